//! What other nodes have on an endpoint: what it was last said to have, less what this node had on
//! it at that time.
//!
//! Connections that this node has lost since then are not taken off: nothing is known of what other
//! nodes have lost, and clients that were told to move are published as gone before they go.

use std::collections::VecDeque;
use std::time::Duration;

use super::PublishedTotal;

/// How far back a node remembers its own connections.
const REMEMBERED: Duration = Duration::from_secs(45);
/// Samples that are closer together replace each other.
const APART: Duration = Duration::from_millis(200);

/// How many connections there were during the last seconds.
///
/// Times are since some start that the caller keeps to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    samples: VecDeque<(Duration, u64)>,
}

impl History {
    /// Takes what there is now.
    pub fn note(&mut self, now: Duration, connections: u64) {
        let before_last = self.samples.len().checked_sub(2);
        if before_last.is_some_and(|index| now < self.samples[index].0 + APART) {
            self.samples.pop_back();
        }
        self.samples.push_back((now, connections));
        // One that is older stays, so that the whole time is covered.
        while self
            .samples
            .get(1)
            .is_some_and(|(at, _)| *at + REMEMBERED <= now)
        {
            self.samples.pop_front();
        }
    }

    /// How many there were: in proportion, between two samples. Before the first: as many as then.
    pub fn at(&self, time: Duration) -> u64 {
        let later = self.samples.partition_point(|(at, _)| *at <= time);
        let after = self.samples.get(later);
        let before = later.checked_sub(1).map(|index| self.samples[index]);
        match (before, after) {
            (Some(before), Some(after)) => between(before, *after, time),
            (Some((_, count)), None) | (None, Some(&(_, count))) => count,
            (None, None) => 0,
        }
    }

    /// What others have on the endpoint on which this node had so many, by what it was said to
    /// have.
    pub fn others(&self, published: PublishedTotal, now: Duration) -> u64 {
        let then = self.at(now.saturating_sub(published.age));
        let last = self.samples.back().map_or(0, |(_, count)| *count);
        published.connections.saturating_sub(then.min(last))
    }
}

/// The count at a time between two samples, rounded to the nearest.
fn between(before: (Duration, u64), after: (Duration, u64), time: Duration) -> u64 {
    let span = after.0.saturating_sub(before.0).as_millis().max(1);
    let passed = time.saturating_sub(before.0).as_millis();
    let share = |count: u64, weight: u128| u128::from(count) * weight;
    let sum = share(before.1, span.saturating_sub(passed)) + share(after.1, passed);
    u64::try_from((sum + span / 2) / span).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn published(connections: u64, age: Duration) -> PublishedTotal {
        PublishedTotal { connections, age }
    }

    #[test]
    fn own_connections_are_those_of_the_time_of_the_count() {
        let mut history = History::default();
        assert_eq!(
            history.others(published(7, ms(500)), ms(1000)),
            7,
            "nothing known"
        );
        for second in 0..100 {
            history.note(ms(second * 1000), second * 10);
        }
        assert_eq!(history.at(ms(98_000)), 980);
        assert_eq!(history.at(ms(98_530)), 985);
        assert_eq!(history.at(ms(120_000)), 990);
        assert_eq!(
            history.others(published(1_200, ms(2_000)), ms(100_000)),
            220
        );
        assert_eq!(history.others(published(3, ms(2_000)), ms(100_000)), 0);
        history.note(ms(99_500), 600);
        assert_eq!(
            history.others(published(1_200, ms(2_000)), ms(100_000)),
            600,
            "what was lost since is not known of others either"
        );
        assert_eq!(history.at(ms(54_000)), 540, "still remembered");
        assert_eq!(history.at(ms(0)), 540, "as the oldest that is remembered");
    }

    proptest! {
        #[test]
        fn it_is_bounded_and_between_what_was_seen(
            steps in prop::collection::vec((0..3_000_u64, 0..1_000_u64), 1..400),
            asked in 0..1_000_000_u64,
        ) {
            let mut history = History::default();
            let (mut now, mut most, mut least) = (0, 0, u64::MAX);
            for (pause, count) in steps {
                now += pause;
                history.note(ms(now), count);
                most = most.max(count);
                least = least.min(count);
                prop_assert_eq!(history.at(ms(now)), count);
                prop_assert!(history.samples.len() <= 2 * 45_000 / 200 + 4);
            }
            prop_assert!((least..=most).contains(&history.at(ms(asked))));
        }
    }
}
