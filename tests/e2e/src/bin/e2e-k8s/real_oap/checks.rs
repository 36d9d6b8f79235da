//! Checks that come up more than once in the scenario.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::oap::segments::{DATA_COMES_BACK_WITHIN, has_run};
use e2e::oap::{graphql, http};
use testkit::fixtures::diag;
use testkit::scenario::{Check, Report};

use super::agents::{self, AgentPod};
use super::layout::{AGENTS, METRICS_PORT, QUOTA, REPLICAS, REST_PORT};
use super::{Fixture, Oap, QUOTAS_WITHIN, Way, kernel, living, quotas, slashed, wait};
use crate::daemons::Group;
use crate::layout::{OAPS, PORT, WORKLOADS};

/// A JVM starts; refused, gRPC tries again after pauses that grow to two minutes.
const CONNECT_WITHIN: Duration = Duration::from_secs(180);
/// An OAP opens a connection to another when it first has data for it, and after a failure backs
/// off for up to two minutes.
const LINKS_STAND_WITHIN: Duration = Duration::from_secs(150);
/// Every five seconds an OAP looks who the others are.
const CLUSTER_FORMS_WITHIN: Duration = Duration::from_secs(60);
/// What was received can be queried so soon.
const DATA_IS_STORED_WITHIN: Duration = Duration::from_secs(60);
const GUARDED_WITHIN: Duration = Duration::from_secs(15);

/// The two ends of the agents' connections.
pub type Connections = BTreeSet<(SocketAddr, SocketAddr)>;

impl Fixture {
    /// The pods with agents, all of which must run.
    pub fn agents(&self) -> Result<Vec<AgentPod>> {
        let agents = agents::look(&self.cluster)?;
        ensure!(
            u32::try_from(agents.len()) == Ok(AGENTS),
            "only {} of {AGENTS} pods with agents run",
            agents.len()
        );
        Ok(agents)
    }

    /// The connections of agents, by the OAPs' socket tables.
    pub fn connections(&self) -> Result<Connections> {
        let sources: BTreeSet<_> = self.agents()?.iter().map(|agent| agent.address).collect();
        let rows = self
            .oaps
            .iter()
            .flat_map(|oap| oap.run(|| diag::accepted(PORT)));
        let of_agents = rows.filter(|row| sources.contains(&row.remote.ip()));
        Ok(of_agents.map(|row| (row.local, row.remote)).collect())
    }

    /// Every agent has one connection, and makes segments.
    pub fn agents_connected(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let step = format!("{step}: agents with a connection, that report");
        let expected = format!("{AGENTS}, {AGENTS}");
        wait(report, &step, CONNECT_WITHIN, &expected, || {
            self.look()?;
            let connected = self.connections()?;
            let sources: BTreeSet<_> = connected.iter().map(|(_, remote)| remote.ip()).collect();
            let made = self.made()?;
            let reporting = made.values().filter(|made| **made > 0);
            let seen = format!("{}, {}", sources.len(), reporting.count());
            Ok(Check::judged(
                &expected,
                &seen,
                seen == expected && connected.len() == sources.len(),
            ))
        })
    }

    /// The OAPs have found each other, by their own word.
    pub fn oaps_form_a_cluster(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let step = format!("{step} coordinator kubernetes: size of each OAP's cluster");
        let expected = slashed([REPLICAS; REPLICAS as usize]);
        wait(report, &step, CLUSTER_FORMS_WITHIN, &expected, || {
            self.look()?;
            let sizes = self.oaps.iter().map(|oap| {
                let at = SocketAddr::new(oap.address, METRICS_PORT);
                let metrics = self.outside(|| http::get(at, "/metrics"))?;
                let size = metrics.lines().find_map(|line| {
                    let (name, value) = line.rsplit_once(' ')?;
                    let name = name.split('{').next()?;
                    (name == "cluster_size").then(|| value.parse::<f64>().ok())?
                });
                size.with_context(|| format!("{} does not tell its cluster's size", oap.name))
            });
            let sizes: Vec<_> = sizes.collect::<Result<_>>()?;
            Ok(Check::new(&expected, slashed(sizes)))
        })
    }

    /// Every OAP has a connection to every other.
    pub fn oaps_are_linked(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let step = format!("{step} connections from the other OAP");
        let expected = slashed([REPLICAS - 1; REPLICAS as usize]);
        wait(report, &step, LINKS_STAND_WITHIN, &expected, || {
            self.look()?;
            Ok(Check::new(&expected, slashed(self.links())))
        })
    }

    /// And no quota is for it, by the balancer's word.
    pub fn peers_are_exempt(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let step = format!("{step}: connections between OAPs that status calls exempt");
        wait(report, &step, LINKS_STAND_WITHIN, "all", || {
            self.look()?;
            let links = slashed(self.links());
            let exempt = self.counted(Way::Exec)?;
            Ok(Check::new(
                links,
                slashed(exempt.iter().map(|held| held.exempt)),
            ))
        })
    }

    /// How many connections each OAP has from others.
    fn links(&self) -> Vec<usize> {
        let peers = self.peers();
        let from_peers = |oap: &Oap| {
            let rows = oap.run(|| diag::accepted(PORT)).into_iter();
            rows.filter(|row| peers.contains(&row.remote.ip())).count()
        };
        self.oaps.iter().map(from_peers).collect()
    }

    /// The quota of every OAP is its share of the agents, and every node says so; or, where the
    /// agents happen to be spread like that, it is open, as another one would have nowhere to go.
    pub fn quotas_are_exact(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let formula = format!("ceil({AGENTS} ");
        let step = format!("{step}: quotas");
        let exact = format!("{QUOTA}, of {AGENTS} pods");
        wait(report, &step, QUOTAS_WITHIN, &exact, || {
            self.look()?;
            let full = self.held().iter().all(|held| held.admitted() >= QUOTA);
            let groups = self.groups(Way::Exec)?;
            let is_open = |group: &Group| group.sentence.contains("has room for another");
            if full && groups.iter().any(is_open) {
                return Ok(Check::new("open, as all are full", "open, as all are full"));
            }
            let other = groups.iter().find(|group| {
                let all = living(group).count() == REPLICAS as usize;
                !(all && group.sentence.starts_with(&formula) && quotas(group) == QUOTA.to_string())
            });
            let seen = other.map_or(exact.clone(), |group| {
                format!("{}: {}", quotas(group), group.sentence)
            });
            Ok(Check::new(&exact, seen))
        })
    }

    /// The kernel half is in every OAP's netns.
    pub fn guarded(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let step = format!("{step}: OAPs that are guarded");
        wait(report, &step, GUARDED_WITHIN, "all", || {
            self.look()?;
            let guarded = self.oaps.iter().filter(|oap| {
                kernel::guarded_since(&self.cluster, &oap.node, oap.cookie).is_some()
            });
            Ok(Check::new(REPLICAS, guarded.count()))
        })
    }

    /// These connections of agents are still there, and no other is.
    pub fn no_connection_lost(
        &mut self,
        report: &mut Report,
        step: &str,
        before: &Connections,
    ) -> Result<()> {
        self.look()?;
        let now = self.connections()?;
        let lost = before.difference(&now).count();
        let new = now.difference(before).count();
        report.check(
            &format!("{step}: connections before, lost, new"),
            &Check::new(
                format!("{AGENTS}, 0, 0"),
                format!("{}, {lost}, {new}", before.len()),
            ),
        )
    }

    /// How often a connect was refused over quota, since the data planes were made.
    pub fn refused(&self) -> Result<u64> {
        let daemons = self.daemons.values();
        daemons
            .map(|daemon| {
                let status = daemon.status(&self.cluster, Way::Exec)?;
                let services = status.services.iter();
                Ok(services
                    .map(|service| service.verdicts("over-quota"))
                    .sum::<u64>())
            })
            .sum()
    }

    /// How many segments each agent has made, by service.
    pub fn made(&self) -> Result<BTreeMap<String, u32>> {
        let agents = self.agents()?;
        let made = agents
            .into_iter()
            .map(|agent| Ok((agent.service.clone(), agent.made(&self.cluster)?)));
        made.collect()
    }

    /// All segments that the agents have made until now are in the OAPs. An agent drops what it has
    /// when a connect is refused, so of one that was refused, those from the first on that was
    /// received.
    pub fn nothing_is_missing(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let refused = self.refused_agents()?;
        let made = self.made()?;
        let step = format!("{step} sent, and received");
        wait(report, &step, DATA_IS_STORED_WITHIN, "all", || {
            let stored = self.stored()?;
            let (mut sent, mut received) = (0, 0);
            for (service, made) in &made {
                let numbers = stored.iter().filter_map(|oap| oap.get(service));
                let numbers: BTreeSet<_> = numbers.flat_map(|all| all.range(..made)).collect();
                let first = numbers.first().copied().copied().unwrap_or(0);
                sent += made - if refused.contains(service) { first } else { 0 };
                received += numbers.len();
            }
            Ok(Check::new(sent, received))
        })
    }

    /// The agents that have seen a refusal, by their own logs.
    pub fn refused_agents(&self) -> Result<BTreeSet<String>> {
        let mut refused = BTreeSet::new();
        for agent in self.agents()? {
            if agent.was_refused(&self.cluster)? {
                refused.insert(agent.service);
            }
        }
        Ok(refused)
    }

    /// The quotas that each node knows of.
    pub fn quotas(&self) -> Result<String> {
        let groups = self.groups(Way::Exec)?;
        let quotas: Vec<_> = groups.iter().map(quotas).collect();
        Ok(quotas.join(", "))
    }

    /// Each agent has, from some moment after these numbers on, a run of segments without a gap in
    /// one OAP.
    pub fn report_again(
        &mut self,
        report: &mut Report,
        step: &str,
        since: &BTreeMap<String, u32>,
    ) -> Result<()> {
        let step = format!("{step}: agents whose segments come without a gap");
        wait(report, &step, DATA_COMES_BACK_WITHIN, "all", || {
            self.look()?;
            let stored = self.stored()?;
            let back = since.iter().filter(|(service, since)| {
                let mut oaps = stored.iter().filter_map(|oap| oap.get(*service));
                oaps.any(|numbers| has_run(numbers, **since))
            });
            Ok(Check::new(AGENTS, back.count()))
        })
    }

    /// What each OAP that is ready has stored.
    fn stored(&self) -> Result<Vec<graphql::Segments>> {
        let ready = self.oaps.iter().filter(|oap| oap.ready);
        let stored = ready.map(|oap| {
            let at = SocketAddr::new(oap.address, REST_PORT);
            self.outside(|| graphql::segments(at))
        });
        stored.collect()
    }

    /// No probe of an OAP that runs has failed since it was up, and none was restarted.
    pub fn probes_hold(&mut self, report: &mut Report, step: &str) -> Result<()> {
        self.look()?;
        let events =
            self.cluster
                .get(&["events", "-n", OAPS, "--field-selector=reason=Unhealthy"])?;
        let events = events["items"].as_array().context("a list has items")?;
        let of = |oap: &Oap| {
            let own = events
                .iter()
                .filter(|event| event["involvedObject"]["name"] == oap.name.as_str());
            own.filter(|event| {
                let message = event["message"].as_str().unwrap_or_default();
                !message.starts_with("Startup probe")
            })
            .count()
        };
        let failed: usize = self.oaps.iter().map(of).sum();
        let ready = self.oaps.iter().filter(|oap| oap.ready).count();
        report.check(
            &format!("{step} OAPs ready, probes that failed"),
            &Check::new(format!("{REPLICAS}, 0"), format!("{ready}, {failed}")),
        )
    }

    fn outside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.cluster.kubernetes.outside().run(work)
    }
}

/// Writes down what OAPs and agents have logged, as far as they are still there.
pub fn keep_logs(fixture: &Fixture) {
    for (namespace, label) in [(OAPS, "component=oap"), (WORKLOADS, "app=workload")] {
        let pods = ["get", "pods", "-n", namespace, "-l", label, "-o", "name"];
        let Ok(pods) = fixture.cluster.kubectl(&pods) else {
            continue;
        };
        for pod in pods.lines() {
            let log = fixture.cluster.kubectl(&["logs", "-n", namespace, pod]);
            let name = pod.trim_start_matches("pod/");
            let file = fixture.cluster.logs().join(format!("{name}.log"));
            if let Err(error) = log.and_then(|log| Ok(fs::write(&file, log)?)) {
                eprintln!("cannot keep the log of {name}: {error:#}");
            }
        }
    }
}
