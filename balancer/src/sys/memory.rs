//! Memory that is free and still the process's.

/// Gives memory that was freed back to the kernel. Reading the kernel's type information takes some
/// 20 MB for a moment, in small pieces, and a large socket table as much: the C library would keep
/// most of it.
pub fn give_back() {
    // SAFETY: `malloc_trim` takes a number and touches only memory that nobody has
    // (malloc_trim(3)).
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}
