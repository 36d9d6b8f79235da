//! System calls, each behind a safe function. Outside of this module the user half has `unsafe`
//! only to mark plain data (`dataplane/plain.rs`).

pub mod bpf;
pub mod bpffs;
pub mod clock;
pub mod file_id;
pub mod limits;
pub mod memory;
pub mod netns;
pub mod pidfd;
pub mod privileges;
pub mod shared;
pub mod sock_diag;
pub mod socket;
