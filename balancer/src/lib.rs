//! The user half of the balancer: the daemon, the command line, and what both are made of.
#![deny(unsafe_code)]
// What is printed goes through the module `terminal`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod discover;
pub mod doctor;
pub mod health;
pub mod kubernetes;
pub mod metrics;
pub mod moving;
pub mod place;
pub mod quota;
pub mod rebalance;
mod sanitize;
#[expect(
    unsafe_code,
    reason = "system calls that no safe crate offers have their one place here"
)]
pub mod sys;
mod terminal;

/// The readers of untrusted bytes that only the fuzz targets need from outside.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::api::{
        client::{encode_request, read_response},
        server::{parse_request, read_line},
    };
    pub use crate::cli::{status_json, status_text};
    pub use crate::daemon::fuzzing::{OAP, plan_beside_slice, quota_beside_report};
    pub use crate::daemon::log_event;
    pub use crate::dataplane::parse_event;
    pub use crate::kubernetes::parse_report;
}
