//! What the balancer is compared with.

pub mod envoy;
pub mod haproxy;
pub mod nft;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testkit::fixtures::{Balancer, Machine};

use crate::drive::visit;
use crate::process::{Process, command};
use crate::{interrupt, serve};

/// Where every subject takes connections.
pub const FRONT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 11800);

const READY_WITHIN: Duration = Duration::from_secs(20);

/// A balancer's file: one service in front of so many backends.
pub fn balancer_file(policy: &str, backends: u16, quota: Option<u32>) -> String {
    let backends: Vec<_> = serve::backends(backends)
        .iter()
        .map(|address| format!("\"{address}\""))
        .collect();
    let quota = quota.map_or_else(String::new, |quota| {
        format!("    quota: {{ per_backend: {quota} }}\n")
    });
    format!(
        "services:\n  - name: agents\n    port: {}\n    policy: {policy}\n    backends: [{}]\n{quota}",
        FRONT.port(),
        backends.join(", ")
    )
}

/// Puts another policy in force.
pub fn set_policy(balancer: &Balancer<'_>, policy: &str, backends: u16) {
    balancer.configure(&balancer_file(policy, backends, None));
    balancer.reload();
    balancer.wait_until(|service| service.policy == policy);
}

/// A command in a machine's netns that is killed with this program. The main thread must start it:
/// it is that thread's end that kills it.
fn command_in(machine: &Machine, program: &Path) -> Command {
    let mut command = command("nsenter");
    command.arg(format!("--net={}", machine.netns.path().display()));
    command.arg("--").arg(program);
    command
}

/// Waits until a client is served at [`FRONT`].
fn wait_until_it_serves(machine: &Machine, process: &mut Process) -> Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        process.check()?;
        match machine.netns.run(|| visit(FRONT)) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| {
                    format!("nobody serves at {FRONT} after {READY_WITHIN:?}: see its log")
                });
            }
            Err(_) => interrupt::pause(Duration::from_millis(20))?,
        }
    }
}
