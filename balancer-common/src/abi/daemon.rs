//! What the daemon says of itself.

/// Value of HEARTBEAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Heartbeat {
    /// When the daemon last lived, ns of `CLOCK_MONOTONIC` (`bpf_ktime_get_ns`). Atomic.
    pub last_ns: u64,
    /// After how many ns of silence the kernel stops refusing. Atomic.
    pub limit_ns: u64,
}

impl Heartbeat {
    /// Whether the kernel must not refuse any more.
    #[inline(always)]
    pub const fn is_stale(&self, now_ns: u64) -> bool {
        now_ns > self.last_ns && now_ns - self.last_ns > self.limit_ns
    }
}

/// Value of AUDIT: how COUNTS compares with the socket table. Written by the daemon, each word
/// atomically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AuditTotals {
    /// Comparisons made.
    pub checks: u64,
    /// Connections by which counts were lastingly off at the last comparison, all backends
    /// together.
    pub drift: u64,
    /// Counts that were put right, ever.
    pub repairs: u64,
    /// When the last comparison ended, ns of `CLOCK_MONOTONIC`.
    pub last_ns: u64,
    /// Processor time that it took, ns.
    pub cost_ns: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Stale once is stale until the next beat, however old it is; one that another CPU has
        /// just given is not.
        #[test]
        fn only_silence_makes_it_stale(last_ns in 0..1_u64 << 62, limit_ns in 0..1_u64 << 62, age in 0..1_u64 << 62) {
            let beat = Heartbeat { last_ns, limit_ns };
            prop_assert_eq!(beat.is_stale(last_ns + age), age > limit_ns);
            prop_assert!(!beat.is_stale(last_ns.saturating_sub(age)));
        }
    }

    #[test]
    fn heartbeat_goes_stale_after_its_limit() {
        let beat = Heartbeat {
            last_ns: 100,
            limit_ns: 10,
        };
        assert!(!beat.is_stale(90));
        assert!(!beat.is_stale(110));
        assert!(beat.is_stale(111));
    }
}
