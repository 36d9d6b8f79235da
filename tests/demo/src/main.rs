#![forbid(unsafe_code)]
//! Watch the balancer balance: stand-in OAPs, several hundred gRPC clients that keep their
//! connections, and the real daemon on the real kernel, in netns and cgroups of their own. What is
//! shown is held against the socket table; the exit code is 1 where something is off.
//!
//! ```text
//!   netns "node A", 10.77.0.1                                  netns "node B", 10.77.0.2
//!   clients ──► :11800 ──balancer──► oap-1 … oap-3 (, oap-4)   :11800 ──balancer──► oap-5, oap-6
//!      └───────────────── veth, when A refuses ─────────────────┘
//! ```

mod kubernetes;
mod load_generator;
mod moving;
mod node;
mod placing;
mod report;
mod scenario;

use std::process::ExitCode;
use std::time::Instant;

use testkit::fixtures::Machine;
use tokio::signal::unix::{SignalKind, signal};

use crate::report::Report;

/// What a shell gives back for a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let began = Instant::now();
    let machines = [Machine::new(), Machine::new()];
    // Clients live in node A's netns, but in no cgroup that a balancer looks at: they are somebody
    // else's sockets.
    let report = machines[0].netns.run(|| run(&machines));
    drop(machines);
    let Some(report) = report else {
        eprintln!("interrupted; everything is cleaned up");
        return ExitCode::from(INTERRUPTED);
    };
    println!(
        "\n{report}\n{:.0} s in all; netns, cgroups, pins and processes are gone.",
        began.elapsed().as_secs_f64()
    );
    if report.is_as_expected() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// `None`: somebody interrupted it. All guards have been dropped by then.
fn run(machines: &[Machine; 2]) -> Option<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime
        .expect("a tokio runtime can be started")
        .block_on(async {
            let mut interrupt = signal(SignalKind::interrupt()).expect("SIGINT can be handled");
            let mut terminate = signal(SignalKind::terminate()).expect("SIGTERM can be handled");
            tokio::select! {
                report = scenario::run(machines) => Some(report),
                _ = interrupt.recv() => None,
                _ = terminate.recv() => None,
            }
        })
}
