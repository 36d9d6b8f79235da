//! Admission: may this backend take one connection more?

use crate::abi::{
    BESIDE, Cookies, Counts, MOST_BESIDE, beside, lasts, stamped, tick_of, ticks_of_ms, ticks_of_us,
};

/// How long a queue may be full without a pause before connections are refused because of it, in
/// ticks.
pub const QUEUE_GRACE: u64 = ticks_of_ms(1_000);

/// For how long a look that found a queue full is remembered, in ticks. Longer than the grace, and
/// than a client waits before it sends its SYN again (`TCP_TIMEOUT_INIT`, include/net/tcp.h: a
/// second, and then some milliseconds): one that is alone must see the grace end.
pub const QUEUE_REMEMBERED: u64 = ticks_of_ms(1_500);

/// How long a SYN that was sent to a backend counts as expected there: as long as the kernel calls
/// it young.
pub const EXPECTED_FOR: u64 = ticks_of_ms(1_100);

/// How long after the last overflow the kernel accepts cookies (`TCP_SYNCOOKIE_VALID`,
/// include/net/tcp.h), in seconds.
pub const COOKIES_FOR_SECONDS: u32 = 120;

/// How long a SYN queue that is about to overflow makes the choice stable for cookies, in ticks.
pub const COOKIES_SOON_FOR: u64 = ticks_of_ms(3_000);

/// Free places in the SYN queue below which other CPUs may fill it before the SYN at hand gets
/// there.
const QUEUE_MARGIN: u32 = 4;

/// How long the room may be full of half-open connections none of which completes, before they are
/// taken for a flood, in ticks: where no handshake was seen yet, and at most. Shorter than the
/// kernel calls them young.
const FLOOD_LONGEST: u64 = ticks_of_ms(900);

/// The least time for which half-open connections may hold the room, in ticks: some handshakes take
/// next to no time.
const FLOOD_SHORTEST: u64 = ticks_of_ms(20);

/// How many times the longest handshake half-open connections may hold the room.
const FLOOD_HANDSHAKES: u64 = 8;

/// How long half-open connections that were taken for a flood stay one, in ticks: after that the
/// SYN queue itself shows a flood that goes on.
const FLOOD_FOR: u64 = ticks_of_ms(5_000);

/// How long the longest handshake is remembered, in ticks.
const HANDSHAKE_FOR: u64 = ticks_of_ms(600_000);

/// What the kernel says of a listening socket at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Half-open connections (`icsk_accept_queue.qlen`).
    pub half_open: u32,
    /// Half-open connections whose SYN-ACK was not yet sent again (`icsk_accept_queue.young`).
    pub young: u32,
    /// TCP Fast Open connections whose handshake is not complete (`fastopenq.qlen`).
    pub fast_open: u32,
    /// Connections that wait for `accept()` (`sk_ack_backlog`).
    pub queue: u32,
    /// The backlog of `listen()` (`sk_max_ack_backlog`).
    pub backlog: u32,
    /// `net.ipv4.tcp_syncookies` of the listener's netns: 0 to 2.
    pub syncookies: u8,
    /// Seconds since the SYN queue last overflowed.
    pub overflow_age: u32,
    /// Connections that have entered ESTABLISHED (`Totals::entered`), read before `queue`.
    pub entered: u64,
}

impl Observation {
    /// What can be said of a listener that can't be looked at (MPTCP): nothing is pending.
    pub const BLIND: Self = Self {
        half_open: 0,
        young: 0,
        fast_open: 0,
        queue: 0,
        backlog: u32::MAX,
        syncookies: 0,
        overflow_age: u32::MAX,
        entered: 0,
    };

    /// The accept queue is full (`sk_acceptq_is_full`, include/net/sock.h: with >=, listen(0) would
    /// never accept).
    #[inline(always)]
    pub const fn queue_is_full(&self) -> bool {
        self.queue > self.backlog
    }

    /// Whether the listener answers with SYN cookies.
    #[inline(always)]
    pub const fn cookies(&self) -> Cookies {
        if self.syncookies == 0 {
            Cookies::Off
        } else if self.syncookies == 2 || self.overflow_age < COOKIES_FOR_SECONDS {
            Cookies::InUse
        } else if self.half_open.saturating_add(QUEUE_MARGIN) >= self.backlog {
            Cookies::Soon
        } else {
            Cookies::Off
        }
    }

    /// Half-open connections that may still complete; none during a half-open flood, which would
    /// otherwise use up the room of honest clients.
    #[inline(always)]
    pub const fn pending(&self, counts: &Counts, quota: u32, now: u64) -> u32 {
        if is_flooded(counts, now) {
            return 0;
        }
        self.young_unless_flooded(quota)
    }

    /// Half-open connections that may still complete, by what the SYN queue shows alone: it needs a
    /// second or more to show a flood.
    #[inline(always)]
    const fn young_unless_flooded(&self, quota: u32) -> u32 {
        let allowance = if quota / 8 > 16 { quota / 8 } else { 16 };
        if matches!(self.cookies(), Cookies::InUse)
            || self.half_open.saturating_sub(self.young) > allowance
        {
            return 0;
        }
        self.young.saturating_add(self.fast_open)
    }
}

/// Whether the half-open connections are a flood by what became of them: they held all the room for
/// longer than handshakes take here, and not one was completed.
#[inline(always)]
const fn is_flooded(counts: &Counts, now: u64) -> bool {
    counts.flood != 0 && counts.flood <= now && lasts(counts.flood, FLOOD_FOR, now)
}

/// Whether a handshake that is completed now takes the word `flood` back.
#[inline(always)]
pub const fn is_held(word: u64, now: u64) -> bool {
    word > now
}

/// The word `flood` after a look. `None`: leave it as it is.
#[inline(always)]
pub const fn pack_flood(counts: &Counts, now: u64) -> Option<u64> {
    if is_held(counts.flood, now) || is_flooded(counts, now) {
        return None;
    }
    Some(now + flood_patience(counts.handshake))
}

/// How long half-open connections may hold all the room without one being completed.
#[inline(always)]
const fn flood_patience(handshake: u64) -> u64 {
    if handshake == 0 {
        return FLOOD_LONGEST;
    }
    let ticks = ticks_of_us(beside(handshake) * FLOOD_HANDSHAKES);
    if ticks < FLOOD_SHORTEST {
        FLOOD_SHORTEST
    } else if ticks > FLOOD_LONGEST {
        FLOOD_LONGEST
    } else {
        ticks
    }
}

/// The word `handshake` after one that took `micros` was completed. `None`: leave it as it is.
#[inline(always)]
pub const fn pack_handshake(word: u64, micros: u32, now: u64) -> Option<u64> {
    // A handshake of no time at all is one all the same.
    let longest = stamped(now, if micros == 0 { 1 } else { micros as u64 });
    let is_shorter = beside(longest) <= beside(word);
    if word != 0 && is_shorter && lasts(tick_of(word), HANDSHAKE_FOR, now) {
        return None;
    }
    Some(longest)
}

/// More than there can be connections: added to a quota that does not count.
pub const LIFTED: u64 = 1 << 40;

/// The rule: established (without the exempt ones) + pending < quota.
#[inline(always)]
pub const fn admits(established: u32, exempt: u32, pending: u32, quota: u32) -> bool {
    used(established, exempt, pending) < limit(quota)
}

/// What counts against a quota.
#[inline(always)]
pub const fn used(established: u32, exempt: u32, pending: u32) -> u64 {
    established.saturating_sub(exempt) as u64 + pending as u64
}

/// What must be more than [`used`]. Without a branch, after which the verifier would follow both
/// ways through all that comes.
#[inline(always)]
pub const fn limit(quota: u32) -> u64 {
    let quota = quota as u64;
    quota + ((quota + 1) >> 32) * LIFTED
}

/// One look at a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It has room.
    Take,
    /// established + pending has reached the quota.
    OverQuota,
    /// It does not accept; `since` is the tick since when.
    QueueFull {
        /// Tick when its queue was first seen full.
        since: u64,
    },
    /// It has accepted nothing for a while, though connections wait. Never where it is asked as
    /// one that is avoided.
    Stalled,
}

/// Judges one look. `enforce` is false where the quota does not matter (exempt source, stale
/// daemon).
#[inline(always)]
pub fn judge(
    seen: &Observation,
    counts: &Counts,
    quota: u32,
    enforce: bool,
    now: u64,
) -> Judgement {
    if enforce
        && !admits(
            counts.established(),
            counts.exempt(),
            seen.pending(counts, quota, now),
            quota,
        )
    {
        return Judgement::OverQuota;
    }
    if seen.queue_is_full() {
        return Judgement::QueueFull {
            since: full_since(counts.full, now),
        };
    }
    Judgement::Take
}

/// Since when the queue has been full, given the word of the last look; anew where that look is no
/// longer remembered.
#[inline(always)]
pub const fn full_since(word: u64, now: u64) -> u64 {
    if is_full(word, now) {
        tick_of(word).saturating_sub(beside(word))
    } else {
        now
    }
}

/// The word `full` after a look that found the queue full (never 0, which says "not full").
#[inline(always)]
pub const fn pack_full(since: u64, now: u64) -> u64 {
    let word = stamped(now, now.saturating_sub(since));
    if word == 0 { 1 } else { word }
}

/// Whether the queue was full at the last look, and that look is remembered.
#[inline(always)]
pub const fn is_full(word: u64, now: u64) -> bool {
    word != 0 && lasts(tick_of(word), QUEUE_REMEMBERED, now)
}

/// SYNs that were sent to a backend and may still become established. Without a branch, like
/// [`limit`].
#[inline(always)]
pub const fn expected(word: u64, now: u64) -> u32 {
    // The number stands at the top, with its sign.
    let count = word << (u64::BITS - BESIDE);
    let is_none = (count | count.wrapping_sub(1)) >> 63;
    let is_old = (tick_of(word) + EXPECTED_FOR).wrapping_sub(now) >> 63;
    let counts = 1 & !(is_none | is_old);
    (beside(word) * counts) as u32
}

/// Whether a handshake that is completed now takes one off the word `expected`. Completions that no
/// SYN announced (exempt ones on an own port) may have made its number negative.
#[inline(always)]
pub const fn is_expected(word: u64) -> bool {
    (word << (u64::BITS - BESIDE)) as i64 > 0
}

/// The most SYNs that the word `expected` tells of: its number has a sign.
const MOST_EXPECTED: u32 = (MOST_BESIDE >> 1) as u32;

/// The word `expected` after a SYN was sent to a backend that has `pending` half-open connections.
#[inline(always)]
pub const fn pack_expected(pending: u32, now: u64) -> u64 {
    pack_over(pending.saturating_add(1), now)
}

/// The word `expected` after a look that found so many pending that the quota is reached: no SYN
/// was sent.
#[inline(always)]
pub const fn pack_over(pending: u32, now: u64) -> u64 {
    let pending = if pending > MOST_EXPECTED {
        MOST_EXPECTED
    } else {
        pending
    };
    stamped(now, pending as u64)
}

/// What the word `cookies` says of SYN cookies.
#[inline(always)]
pub const fn cookies_state(word: u64, now: u64) -> Cookies {
    if cookies_near(word, now) == 0 {
        Cookies::Off
    } else if cookies_in_use(word, now) == 0 {
        Cookies::Soon
    } else {
        Cookies::InUse
    }
}

/// Bits of the word `cookies` below its tick.
const KIND: u32 = 2;

/// The word `cookies` of a kind until a tick.
#[inline(always)]
pub(super) const fn cookies_until(kind: Cookies, tick: u64) -> u64 {
    tick << KIND | kind as u64
}

/// 1 where the word says that SYN cookies are in use or soon will be, else 0; without a branch.
#[inline(always)]
pub const fn cookies_near(word: u64, now: u64) -> u64 {
    now.wrapping_sub(word >> KIND) >> 63
}

/// 1 where the word says that SYN cookies are in use, else 0; without a branch.
#[inline(always)]
pub const fn cookies_in_use(word: u64, now: u64) -> u64 {
    const { assert!(Cookies::Soon as u32 == 1 && Cookies::InUse as u32 == 2) };
    cookies_near(word, now) & word >> 1
}

/// The word `cookies` after a look: until when the choice must be stable for cookies. `None`: leave
/// it as it is.
#[inline(always)]
pub const fn pack_cookies(seen: &Observation, word: u64, now: u64) -> Option<u64> {
    match seen.cookies() {
        Cookies::Off => None,
        Cookies::Soon => {
            if matches!(cookies_state(word, now), Cookies::InUse) {
                return None;
            }
            Some(cookies_until(Cookies::Soon, now + COOKIES_SOON_FOR))
        }
        Cookies::InUse => {
            let age = if seen.overflow_age < COOKIES_FOR_SECONDS {
                seen.overflow_age
            } else {
                0
            };
            let left = ticks_of_ms((COOKIES_FOR_SECONDS - age) as u64 * 1_000);
            Some(cookies_until(Cookies::InUse, now + left))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::UNLIMITED;
    use proptest::prelude::*;
    use std::vec::Vec;

    const QUIET: Observation = Observation {
        half_open: 0,
        young: 0,
        fast_open: 0,
        queue: 0,
        backlog: 128,
        syncookies: 1,
        overflow_age: 500,
        entered: 0,
    };

    #[test]
    fn admission_is_exact() {
        assert!(admits(9, 0, 0, 10));
        assert!(!admits(10, 0, 0, 10));
        assert!(!admits(5, 0, 5, 10));
        assert!(admits(15, 6, 0, 10));
        assert!(!admits(0, 0, 0, 0));
        assert!(admits(u32::MAX, 0, u32::MAX, UNLIMITED));
    }

    #[test]
    fn flood_does_not_count_as_pending() {
        let flood = Observation {
            half_open: 117,
            young: 100,
            ..QUIET
        };
        assert_eq!(flood.young_unless_flooded(100), 0);
        assert_eq!(
            Observation {
                half_open: 116,
                ..flood
            }
            .young_unless_flooded(100),
            100
        );
        assert_eq!(
            Observation {
                half_open: 225,
                young: 100,
                ..QUIET
            }
            .young_unless_flooded(1000),
            100
        );
        assert_eq!(
            Observation {
                young: 3,
                half_open: 3,
                overflow_age: 119,
                ..QUIET
            }
            .young_unless_flooded(100),
            0
        );
        assert_eq!(
            Observation {
                young: 3,
                half_open: 3,
                overflow_age: 120,
                ..QUIET
            }
            .young_unless_flooded(100),
            3
        );
        assert_eq!(
            Observation {
                young: 3,
                half_open: 3,
                syncookies: 2,
                ..QUIET
            }
            .young_unless_flooded(100),
            0
        );
        assert_eq!(
            Observation {
                young: 3,
                half_open: 3,
                fast_open: 2,
                ..QUIET
            }
            .young_unless_flooded(100),
            5
        );
    }

    #[test]
    fn queue_is_full_as_the_kernel_says() {
        assert!(
            !Observation {
                queue: 0,
                backlog: 0,
                ..QUIET
            }
            .queue_is_full()
        );
        assert!(
            Observation {
                queue: 1,
                backlog: 0,
                ..QUIET
            }
            .queue_is_full()
        );
    }

    #[test]
    fn cookies_are_foreseen_only_where_they_are_sent() {
        let nearly = Observation {
            half_open: 126,
            young: 126,
            ..QUIET
        };
        assert_eq!(nearly.cookies(), Cookies::Soon);
        assert_eq!(nearly.young_unless_flooded(1000), 126);
        assert_eq!(
            Observation {
                syncookies: 0,
                overflow_age: 0,
                ..nearly
            }
            .cookies(),
            Cookies::Off
        );
    }

    #[test]
    fn a_queue_must_be_full_without_a_pause() {
        let first = pack_full(full_since(0, 1000), 1000);
        let second = pack_full(full_since(first, 1500), 1500);
        assert_eq!(full_since(second, 1900), 1000);
        let forgotten = 1501 + QUEUE_REMEMBERED;
        assert_eq!(full_since(second, forgotten), forgotten);
    }

    /// How long the kernel calls a half-open connection young.
    const YOUNG_FOR: u64 = ticks_of_ms(1_000);
    const QUOTA: u32 = 20;
    /// After the first tick of all, with which no word begins.
    const BEGIN: u64 = 1;

    /// A listener, and what becomes of the SYNs that it takes.
    struct Model {
        counts: Counts,
        /// When each half-open connection began, and when its last segment comes if one does.
        half_open: Vec<(u64, Option<u64>)>,
    }

    impl Model {
        fn new(longest_handshake: u32) -> Self {
            let handshake = pack_handshake(0, longest_handshake * 1_049, 0).unwrap();
            let counts = Counts {
                handshake,
                ..Counts::ZERO
            };
            Self {
                counts,
                half_open: Vec::new(),
            }
        }

        /// The kernel half's `completed`.
        fn complete(&mut self, now: u64) {
            let before = self.half_open.len();
            self.half_open
                .retain(|(_, last)| last.is_none_or(|last| last > now));
            self.counts.established += (before - self.half_open.len()) as u64;
            if before > self.half_open.len() && is_held(self.counts.flood, now) {
                self.counts.flood = 0;
            }
        }

        /// A SYN of a client whose handshake takes that long; whether it is let in.
        fn syn(&mut self, now: u64, takes: Option<u64>) -> bool {
            self.complete(now);
            let young = |(born, _): &&(u64, Option<u64>)| now - born < YOUNG_FOR;
            let seen = Observation {
                half_open: self.half_open.len() as u32,
                young: self.half_open.iter().filter(young).count() as u32,
                backlog: u32::MAX,
                ..QUIET
            };
            let admitted = judge(&seen, &self.counts, QUOTA, true, now) == Judgement::Take;
            let for_pending = admits(self.counts.established(), 0, 0, QUOTA);
            if !admitted
                && for_pending
                && let Some(word) = pack_flood(&self.counts, now)
            {
                self.counts.flood = word;
            }
            if admitted {
                self.half_open.push((now, takes.map(|takes| now + takes)));
            }
            admitted
        }
    }

    /// How many of a flood of one SYN a tick are let in.
    fn flood(model: &mut Model, times: core::ops::Range<u64>) -> usize {
        times.filter(|now| model.syn(*now, None)).count()
    }

    #[test]
    fn half_open_connections_that_never_complete_hold_the_room_for_a_moment() {
        let mut model = Model::new(1);
        let ends = BEGIN + u64::from(QUOTA) + FLOOD_SHORTEST;
        assert_eq!(flood(&mut model, BEGIN..ends), QUOTA as usize);
        // From then on, beside the flood, honest ones get in up to the quota and not beyond.
        for n in 0..QUOTA + 5 {
            let now = ends + 300 * u64::from(n);
            assert_eq!(model.syn(now, Some(1)), n < QUOTA, "honest client {n}");
            flood(&mut model, now + 1..now + 300);
        }
        assert_eq!(model.counts.established(), QUOTA);
    }

    #[test]
    fn a_backend_without_a_handshake_yet_is_given_nearly_a_second() {
        let mut model = Model::new(1);
        model.counts.handshake = 0;
        let ends = BEGIN + u64::from(QUOTA) + FLOOD_LONGEST;
        assert_eq!(flood(&mut model, BEGIN..ends), QUOTA as usize);
        assert!(model.syn(ends, Some(1)));
    }

    /// However little room is left: the dead ones in the SYN queue would take many seconds to be
    /// too many.
    #[test]
    fn one_place_that_is_left_is_not_held_for_long() {
        let mut model = Model::new(1);
        model.counts.established = u64::from(QUOTA) - 1;
        assert!(model.syn(BEGIN, None));
        assert!(!model.syn(BEGIN + 1, Some(1)));
        assert!(model.syn(BEGIN + 1 + FLOOD_SHORTEST, Some(1)));
    }

    #[test]
    fn the_longest_handshake_is_remembered_for_a_while() {
        let first = pack_handshake(0, 800, 1_000).unwrap();
        assert_eq!(pack_handshake(first, 700, 2_000), None);
        assert_eq!(pack_handshake(first, 900, 2_000).map(beside), Some(900));
        let later = 1_001 + HANDSHAKE_FOR;
        assert_eq!(pack_handshake(first, 700, later).map(beside), Some(700));
        assert_eq!(
            flood_patience(pack_handshake(0, 0, 0).unwrap()),
            FLOOD_SHORTEST
        );
        assert_eq!(
            flood_patience(pack_handshake(0, 10_000, 0).unwrap()),
            ticks_of_ms(80)
        );
        assert_eq!(
            flood_patience(pack_handshake(0, u32::MAX, 0).unwrap()),
            FLOOD_LONGEST
        );
    }

    proptest! {
        /// Bursts of clients that all complete are no flood: they get the quota and no more.
        #[test]
        fn a_burst_of_honest_clients_stays_within_the_quota(
            longest in 1..100_u32, clients in prop::collection::vec((0..4_u64, 1..100_u64), 1..300),
        ) {
            let mut model = Model::new(longest);
            let mut now = BEGIN;
            let longest = u64::from(longest);
            let wanted = clients.len().min(QUOTA as usize);
            for (gap, takes) in clients {
                now += gap;
                model.syn(now, Some(takes.min(longest)));
            }
            model.complete(now + longest);
            prop_assert_eq!(model.counts.established() as usize, wanted);
        }

        /// Whatever the rate of a flood and the room that it finds: an honest client that was
        /// refused gets in soon after.
        #[test]
        fn a_flood_refuses_honest_clients_for_a_moment_only(
            gaps in prop::collection::vec(0..60_u64, 400), established in 0..QUOTA, longest in 1..100_u32,
        ) {
            let mut model = Model::new(longest);
            model.counts.established = u64::from(established);
            let (mut now, mut refused) = (BEGIN, None);
            for gap in gaps {
                // One that leaves at once: it takes no room.
                if model.syn(now, Some(0)) {
                    model.complete(now);
                    model.counts.established -= 1;
                    refused = None;
                } else {
                    let since: u64 = *refused.get_or_insert(now);
                    prop_assert!(now - since <= flood_patience(model.counts.handshake));
                }
                now += gap;
                model.syn(now, None);
            }
        }

        #[test]
        fn nothing_is_admitted_over_quota(established: u32, exempt: u32, pending: u32, quota in 0..UNLIMITED) {
            if admits(established, exempt, pending, quota) {
                prop_assert!(u64::from(established.saturating_sub(exempt)) + u64::from(pending) < u64::from(quota));
            }
            prop_assert!(admits(established, exempt, pending, UNLIMITED));
        }

        #[test]
        fn only_young_syns_are_expected(count in 0..=MOST_BESIDE, age in 0..=2 * EXPECTED_FOR, now in 2 * EXPECTED_FOR..END) {
            let word = stamped(now - age, count);
            let is_young = age <= EXPECTED_FOR;
            let count = u32::try_from(count).unwrap();
            prop_assert_eq!(is_expected(word), (1..=MOST_EXPECTED).contains(&count));
            prop_assert_eq!(expected(word, now), if is_expected(word) && is_young { count } else { 0 });
        }

        #[test]
        fn what_is_told_of_cookies_without_a_branch_is_their_state(kind in 0..=2_u32, until in 0..END, now in 0..END) {
            let kind = [Cookies::Off, Cookies::Soon, Cookies::InUse][kind as usize];
            let word = if kind == Cookies::Off { 0 } else { cookies_until(kind, until) };
            let expected = if until <= now { Cookies::Off } else { kind };
            prop_assert_eq!(cookies_state(word, now), expected);
            prop_assert_eq!(cookies_near(word, now) == 1, expected != Cookies::Off);
            prop_assert_eq!(cookies_in_use(word, now) == 1, expected == Cookies::InUse);
        }

        /// What was written once and then left alone ends once, and does not come back: not after
        /// 2³¹ ticks, which are 26 days, nor after 2³².
        #[test]
        fn what_is_past_stays_past(
            written in BEGIN..1_u64 << 40, half_open in 0..300_u32, overflow_age in 0..300_u32, micros: u32, pending: u32, lasting in 0..2_000_u64, age in any_age(),
        ) {
            let seen = Observation { half_open, overflow_age, ..QUIET };
            let now = written + age;
            if let Some(word) = pack_cookies(&seen, 0, written) {
                let longest = ticks_of_ms(u64::from(COOKIES_FOR_SECONDS) * 1_000);
                prop_assert_ne!(cookies_state(word, written), Cookies::Off);
                prop_assert!(age < longest || cookies_state(word, now) == Cookies::Off);
            }
            let full = pack_full(written.saturating_sub(lasting), written);
            prop_assert_eq!(is_full(full, now), age <= QUEUE_REMEMBERED);
            prop_assert!(age <= QUEUE_REMEMBERED || full_since(full, now) == now);
            let word = pack_over(pending, written);
            prop_assert_eq!(expected(word, now) != 0, is_expected(word) && age <= EXPECTED_FOR);
            let handshake = pack_handshake(0, micros, written).unwrap();
            prop_assert_eq!(pack_handshake(handshake, 0, now).is_some(), age > HANDSHAKE_FOR || beside(handshake) == 0);
            let patience = flood_patience(handshake);
            let flood = pack_flood(&Counts { handshake, ..Counts::ZERO }, written).unwrap();
            prop_assert_eq!(is_held(flood, now), age < patience);
            let counts = Counts { flood, ..Counts::ZERO };
            prop_assert_eq!(is_flooded(&counts, now), (patience..=patience + FLOOD_FOR).contains(&age));
            prop_assert_eq!(pack_flood(&counts, now).is_some(), age > patience + FLOOD_FOR);
        }

        /// A look on another CPU may have a later time than the one at hand.
        #[test]
        fn what_another_cpu_has_just_seen_counts(now in BEGIN..1_u64 << 40, later in 0..10_u64, pending in 1..100_u32) {
            prop_assert!(is_full(pack_full(now, now + later), now));
            prop_assert_eq!(full_since(pack_full(now, now + later), now), now);
            prop_assert_eq!(expected(pack_over(pending, now + later), now), pending);
            prop_assert!(pack_handshake(pack_handshake(0, 9, now + later).unwrap(), 8, now).is_none());
        }

        #[test]
        fn no_word_panics(
            half_open: u32, young: u32, fast_open: u32, queue: u32, backlog: u32, syncookies: u8, overflow_age: u32,
            word: u64, quota: u32, now in 0..END, established: u64, enforce: bool,
        ) {
            let seen = Observation { half_open, young, fast_open, queue, backlog, syncookies, overflow_age, entered: 0 };
            let counts = Counts { established, expected: word, full: word, cookies: word, flood: word, handshake: word };
            judge(&seen, &counts, quota, enforce, now);
            pack_cookies(&seen, word, now);
            pack_full(full_since(word, now), now);
            pack_flood(&counts, now);
            pack_handshake(word, half_open, now);
            prop_assert!(expected(pack_expected(seen.pending(&counts, quota, now), now), now) <= MOST_EXPECTED);
        }
    }

    /// After the last tick that there is.
    const END: u64 = 1 << 44;

    fn any_age() -> impl Strategy<Value = u64> {
        prop_oneof![
            0..10_000_u64,
            0..2_000_000_u64,
            (1_u64 << 31) - 200_000..(1 << 31) + 200_000,
            (1_u64 << 32) - 200_000..(1 << 32) + 200_000,
            0..1_u64 << 43,
        ]
    }
}
