//! Stores that the compiler must leave apart.

/// Gives a value back, of which the compiler then knows nothing. Of constant stores side by side it
/// makes one `memset`, which in the kernel is a loop over bytes: the linker has LLVM expand such
/// calls later than it can (`-bpf-expand-memcpy-in-order`).
#[inline(always)]
pub fn opaque<T>(value: T) -> T {
    core::hint::black_box(value)
}
