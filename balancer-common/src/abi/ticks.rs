//! Coarse time, in which the packed words have their stamps.

/// Coarse time for packed stamps: units of 2²⁰ ns (about 1.05 ms) of `CLOCK_MONOTONIC`, below
/// 2⁴⁴. It never begins anew, so that no stamp, however old, looks like another.
#[inline(always)]
pub const fn ticks(monotonic_ns: u64) -> u64 {
    monotonic_ns >> 20
}

/// Ticks of that many milliseconds, rounded down.
pub const fn ticks_of_ms(ms: u64) -> u64 {
    ticks(ms * 1_000_000)
}

/// Ticks of that many microseconds, rounded down, and the most that there are where they are more.
#[inline(always)]
pub const fn ticks_of_us(us: u64) -> u64 {
    ticks(us.saturating_mul(1_000))
}
