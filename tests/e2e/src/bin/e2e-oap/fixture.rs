//! All that runs, and what can be seen of it.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use e2e::oap::cache::Cache;
use e2e::oap::graphql::{self, Segments};
use testkit::fixtures::{Balancer, Machine};

use crate::access_logs::Envoy;
use crate::agents::{Agent, Kind};
use crate::cluster::Cluster;
use crate::layout::{self, AGENTS, NODES, Service, VIRTUAL};
use crate::sockets::{self, Connection};
use testkit::scenario::Check;

/// All that runs. Its parts are dropped in this order.
pub struct Fixture<'a> {
    cache: &'a Cache,
    pub agents: Vec<Agent>,
    /// How many agents were started.
    started: usize,
    pub envoy: Option<Envoy>,
    pub cluster: Cluster,
    pub balancer: Balancer<'a>,
}

impl<'a> Fixture<'a> {
    /// Starts the daemon, then the OAPs, and does not wait for these.
    ///
    /// # Errors
    /// When a process cannot be started.
    pub fn start(cache: &'a Cache, machine: &'a Machine) -> Result<Self> {
        // Before the OAPs: their listeners are registered as they appear.
        let balancer = Balancer::start(machine, &layout::configuration());
        Ok(Self {
            cache,
            agents: Vec::new(),
            started: 0,
            envoy: None,
            cluster: Cluster::start(cache)?,
            balancer,
        })
    }

    /// Starts one more agent of each of these kinds, behind the virtual port; returns their names.
    ///
    /// # Errors
    /// When a process cannot be started.
    pub fn start_agents(&mut self, kinds: &[Kind]) -> Result<BTreeSet<String>> {
        self.start_agents_of(&layout::one_address(), kinds)
    }

    /// The same for agents that report elsewhere.
    ///
    /// # Errors
    /// When a process cannot be started.
    pub fn start_agents_of(&mut self, collector: &str, kinds: &[Kind]) -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for kind in kinds {
            let number = self.started + 1;
            let agent = Agent::start(self.cache, *kind, collector, number)?;
            self.started = number;
            names.insert(agent.name().to_owned());
            self.agents.push(agent);
        }
        Ok(names)
    }

    /// Starts Envoy.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start_envoy(&mut self) -> Result<()> {
        self.envoy = Some(Envoy::start(self.cache)?);
        Ok(())
    }

    /// Envoy, once it was started.
    ///
    /// # Errors
    /// Before.
    pub fn envoy(&mut self) -> Result<&mut Envoy> {
        self.envoy.as_mut().context("Envoy was not started")
    }

    /// The agents of these names.
    pub fn select<'n>(
        &self,
        names: &'n BTreeSet<String>,
    ) -> impl Iterator<Item = &Agent> + use<'_, 'n, 'a> {
        self.agents
            .iter()
            .filter(|agent| names.contains(agent.name()))
    }

    /// The quotas of a service's active backends, by OAP.
    pub fn quotas(&self, service: Service) -> String {
        let status = self.balancer.status();
        let backends = &status.service(service.name).backends;
        slashed((0..NODES).map(|index| {
            let active = backends.iter().find(|backend| {
                backend.address == service.backend(index) && backend.state == "active"
            });
            active
                .and_then(|backend| backend.quota)
                .map_or("-".to_owned(), |quota| quota.to_string())
        }))
    }

    /// What `status` says of how a service's active backends serve, by OAP, with its reason.
    pub fn health(&self, service: Service) -> Vec<(String, Option<String>)> {
        let status = self.balancer.status();
        let backends = &status.service(service.name).backends;
        let health = |index| {
            let health = backends.iter().find_map(|backend| {
                let health = backend.health.as_ref()?;
                (backend.address == service.backend(index)).then_some(health)
            });
            health.map_or(("-".to_owned(), None), |health| {
                (health.state.clone(), health.reason.clone())
            })
        };
        (0..NODES).map(health).collect()
    }

    /// Look-ups of `agents` that were refused for the quota.
    pub fn refusals(&self) -> u64 {
        self.balancer
            .status()
            .service(AGENTS.name)
            .verdicts("over-quota")
    }

    /// The connections that the OAPs hold, by the socket table.
    pub fn loads(&self, service: Service) -> Result<Loads> {
        let mut loads = Loads::default();
        for Connection {
            local,
            peer,
            process,
        } in sockets::established()?
        {
            let owner = process.and_then(|process| self.cluster.index_of(process));
            let Some(index) = owner.filter(|_| service.ports().contains(&local.port())) else {
                continue;
            };
            if layout::is_peer(peer.ip()) {
                loads.exempt[index] += 1;
            } else {
                loads.connections[index] += 1;
            }
        }
        Ok(loads)
    }

    /// The connections from OAP to OAP, as `1>2`, sorted.
    pub fn links(&self) -> Result<Vec<String>> {
        let mut links = Vec::new();
        for Connection { peer, process, .. } in sockets::established()? {
            let from = process.and_then(|process| self.cluster.index_of(process));
            let to = (0..NODES).find(|index| peer == AGENTS.backend(*index));
            if let (Some(from), Some(to)) = (from, to) {
                links.push(link(from, to));
            }
        }
        links.sort();
        Ok(links)
    }

    /// The OAPs that the agents are connected to.
    pub fn homes(&self) -> Result<Vec<(String, usize)>> {
        let connections = sockets::established()?;
        let home = |agent: &Agent| {
            let own = connections
                .iter()
                .find(|end| end.process == Some(agent.process()) && end.peer.ip() == VIRTUAL)?;
            let other = connections.iter().find(|end| end.peer == own.local)?;
            Some((
                agent.name().to_owned(),
                self.cluster.index_of(other.process?)?,
            ))
        };
        Ok(self.agents.iter().filter_map(home).collect())
    }

    /// The agents that are connected to an OAP.
    pub fn agents_of(&self, index: usize) -> Result<BTreeSet<String>> {
        let homes = self.homes()?.into_iter();
        Ok(homes
            .filter(|(_, home)| *home == index)
            .map(|(name, _)| name)
            .collect())
    }

    /// What each OAP has stored; nothing for one that is down.
    pub fn stored_segments(&self) -> Result<Vec<Segments>> {
        let running = self.cluster.running();
        (0..NODES)
            .map(|index| {
                if running.contains(&index) {
                    graphql::segments(Cluster::rest(index))
                } else {
                    Ok(Segments::new())
                }
            })
            .collect()
    }

    /// How many different access logs the OAPs have stored.
    pub fn stored_access_logs(&self) -> Result<usize> {
        let mut numbers = BTreeSet::new();
        for index in self.cluster.running() {
            numbers.extend(graphql::access_logs(Cluster::rest(index))?);
        }
        Ok(numbers.len())
    }

    /// What must be gone afterwards.
    pub fn traces(&self) -> Traces {
        let mut processes = self.cluster.processes();
        processes.extend(self.agents.iter().map(Agent::process));
        processes.extend(self.envoy.iter().map(Envoy::process));
        Traces {
            processes,
            pins: self.balancer.state().to_owned(),
        }
    }

    fn connections_by_owner(&self) -> String {
        let owner = |process: u32| {
            let node = self.cluster.index_of(process);
            let agent = self.agents.iter().find(|agent| agent.process() == process);
            node.map(|index| format!("OAP {}", index + 1))
                .or_else(|| agent.map(|agent| agent.name().to_owned()))
        };
        let line = |end: Connection| {
            let owner = end.process.and_then(owner)?;
            Some(format!("{owner}: {} - {}\n", end.local, end.peer))
        };
        let mut lines: Vec<_> = match sockets::established() {
            Ok(table) => table.into_iter().filter_map(line).collect(),
            Err(error) => return format!("{error:#}"),
        };
        lines.sort();
        lines.concat()
    }

    /// What helps to understand a failure.
    pub fn explain(&self) {
        let status = self.balancer.verb(&["status"]);
        eprintln!(
            "--- balancer status ---\n{}{}",
            status.stdout, status.stderr
        );
        eprintln!("--- connections ---\n{}", self.connections_by_owner());
        eprintln!("--- log of the daemon ---\n{}", self.balancer.logs());
        eprintln!(
            "--- the other logs are in {} ---",
            self.cache.logs().display()
        );
    }
}

/// What each OAP holds: connections of clients, and those of the other OAPs.
#[derive(Default)]
pub struct Loads {
    pub connections: [u32; NODES],
    pub exempt: [u32; NODES],
}

impl Loads {
    /// The connections of clients, most first.
    pub fn sorted(&self) -> [u32; NODES] {
        let mut connections = self.connections;
        connections.sort_unstable_by(|a, b| b.cmp(a));
        connections
    }
}

/// What the run leaves behind if it does not clean up.
pub struct Traces {
    processes: Vec<u32>,
    pins: PathBuf,
}

impl Traces {
    /// Looks for them, and for the cgroup.
    pub fn look(&self, cgroup: &Path) -> Check {
        let alive = |process: &&u32| Path::new("/proc").join(process.to_string()).exists();
        let processes = self.processes.iter().filter(alive).count();
        let seen = format!(
            "{processes}, {}, {}",
            u8::from(self.pins.exists()),
            u8::from(cgroup.exists())
        );
        Check::new("0, 0, 0", seen)
    }
}

/// The name of the connection from one OAP to another.
pub fn link(from: usize, to: usize) -> String {
    format!("{}>{}", from + 1, to + 1)
}

/// `a/b/c`
pub fn slashed<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    items.join("/")
}
