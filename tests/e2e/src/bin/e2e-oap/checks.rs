//! Checks that come up more than once in the scenario.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::oap::graphql::Segments;
use e2e::oap::segments::{DATA_COMES_BACK_WITHIN, ENOUGH, has_run};
use testkit::fixtures::Service as ServiceStatus;

use crate::access_logs::Envoy;
use crate::agents::Agent;
use crate::fixture::{Fixture, link, slashed};
use crate::layout::{AGENTS, ALS, NODES, Service};
use testkit::scenario::{Check, Report};

/// An OAP opens a connection to another when it first has data for it, and after a failure backs
/// off for up to two minutes.
const LINKS_STAND_WITHIN: Duration = Duration::from_secs(150);
/// Clients start, and find an OAP, so soon.
pub const AGENTS_CONNECT_WITHIN: Duration = Duration::from_secs(60);
/// What was received can be queried so soon.
pub const DATA_IS_STORED_WITHIN: Duration = Duration::from_secs(40);
/// The daemon shows so soon what has happened in the kernel.
pub const DAEMON_FOLLOWS_WITHIN: Duration = Duration::from_secs(10);

impl Fixture<'_> {
    /// A bounded wait in which all processes must live.
    pub fn wait(
        &mut self,
        report: &mut Report,
        step: &str,
        within: Duration,
        mut look: impl FnMut(&mut Self) -> Result<Check>,
    ) -> Result<()> {
        report.wait(step, within, || {
            self.cluster.check()?;
            self.envoy.iter_mut().try_for_each(Envoy::check)?;
            self.agents.iter_mut().try_for_each(Agent::check)?;
            look(self)
        })
    }

    /// Every OAP has a connection to every other.
    pub fn links_stand(&mut self, report: &mut Report, step: &str) -> Result<()> {
        let step = format!("{step} links between OAPs");
        let all = pairs().join(" ");
        self.wait(report, &step, LINKS_STAND_WITHIN, |fixture| {
            Ok(Check::new(&all, fixture.links()?.join(" ")))
        })
    }

    /// What `status` counts is what the socket table holds.
    pub fn status_is_true(&mut self, report: &mut Report, step: &str) -> Result<()> {
        for service in [AGENTS, ALS] {
            let step = format!("{step} status of {}: established (exempt)", service.name);
            self.wait(report, &step, DAEMON_FOLLOWS_WITHIN, |fixture| {
                let truth = fixture.loads(service)?;
                let expected = (0..NODES).map(|index| {
                    let (own, exempt) = (truth.connections[index], truth.exempt[index]);
                    format!("{} ({exempt})", own + exempt)
                });
                let status = fixture.balancer.status();
                let seen =
                    (0..NODES).map(|index| counts(status.service(service.name), service, index));
                Ok(Check::new(slashed(expected), slashed(seen)))
            })?;
        }
        Ok(())
    }

    /// All these agents make segments.
    pub fn segments_are_made(
        &mut self,
        report: &mut Report,
        step: &str,
        names: &BTreeSet<String>,
    ) -> Result<()> {
        let step = format!("{step} agents that have made {ENOUGH} segments");
        self.wait(report, &step, AGENTS_CONNECT_WITHIN, |fixture| {
            let made = fixture
                .select(names)
                .filter(|agent| agent.made() >= Some(ENOUGH - 1));
            Ok(Check::new(names.len(), made.count()))
        })
    }

    /// All segments that these agents have made until now are in the OAPs that they are connected
    /// to.
    pub fn nothing_is_lost(
        &mut self,
        report: &mut Report,
        step: &str,
        choose: impl Fn(&Agent) -> bool,
    ) -> Result<()> {
        let homes = self.homes()?;
        let made = self
            .agents
            .iter()
            .filter(|agent| choose(agent))
            .map(|agent| {
                let name = agent.name();
                let home = homes.iter().find(|(connected, _)| connected == name);
                let (_, home) = home.with_context(|| format!("{name} is not connected"))?;
                Ok((
                    name.to_owned(),
                    *home,
                    agent.made().map_or(0, |last| last + 1),
                ))
            });
        let made: Vec<_> = made.collect::<Result<_>>()?;
        let expected: u32 = made.iter().map(|(_, _, number)| number).sum();
        self.wait(report, step, DATA_IS_STORED_WITHIN, |fixture| {
            let stored = fixture.stored_segments()?;
            let seen = made.iter().map(|(name, home, number)| {
                stored[*home]
                    .get(name)
                    .map_or(0, |numbers| numbers.range(..number).count())
            });
            Ok(Check::new(expected, seen.sum::<usize>()))
        })
    }

    /// Each of these agents has, from some moment after now on, a run of segments without a gap in
    /// one OAP.
    pub fn report_again(
        &mut self,
        report: &mut Report,
        step: &str,
        names: &BTreeSet<String>,
    ) -> Result<()> {
        let since: Vec<_> = self
            .select(names)
            .map(|agent| (agent.name().to_owned(), agent.made().unwrap_or(0)))
            .collect();
        self.wait(report, step, DATA_COMES_BACK_WITHIN, |fixture| {
            let stored = fixture.stored_segments()?;
            let back = since.iter().filter(|(name, since)| {
                let in_one = |segments: &Segments| {
                    segments
                        .get(name)
                        .is_some_and(|numbers| has_run(numbers, *since))
                };
                stored.iter().any(in_one)
            });
            Ok(Check::new(since.len(), back.count()))
        })
    }

    /// Sets the quota of every `agents` backend by hand, and sees it in `status`.
    pub fn set_quota(&mut self, report: &mut Report, step: &str, quota: u32) -> Result<()> {
        self.balancer.quota_set(AGENTS.name, None, quota);
        let expected = slashed([quota; NODES]);
        let step = format!("{step} quota set {} {quota}: quotas", AGENTS.name);
        self.wait(report, &step, DAEMON_FOLLOWS_WITHIN, |fixture| {
            Ok(Check::new(&expected, fixture.quotas(AGENTS)))
        })
    }
}

/// `established (exempt)` of one OAP by `status`, a backend that is gone but not empty included.
fn counts(status: &ServiceStatus, service: Service, index: usize) -> String {
    let own = || {
        status
            .backends
            .iter()
            .filter(|backend| backend.address == service.backend(index))
    };
    let established: u32 = own().map(|backend| backend.established).sum();
    let exempt: u32 = own().map(|backend| backend.exempt).sum();
    format!("{established} ({exempt})")
}

/// All links of a full mesh, sorted.
fn pairs() -> Vec<String> {
    let all = (0..NODES).flat_map(|from| (0..NODES).map(move |to| (from, to)));
    all.filter(|(from, to)| from != to)
        .map(|(from, to)| link(from, to))
        .collect()
}
