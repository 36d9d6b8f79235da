//! Reads of what other CPUs and the daemon change meanwhile.

/// Reads a field of a map's element once and whole: volatile, like `READ_ONCE` of the kernel,
/// because the compiler may otherwise read it again at each use, and judge by two values of it.
macro_rules! shared {
    ($element:expr, $field:ident) => {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program. Should
        // it be reused for another meanwhile: any bytes are a value.
        unsafe { core::ptr::read_volatile(&raw const (*$element).$field) }
    };
    ($element:expr, $field:ident[$index:expr]) => {
        // SAFETY: as above.
        unsafe { core::ptr::read_volatile(&raw const (*$element).$field[$index]) }
    };
    ($element:expr, $field:ident as $type:ty) => {
        // SAFETY: as above, and the field has the size and the alignment of this type.
        unsafe { core::ptr::read_volatile((&raw const (*$element).$field).cast::<$type>()) }
    };
}
pub(crate) use shared;
