//! A bound on the log: what others can make happen as often as they like must not fill a disk.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata, warn};
use tracing_subscriber::layer::{Context, Filter};

/// The most lines of one kind in a [`WINDOW`]. A kind is a place in the source.
const LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);

/// The target of lines about what root asks for: these are never left out.
pub const BY_HAND: &str = "balancer::daemon::by_hand";

static KINDS: LazyLock<Mutex<Kinds>> = LazyLock::new(Mutex::default);

/// Lets 20 lines of a kind through in a minute, those of the levels debug and trace and those about
/// what root asks for always: who asks for these wants them all.
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
    for Kind { metadata, seen, .. } in with_kinds(|kinds| kinds.end(Instant::now())) {
        let left_out = seen.saturating_sub(LINES);
        if left_out > 0 {
            let line = metadata.line().unwrap_or_default();
            warn!(
                "{left_out} more lines like those of {} (line {line}) were left out within a \
                 minute: the log has at most {LINES} of a kind",
                metadata.target()
            );
        }
    }
}

fn with_kinds<T>(work: impl FnOnce(&mut Kinds) -> T) -> T {
    work(&mut KINDS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The lines of one kind in its present window.
#[derive(Clone, Copy, Debug)]
struct Kind {
    metadata: &'static Metadata<'static>,
    since: Instant,
    seen: u32,
}

#[derive(Debug, Default)]
struct Kinds(HashMap<Identifier, Kind>);

impl Kinds {
    /// Counts a line; says whether it may be written.
    fn take(&mut self, metadata: &'static Metadata<'static>, now: Instant) -> bool {
        let kind = self.0.entry(metadata.callsite()).or_insert(Kind {
            metadata,
            since: now,
            seen: 0,
        });
        kind.seen = kind.seen.saturating_add(1);
        kind.seen <= LINES
    }

    /// Takes out the kinds whose window is over.
    fn end(&mut self, now: Instant) -> Vec<Kind> {
        let over = self
            .0
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
            assert!(over.iter().any(|kind| kind.seen == 500), "{over:?}");
            warn!("refused again");
            assert_eq!(count(&LINES_SEEN), LINES + 502);
        });
    }
}
