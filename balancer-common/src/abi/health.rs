//! What is seen of a backend's health.

use super::ticks::{beside, tick_of};

/// Whether a backend serves, as far as the data plane sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HealthState {
    /// Nothing speaks against it.
    Serving,
    /// Connections wait in its accept queue, and it has accepted none for two seconds.
    Stalled,
    /// It does not read what its connections have received.
    Hung,
    /// It ends its connections as soon as they begin. Needs room for one connection, the trial,
    /// without which it stays so.
    Failing,
}

impl HealthState {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Serving, Self::Stalled, Self::Hung, Self::Failing];

    /// The word in JSON, tables and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Stalled => "stalled",
            Self::Hung => "hung",
            Self::Failing => "failing",
        }
    }
}

/// Where the circuit breaker of a backend stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Breaker {
    /// Closed: it gets connections.
    Closed = 0,
    /// Open: it gets none until a tick. From then on the next SYN that chooses it is the trial.
    Open = 1,
    /// Half-open: the trial's SYN was sent to it. No other follows until a tick; then one may be
    /// sent again.
    Trial = 2,
    /// Half-open: the trial is established. If it has not failed by a tick, the breaker closes.
    Proving = 3,
}

impl Breaker {
    /// Where it stands by the word `Health::failing`.
    #[inline(always)]
    pub const fn of(word: u64) -> Self {
        match beside(word) & 3 {
            0 => Self::Closed,
            1 => Self::Open,
            2 => Self::Trial,
            _ => Self::Proving,
        }
    }
}

/// Value of HEALTH: what is seen of a slot's health, each word atomic. [`decision::health`] has the
/// rules.
///
/// [`decision::health`]: crate::decision::health
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Health {
    /// The mark of the accept queue: connections accepted ever (20 bits) | tick since when that has
    /// not changed << 20; 0: the queue was empty. Written by both halves at each look.
    pub queue: u64,
    /// Tick until which it counts as stalled. Written by both halves at each look.
    pub stalled: u64,
    /// A run of failed connections: how many (6 bits) | connections entered ever when it began
    /// (14 bits) << 6 | tick of the first << 20; 0: none. Written by the kernel half.
    pub failures: u64,
    /// [`Breaker`] (2 bits) | how often it has opened of late (4 bits) << 2 | the breaker's tick
    /// << 20. Written by the kernel half.
    pub failing: u64,
    /// Tick when the breaker first opened. Written by the kernel half.
    pub failing_since: u64,
    /// Tick until which it counts as hung. Written by the daemon alone.
    pub hung: u64,
    /// Tick since when it is hung. Written by the daemon alone.
    pub hung_since: u64,
    /// Always 0: fills the cache line.
    pub zero: u64,
}

impl Health {
    /// Nothing was seen.
    pub const UNKNOWN: Self = Self {
        queue: 0,
        stalled: 0,
        failures: 0,
        failing: 0,
        failing_since: 0,
        hung: 0,
        hung_since: 0,
        zero: 0,
    };

    /// Where the breaker stands.
    #[inline(always)]
    pub const fn breaker(&self) -> Breaker {
        Breaker::of(self.failing)
    }

    /// The backend's state. Several may hold: the one that says most is given.
    pub const fn state(&self, now: u64) -> HealthState {
        let fails = match self.breaker() {
            Breaker::Closed => false,
            Breaker::Open | Breaker::Trial => true,
            Breaker::Proving => now < tick_of(self.failing),
        };
        if fails {
            HealthState::Failing
        } else if now < self.hung {
            HealthState::Hung
        } else if now < self.stalled {
            HealthState::Stalled
        } else {
            HealthState::Serving
        }
    }

    /// Whether a connection may try whether it still fails.
    pub const fn wants_trial(&self, now: u64) -> bool {
        matches!(self.breaker(), Breaker::Open | Breaker::Trial) && now >= tick_of(self.failing)
    }

    /// Tick since when it is in that state; `None` while it serves.
    pub const fn since(&self, now: u64) -> Option<u64> {
        match self.state(now) {
            HealthState::Serving => None,
            HealthState::Stalled => Some(tick_of(self.queue)),
            HealthState::Hung => Some(self.hung_since),
            HealthState::Failing => Some(self.failing_since),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::stamped;

    #[test]
    fn each_state_has_its_words_and_its_time() {
        let seen = Health {
            queue: stamped(70, 5),
            stalled: 100,
            hung: 200,
            hung_since: 90,
            failing: stamped(300, Breaker::Proving as u64),
            failing_since: 80,
            ..Health::UNKNOWN
        };
        let at = |health: &Health, now| (health.state(now), health.since(now));
        assert_eq!(at(&seen, 99), (HealthState::Failing, Some(80)));
        assert!(!seen.wants_trial(400), "it is under way");
        let proved = Health {
            failing: stamped(90, Breaker::Proving as u64),
            ..seen
        };
        assert_eq!(at(&proved, 99), (HealthState::Hung, Some(90)));
        let reads = Health { hung: 0, ..proved };
        assert_eq!(at(&reads, 99), (HealthState::Stalled, Some(70)));
        assert_eq!(at(&reads, 100), (HealthState::Serving, None));
        assert_eq!(at(&Health::UNKNOWN, 0), (HealthState::Serving, None));
        for breaker in [Breaker::Open, Breaker::Trial] {
            let failing = stamped(90, breaker as u64);
            let waits = Health { failing, ..reads };
            assert_eq!(waits.breaker(), breaker);
            assert_eq!(
                waits.state(5_000),
                HealthState::Failing,
                "until it is tried"
            );
            assert!(!waits.wants_trial(89) && waits.wants_trial(90));
        }
    }
}
