//! The daemon itself, on a node without an OAP.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use testkit::fixtures::{Balancer, Machine};

use super::control_plane::ControlPlane;
use super::objects::{self, FILE, SYSTEM};
use crate::usage;

/// What it takes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Use {
    /// In MB of 10^6 bytes, as is the next one.
    pub resident: f64,
    /// Its share of the pages that several processes have.
    pub proportional: f64,
    /// In percent of a processor.
    pub processor: f64,
}

/// A daemon of this build.
pub struct Daemon<'a>(Balancer<'a>);

impl<'a> Daemon<'a> {
    /// Starts the one of the last node.
    ///
    /// # Errors
    /// When the node has no pod for it.
    pub fn start(machine: &'a Machine, plane: &ControlPlane, nodes: usize) -> Result<Self> {
        let node = objects::measured_node(nodes);
        let pod = plane.pod_of(&node)?;
        let account = plane.account().to_str().context("a path in UTF-8")?;
        let mut balancer = Balancer::prepare(machine, FILE).with_environment(&[
            ("KUBECONFIG", account),
            ("NODE_NAME", &node),
            ("POD_NAME", &pod),
            ("POD_NAMESPACE", SYSTEM),
            ("NODE_IP", "10.89.0.11"),
        ]);
        balancer.launch();
        Ok(Self(balancer))
    }

    /// What it uses while `work` is done, which returns how many seconds that took.
    ///
    /// # Errors
    /// When the work fails, or the daemon has ended.
    pub fn uses(&self, work: impl FnOnce() -> Result<()>) -> Result<Use> {
        let pid = u32::try_from(self.0.pid().as_raw())?;
        let (begun, before) = (std::time::Instant::now(), usage::processor_time(pid)?);
        work()?;
        let used = usage::processor_time(pid)?.saturating_sub(before);
        Ok(Use {
            resident: usage::resident(pid)?,
            proportional: proportional(pid)?,
            processor: percent(used, begun.elapsed()),
        })
    }
}

fn percent(used: Duration, of: Duration) -> f64 {
    used.as_secs_f64() / of.as_secs_f64() * 100.0
}

/// Its memory in megabytes of 10^6 bytes, of pages that others have as well its share.
fn proportional(pid: u32) -> Result<f64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .context("cannot read smaps_rollup of the daemon")?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kilobytes: f64 = kilobytes
        .and_then(|text| text.trim().parse().ok())
        .context("/proc/PID/smaps_rollup says Pss")?;
    Ok(kilobytes * 1024.0 / 1e6)
}
