//! Coarse time, in which the packed words have their stamps.

/// Coarse time for packed stamps: units of 2²⁰ ns (about 1.05 ms) of `CLOCK_MONOTONIC`; compare by
/// wrapping difference.
#[inline(always)]
pub const fn ticks(monotonic_ns: u64) -> u32 {
    (monotonic_ns >> 20) as u32
}

/// Ticks of that many milliseconds, rounded down.
pub const fn ticks_of_ms(ms: u64) -> u32 {
    ((ms * 1_000_000) >> 20) as u32
}

/// Ticks of that many microseconds, rounded down, and all of 32 bits where they are more.
#[inline(always)]
pub const fn ticks_of_us(us: u64) -> u32 {
    let ticks = us.saturating_mul(1_000) >> 20;
    if ticks > u32::MAX as u64 {
        u32::MAX
    } else {
        ticks as u32
    }
}
