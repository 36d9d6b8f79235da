//! Atomic operations on map values. `core` has them for BPF only as intrinsics.

use core::intrinsics::{
    AtomicOrdering::SeqCst, atomic_and, atomic_cxchg, atomic_or, atomic_xadd, atomic_xchg,
};

/// Adds; wraps. Returns what was there.
#[inline(always)]
pub unsafe fn add(word: *mut u64, value: u64) -> u64 {
    unsafe { atomic_xadd::<u64, u64, { SeqCst }>(word, value) }
}

/// Sets bits.
#[inline(always)]
pub unsafe fn or(word: *mut u64, bits: u64) {
    unsafe { atomic_or::<u64, u64, { SeqCst }>(word, bits) };
}

/// Keeps bits.
#[inline(always)]
pub unsafe fn and(word: *mut u64, bits: u64) {
    unsafe { atomic_and::<u64, u64, { SeqCst }>(word, bits) };
}

/// Writes.
#[inline(always)]
pub unsafe fn store(word: *mut u64, value: u64) {
    unsafe { atomic_xchg::<u64, { SeqCst }>(word, value) };
}

/// Writes `new` if `old` is there; whether it was.
#[inline(always)]
pub unsafe fn replace(word: *mut u64, old: u64, new: u64) -> bool {
    unsafe { atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(word, old, new).1 }
}
