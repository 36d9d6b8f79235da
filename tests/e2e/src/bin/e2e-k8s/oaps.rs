//! The OAP pods, and the truth about their connections: the socket tables of their netns.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::{fmt, fs};

use anyhow::{Context, Result};
use balancer::sys::netns;
use serde_json::Value;
use testkit::fixtures::{Netns, diag};

use crate::cluster::TestCluster;
use crate::layout::{self, OAPS, PORT};
use crate::timestamp;

/// A pod that runs, and is not being ended.
pub struct Oap {
    pub name: String,
    pub node: String,
    pub address: IpAddr,
    pub ready: bool,
    netns: Netns,
    /// The cookie of its netns, by which the balancer knows it.
    pub cookie: u64,
}

/// The connections that a pod holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// All of them.
    pub established: u32,
    /// Those among them that no quota is for: of other OAPs, and from the addresses of the pod's
    /// own node. These are probes of its kubelet, and what its kube-proxy translates: clients from
    /// outside that come in at this node.
    pub exempt: u32,
}

impl Held {
    /// Those that the quota is for.
    pub const fn admitted(self) -> u32 {
        self.established - self.exempt
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.exempt {
            0 => write!(f, "{}", self.established),
            exempt => write!(f, "{} ({exempt})", self.established),
        }
    }
}

/// The OAPs that run on nodes that run, by name.
///
/// # Errors
/// When the API server does not answer, or a pod ends meanwhile.
pub fn look(cluster: &TestCluster) -> Result<Vec<Oap>> {
    let list = cluster.get(&["pods", "-n", OAPS, "-l", "component=oap"])?;
    let items = list["items"].as_array().context("a list has items")?;
    let running = items.iter().filter(|pod| {
        pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["phase"] == "Running"
    });
    let mut oaps = Vec::new();
    for pod in running {
        let node = text(&pod["spec"]["nodeName"])?;
        if cluster.kubernetes.runs(&node) {
            oaps.push(Oap::of(pod, node)?);
        }
    }
    oaps.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(oaps)
}

impl Oap {
    fn of(pod: &Value, node: String) -> Result<Self> {
        let uid = text(&pod["metadata"]["uid"])?;
        let process = process_of(&uid)?;
        let netns = Netns::of_process(process).context("the pod has ended")?;
        let cookie = netns::open(&netns.path()).and_then(netns::cookie_of);
        Ok(Self {
            name: text(&pod["metadata"]["name"])?,
            node,
            address: text(&pod["status"]["podIP"])?.parse()?,
            ready: is_ready(pod),
            netns,
            cookie: cookie.context("cannot read the cookie of the pod's netns")?,
        })
    }

    /// What the socket table of its netns holds.
    pub fn held(&self, peers: &BTreeSet<IpAddr>) -> Held {
        let rows = self.netns.run(|| diag::accepted(PORT));
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let node = layout::addresses(&self.node);
        let exempt = rows.iter().filter(|row| {
            let source = row.remote.ip();
            peers.contains(&source) || node.contains(&source)
        });
        Held {
            exempt: number(exempt.count()),
            established: number(rows.len()),
        }
    }

    /// Does something in the pod's network.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.run(work)
    }

    /// When it began to listen.
    ///
    /// # Errors
    /// When its log can't be read.
    pub fn listens_since(&self, cluster: &TestCluster) -> Result<u64> {
        let log = cluster.kubectl(&["logs", "-n", OAPS, &self.name, "--timestamps"])?;
        let line = log.lines().find(|line| line.contains("listening on"));
        line.and_then(timestamp::of_line)
            .with_context(|| format!("{} has not said that it listens: {log}", self.name))
    }
}

/// A process of a pod, by the pod's cgroup.
pub fn process_of(uid: &str) -> Result<u32> {
    let processes = fs::read_dir("/proc").context("cannot list the processes")?;
    let ids = processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.into_iter()
        .find(|id: &u32| {
            let cgroups = fs::read_to_string(format!("/proc/{id}/cgroup"));
            cgroups.is_ok_and(|cgroups| cgroups.contains(uid))
        })
        .with_context(|| format!("no process belongs to the pod {uid}"))
}

/// Whether it is, as the API server knows it. (What it says of the containers stays as it was when
/// their node dies.)
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// A string of an object.
pub fn text(value: &Value) -> Result<String> {
    let text = value.as_str().map(str::to_owned);
    text.context("the API server does not say what it should yet")
}
