//! The pods with Java agents.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use testkit::fixtures::Netns;
use testkit::fixtures::diag::{self, State};

use crate::cluster::TestCluster;
use crate::layout::{PORT, WORKLOADS};
use crate::oaps::{process_of, text};

/// Between two looks whether an agent has a connection.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// A pod that runs, and is not being ended.
pub struct AgentPod {
    pub pod: String,
    pub address: IpAddr,
    /// By which its segments are known.
    pub service: String,
    netns: Netns,
}

/// Those that there are, by name.
///
/// # Errors
/// When the API server does not answer, or a pod ends meanwhile.
pub fn look(cluster: &TestCluster) -> Result<Vec<AgentPod>> {
    let list = cluster.get(&["pods", "-n", WORKLOADS, "-l", "app=workload"])?;
    let items = list["items"].as_array().context("a list has items")?;
    let running = items.iter().filter(|pod| {
        pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["phase"] == "Running"
    });
    let agents = running.map(|pod| {
        let name = text(&pod["metadata"]["name"])?;
        let uid = text(&pod["metadata"]["uid"])?;
        let netns = Netns::of_process(process_of(&uid)?);
        Ok(AgentPod {
            address: text(&pod["status"]["podIP"])?.parse()?,
            service: format!("{name}.{uid}"),
            netns: netns.context("the pod has ended")?,
            pod: name,
        })
    });
    let mut agents: Vec<_> = agents.collect::<Result<_>>()?;
    agents.sort_by(|a, b| a.pod.cmp(&b.pod));
    Ok(agents)
}

impl AgentPod {
    /// How many segments its agent has made.
    ///
    /// # Errors
    /// When its log can't be read.
    pub fn made(&self, cluster: &TestCluster) -> Result<u32> {
        let log = cluster.kubectl(&["logs", "-n", WORKLOADS, &self.pod, "--tail=50"])?;
        let mut numbers = log.lines().rev();
        let last = numbers.find_map(|line| line.strip_prefix("made ")?.parse::<u32>().ok());
        Ok(last.map_or(0, |last| last + 1))
    }

    /// Whether it has seen a refusal.
    ///
    /// # Errors
    /// When its log can't be read.
    pub fn was_refused(&self, cluster: &TestCluster) -> Result<bool> {
        let log = cluster.kubectl(&["logs", "-n", WORKLOADS, &self.pod])?;
        Ok(log.contains("Connection refused"))
    }
}

/// A watch over the connections of agents, until it is told to end.
pub struct Watch {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Watch {
    /// Watches these from now on.
    pub fn start(agents: &[AgentPod]) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let namespaces: Vec<_> = agents.iter().map(|agent| agent.netns.share()).collect();
        let told = Arc::clone(&ends);
        Self {
            ends,
            thread: thread::spawn(move || watch(&namespaces, &told)),
        }
    }

    /// For how long one of them was without a connection, at most.
    ///
    /// # Errors
    /// When the watch failed.
    pub fn longest_outage(self) -> Result<Duration> {
        self.ends.store(true, Ordering::Relaxed);
        let outage = self.thread.join();
        outage.map_err(|_| anyhow!("the watch over connections failed, see above"))
    }
}

fn watch(namespaces: &[Netns], ends: &AtomicBool) -> Duration {
    let mut connected = vec![Instant::now(); namespaces.len()];
    let mut longest = Duration::ZERO;
    while !ends.load(Ordering::Relaxed) {
        for (netns, connected) in namespaces.iter().zip(&mut connected) {
            if netns.run(has_a_connection) {
                *connected = Instant::now();
            } else {
                longest = longest.max(connected.elapsed());
            }
        }
        thread::sleep(BETWEEN_LOOKS);
    }
    longest
}

fn has_a_connection() -> bool {
    let table = diag::table(State::Established);
    table.iter().any(|row| row.remote.port() == PORT)
}
