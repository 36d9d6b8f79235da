//! Integration tests on the real kernel, each on a machine (network namespace and cgroup) of its own. They need root.
#![forbid(unsafe_code)]

mod admission;
mod config_errors;
mod cookies;
mod counting;
mod doctor;
mod exit;
mod explain;
mod fixtures;
mod lifecycle;
mod load;
mod neighbours;
mod policies;
mod queue;
mod reasons;
mod sockets;
mod support;
