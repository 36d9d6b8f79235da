//! What the programs need of the running kernel: its structures, atomics, memory.

pub mod atomic;
pub mod context;
pub mod offsets;
pub mod scratch;
pub mod shared;
pub mod socket;
