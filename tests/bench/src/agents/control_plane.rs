//! The control plane that is measured, and what it has used.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use testkit::fixtures::Machine;
use testkit::kubernetes::{ApiServer, Program};

use super::objects::{self, SYSTEM};
use crate::usage;

/// An API server with its database, the controllers and the scheduler.
pub struct ControlPlane {
    api: ApiServer,
    account: PathBuf,
}

/// What a window has cost. Processor times are in seconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Cost {
    pub seconds: f64,
    pub api_server: f64,
    pub etcd: f64,
    /// Of the process with the daemons, and with the stand-in for kubelets.
    pub fleet: f64,
    pub requests: f64,
    /// Objects that watches were told of.
    pub events: f64,
    /// Those of `DaemonSet`s.
    pub set_events: f64,
    /// Of all events, as they are sent.
    pub bytes: f64,
    /// At the end, as the following ones.
    pub watches: f64,
    pub api_server_megabytes: f64,
    /// Sockets of the process with the daemons.
    pub sockets: f64,
}

impl Cost {
    /// This and so much more time of the other.
    #[must_use]
    pub fn followed_by(&self, other: &Self, seconds: f64) -> Self {
        let part = seconds / other.seconds;
        Self {
            seconds: self.seconds + seconds,
            api_server: self.api_server + other.api_server * part,
            etcd: self.etcd + other.etcd * part,
            fleet: self.fleet + other.fleet * part,
            requests: self.requests + other.requests * part,
            events: self.events + other.events * part,
            set_events: self.set_events + other.set_events * part,
            bytes: self.bytes + other.bytes * part,
            ..*self
        }
    }

    /// Per second.
    pub fn rate(&self, of: fn(&Self) -> f64) -> f64 {
        of(self) / self.seconds
    }
}

/// What the API server has counted since it started.
struct Counters {
    requests: f64,
    events: f64,
    set_events: f64,
    bytes: f64,
    watches: f64,
}

impl ControlPlane {
    /// Starts it, with the account of the daemons.
    pub fn start(machine: &Machine) -> Self {
        let api = ApiServer::start_with_controllers(&machine.netns);
        api.admin().apply(&objects::account());
        let account = api.account(SYSTEM, "balancer").kubeconfig().to_owned();
        Self { api, account }
    }

    /// The kubeconfig of who may do everything.
    pub fn admin(&self) -> &Path {
        self.api.admin().kubeconfig()
    }

    /// The kubeconfig of the daemons.
    pub fn account(&self) -> &Path {
        &self.account
    }

    /// The pod of the `DaemonSet` on a node.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod_of(&self, node: &str) -> Result<String> {
        let of_node = format!("--field-selector=spec.nodeName={node}");
        let pods = self.api.admin().get(&["pods", "-n", SYSTEM, &of_node]);
        let name = pods["items"][0]["metadata"]["name"].as_str();
        Ok(name.context("the node has no pod")?.to_owned())
    }

    /// What the time costs that `work` takes; `fleet` is the process with the daemons.
    ///
    /// # Errors
    /// When the work fails, or a process is gone.
    pub fn cost(&self, fleet: u32, work: impl FnOnce() -> Result<()>) -> Result<Cost> {
        let processes = [
            self.api.id(Program::ApiServer),
            self.api.id(Program::Etcd),
            fleet,
        ];
        let times = || -> Result<Vec<Duration>> {
            let times = processes.iter().map(|pid| usage::processor_time(*pid));
            times.collect()
        };
        // Asking costs the API server time, too: outside of what is measured.
        let counted = self.counters()?;
        let (begun, before) = (Instant::now(), times()?);
        work()?;
        let (seconds, after) = (begun.elapsed().as_secs_f64(), times()?);
        let counters = self.counters()?;
        let used = |index: usize| after[index].saturating_sub(before[index]).as_secs_f64();
        Ok(Cost {
            seconds,
            api_server: used(0),
            etcd: used(1),
            fleet: used(2),
            requests: counters.requests - counted.requests,
            events: counters.events - counted.events,
            set_events: counters.set_events - counted.set_events,
            bytes: counters.bytes - counted.bytes,
            watches: counters.watches,
            api_server_megabytes: usage::resident(processes[0])?,
            sockets: sockets(fleet)?,
        })
    }

    fn counters(&self) -> Result<Counters> {
        let text = self.api.kubectl(&["get", "--raw", "/metrics"]);
        let sum = |name: &str, label: &str| sum(&text, name, label);
        Ok(Counters {
            requests: sum("apiserver_request_total", "")?,
            events: sum("apiserver_watch_events_total", "")?,
            set_events: sum("apiserver_watch_events_total", "aemon")?,
            bytes: sum("apiserver_watch_events_sizes_sum", "")?,
            watches: sum("apiserver_longrunning_requests", "verb=\"WATCH\"")?,
        })
    }
}

/// The sum of a metric over all its series that have these words among their labels.
fn sum(text: &str, metric: &str, label: &str) -> Result<f64> {
    let mut found = false;
    let mut sum = 0.0;
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(metric) else {
            continue;
        };
        let Some((labels, value)) = rest
            .strip_prefix('{')
            .and_then(|rest| rest.rsplit_once('}'))
        else {
            continue;
        };
        found = true;
        if labels.contains(label) {
            sum += value
                .trim()
                .parse::<f64>()
                .context("a metric is a number")?;
        }
    }
    found
        .then_some(sum)
        .with_context(|| format!("the API server counts no {metric}"))
}

fn sockets(pid: u32) -> Result<f64> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).context("the process is gone")?;
    let targets = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    let sockets = targets.filter(|target| target.to_string_lossy().starts_with("socket:"));
    Ok(f64::from(u32::try_from(sockets.count())?))
}
