//! System calls that no safe crate offers, each behind a safe function.
//!
//! This is the only module of the host side that contains `unsafe`.

pub mod bpf;
pub mod bpffs;
pub mod clock;
pub mod file_id;
pub mod memory;
pub mod netns;
pub mod pidfd;
pub mod privileges;
pub mod shared;
pub mod sock_diag;
pub mod socket;
