//! Atomic operations on map values. `core` has them for BPF only as intrinsics.
//!
//! Each is unsafe for one reason: `word` must point to 8 aligned bytes of a live map element. The
//! verifier checks that. What others change there at the same time, they must change atomically.

use core::intrinsics::{
    AtomicOrdering::SeqCst, atomic_and, atomic_cxchg, atomic_or, atomic_xadd, atomic_xchg,
};

/// Adds; wraps. Returns what was there.
///
/// # Safety
/// `word` points into a live element of a map.
#[inline(always)]
pub unsafe fn add(word: *mut u64, value: u64) -> u64 {
    // SAFETY: by this function's contract.
    unsafe { atomic_xadd::<u64, u64, { SeqCst }>(word, value) }
}

/// Sets bits.
///
/// # Safety
/// `word` points into a live element of a map.
#[inline(always)]
pub unsafe fn or(word: *mut u64, bits: u64) {
    // SAFETY: by this function's contract.
    unsafe { atomic_or::<u64, u64, { SeqCst }>(word, bits) };
}

/// Keeps bits.
///
/// # Safety
/// `word` points into a live element of a map.
#[inline(always)]
pub unsafe fn and(word: *mut u64, bits: u64) {
    // SAFETY: by this function's contract.
    unsafe { atomic_and::<u64, u64, { SeqCst }>(word, bits) };
}

/// Writes a value.
///
/// # Safety
/// `word` points into a live element of a map.
#[inline(always)]
pub unsafe fn store(word: *mut u64, value: u64) {
    // SAFETY: by this function's contract.
    unsafe { atomic_xchg::<u64, { SeqCst }>(word, value) };
}

/// Writes `new` where `old` stands, and says whether it did (compare-and-swap).
///
/// # Safety
/// `word` points into a live element of a map.
#[inline(always)]
pub unsafe fn replace(word: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: by this function's contract.
    unsafe { atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(word, old, new).1 }
}
