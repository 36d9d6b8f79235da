//! All that runs, and what can be seen of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result};

use crate::clients::Clients;
use crate::cluster::TestCluster;
use crate::daemons::{self, DaemonPod, Group, Way};
use crate::kernel;
use crate::oaps::{self, Held, Oap};
use crate::recording::Recording;

/// All that runs. Its parts are dropped in this order.
pub struct Fixture {
    pub clients: Option<Clients>,
    /// The OAPs as of the last look.
    pub oaps: Vec<Oap>,
    /// The daemons as of the last look, by node.
    pub daemons: BTreeMap<String, DaemonPod>,
    pub cluster: TestCluster,
    /// Addresses of pods have come to mean others, so that they no longer tell which connections
    /// were exempt when they were accepted.
    pub reused: bool,
    /// The largest number of connections that an OAP held, by the mean, without the balancer.
    pub uneven: f64,
    /// Connections of the OAPs while the main events happened.
    pub recordings: Vec<Recording>,
}

impl Fixture {
    /// The cluster, and nothing in it yet.
    pub fn new(cluster: TestCluster) -> Self {
        Self {
            clients: None,
            oaps: Vec::new(),
            daemons: BTreeMap::new(),
            cluster,
            reused: false,
            uneven: 1.0,
            recordings: Vec::new(),
        }
    }

    /// The clients, once they were started.
    ///
    /// # Errors
    /// Before.
    pub fn clients(&self) -> Result<&Clients> {
        self.clients.as_ref().context("the clients do not run yet")
    }

    /// Looks which pods there are.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn look(&mut self) -> Result<()> {
        self.oaps = oaps::look(&self.cluster)?;
        self.daemons = daemons::look(&self.cluster)?;
        Ok(())
    }

    /// What each OAP holds, by the socket tables.
    pub fn held(&self) -> Vec<Held> {
        let peers = self.peers();
        self.oaps.iter().map(|oap| oap.held(&peers)).collect()
    }

    /// How connections are shown: with those that are exempt, where that can be told.
    pub fn show(&self, held: Vec<Held>) -> String {
        slashed(held.into_iter().map(|held| Held {
            exempt: if self.reused { 0 } else { held.exempt },
            ..held
        }))
    }

    /// The addresses of the OAPs.
    pub fn peers(&self) -> BTreeSet<IpAddr> {
        self.oaps.iter().map(|oap| oap.address).collect()
    }

    /// What each OAP holds, by the daemons' word; an OAP that none of them knows is an error.
    ///
    /// # Errors
    /// With what they complain about.
    pub fn counted(&self, way: Way) -> Result<Vec<Held>> {
        let mut by_cookie: BTreeMap<u64, Held> = BTreeMap::new();
        for daemon in self.daemons.values() {
            let status = daemon.status(&self.cluster, way)?;
            for backend in status.services.iter().flat_map(|service| &service.backends) {
                let counted = by_cookie.entry(backend.netns).or_default();
                counted.established += backend.established;
                counted.exempt += backend.exempt;
            }
        }
        let counted = self.oaps.iter().map(|oap| {
            let counted = by_cookie.get(&oap.cookie).copied();
            counted.with_context(|| format!("no daemon knows {}", oap.name))
        });
        counted.collect()
    }

    /// What the daemon of each node knows of the OAPs of all nodes.
    ///
    /// # Errors
    /// With what they complain about.
    pub fn groups(&self, way: Way) -> Result<Vec<Group>> {
        let groups = self.daemons.values().map(|daemon| {
            let status = daemon.cluster_status(&self.cluster, way)?;
            status.group().cloned()
        });
        groups.collect()
    }

    /// The programs in the kernel, of all nodes.
    pub fn programs(&self) -> BTreeSet<u32> {
        let nodes = self.daemons.keys();
        nodes
            .flat_map(|node| kernel::programs(&self.cluster, node))
            .collect()
    }

    /// Writes down what the daemons have logged, as far as they are still there.
    pub fn keep_logs(&self) {
        let directory = self.cluster.logs();
        for daemon in self.daemons.values() {
            let log = either(daemon.log(&self.cluster, &[]));
            let file = directory.join(format!("{}-{}.log", daemon.node, daemon.name));
            if let Err(error) = fs::write(&file, log) {
                eprintln!("cannot write {}: {error}", file.display());
            }
        }
    }

    /// What helps to understand a failure.
    pub fn explain(&mut self) {
        if let Err(error) = self.look() {
            eprintln!("{error:#}");
        }
        let held: Vec<_> = self.held();
        for (oap, held) in self.oaps.iter().zip(held) {
            eprintln!("{} on {}: {held:?}", oap.name, oap.node);
        }
        for (node, daemon) in &self.daemons {
            for arguments in [&["status"][..], &["status", "--cluster"]] {
                let said = daemon.ask(&self.cluster, Way::OnNode, arguments);
                eprintln!(
                    "--- balancer {} on {node} ---\n{}",
                    arguments.join(" "),
                    either(said)
                );
            }
        }
        eprintln!(
            "--- the logs of the daemons are in {} ---",
            self.cluster.logs().display()
        );
    }
}

fn either(said: Result<String>) -> String {
    said.unwrap_or_else(|error| format!("{error:#}"))
}

/// The largest by the mean.
pub fn unevenness(held: &[u32]) -> f64 {
    let sum: u32 = held.iter().sum();
    let largest = held.iter().max().copied().unwrap_or(0);
    let number = u32::try_from(held.len()).unwrap_or(u32::MAX);
    if sum == 0 {
        return 1.0;
    }
    f64::from(largest) * f64::from(number) / f64::from(sum)
}

/// `a/b/c`
pub fn slashed<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    items.join("/")
}
