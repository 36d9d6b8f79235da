//! Health, by what the data plane sees anyway: no traffic of its own, and nothing for each packet.

use crate::abi::{BESIDE, Breaker, Health, beside, lasts, stamped, tick_of, ticks_of_ms};

/// How long connections may wait in an accept queue out of which none is taken, in ticks.
pub const STALLED_FOR: u64 = ticks_of_ms(2_000);
/// How long the word of a look at an accept queue counts, in ticks: longer than the daemon takes
/// from look to look.
const STALLED_LASTS: u64 = ticks_of_ms(3_000);
/// How much of that is left when the choice looks at it again, in ticks.
const STALLED_UNSEEN: u64 = STALLED_LASTS - ticks_of_ms(250);

/// So many failed connections are several.
const SEVERAL: u64 = 4;
/// How soon a connection must end to have failed, in ticks.
pub const FAILS_WITHIN: u64 = ticks_of_ms(1_000);
/// How long the breaker stays open the first time, in ticks; twice as long each time after.
const OPEN_FIRST: u64 = ticks_of_ms(1_000);
/// How long it stays open at most, in ticks.
const OPEN_LONGEST: u64 = ticks_of_ms(30_000);
/// Times after which it stays open for longest.
const MOST_TIMES: u64 = 6;
/// How long the SYN of a trial may take to become a connection, in ticks: it may be sent again.
const TRIAL_ARRIVES_WITHIN: u64 = ticks_of_ms(3_000);
/// How long a trial must live, in ticks: longer than a connection that fails.
const TRIAL_PROVES_WITHIN: u64 = ticks_of_ms(1_200);
/// How long what one backend did says that others of its service are like that, in ticks.
const ALIKE_FOR: u64 = ticks_of_ms(60_000);
/// How long after it has closed the breaker remembers how often it had opened, in ticks.
const REMEMBERS_FOR: u64 = ticks_of_ms(60_000);

/// A look at an accept queue: the words `queue` and `stalled` after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLook {
    /// `Health::queue`.
    pub queue: u64,
    /// `Health::stalled`.
    pub stalled: u64,
}

/// Looks at an accept queue. `queue` is the word of the look before, `entered` is
/// `Totals::entered`, read before `waiting`, the length of the accept queue (`sk_ack_backlog`).
///
/// Accepted ever is what entered ever without what waits. A backend is stalled where that has not
/// changed for [`STALLED_FOR`] and the queue was empty at none of the looks: a connection waits
/// for as long.
#[inline(always)]
pub const fn look_at_queue(queue: u64, entered: u64, waiting: u32, now: u64) -> QueueLook {
    if waiting == 0 {
        return QueueLook {
            queue: 0,
            stalled: 0,
        };
    }
    let accepted = beside(entered.wrapping_sub(waiting as u64));
    if queue == 0 || accepted != beside(queue) {
        return QueueLook {
            queue: stamped(now, accepted),
            stalled: 0,
        };
    }
    let stalled = if lasts(tick_of(queue), STALLED_FOR, now) {
        0
    } else {
        now + STALLED_LASTS
    };
    QueueLook { queue, stalled }
}

impl Health {
    /// 1 where the choice avoids it, else 0. One that was last seen stalled a while ago is looked
    /// at again, and not given a SYN if it still is: so it is back as soon as it accepts. With SYN
    /// cookies a trial is not avoided: its ACK must find the listener of its SYN. Without a branch,
    /// after which the verifier would follow both ways.
    #[inline(always)]
    pub const fn is_avoided(&self, cookies: bool, now: u64) -> u64 {
        const { assert!(Breaker::Trial as u8 == 2 && Breaker::Proving as u8 == 3) };
        let is_half_open = self.failing >> 1 & 1;
        let fails = is_before(now, tick_of(self.failing)) & !(is_half_open & cookies as u64);
        fails | is_before(now + STALLED_UNSEEN, self.stalled) | is_before(now, self.hung)
    }
}

/// 1 where one tick is before the other, else 0; without a branch.
#[inline(always)]
const fn is_before(tick: u64, other: u64) -> u64 {
    tick.wrapping_sub(other) >> 63
}

/// How a connection left ESTABLISHED.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// The state that it went to (`include/net/tcp_states.h`).
    pub state: u32,
    /// `sk_err`.
    pub error: u32,
    /// `sk_shutdown`.
    pub shutdown: u8,
    /// Bytes that the server has sent.
    pub sent: u64,
    /// Bytes that it was sent.
    pub received: u64,
    /// For how many ticks it was established.
    pub age: u64,
}

impl Ending {
    const FIN_WAIT1: u32 = 4;
    const CLOSE: u32 = 7;
    /// Both directions: the server has closed it.
    const SHUT_BOTH: u8 = 3;

    /// Whether that says that the server fails: it ended the connection first, soon after its
    /// beginning, and has sent no more than it was sent. Health checkers and port scans end theirs
    /// themselves; a server of one answer for each connection has sent that.
    #[inline(always)]
    pub const fn is_failure(&self) -> bool {
        self.is_by_server() && self.sent <= self.received && self.age < FAILS_WITHIN
    }

    /// Whether the server sent something before. Some servers are like that: a failure counts only
    /// where no other of the service does it ([`is_alone`]).
    #[inline(always)]
    pub const fn has_spoken(&self) -> bool {
        self.sent != 0
    }

    /// Whether the server ended it: it closed first, or closed and left bytes unread. Not the
    /// client's FIN or RST, a time-out, `SOCK_DESTROY`, or a listener that closed over it.
    #[inline(always)]
    const fn is_by_server(&self) -> bool {
        self.state == Self::FIN_WAIT1
            || self.state == Self::CLOSE && self.error == 0 && self.shutdown == Self::SHUT_BOTH
    }
}

/// The word `ServiceState::spoke` after a backend of the service has failed though it had sent
/// something.
#[inline(always)]
pub const fn pack_spoke(slot: u32, now: u64) -> u64 {
    stamped(now, slot as u64)
}

/// Whether no other backend of the service has done so of late.
#[inline(always)]
pub const fn is_alone(word: u64, slot: u32, now: u64) -> bool {
    word == 0 || beside(word) == slot as u64 || !lasts(tick_of(word), ALIKE_FOR, now)
}

/// Bits of the number of failures in the word `failures`.
const FAILURES: u32 = 6;
/// The most that it holds.
const MOST_FAILURES: u64 = (1 << FAILURES) - 1;
/// What the word keeps of the connections entered ever.
const ENTERED: u64 = (1 << (BESIDE - FAILURES)) - 1;

/// The word `failures` after one more, `entered` being `Totals::entered`. A run begins anew where
/// most of those that came since its beginning have had time to fail and did not.
#[inline(always)]
const fn count_failure(word: u64, entered: u64, now: u64) -> u64 {
    let others = entered_since(word, entered).saturating_sub(failures(word));
    let is_over = others > failures(word) && !lasts(tick_of(word), FAILS_WITHIN, now);
    if word == 0 || is_over {
        let before = entered.wrapping_sub(1) & ENTERED;
        return stamped(now, before << FAILURES | 1);
    }
    if failures(word) == MOST_FAILURES {
        return word;
    }
    word + 1
}

/// Whether several have failed, and no fewer than half of those that came since the first.
#[inline(always)]
const fn several_fail(word: u64, entered: u64) -> bool {
    failures(word) >= SEVERAL && entered_since(word, entered) <= 2 * failures(word)
}

#[inline(always)]
const fn failures(word: u64) -> u64 {
    beside(word) & MOST_FAILURES
}

#[inline(always)]
const fn entered_since(word: u64, entered: u64) -> u64 {
    entered.wrapping_sub(beside(word) >> FAILURES) & ENTERED
}

/// How often the breaker has opened of late, by the word `failing`.
#[inline(always)]
const fn times(word: u64) -> u64 {
    beside(word) >> 2 & 0xf
}

#[inline(always)]
const fn pack_breaker(breaker: Breaker, times: u64, tick: u64) -> u64 {
    stamped(tick, times << 2 | breaker as u64)
}

/// The word `failing` when the breaker opens, for longer each time.
#[inline(always)]
pub const fn pack_open(word: u64, now: u64) -> u64 {
    let is_closed = matches!(Breaker::of(word), Breaker::Closed);
    let before = if is_closed && !lasts(tick_of(word), REMEMBERS_FOR, now) {
        0
    } else {
        times(word)
    };
    let times = if before < MOST_TIMES {
        before + 1
    } else {
        MOST_TIMES
    };
    let longer = OPEN_FIRST << (times - 1);
    let open_for = if times == MOST_TIMES {
        OPEN_LONGEST
    } else {
        longer
    };
    pack_breaker(Breaker::Open, times, now + open_for)
}

/// The word `failing` when a SYN is sent there. The SYN is a trial where the breaker was open, and
/// the trial before has proved itself where nothing has failed since.
#[inline(always)]
pub const fn pack_sent(word: u64, now: u64) -> u64 {
    if now < tick_of(word) {
        return word;
    }
    match Breaker::of(word) {
        Breaker::Closed => word,
        Breaker::Open | Breaker::Trial => {
            pack_breaker(Breaker::Trial, times(word), now + TRIAL_ARRIVES_WITHIN)
        }
        Breaker::Proving => pack_breaker(Breaker::Closed, times(word), now),
    }
}

/// The word `failing` when a connection is established there. `None`: leave it as it is.
#[inline(always)]
pub const fn pack_entered(word: u64, now: u64) -> Option<u64> {
    match Breaker::of(word) {
        Breaker::Trial => Some(pack_breaker(
            Breaker::Proving,
            times(word),
            now + TRIAL_PROVES_WITHIN,
        )),
        _ => None,
    }
}

/// What a failed connection leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The breaker opens.
    Opens,
    /// It is counted, in this word `failures`.
    Counts(u64),
    /// The breaker is open already: it was sent before, or as a last resort.
    Late,
}

/// What a connection that has failed leads to; `entered` is `Totals::entered`.
#[inline(always)]
pub const fn after_failure(health: &Health, entered: u64, now: u64) -> Failed {
    match health.breaker() {
        Breaker::Open => Failed::Late,
        Breaker::Trial | Breaker::Proving => Failed::Opens,
        Breaker::Closed => {
            let word = count_failure(health.failures, entered, now);
            if several_fail(word, entered) {
                Failed::Opens
            } else {
                Failed::Counts(word)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    const SECOND: u64 = ticks_of_ms(1_000);
    const NOW: u64 = 50_000;

    /// A server whose accept queue is looked at.
    struct Server {
        entered: u64,
        waiting: u32,
        look: QueueLook,
    }

    impl Server {
        const IDLE: Self = Self {
            entered: 77,
            waiting: 0,
            look: QueueLook {
                queue: 0,
                stalled: 0,
            },
        };

        fn arrives(&mut self) {
            self.entered += 1;
            self.waiting += 1;
        }

        /// Whether a look finds it stalled.
        fn is_stalled(&mut self, now: u64) -> bool {
            self.look = look_at_queue(self.look.queue, self.entered, self.waiting, now);
            self.look.stalled > now
        }
    }

    #[test]
    fn a_server_that_accepts_nothing_is_stalled_after_two_seconds_until_it_accepts_one() {
        let mut server = Server::IDLE;
        assert!(!server.is_stalled(NOW));
        server.arrives();
        assert!(!server.is_stalled(NOW + 10));
        server.arrives();
        assert!(!server.is_stalled(NOW + 10 + STALLED_FOR));
        server.arrives();
        assert!(server.is_stalled(NOW + 11 + STALLED_FOR), "whoever comes");
        assert!(server.is_stalled(NOW + 60 * SECOND));
        server.waiting -= 1;
        assert!(!server.is_stalled(NOW + 61 * SECOND), "it accepts again");
        assert_eq!(server.look.stalled, 0);
    }

    proptest! {
        /// However long nobody has looked, and whatever waited then.
        #[test]
        fn a_server_that_accepts_is_never_stalled(
            steps in prop::collection::vec((0..4_u32, 1..4_u32, 0..10 * SECOND), 1..100),
        ) {
            let (mut server, mut now) = (Server::IDLE, NOW);
            for (arrive, accept, pause) in steps {
                for _ in 0..arrive {
                    server.arrives();
                }
                prop_assert!(!server.is_stalled(now));
                server.waiting = server.waiting.saturating_sub(accept);
                now += pause;
            }
        }

        /// A pause of 3 s, as a garbage collection makes: at most its last second.
        #[test]
        fn a_pause_is_a_stall_only_after_two_seconds(waited in 0..3 * SECOND, look in 1..SECOND) {
            let mut server = Server::IDLE;
            server.arrives();
            let mut now = NOW;
            while now <= NOW + waited {
                prop_assert!(!server.is_stalled(now) || now > NOW + STALLED_FOR);
                now += look;
            }
            server.waiting = 0;
            prop_assert!(!server.is_stalled(now));
        }

        #[test]
        fn no_word_panics(word: u64, entered: u64, waiting: u32, now in 0..1_u64 << 43) {
            look_at_queue(word, entered, waiting, now);
            let health = Health { failures: word, failing: entered, ..Health::UNKNOWN };
            after_failure(&health, entered, now);
            pack_sent(word, now);
            pack_entered(word, now);
            let opened = pack_open(word, now);
            prop_assert_eq!(Breaker::of(opened), Breaker::Open);
            prop_assert!((OPEN_FIRST..=OPEN_LONGEST).contains(&(tick_of(opened) - now)));
        }
    }

    /// Each way that a connection can end: state, `sk_err`, `sk_shutdown`.
    #[test]
    fn only_what_the_server_ends_at_once_and_without_a_word_is_a_failure() {
        let ending = |(state, error, shutdown)| Ending {
            state,
            error,
            shutdown,
            sent: 0,
            received: 40,
            age: FAILS_WITHIN - 1,
        };
        // It closed, and had read all; had not; was killed.
        let by_server = [(4, 0, 2), (4, 0, 3), (7, 0, 3)];
        // The client's FIN; its RST; a time-out; no route; SOCK_DESTROY; never accepted.
        let others = [
            (8, 0, 1),
            (7, 104, 3),
            (7, 110, 3),
            (7, 113, 3),
            (7, 103, 3),
            (7, 0, 0),
        ];
        assert!(by_server.iter().all(|end| ending(*end).is_failure()));
        assert!(!others.iter().any(|end| ending(*end).is_failure()));
        for end in by_server {
            let failed = ending(end);
            let has_lived = Ending {
                age: FAILS_WITHIN,
                ..failed
            };
            let has_answered = Ending { sent: 41, ..failed };
            assert!(!has_lived.is_failure() && !has_answered.is_failure());
            let has_greeted = Ending { sent: 40, ..failed };
            assert!(has_greeted.is_failure() && has_greeted.has_spoken() && !failed.has_spoken());
        }
    }

    #[test]
    fn what_several_servers_of_a_service_do_is_held_against_none() {
        let word = pack_spoke(7, NOW);
        assert!(is_alone(0, 7, NOW) && is_alone(word, 7, NOW));
        assert!(!is_alone(word, 8, NOW) && !is_alone(word, 8, NOW + ALIKE_FOR));
        assert!(is_alone(word, 8, NOW + ALIKE_FOR + 1));
    }

    /// A backend's counters, and what its connections do to them.
    struct Backend {
        health: Health,
        entered: u64,
        now: u64,
    }

    impl Backend {
        const NEW: Self = Self {
            health: Health::UNKNOWN,
            entered: 1 << 20,
            now: NOW,
        };

        fn is_avoided(&self) -> bool {
            tick_of(self.health.failing) > self.now
        }

        fn is_open(&self) -> bool {
            self.health.breaker() == Breaker::Open && self.is_avoided()
        }

        /// A connection comes, and fails or not.
        fn connect(&mut self, fails: bool) {
            self.health.failing = pack_sent(self.health.failing, self.now);
            self.entered += 1;
            if let Some(word) = pack_entered(self.health.failing, self.now) {
                self.health.failing = word;
            }
            if fails {
                self.fail();
            }
        }

        fn fail(&mut self) {
            match after_failure(&self.health, self.entered, self.now) {
                Failed::Opens => {
                    self.health.failing = pack_open(self.health.failing, self.now);
                    self.health.failures = 0;
                }
                Failed::Counts(word) => self.health.failures = word,
                Failed::Late => {}
            }
        }

        /// Connections come until the breaker opens; how many there were.
        fn failures_until_open(&mut self) -> u32 {
            let mut failures = 0;
            while !self.is_open() {
                self.connect(true);
                failures += 1;
            }
            failures
        }
    }

    #[test]
    fn a_server_that_fails_gets_one_trial_after_twice_as_long_each_time() {
        let mut backend = Backend::NEW;
        assert_eq!(backend.failures_until_open(), 4);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let end = tick_of(backend.health.failing);
            assert!((end - backend.now).abs_diff(seconds * SECOND) < 30);
            backend.fail();
            assert_eq!(tick_of(backend.health.failing), end, "sent before");
            backend.now = end;
            assert!(!backend.is_avoided());
            assert_eq!(backend.failures_until_open(), 1, "one trial");
        }
    }

    #[test]
    fn nobody_follows_the_trial_until_it_has_lived() {
        let mut backend = Backend::NEW;
        backend.failures_until_open();
        backend.now = tick_of(backend.health.failing);
        let sent = pack_sent(backend.health.failing, backend.now);
        backend.health.failing = sent;
        assert!(backend.is_avoided(), "its SYN is on its way");
        assert_eq!(pack_sent(sent, backend.now), sent);
        let again = pack_sent(sent, tick_of(sent));
        assert_eq!(Breaker::of(again), Breaker::Trial, "it got lost");
        backend.health.failing = pack_entered(sent, backend.now).unwrap();
        assert!(backend.is_avoided(), "it is established");
        backend.now += TRIAL_PROVES_WITHIN;
        assert!(!backend.is_avoided());
        backend.connect(false);
        assert_eq!(backend.health.breaker(), Breaker::Closed);
        assert!(!backend.is_avoided());
        // It remembers for a minute that it had been open.
        let opened = |after| pack_open(backend.health.failing, backend.now + after);
        assert_eq!(tick_of(opened(0)) - backend.now, 2 * OPEN_FIRST);
        let later = REMEMBERS_FOR + 1;
        assert_eq!(tick_of(opened(later)) - backend.now - later, OPEN_FIRST);
    }

    /// Some clients are thrown out by a server that serves all others.
    #[test]
    fn a_server_that_serves_most_is_not_failing() {
        for (served, spacing) in [(2, 0), (2, 10), (3, 500), (20, 1), (500, 100)] {
            let mut backend = Backend::NEW;
            for _ in 0..200 {
                backend.connect(true);
                for _ in 0..served {
                    backend.now += spacing;
                    backend.connect(false);
                }
                assert!(!backend.is_open(), "{served} served, {spacing} apart");
            }
        }
    }

    /// Each connection lives for a while before it fails, and others come meanwhile.
    #[test]
    fn a_server_that_fails_late_is_found_out_as_well() {
        for (live, apart) in [(100, 1), (100, 10), (900, 10), (900, 100)] {
            let mut backend = Backend::NEW;
            let mut lives: Vec<u64> = Vec::new();
            let mut came = 0;
            while !backend.is_open() {
                backend.connect(false);
                came += 1;
                lives.push(backend.now + live);
                backend.now += apart;
                while lives.first().is_some_and(|end| *end <= backend.now) {
                    lives.remove(0);
                    backend.fail();
                }
                assert!(came < 4 + 3 * live / apart, "{live} ms, {apart} ms apart");
            }
        }
    }

    /// As many as there may be at once, which all fail, in any order.
    #[test]
    fn a_burst_that_fails_is_found_out() {
        for burst in [4, 60, 300, 5_000, 20_000] {
            let mut backend = Backend::NEW;
            for _ in 0..burst {
                backend.connect(false);
            }
            for _ in 0..burst {
                backend.fail();
            }
            backend.now += 2 * SECOND;
            let more = backend.failures_until_open();
            assert!(more <= 4, "{burst}: {more}");
        }
    }
}
