//! The kernel's own packet filter: a limit of connections by port, and a Kubernetes Service.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use testkit::fixtures::{Machine, process};

/// Seconds that connection tracking remembers a connection that was reset: at its usual 10 s some
/// rounds would fill its table.
const REMEMBERED: &str = "1";

/// Counts connections by backend port and refuses those above a limit with a RST. Goes with the
/// machine.
///
/// # Errors
/// With what nft said.
pub fn limit(machine: &Machine, ports: std::ops::RangeInclusive<u16>, limit: u32) -> Result<()> {
    let ports = format!("{}-{}", ports.start(), ports.end());
    nft(
        machine,
        &format!(
            "table ip connections {{\n\
             set backends {{ type inet_service; size 1024; flags dynamic; }}\n\
             chain input {{\n\
             type filter hook input priority 0\n\
             tcp dport {ports} ct state new add @backends {{ tcp dport ct count over {limit} }} reject with tcp reset\n\
             }}\n}}\n"
        ),
    )?;
    // There from the first rule on that tracks connections.
    machine
        .netns
        .sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", REMEMBERED);
    Ok(())
}

/// The rule of a Kubernetes Service, as kube-proxy writes it: a backend at random for each new
/// connection. Replaces one that is there.
///
/// # Errors
/// With what nft said.
pub fn service(machine: &Machine, front: SocketAddr, backends: &[SocketAddr]) -> Result<()> {
    let mut map = String::new();
    for (index, backend) in backends.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        write!(
            map,
            "{comma}{index} : {} . {}",
            backend.ip(),
            backend.port()
        )?;
    }
    // -100 is "dstnat", a word that nft does not know at this hook.
    nft(
        machine,
        &format!(
            "table ip service\nflush table ip service\n\
             table ip service {{ chain output {{\ntype nat hook output priority -100\n\
             ip daddr {} tcp dport {} dnat to numgen random mod {} map {{ {map} }}\n}}\n}}\n",
            front.ip(),
            front.port(),
            backends.len(),
        ),
    )
}

fn nft(machine: &Machine, script: &str) -> Result<()> {
    let mut nft = Command::new("nft");
    nft.args(["--file", "-"]);
    nft.stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let started = machine.netns.run(|| process::spawn(&mut nft));
    let mut process = started.context("cannot start nft: run `cargo xtask setup`")?;
    let mut input = process.stdin.take().context("its input is piped")?;
    input.write_all(script.as_bytes())?;
    drop(input);
    let output = process.wait_with_output()?;
    ensure!(
        output.status.success(),
        "nft refused: {}\n{script}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
