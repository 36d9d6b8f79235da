//! Listeners of network namespaces that nobody named, which the kernel half gave no slot because
//! there were too many of them.

use std::time::{Duration, Instant};

use tracing::warn;

use crate::dataplane::Writer;

/// They are looked for everywhere only so often: that takes a look at every thread.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// They are looked for so long: a pod may listen before the API server tells of it.
const LOOK_FOR: Duration = Duration::from_secs(60);
/// The log tells of them only so often.
const TELL_EVERY: Duration = Duration::from_secs(600);

/// What is known of them.
#[derive(Debug, Default)]
pub struct TurnedAway {
    /// How many there had been when the number was read last.
    seen: u64,
    /// When it was seen to have risen.
    rose: Option<Instant>,
    /// When the last look was.
    looked: Option<Instant>,
    /// When the log told of them.
    told: Option<Instant>,
}

impl TurnedAway {
    /// Whether to look everywhere for those of them that belong to somebody.
    pub fn is_due(&mut self, writer: &Writer) -> bool {
        let now = writer.tables.turned_away();
        let number = now.wrapping_sub(self.seen);
        if number != 0 {
            self.seen = now;
            self.rose = Some(Instant::now());
            self.tell(number);
        }
        is_within(self.rose, LOOK_FOR) && !is_within(self.looked, LOOK_EVERY)
    }

    fn tell(&mut self, number: u64) {
        if !is_within(self.told, TELL_EVERY) {
            self.told = Some(Instant::now());
            warn!(
                "{number} listeners on ports of services got no slot: nobody has confirmed their \
                 network namespaces, and there are too many of them. Those that belong to a \
                 service are looked for; the others are not counted"
            );
        }
    }

    /// Notes that everything is looked at now. What was before the daemon is nothing to tell of.
    pub fn look(&mut self, writer: &Writer) {
        if self.looked.is_none() {
            self.seen = writer.tables.turned_away();
        }
        self.looked = Some(Instant::now());
    }
}

fn is_within(since: Option<Instant>, duration: Duration) -> bool {
    since.is_some_and(|since| since.elapsed() < duration)
}
