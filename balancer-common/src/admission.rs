//! Admission: may this backend take one connection more?

use crate::abi::{Backend, Cookies, Counts, UNLIMITED, ticks_of_ms};

/// How long a queue may be full without a pause before connections are refused because of it, in ticks.
pub const QUEUE_GRACE: u32 = ticks_of_ms(1_000);
/// How long a SYN that was sent to a backend counts as expected there: as long as the kernel calls it young.
pub const EXPECTED_FOR: u32 = ticks_of_ms(1_100);
/// How long after the last overflow the kernel accepts cookies (`TCP_SYNCOOKIE_VALID`, include/net/tcp.h), in seconds.
pub const COOKIES_FOR_SECONDS: u32 = 120;
/// How long a SYN queue that is about to overflow makes the choice stable for cookies, in ticks.
pub const COOKIES_SOON_FOR: u32 = ticks_of_ms(3_000);
/// Free places in the SYN queue below which other CPUs may fill it before the SYN at hand gets there.
const QUEUE_MARGIN: u32 = 4;

/// What the kernel says of a listening socket at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Half-open connections (`icsk_accept_queue.qlen`).
    pub half_open: u32,
    /// Those whose SYN-ACK was not yet sent again (`icsk_accept_queue.young`).
    pub young: u32,
    /// TCP Fast Open connections whose handshake is not complete (`fastopenq.qlen`).
    pub fast_open: u32,
    /// Connections that wait for `accept()` (`sk_ack_backlog`).
    pub queue: u32,
    /// The backlog of `listen()` (`sk_max_ack_backlog`).
    pub backlog: u32,
    /// `net.ipv4.tcp_syncookies` of the namespace.
    pub syncookies: u8,
    /// Seconds since the SYN queue last overflowed.
    pub overflow_age: u32,
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
    };

    /// The accept queue is full (`sk_acceptq_is_full`, include/net/sock.h: with >=, listen(0) would never accept).
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

    /// Half-open connections that may still complete; none during a half-open flood, which would otherwise use up the
    /// room of honest clients.
    #[inline(always)]
    pub const fn pending(&self, quota: u32) -> u32 {
        let allowance = if quota / 8 > 16 { quota / 8 } else { 16 };
        if matches!(self.cookies(), Cookies::InUse)
            || self.half_open.saturating_sub(self.young) > allowance
        {
            return 0;
        }
        self.young.saturating_add(self.fast_open)
    }
}

/// The rule: established (without the exempt ones) + pending < quota.
#[inline(always)]
pub const fn admits(established: u32, exempt: u32, pending: u32, quota: u32) -> bool {
    quota == UNLIMITED || established.saturating_sub(exempt).saturating_add(pending) < quota
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
        since: u32,
    },
}

/// Judges one look. `enforce` is false where the quota does not matter (exempt source, stale daemon).
#[inline(always)]
pub fn judge(
    seen: &Observation,
    counts: &Counts,
    quota: u32,
    enforce: bool,
    now: u32,
) -> Judgement {
    if enforce
        && !admits(
            counts.established(),
            counts.exempt(),
            seen.pending(quota),
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

/// Since when the queue has been full, given the word of the last look: a pause of more than the grace starts anew.
#[inline(always)]
pub const fn full_since(word: u64, now: u32) -> u32 {
    let (since, seen) = (word as u32, (word >> 32) as u32);
    if word == 0 || now.wrapping_sub(seen) > QUEUE_GRACE {
        now
    } else {
        since
    }
}

/// The word after a look that found the queue full (never 0, which says "not full").
#[inline(always)]
pub const fn full_word(since: u32, now: u32) -> u64 {
    let word = (now as u64) << 32 | since as u64;
    if word == 0 { 1 } else { word }
}

/// Whether the queue was full at the last look, and that look is recent.
#[inline(always)]
pub const fn is_full(word: u64, now: u32) -> bool {
    word != 0 && now.wrapping_sub((word >> 32) as u32) <= QUEUE_GRACE
}

/// SYNs that were sent to a backend and may still become established.
#[inline(always)]
pub const fn expected(word: u64, now: u32) -> u32 {
    let count = word as u32;
    // Completions that no SYN announced (exempt ones on an own port) make it negative.
    if count as i32 <= 0 || now.wrapping_sub((word >> 32) as u32) > EXPECTED_FOR {
        0
    } else {
        count
    }
}

/// The word after a SYN was sent to a backend that has `pending` half-open ones.
#[inline(always)]
pub const fn expected_word(pending: u32, now: u32) -> u64 {
    over_word(pending.saturating_add(1), now)
}

/// The same word after a look that found so many pending that the quota is reached: no SYN was sent.
#[inline(always)]
pub const fn over_word(pending: u32, now: u32) -> u64 {
    (now as u64) << 32 | pending as u64
}

/// What the word says of SYN cookies.
#[inline(always)]
pub const fn cookies_state(word: u64, now: u32) -> Cookies {
    let until = word as u32;
    if word == 0 || (until.wrapping_sub(now) as i32) < 0 {
        return Cookies::Off;
    }
    if (word >> 32) as u32 == Cookies::InUse as u32 {
        Cookies::InUse
    } else {
        Cookies::Soon
    }
}

/// The word after a look: until when the choice must be stable for cookies. `None`: leave it as it is.
#[inline(always)]
pub const fn cookies_word(seen: &Observation, word: u64, now: u32) -> Option<u64> {
    match seen.cookies() {
        Cookies::Off => None,
        Cookies::Soon => {
            if matches!(cookies_state(word, now), Cookies::InUse) {
                return None;
            }
            Some((Cookies::Soon as u64) << 32 | now.wrapping_add(COOKIES_SOON_FOR) as u64)
        }
        Cookies::InUse => {
            let age = if seen.overflow_age < COOKIES_FOR_SECONDS {
                seen.overflow_age
            } else {
                0
            };
            let left = ticks_of_ms((COOKIES_FOR_SECONDS - age) as u64 * 1_000);
            Some((Cookies::InUse as u64) << 32 | now.wrapping_add(left) as u64)
        }
    }
}

/// Whether a listener can take a packet of that family (`inet_csk` sockets: `bpf_sk_assign` says EAFNOSUPPORT otherwise).
#[inline(always)]
pub const fn fits_family(flags: u32, packet_is_v4: bool) -> bool {
    if packet_is_v4 {
        flags & Backend::V6_ONLY == 0
    } else {
        flags & Backend::V6 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUIET: Observation = Observation {
        half_open: 0,
        young: 0,
        fast_open: 0,
        queue: 0,
        backlog: 128,
        syncookies: 1,
        overflow_age: 500,
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
        assert_eq!(flood.pending(100), 0);
        assert_eq!(
            Observation {
                half_open: 116,
                ..flood
            }
            .pending(100),
            100
        );
        assert_eq!(
            Observation {
                half_open: 225,
                young: 100,
                ..QUIET
            }
            .pending(1000),
            100
        );
        assert_eq!(
            Observation {
                young: 3,
                half_open: 3,
                overflow_age: 119,
                ..QUIET
            }
            .pending(100),
            0
        );
        assert_eq!(
            Observation {
                young: 3,
                half_open: 3,
                overflow_age: 120,
                ..QUIET
            }
            .pending(100),
            3
        );
        assert_eq!(
            Observation {
                young: 3,
                half_open: 3,
                syncookies: 2,
                ..QUIET
            }
            .pending(100),
            0
        );
        assert_eq!(
            Observation {
                young: 3,
                half_open: 3,
                fast_open: 2,
                ..QUIET
            }
            .pending(100),
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
        assert_eq!(nearly.pending(1000), 126);
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
        let first = full_word(full_since(0, 1000), 1000);
        let second = full_word(full_since(first, 1500), 1500);
        assert_eq!(full_since(second, 1900), 1000);
        assert_eq!(full_since(second, 1501 + QUEUE_GRACE), 1501 + QUEUE_GRACE);
    }

    proptest! {
        #[test]
        fn nothing_is_admitted_over_quota(established: u32, exempt: u32, pending: u32, quota in 0..UNLIMITED) {
            if admits(established, exempt, pending, quota) {
                prop_assert!(u64::from(established.saturating_sub(exempt)) + u64::from(pending) < u64::from(quota));
            }
        }

        #[test]
        fn no_word_panics(
            half_open: u32, young: u32, fast_open: u32, queue: u32, backlog: u32, syncookies: u8, overflow_age: u32,
            word: u64, quota: u32, now: u32, established: u64, enforce: bool,
        ) {
            let seen = Observation { half_open, young, fast_open, queue, backlog, syncookies, overflow_age };
            let counts = Counts { established, expected: word, full: word, cookies: word };
            judge(&seen, &counts, quota, enforce, now);
            cookies_word(&seen, word, now);
            full_word(full_since(word, now), now);
            prop_assert!(expected(expected_word(seen.pending(quota), now), now) <= i32::MAX as u32 + 1);
        }
    }
}
