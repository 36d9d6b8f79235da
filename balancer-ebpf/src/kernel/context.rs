//! Reads of the contexts that the kernel gives to programs.

/// Reads a field of a program's context; volatile, because the verifier forbids what the compiler
/// likes to do: to choose among fields by arithmetic on the pointer. Arrays are read word by word,
/// as the verifier demands.
macro_rules! context {
    ($context:expr, local_ip6) => {
        $crate::kernel::context::words!($context, local_ip6)
    };
    ($context:expr, remote_ip6) => {
        $crate::kernel::context::words!($context, remote_ip6)
    };
    ($context:expr, user_ip6) => {
        $crate::kernel::context::words!($context, user_ip6)
    };
    ($context:expr, $field:ident) => {
        // SAFETY: the field of a live context: the verifier checks it, as a read of this size.
        unsafe { core::ptr::read_volatile(&raw const (*$context).$field) }
    };
}
pub(crate) use context;

macro_rules! words {
    ($context:expr, $field:ident) => {
        // SAFETY: the field of a live context: the verifier checks it, as a read of this size.
        unsafe {
            [
                core::ptr::read_volatile(&raw const (*$context).$field[0]),
                core::ptr::read_volatile(&raw const (*$context).$field[1]),
                core::ptr::read_volatile(&raw const (*$context).$field[2]),
                core::ptr::read_volatile(&raw const (*$context).$field[3]),
            ]
        }
    };
}
pub(crate) use words;
