//! A bound on the log: what others can make happen as often as they like must not fill a disk.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata, warn};
use tracing_subscriber::layer::{Context, Filter};

/// The most lines of one kind in a [`WINDOW`]. A kind is a place in the source.
const LINES: u32 = 20;
/// So many lines of all kinds in a [`WINDOW`] are a flood.
const FLOOD: u32 = 60;
/// The most lines of one kind during a flood: what is rare is still told.
const LINES_OF_FLOOD: u32 = 2;
const WINDOW: Duration = Duration::from_secs(60);

/// The target of lines about what root asks for: these are never left out.
pub const BY_HAND: &str = "balancer::daemon::by_hand";

static KINDS: LazyLock<Mutex<Kinds>> = LazyLock::new(Mutex::default);

/// Lets 20 lines of a kind through in a minute, only 2 once there are 60 of all kinds, those of the
/// levels debug and trace and those about what root asks for always: who asks for these wants them
/// all.
#[derive(Clone, Copy, Debug)]
pub struct LogLimit;

impl<S> Filter<S> for LogLimit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let kind = event.metadata();
        let is_unlimited = *kind.level() > Level::INFO || kind.target() == BY_HAND;
        is_unlimited || with_kinds(|kinds| kinds.take(kind, Instant::now()))
    }
}

/// Says how many lines were left out in the minutes that are over.
pub fn report_left_out() {
    let over = with_kinds(|kinds| kinds.end(Instant::now()));
    let cut: Vec<_> = over.iter().filter(|kind| kind.left_out > 0).collect();
    if cut.is_empty() {
        return;
    }
    let sum: u32 = cut.iter().map(|kind| kind.left_out).sum();
    let places = cut.iter().map(|kind| {
        let line = kind.metadata.line().unwrap_or_default();
        let place = kind.metadata.target();
        format!("{} like those of {place} (line {line})", kind.left_out)
    });
    warn!(
        "{sum} more lines were left out within a minute: {}. The log has at most {LINES} of a kind, \
         and {LINES_OF_FLOOD} beside {FLOOD} others",
        places.collect::<Vec<_>>().join(", ")
    );
}

fn with_kinds<T>(work: impl FnOnce(&mut Kinds) -> T) -> T {
    work(&mut KINDS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The lines of one kind in its present window.
#[derive(Clone, Copy, Debug)]
struct Kind {
    metadata: &'static Metadata<'static>,
    since: Instant,
    written: u32,
    left_out: u32,
}

#[derive(Debug, Default)]
struct Kinds {
    by_place: HashMap<Identifier, Kind>,
    /// When the present window of all kinds began; `None`: no line was written yet.
    since: Option<Instant>,
    /// The lines that were written in it.
    written: u32,
}

impl Kinds {
    /// Counts a line; says whether it may be written.
    fn take(&mut self, metadata: &'static Metadata<'static>, now: Instant) -> bool {
        let kind = self.by_place.entry(metadata.callsite()).or_insert(Kind {
            metadata,
            since: now,
            written: 0,
            left_out: 0,
        });
        if self
            .since
            .is_none_or(|since| now.duration_since(since) >= WINDOW)
        {
            (self.since, self.written) = (Some(now), 0);
        }
        let most = if self.written < FLOOD {
            LINES
        } else {
            LINES_OF_FLOOD
        };
        if kind.written >= most {
            kind.left_out = kind.left_out.saturating_add(1);
            return false;
        }
        kind.written += 1;
        self.written += 1;
        true
    }

    /// Takes out the kinds whose window is over.
    fn end(&mut self, now: Instant) -> Vec<Kind> {
        let over = self
            .by_place
            .extract_if(|_, kind| now.duration_since(kind.since) >= WINDOW);
        over.map(|(_, kind)| kind).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::prelude::*;

    fn count(lines: &Mutex<u32>) -> u32 {
        *lines.lock().expect("nobody panics")
    }

    /// A layer that counts the lines that come through.
    struct Counter(&'static Mutex<u32>);

    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Counter {
        fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
            *self.0.lock().expect("nobody panics") += 1;
        }
    }

    #[test]
    fn twenty_lines_of_a_kind_come_through_and_the_rest_are_counted() {
        static LINES_SEEN: Mutex<u32> = Mutex::new(0);
        let layer = Counter(&LINES_SEEN).with_filter(LogLimit);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            for n in 0..500 {
                warn!("refused {n}");
            }
            assert_eq!(count(&LINES_SEEN), LINES);
            warn!("another kind");
            assert_eq!(count(&LINES_SEEN), LINES + 1);
            for _ in 0..250 {
                tracing::debug!("asked for");
                warn!(target: BY_HAND, "asked for");
            }
            assert_eq!(count(&LINES_SEEN), LINES + 501);
            let end = Instant::now() + WINDOW;
            let over = with_kinds(|kinds| kinds.end(end));
            assert!(over.iter().any(|kind| kind.left_out == 480), "{over:?}");
            warn!("refused again");
            assert_eq!(count(&LINES_SEEN), LINES + 502);
        });
    }

    /// A layer with a bound of its own: that of the process is shared by its tests.
    struct Own(&'static Mutex<Kinds>, &'static Mutex<u32>);

    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Own {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut kinds = self.0.lock().expect("nobody panics");
            let written = kinds.take(event.metadata(), Instant::now());
            *self.1.lock().expect("nobody panics") += u32::from(written);
        }
    }

    macro_rules! each_of_a_kind_of_its_own {
        ($($number:literal)*) => {
            $(for _ in 0..30 { warn!("kind {}", $number); })*
        };
    }

    #[test]
    fn of_many_kinds_each_is_told_and_there_are_fewer_than_a_hundred_lines() {
        static LINES_SEEN: Mutex<u32> = Mutex::new(0);
        static KINDS: LazyLock<Mutex<Kinds>> = LazyLock::new(Mutex::default);
        let own = Own(&KINDS, &LINES_SEEN);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(own), || {
            each_of_a_kind_of_its_own!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20);
        });
        // Three of 20 lines, and 17 of 2.
        assert_eq!(count(&LINES_SEEN), 94);
    }
}
