//! What is there: the kernel's structure layouts, network namespaces, mounts, listening sockets.
//!
//! Everything here only reads.

mod kernel;

pub use kernel::{KernelOffsets, kernel_offsets};
