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

/// Bits of a word beside the tick in it.
pub const BESIDE: u32 = 20;
/// What these bits hold at most.
pub const MOST_BESIDE: u64 = (1 << BESIDE) - 1;

/// A word of a tick and a number beside it, which is the most that fits where it is more.
#[inline(always)]
pub const fn stamped(tick: u64, beside: u64) -> u64 {
    let beside = if beside > MOST_BESIDE {
        MOST_BESIDE
    } else {
        beside
    };
    tick << BESIDE | beside
}

/// The tick of such a word.
#[inline(always)]
pub const fn tick_of(word: u64) -> u64 {
    word >> BESIDE
}

/// What such a word has beside its tick.
#[inline(always)]
pub const fn beside(word: u64) -> u64 {
    word & MOST_BESIDE
}

/// Whether something that was seen at `tick` is still so: for a while, in ticks. Another CPU may
/// have seen it after `now`.
#[inline(always)]
pub const fn lasts(tick: u64, for_ticks: u64, now: u64) -> bool {
    tick + for_ticks >= now
}
