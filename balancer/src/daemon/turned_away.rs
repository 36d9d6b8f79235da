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
        self.is_due_at(writer.tables.turned_away(), Instant::now())
    }

    /// As [`Self::is_due`], where there have been so many at that time.
    fn is_due_at(&mut self, total: u64, now: Instant) -> bool {
        let number = total.wrapping_sub(self.seen);
        if number != 0 {
            self.seen = total;
            self.rose = Some(now);
            self.tell(number, now);
        }
        is_within(self.rose, LOOK_FOR, now) && !is_within(self.looked, LOOK_EVERY, now)
    }

    fn tell(&mut self, number: u64, now: Instant) {
        if !is_within(self.told, TELL_EVERY, now) {
            self.told = Some(now);
            warn!(
                "{number} listeners on ports of services got no slot: nobody has confirmed their \
                 network namespaces, and there are too many of them. Those that belong to a \
                 service are looked for; the others are not counted"
            );
        }
    }

    /// Notes that everything is looked at now. What was before the daemon is nothing to tell of.
    pub fn look(&mut self, writer: &Writer) {
        self.look_at(writer.tables.turned_away(), Instant::now());
    }

    /// As [`Self::look`], where there have been so many at that time.
    const fn look_at(&mut self, total: u64, now: Instant) {
        if self.looked.is_none() {
            self.seen = total;
        }
        self.looked = Some(now);
    }
}

fn is_within(since: Option<Instant>, duration: Duration, now: Instant) -> bool {
    since.is_some_and(|since| now.duration_since(since) < duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_looked_for_every_ten_seconds_until_a_minute_after_the_last() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut turned_away = TurnedAway::default();
        // Those before the daemon are looked at by its first audit.
        turned_away.look_at(500, at(0));
        assert!(!turned_away.is_due_at(500, at(20)), "none has come");
        assert!(turned_away.is_due_at(501, at(21)), "at once");
        turned_away.look_at(501, at(21));
        assert!(!turned_away.is_due_at(502, at(30)), "too soon");
        assert!(turned_away.is_due_at(502, at(31)));
        let mut looks = 0;
        for second in 31..200 {
            if turned_away.is_due_at(502, at(second)) {
                turned_away.look_at(502, at(second));
                looks += 1;
            }
        }
        assert_eq!(looks, 6, "the last came at second 30");
    }

    #[test]
    fn the_log_tells_of_them_every_ten_minutes_and_not_of_those_before_the_daemon() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut turned_away = TurnedAway::default();
        turned_away.look_at(u64::MAX, at(0));
        turned_away.is_due_at(u64::MAX, at(0));
        assert_eq!(turned_away.told, None);
        // The number wraps around.
        for second in 0..1_300 {
            turned_away.is_due_at(second, at(second));
            let expected = at(second / 600 * 600);
            assert_eq!(turned_away.told, Some(expected), "second {second}");
        }
    }
}
