//! Keepalive: how long a client that has vanished keeps its place.

/// When the kernel asks a silent client whether it is still there, and when it gives it up
/// (`tcp(7)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Seconds of silence before the first probe (`TCP_KEEPIDLE`).
    pub idle: u16,
    /// Seconds between two probes (`TCP_KEEPINTVL`).
    pub interval: u16,
    /// Probes that stay without an answer before the connection is given up (`TCP_KEEPCNT`).
    pub probes: u8,
}

impl Keepalive {
    /// Where nothing else is said: a client that has vanished is gone after 90 s.
    pub const DEFAULT: Self = Self {
        idle: 60,
        interval: 10,
        probes: 3,
    };
    /// The least seconds that data may stay unacknowledged. `TCP_USER_TIMEOUT` also ends the
    /// connection of a client that lives and does not read.
    pub const LEAST_USER_TIMEOUT: u32 = 90;

    /// Seconds after which a client that has vanished is given up.
    #[inline(always)]
    pub const fn gone_after(self) -> u32 {
        self.idle as u32 + self.interval as u32 * self.probes as u32
    }

    /// Seconds of silence that only a client has which has left a probe unanswered.
    #[inline(always)]
    pub const fn silent_after(self) -> u32 {
        self.idle as u32 + self.interval as u32
    }

    /// For how many ms data may stay unacknowledged (`TCP_USER_TIMEOUT`): probes are not sent
    /// meanwhile. 0: that is left to the kernel (`tcp_retries2`). A shorter time would end
    /// connections of clients that live, and a longer one would be waited for in place of the
    /// unanswered probes (`tcp_keepalive_timer`, `net/ipv4/tcp_timer.c`).
    #[inline(always)]
    pub const fn user_timeout_ms(self) -> u32 {
        let seconds = self.gone_after();
        if seconds < Self::LEAST_USER_TIMEOUT {
            0
        } else {
            seconds.saturating_mul(1_000)
        }
    }
}

/// Value of KEEPALIVE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct KeepaliveWord {
    /// Idle | interval << 16 | probes << 32; 0: off. Atomic.
    pub packed: u64,
}

impl KeepaliveWord {
    /// The word of these values; `None`: off.
    pub const fn new(keepalive: Option<Keepalive>) -> Self {
        let packed = match keepalive {
            None => 0,
            Some(Keepalive {
                idle,
                interval,
                probes,
            }) => idle as u64 | (interval as u64) << 16 | (probes as u64) << 32,
        };
        Self { packed }
    }

    /// The values; `None`: off, as is a word that lacks one of them.
    #[inline(always)]
    pub const fn get(self) -> Option<Keepalive> {
        let keepalive = Keepalive {
            idle: self.packed as u16,
            interval: (self.packed >> 16) as u16,
            probes: (self.packed >> 32) as u8,
        };
        if keepalive.idle == 0 || keepalive.interval == 0 || keepalive.probes == 0 {
            return None;
        }
        Some(keepalive)
    }
}

/// Value of SILENCE: the connections of a slot from which nothing was heard for longer than
/// [`Keepalive::silent_after`], neither data nor an acknowledgement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Silence {
    /// How many | seconds of the longest silence of all connections << 32. Atomic.
    pub packed: u64,
}

impl Silence {
    /// The word of these numbers.
    pub const fn new(connections: u32, longest: u32) -> Self {
        Self {
            packed: connections as u64 | (longest as u64) << 32,
        }
    }

    /// How many connections have been silent for long.
    pub const fn connections(self) -> u32 {
        self.packed as u32
    }

    /// Seconds for which nothing was heard from the most silent connection.
    pub const fn longest(self) -> u32 {
        (self.packed >> 32) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn defaults_give_a_vanished_client_up_after_90_s_with_and_without_data() {
        let keepalive = Keepalive::DEFAULT;
        assert_eq!(keepalive.gone_after(), 90);
        assert_eq!(keepalive.user_timeout_ms(), 90_000);
        assert_eq!(keepalive.silent_after(), 70);
    }

    proptest! {
        #[test]
        fn words_keep_their_values(idle in 1_u16.., interval in 1_u16.., probes in 1_u8..) {
            let keepalive = Keepalive { idle, interval, probes };
            prop_assert_eq!(KeepaliveWord::new(Some(keepalive)).get(), Some(keepalive));
        }

        /// Whatever is configured: no client that lives is given up within 90 s of not reading,
        /// and none before the probes would give it up.
        #[test]
        fn data_may_stay_unacknowledged_for_long(idle in 1_u16.., interval in 1_u16.., probes in 1_u8..) {
            let keepalive = Keepalive { idle, interval, probes };
            let timeout = u64::from(keepalive.user_timeout_ms());
            prop_assert!(timeout == 0 || timeout >= 90_000);
            let gone_after = u64::from((keepalive.gone_after()).saturating_mul(1_000));
            prop_assert!(timeout == 0 || timeout >= gone_after);
        }

        #[test]
        fn no_word_is_half_a_keepalive(packed: u64) {
            let is_whole = |found: Keepalive| found.idle > 0 && found.interval > 0 && found.probes > 0;
            let (word, silence) = (KeepaliveWord { packed }, Silence { packed });
            prop_assert!(word.get().is_none_or(is_whole));
            prop_assert_eq!(silence, Silence::new(silence.connections(), silence.longest()));
        }
    }

    #[test]
    fn off_is_a_word_of_its_own() {
        assert_eq!(KeepaliveWord::new(None).get(), None);
    }
}
