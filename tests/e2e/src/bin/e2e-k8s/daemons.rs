//! The balancer's pods, and what they say.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;
use serde::Deserialize;
use testkit::fixtures::Status;
use testkit::scenario::interrupt;

use crate::cluster::TestCluster;
use crate::layout::{RELEASE, SYSTEM};
use crate::oaps::{is_ready, text};

/// A pod that is not being ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonPod {
    pub name: String,
    pub uid: String,
    pub node: String,
    pub ready: bool,
    pub restarts: u64,
}

/// How a daemon is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// With `kubectl exec`, as people do.
    Exec,
    /// With a program on its node, which works without an API server.
    OnNode,
}

/// What `status --cluster` says, as far as it is looked at.
#[derive(Clone, Debug, Deserialize)]
pub struct ClusterStatus {
    pub node: String,
    pub complete: bool,
    pub silent_seconds: u64,
    pub problems: Vec<String>,
    pub groups: Vec<Group>,
}

/// The backends of one Service.
#[derive(Clone, Debug, Deserialize)]
pub struct Group {
    pub entry: String,
    pub service: Named,
    pub port: u16,
    pub sentence: String,
    pub backends: Vec<Backend>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Named {
    pub namespace: String,
    pub name: String,
}

/// A pod on any node.
#[derive(Clone, Debug, Deserialize)]
pub struct Backend {
    pub pod: Named,
    pub terminating: bool,
    pub established: Option<u32>,
    pub exempt: Option<u32>,
    pub quota: Option<u32>,
}

/// The daemons on nodes that run, by node.
///
/// # Errors
/// When the API server does not answer.
pub fn look(cluster: &TestCluster) -> Result<BTreeMap<String, DaemonPod>> {
    let instance = format!("app.kubernetes.io/instance={RELEASE}");
    let list = cluster.get(&["pods", "-n", SYSTEM, "-l", &instance])?;
    let items = list["items"].as_array().context("a list has items")?;
    let mut daemons = BTreeMap::new();
    for pod in items {
        let node = text(&pod["spec"]["nodeName"])?;
        if !pod["metadata"]["deletionTimestamp"].is_null() || !cluster.kubernetes.runs(&node) {
            continue;
        }
        let container = &pod["status"]["containerStatuses"][0];
        let daemon = DaemonPod {
            name: text(&pod["metadata"]["name"])?,
            uid: text(&pod["metadata"]["uid"])?,
            node: node.clone(),
            ready: is_ready(pod),
            restarts: container["restartCount"].as_u64().unwrap_or(0),
        };
        daemons.insert(node, daemon);
    }
    Ok(daemons)
}

impl DaemonPod {
    /// Asks it.
    ///
    /// # Errors
    /// With what it complains about.
    pub fn ask(&self, cluster: &TestCluster, way: Way, arguments: &[&str]) -> Result<String> {
        match way {
            Way::Exec => {
                let exec = ["exec", "-n", SYSTEM, &self.name, "--", "balancer"];
                cluster.kubectl(&[&exec[..], arguments].concat())
            }
            Way::OnNode => cluster.balancer(&self.node, arguments),
        }
    }

    /// `balancer status`
    ///
    /// # Errors
    /// With what it complains about.
    pub fn status(&self, cluster: &TestCluster, way: Way) -> Result<Status> {
        let text = self.ask(cluster, way, &["status", "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("cannot read this status: {text}"))
    }

    /// `balancer status --cluster`
    ///
    /// # Errors
    /// With what it complains about, and when it knows of another group than that of the OAPs.
    pub fn cluster_status(&self, cluster: &TestCluster, way: Way) -> Result<ClusterStatus> {
        let text = self.ask(cluster, way, &["status", "--cluster", "-o", "json"])?;
        let status: ClusterStatus = serde_json::from_str(&text)
            .with_context(|| format!("cannot read this status: {text}"))?;
        ensure!(
            status.groups.len() < 2 && status.node == self.node,
            "it is not of {}, or of several groups: {text}",
            self.node
        );
        Ok(status)
    }

    /// The process, by the id that it has here.
    ///
    /// # Errors
    /// When there is none within a time.
    pub fn process(&self) -> Result<Pid> {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let processes = fs::read_dir("/proc").context("cannot list the processes")?;
            for entry in processes.flatten() {
                let read =
                    |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
                if read("comm").trim() == "balancer"
                    && read("cgroup").contains(&self.uid)
                    && read("cmdline").split('\0').nth(1) == Some("run")
                {
                    let id = entry.file_name().to_string_lossy().parse()?;
                    return Ok(Pid::from_raw(id));
                }
            }
            interrupt::pause(Duration::from_millis(50))?;
        }
        bail!("no process of {} is a daemon", self.name)
    }

    /// How many seccomp filters its system calls go through.
    ///
    /// # Errors
    /// When it does not run.
    pub fn seccomp_filters(&self) -> Result<u32> {
        let status = format!("/proc/{}/status", self.process()?);
        let status =
            fs::read_to_string(&status).with_context(|| format!("cannot read {status}"))?;
        let filters = status
            .lines()
            .find_map(|line| line.strip_prefix("Seccomp_filters:"));
        let filters = filters.context("the kernel does not tell the number of seccomp filters")?;
        Ok(filters.trim().parse()?)
    }

    /// What it has logged; `options` are those of `kubectl logs`.
    ///
    /// # Errors
    /// When there is no API server.
    pub fn log(&self, cluster: &TestCluster, options: &[&str]) -> Result<String> {
        cluster.kubectl(&[&["logs", "-n", SYSTEM, &self.name], options].concat())
    }
}

impl ClusterStatus {
    /// The group of the OAPs.
    ///
    /// # Errors
    /// When it is not known yet.
    pub fn group(&self) -> Result<&Group> {
        let node = &self.node;
        self.groups
            .first()
            .with_context(|| format!("{node} knows of no OAPs yet"))
    }
}
