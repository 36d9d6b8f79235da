//! One attempt at one backend: how its socket is judged, and what that leaves in its counters.

use crate::abi::{BackendState, Cookies, Health};
use crate::decision::admission::{
    Judgement, Observation, judge, pack_cookies, pack_expected, pack_flood, pack_full, pack_over,
};
use crate::decision::health::{look_at_queue, pack_sent};
use crate::decision::member::Member;
use crate::decision::scan::Scan;

/// How one attempt at a backend ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The SYN is its.
    Assigned,
    /// Another CPU sent a SYN there since the scan: the choice must be made anew.
    Raced,
    /// SYN cookies are in use, which the scan did not know: the choice must be made anew, by
    /// four-tuple.
    Cookies,
    /// It was looked at and can't take it.
    Judged(Judgement),
    /// It does not listen any more.
    Gone,
    /// The kernel refused the assignment.
    Failed,
    /// Another `sk_lookup` program has chosen a socket.
    Foreign,
}

impl Attempt {
    /// Packed into one word, for a call between kernel functions, which return no structures.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        match self {
            Self::Assigned => 0,
            Self::Raced => 1,
            Self::Cookies => 2,
            Self::Gone => 3,
            Self::Failed => 4,
            Self::Foreign => 5,
            Self::Judged(Judgement::OverQuota) => 6,
            Self::Judged(Judgement::QueueFull { since }) => 7 | since << KIND,
            Self::Judged(Judgement::Take) => 8,
            Self::Judged(Judgement::Stalled) => 9,
        }
    }

    /// The attempt of a word; an unknown one failed.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        match word as u8 {
            0 => Self::Assigned,
            1 => Self::Raced,
            2 => Self::Cookies,
            3 => Self::Gone,
            5 => Self::Foreign,
            6 => Self::Judged(Judgement::OverQuota),
            7 => Self::Judged(Judgement::QueueFull {
                since: word >> KIND,
            }),
            8 => Self::Judged(Judgement::Take),
            9 => Self::Judged(Judgement::Stalled),
            _ => Self::Failed,
        }
    }
}

/// Bits of an attempt's word that say how it ended.
const KIND: u32 = 8;

/// How a backend is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Give way to another CPU that has sent a SYN to the backend since it was chosen.
    pub yielding: bool,
    /// Ask whether it has room. Otherwise it has the SYN, whatever its quota and its accept queue
    /// say.
    pub judging: bool,
}

/// What a look at a backend leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// [`Attempt::Assigned`]: the SYN is to be assigned to it once the words are written.
    pub attempt: Attempt,
    /// What the look leaves in its counters.
    pub writes: Writes,
}

/// A word that none is: it leaves a word as it is. No `Option`, of whose absent value the compiler
/// keeps bytes that nobody has written: Linux 6.1 refuses a program that reads such.
pub const LEAVE: u64 = u64::MAX;

/// New words of a backend's `Counts`, each of which may be [`LEAVE`], and of its [`Health`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writes {
    /// `Counts::cookies`.
    pub cookies: u64,
    /// `Counts::full`.
    pub full: u64,
    /// `Counts::flood`, only in place of the word that was judged by: a handshake that completes
    /// on another CPU takes it back.
    pub flood: u64,
    /// `Counts::expected`.
    pub expected: u64,
    /// The word in place of which alone `expected` is written: another one there means that another
    /// CPU was faster, and the attempt has [`Attempt::Raced`]. [`LEAVE`]: in place of any.
    pub instead_of: u64,
    /// `Health::queue`.
    pub queue: u64,
    /// `Health::stalled`.
    pub stalled: u64,
    /// `Health::failing`, another one where the SYN is a trial or shows that the last one lives:
    /// only in place of the word that was judged by, or the attempt has [`Attempt::Raced`].
    pub failing: u64,
}

impl Writes {
    /// Nothing else than what stands there.
    #[inline(always)]
    const fn none(health: &Health) -> Self {
        Self {
            cookies: LEAVE,
            full: LEAVE,
            flood: LEAVE,
            expected: LEAVE,
            instead_of: LEAVE,
            queue: health.queue,
            stalled: health.stalled,
            failing: health.failing,
        }
    }

    /// Writes the words to a member that nobody else changes.
    pub const fn apply(&self, member: &mut Member) {
        let (counts, health) = (&mut member.counts, &mut member.health);
        if self.cookies != LEAVE {
            counts.cookies = self.cookies;
        }
        if self.full != LEAVE {
            counts.full = self.full;
        }
        if self.flood != LEAVE {
            counts.flood = self.flood;
        }
        if self.expected != LEAVE {
            counts.expected = self.expected;
        }
        health.queue = self.queue;
        health.stalled = self.stalled;
        health.failing = self.failing;
    }
}

/// Judges one look at a member that a scan has chosen. `seen` is `None` for a listener that can be
/// neither looked at nor assigned (MPTCP): on its own port the kernel finds it without our help.
#[inline(always)]
pub fn attempt(
    seen: Option<&Observation>,
    member: &Member,
    scan: &Scan,
    effort: Effort,
) -> Outcome {
    let mut writes = Writes::none(&member.health);
    let attempt = if !member.backend.slot_state().is(BackendState::Active) {
        Attempt::Gone
    } else if let Some(seen) = seen {
        look(seen, member, scan, effort, &mut writes)
    } else {
        match judge_member(&Observation::BLIND, member, scan) {
            Judgement::Take => Attempt::Assigned,
            judgement => Attempt::Judged(judgement),
        }
    };
    Outcome { attempt, writes }
}

#[inline(always)]
fn look(
    seen: &Observation,
    member: &Member,
    scan: &Scan,
    effort: Effort,
    writes: &mut Writes,
) -> Attempt {
    let (counts, now) = (&member.counts, scan.request.now);
    writes.cookies = pack_cookies(seen, counts.cookies, now).unwrap_or(LEAVE);
    if must_choose_by_tuple(seen.cookies(), scan) {
        return Attempt::Cookies;
    }
    let stalled = look_at_health(seen, member, now, writes) && scan.may_avoid_best();
    let pending = seen.pending(counts, member.quota(scan.request.quota), now);
    if effort.judging
        && let Some(judgement) = in_vain(seen, pending, stalled, member, scan, writes)
    {
        return Attempt::Judged(judgement);
    }
    // Tells the other CPUs of the SYN that goes there.
    writes.expected = pack_expected(pending, now);
    if effort.yielding {
        writes.instead_of = scan.best_expected();
    }
    if scan.request.health {
        writes.failing = pack_sent(member.health.failing, now);
    }
    Attempt::Assigned
}

/// Notes what the accept queue says of its health; whether it is stalled.
#[inline(always)]
fn look_at_health(seen: &Observation, member: &Member, now: u64, writes: &mut Writes) -> bool {
    let look = look_at_queue(member.health.queue, seen.entered, seen.queue, now);
    writes.queue = look.queue;
    writes.stalled = look.stalled;
    look.stalled != 0
}

/// Why it can't take the SYN, and what the look leaves then.
#[inline(always)]
fn in_vain(
    seen: &Observation,
    pending: u32,
    stalled: bool,
    member: &Member,
    scan: &Scan,
    writes: &mut Writes,
) -> Option<Judgement> {
    let (counts, now) = (&member.counts, scan.request.now);
    let judgement = judge_member(seen, member, scan);
    match judgement {
        Judgement::Take => {
            if counts.full != 0 {
                writes.full = 0;
            }
            return stalled.then_some(Judgement::Stalled);
        }
        Judgement::QueueFull { since } => writes.full = pack_full(since, now),
        Judgement::OverQuota => {
            // Corrects the hint that the look has found wrong.
            writes.expected = pack_over(pending, now);
            // By established connections alone it would not have been looked at: half-open ones
            // hold the room.
            writes.flood = pack_flood(counts, now).unwrap_or(LEAVE);
        }
        Judgement::Stalled => {}
    }
    Some(judgement)
}

#[inline(always)]
fn judge_member(seen: &Observation, member: &Member, scan: &Scan) -> Judgement {
    let quota = member.quota(scan.request.quota);
    let enforce = scan.enforces(member.is_closed(quota));
    judge(seen, &member.counts, quota, enforce, scan.request.now)
}

/// Whether the choice must be made anew because cookies turn out to be in use, or about to be: a
/// SYN queue that is found full, and not nearly full first, answers the very SYN at hand with one.
#[inline(always)]
const fn must_choose_by_tuple(cookies: Cookies, scan: &Scan) -> bool {
    !matches!(cookies, Cookies::Off) && !scan.cookies
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{
        Address, Backend, Breaker, Counts, ServicePort, SlotPolicy, SlotState, UNLIMITED,
    };
    use crate::decision::health::{STALLED_FOR, pack_open};
    use crate::decision::request::{Arrival, Request};

    const NOW: u64 = 50_000;
    const IDLE: Observation = Observation {
        half_open: 3,
        young: 3,
        fast_open: 0,
        queue: 0,
        backlog: 128,
        syncookies: 1,
        overflow_age: 1_000,
        entered: 0,
    };
    const FULL: Observation = Observation { queue: 129, ..IDLE };
    const NOTHING: Writes = Writes::none(&Health::UNKNOWN);
    const USUAL: Effort = Effort {
        yielding: true,
        judging: true,
    };

    fn member(established: u64) -> Member {
        Member {
            slot: 0,
            backend: Backend {
                slot_state: SlotState::new(1, BackendState::Active).0,
                ..Backend::EMPTY
            },
            policy: SlotPolicy::new(1, 10, 1, 0),
            counts: Counts {
                established,
                expected: pack_expected(7, NOW - 1),
                ..Counts::ZERO
            },
            health: Health::UNKNOWN,
        }
    }

    /// The outcome for a member that was chosen by a scan of it alone.
    fn outcome(seen: Option<&Observation>, member: &Member, effort: Effort) -> Outcome {
        let port = ServicePort {
            service: 0,
            policy: 0,
            flags: ServicePort::VIRTUAL,
            quota: UNLIMITED,
        };
        let arrival = Arrival {
            netns: 0,
            device: 0,
            from: Address::ANY_V4,
            from_port: 1,
            to: Address::ANY_V4,
            to_port: 1,
        };
        let mut scan = Scan::new(Request::new(&port, &arrival, 0, 0, NOW));
        scan.consider(member);
        attempt(seen, member, &scan, effort)
    }

    #[test]
    fn a_syn_is_announced_only_in_place_of_the_word_that_the_scan_saw() {
        let mut member = member(5);
        let announced = |instead_of| Writes {
            expected: pack_expected(3, NOW),
            instead_of,
            ..NOTHING
        };
        let usual = outcome(Some(&IDLE), &member, USUAL);
        assert_eq!(usual.attempt, Attempt::Assigned);
        assert_eq!(usual.writes, announced(member.counts.expected));
        let stubborn = Effort {
            yielding: false,
            ..USUAL
        };
        let outcome_of = |member: &Member| outcome(Some(&IDLE), member, stubborn).writes;
        assert_eq!(outcome_of(&member), announced(LEAVE));
        member.counts.full = pack_full(NOW - 9, NOW - 9);
        let emptied = Writes {
            full: 0,
            ..announced(LEAVE)
        };
        assert_eq!(outcome_of(&member), emptied, "its queue is full no more");
    }

    #[test]
    fn a_look_in_vain_leaves_what_it_has_found() {
        let over = outcome(Some(&IDLE), &member(8), USUAL);
        assert_eq!(over.attempt, Attempt::Judged(Judgement::OverQuota));
        let corrected = Writes {
            expected: pack_over(3, NOW),
            flood: pack_flood(&member(8).counts, NOW).unwrap_or(LEAVE),
            ..NOTHING
        };
        assert_ne!(corrected.flood, LEAVE);
        assert_eq!(over.writes, corrected);
        let full = outcome(Some(&FULL), &member(5), USUAL);
        let judgement = Judgement::QueueFull { since: NOW };
        assert_eq!(full.attempt, Attempt::Judged(judgement));
        let seen_full = Writes {
            full: pack_full(NOW, NOW),
            queue: look_at_queue(0, 0, FULL.queue, NOW).queue,
            ..NOTHING
        };
        assert_eq!(full.writes, seen_full);
        let last = Effort {
            yielding: false,
            judging: false,
        };
        let last = outcome(Some(&FULL), &member(5), last);
        assert_eq!(last.attempt, Attempt::Assigned);
        assert!(last.writes.expected != LEAVE && last.writes.full == LEAVE);
    }

    #[test]
    fn cookies_that_the_scan_did_not_know_are_all_that_is_noted() {
        let overflowed = Observation {
            overflow_age: 1,
            ..FULL
        };
        let found = outcome(Some(&overflowed), &member(5), USUAL);
        assert_eq!(found.attempt, Attempt::Cookies);
        let noted = Writes {
            cookies: pack_cookies(&overflowed, 0, NOW).unwrap_or(LEAVE),
            ..NOTHING
        };
        assert_ne!(noted.cookies, LEAVE);
        assert_eq!(found.writes, noted);
    }

    #[test]
    fn what_is_gone_or_can_not_be_looked_at_is_not_written_to() {
        let mut closed = member(5);
        closed.backend.slot_state = SlotState::new(1, BackendState::Closed).0;
        for (seen, member, attempt) in [
            (Some(&FULL), closed, Attempt::Gone),
            (None, closed, Attempt::Gone),
            (None, member(9), Attempt::Assigned),
            (None, member(10), Attempt::Judged(Judgement::OverQuota)),
        ] {
            let writes = NOTHING;
            assert_eq!(outcome(seen, &member, USUAL), Outcome { attempt, writes });
        }
    }

    #[test]
    fn attempts_survive_a_word() {
        for attempt in [
            Attempt::Assigned,
            Attempt::Raced,
            Attempt::Cookies,
            Attempt::Gone,
            Attempt::Failed,
            Attempt::Foreign,
            Attempt::Judged(Judgement::OverQuota),
            Attempt::Judged(Judgement::QueueFull { since: 77 }),
            Attempt::Judged(Judgement::Take),
            Attempt::Judged(Judgement::Stalled),
        ] {
            assert_eq!(Attempt::decode(attempt.encode()), attempt);
        }
    }

    /// Nothing was accepted since the last look, which is long ago.
    #[test]
    fn one_that_is_found_stalled_has_the_syn_only_where_nobody_may_be_avoided() {
        let waiting = Observation { queue: 2, ..IDLE };
        let mark = look_at_queue(0, 0, 2, NOW - STALLED_FOR - 1).queue;
        let mut stalled = member(5);
        stalled.health.queue = mark;
        let found = outcome(Some(&waiting), &stalled, USUAL);
        assert_eq!(found.attempt, Attempt::Judged(Judgement::Stalled));
        let until = found.writes.stalled;
        assert!(until > NOW && found.writes.queue == mark && found.writes.expected == LEAVE);
        // Known to be so: it was chosen because there is no other.
        stalled.health.stalled = until;
        let last = outcome(Some(&waiting), &stalled, USUAL);
        assert_eq!(last.attempt, Attempt::Assigned);
        let serves = Observation { queue: 1, ..IDLE };
        let accepts = outcome(Some(&serves), &stalled, USUAL).writes;
        assert_eq!(accepts.stalled, 0, "it has accepted one");
        assert_eq!(outcome(Some(&IDLE), &stalled, USUAL).writes.queue, 0);
    }

    #[test]
    fn the_syn_of_a_trial_takes_it_from_all_other_cpus() {
        let mut failing = member(5);
        failing.health.failing = pack_open(0, NOW - 2 * STALLED_FOR);
        let word = outcome(Some(&IDLE), &failing, USUAL).writes.failing;
        assert_eq!(Breaker::of(word), Breaker::Trial);
        failing.health.failing = word;
        assert_eq!(outcome(Some(&IDLE), &failing, USUAL).writes.failing, word);
    }
}
