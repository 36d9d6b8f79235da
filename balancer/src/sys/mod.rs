//! System calls, each behind a safe function. The only module of the user half with `unsafe`.

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
