//! The balancer in front of real `SkyWalking`: three clustered OAP servers, Java and Python agents,
//! an Envoy that sends access logs.
//!
//! Everything runs in a netns and a cgroup of the run's own. What it needs is fetched once with
//! Maven and pip and kept in `<target directory>/e2e-oap`. Each row of the table that it prints is
//! a check; the first difference ends the run.
#![forbid(unsafe_code)]

mod access_logs;
mod agents;
mod checks;
mod cluster;
mod fixture;
mod layout;
mod scenario;
mod sockets;

use std::process::ExitCode;

use anyhow::Result;

use e2e::oap::cache::Cache;
use testkit::scenario::{Report, interrupt};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("e2e oap failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    interrupt::watch()?;
    let cache = Cache::prepare()?;
    let mut report = Report::begin();
    scenario::run(&cache, &mut report)?;
    report.end()
}
