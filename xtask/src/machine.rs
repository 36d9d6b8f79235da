//! What the machine itself must allow for the tests and the demo on the running kernel. It can't be
//! installed: where it is missing they fail, before anything is built.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command;

/// Capabilities by name and number (`include/uapi/linux/capability.h`).
const CAPABILITIES: [(&str, u32); 3] = [
    ("CAP_NET_ADMIN", 12),
    ("CAP_SYS_ADMIN", 21),
    ("CAP_BPF", 39),
];

/// Checks that programs can be loaded into this kernel, and that network namespaces and cgroups can
/// be made.
///
/// # Errors
/// Names everything that is missing, and what to do about each.
pub fn check() -> Result<()> {
    let checks = [root(), capabilities(), btf(), cgroup2(), namespaces()];
    let lacks: Vec<String> = checks.into_iter().flatten().collect();
    if lacks.is_empty() {
        return Ok(());
    }
    bail!(
        "this machine can't run it: it loads programs into the running kernel, in network namespaces and cgroups of its own.\n  - {}",
        lacks.join("\n  - ")
    );
}

/// The effective user id of this process.
pub fn effective_user() -> Option<u32> {
    own_status("Uid:")?.split_whitespace().nth(1)?.parse().ok()
}

fn root() -> Option<String> {
    (effective_user() != Some(0))
        .then(|| "not root: run it as root (sudo -E cargo xtask …)".to_owned())
}

fn capabilities() -> Option<String> {
    let held = u64::from_str_radix(own_status("CapEff:")?.trim(), 16).unwrap_or(0);
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(_, bit)| held >> bit & 1 == 0)
        .map(|(name, _)| *name)
        .collect();
    (!missing.is_empty()).then(|| {
        format!(
            "{} missing: in a container, start it privileged",
            missing.join(", ")
        )
    })
}

fn btf() -> Option<String> {
    let missing = !Path::new("/sys/kernel/btf/vmlinux").is_file();
    missing.then(|| "no /sys/kernel/btf/vmlinux: use a kernel built with CONFIG_DEBUG_INFO_BTF, as every distribution's is".to_owned())
}

fn cgroup2() -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = mounts.lines().any(|mount| mount.contains(" - cgroup2 "));
    (!mounted).then(|| {
        "no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified".to_owned()
    })
}

fn namespaces() -> Option<String> {
    let made = command::output(Command::new("unshare").args(["--net", "true"])).is_some();
    (!made).then(|| "cannot make a network namespace (unshare --net): CAP_SYS_ADMIN or CONFIG_NET_NS is missing".to_owned())
}

fn own_status(field: &str) -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .map(str::to_owned)
}
