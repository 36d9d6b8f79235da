//! Stores that the compiler must leave apart.

/// The same value, of which the compiler knows nothing. It makes one `memset` of constant stores
/// side by side, which in the kernel is a loop over bytes: the linker has LLVM expand such calls
/// later than it can (`-bpf-expand-memcpy-in-order`).
#[inline(always)]
pub fn opaque<T>(value: T) -> T {
    core::hint::black_box(value)
}
