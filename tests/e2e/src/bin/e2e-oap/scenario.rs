//! The scenario: what happens, and what must be seen.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::oap::cache::Cache;
use testkit::fixtures::{Machine, Signal};

use crate::agents::Kind;
use crate::checks::{AGENTS_CONNECT_WITHIN, DAEMON_FOLLOWS_WITHIN, DATA_IS_STORED_WITHIN};
use crate::fixture::{Fixture, Traces, slashed};
use crate::layout::{self, AGENTS, ALS, NODES, VIRTUAL};
use crate::sockets;
use testkit::scenario::{Check, Report};

/// Three JVMs start at once on what may be two busy CPUs.
const OAPS_START_WITHIN: Duration = Duration::from_secs(150);

const ACCESS_LOGS: u32 = 40;

/// What is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Play {
    /// The scenario.
    Scenario,
    /// How long agents with their own defaults take to come back.
    AgentDefaults,
}

/// Runs it from the first to the last check, and cleans up, whatever happens.
///
/// # Errors
/// At the first difference.
pub fn run(cache: &Cache, play: Play, report: &mut Report) -> Result<()> {
    let machine = Machine::new();
    for address in layout::addresses() {
        machine.netns.add_address(address);
    }
    let left = machine.run(|| -> Result<Traces> {
        let mut fixture = Fixture::start(cache, &machine)?;
        let outcome = match play {
            Play::Scenario => fixture.run(report),
            Play::AgentDefaults => fixture.time_agents(report),
        };
        if outcome.is_err() {
            fixture.explain();
        }
        outcome.map(|()| fixture.traces())
    })?;
    let cgroup = machine.cgroup.path().to_owned();
    drop(machine);
    report.check("6 afterwards: processes, pins, cgroup", &left.look(&cgroup))
}

impl Fixture<'_> {
    fn run(&mut self, report: &mut Report) -> Result<()> {
        self.oaps_join(report)?;
        self.clients_spread(report)?;
        let (victim, moved) = self.oap_dies(report)?;
        self.oap_returns(report, victim, &moved)?;
        self.quota_refuses_and_admits(report, victim)?;
        self.agents_move(report)?;
        self.oap_hangs(report)?;
        self.balancer.stop(Signal::SIGINT);
        let loaded = self.balancer.is_loaded();
        report.check(
            "6 Ctrl-C: the data plane is loaded",
            &Check::new(false, loaded),
        )
    }

    /// 1: three OAPs, a cluster, on ports of their own.
    pub(crate) fn oaps_join(&mut self, report: &mut Report) -> Result<()> {
        self.wait(report, "1 OAPs that answer", OAPS_START_WITHIN, |fixture| {
            Ok(Check::new(NODES, fixture.cluster.answering()))
        })?;
        for service in [AGENTS, ALS] {
            let step = format!("1 {}: quotas of the active backends", service.name);
            let expected = slashed([service.quota; NODES]);
            self.wait(report, &step, DAEMON_FOLLOWS_WITHIN, |fixture| {
                Ok(Check::new(&expected, fixture.quotas(service)))
            })?;
        }
        let hidden = sockets::listeners(AGENTS.port)? + sockets::listeners(ALS.port)?;
        report.check(
            "1 listeners on 11800 and 11802 themselves",
            &Check::new(0, hidden),
        )
    }

    /// 2: agents and Envoy connect and report.
    fn clients_spread(&mut self, report: &mut Report) -> Result<()> {
        let agents = self.start_agents(&[Kind::Java, Kind::Python].repeat(NODES))?;
        self.start_envoy()?;
        self.wait(report, "2 Envoy serves", AGENTS_CONNECT_WITHIN, |fixture| {
            Ok(Check::new(true, fixture.envoy()?.request().is_ok()))
        })?;
        let envoy = self.envoy()?;
        while envoy.sent() < ACCESS_LOGS {
            envoy.request()?;
        }
        self.wait(
            report,
            "2 access log connections, sorted",
            AGENTS_CONNECT_WITHIN,
            |fixture| Ok(Check::new("1/1/0", slashed(fixture.loads(ALS)?.sorted()))),
        )?;
        self.wait(
            report,
            "2 agent connections per OAP",
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                Ok(Check::new(
                    "2/2/2",
                    slashed(fixture.loads(AGENTS)?.connections),
                ))
            },
        )?;
        report.check("2 look-ups refused so far", &Check::new(0, self.refusals()))?;
        self.links_stand(report, "2")?;
        self.status_is_true(report, "2")?;
        self.segments_are_made(report, "2", &agents)?;
        self.nothing_is_lost(
            report,
            "2 numbered segments, each in its agent's OAP",
            |_| true,
        )?;
        self.wait(
            report,
            "2 numbered access logs",
            DATA_IS_STORED_WITHIN,
            |fixture| {
                Ok(Check::new(
                    fixture.envoy()?.sent(),
                    fixture.stored_access_logs()?,
                ))
            },
        )
    }

    /// 3, first half: one OAP dies. Returns which one, and the agents that had to move.
    fn oap_dies(&mut self, report: &mut Report) -> Result<(usize, BTreeSet<String>)> {
        self.set_quota(report, "3", 3)?;
        let access_logs = self.loads(ALS)?.connections;
        let victim = access_logs.iter().position(|connections| *connections > 0);
        let victim = victim.context("no OAP has an access log connection")?;
        let moved = self.agents_of(victim)?;
        report.check(
            "3 agents of the OAP that will be killed",
            &Check::new(2, moved.len()),
        )?;
        self.cluster.kill(victim);
        let mut spread = [3; NODES];
        spread[victim] = 0;
        let expected = slashed(spread);
        let step = format!("3 OAP {} killed: agent connections", victim + 1);
        self.wait(report, &step, AGENTS_CONNECT_WITHIN, |fixture| {
            Ok(Check::new(
                &expected,
                slashed(fixture.loads(AGENTS)?.connections),
            ))
        })?;
        let mut spread = [1; NODES];
        spread[victim] = 0;
        let expected = slashed(spread);
        self.wait(
            report,
            "3 access log connections",
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                fixture.envoy()?.request()?;
                Ok(Check::new(
                    &expected,
                    slashed(fixture.loads(ALS)?.connections),
                ))
            },
        )?;
        self.status_is_true(report, "3")?;
        self.report_again(report, "3 agents that moved and report again", &moved)?;
        self.nothing_is_lost(report, "3 segments of the agents that stayed", |agent| {
            !moved.contains(agent.name())
        })?;
        Ok((victim, moved))
    }

    /// 3, second half: it comes back.
    fn oap_returns(
        &mut self,
        report: &mut Report,
        victim: usize,
        moved: &BTreeSet<String>,
    ) -> Result<()> {
        self.cluster.launch(victim)?;
        self.wait(
            report,
            "3 started again: OAPs that answer",
            OAPS_START_WITHIN,
            |fixture| Ok(Check::new(NODES, fixture.cluster.answering())),
        )?;
        for (service, quota) in [(AGENTS, 3), (ALS, ALS.quota)] {
            let step = format!("3 {}: quotas of the active backends", service.name);
            let expected = slashed([quota; NODES]);
            self.wait(report, &step, DAEMON_FOLLOWS_WITHIN, |fixture| {
                Ok(Check::new(&expected, fixture.quotas(service)))
            })?;
        }
        let next = self.start_agents(&[Kind::Python, Kind::Java, Kind::Python])?;
        self.wait(
            report,
            "3 OAP of the next three agents",
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                let own = fixture.agents_of(victim)?;
                let others = own.iter().filter(|name| !next.contains(*name)).count();
                let seen = format!("{} there, {others} others", own.len() - others);
                Ok(Check::new("3 there, 0 others", seen))
            },
        )?;
        self.wait(
            report,
            "3 agent connections per OAP",
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                Ok(Check::new(
                    "3/3/3",
                    slashed(fixture.loads(AGENTS)?.connections),
                ))
            },
        )?;
        self.status_is_true(report, "3")?;
        self.segments_are_made(report, "3", &next)?;
        self.nothing_is_lost(report, "3 segments of all but the moved agents", |agent| {
            !moved.contains(agent.name())
        })
    }

    /// 4: two agents too many.
    fn quota_refuses_and_admits(&mut self, report: &mut Report, returned: usize) -> Result<()> {
        let before = self.refusals();
        let extra = self.start_agents(&[Kind::Java, Kind::Python])?;
        self.wait(
            report,
            "4 two agents more: both run, refused as over-quota",
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                let running = fixture
                    .select(&extra)
                    .filter(|agent| agent.made().is_some())
                    .count();
                let refused = fixture.refusals() >= before + 2;
                Ok(Check::new(
                    "2 run, refused: true",
                    format!("{running} run, refused: {refused}"),
                ))
            },
        )?;
        let connected = self
            .homes()?
            .into_iter()
            .filter(|(name, _)| extra.contains(name))
            .count();
        report.check(
            "4 connections that these two have",
            &Check::new(0, connected),
        )?;
        let spread = slashed(self.loads(AGENTS)?.connections);
        report.check("4 agent connections per OAP", &Check::new("3/3/3", spread))?;
        let target = format!("{VIRTUAL}:{}", AGENTS.port);
        let explained = self.balancer.explain(&VIRTUAL, &target).reason;
        report.check(
            "4 explain says about one more",
            &Check::new("over-quota", explained.as_deref().unwrap_or("not judged")),
        )?;
        self.set_quota(report, "4", 4)?;
        self.wait(
            report,
            "4 agent connections, sorted",
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                Ok(Check::new(
                    "4/4/3",
                    slashed(fixture.loads(AGENTS)?.sorted()),
                ))
            },
        )?;
        self.report_again(report, "4 agents let in that report", &extra)?;
        self.links_stand(report, &format!("4 OAP {} returned:", returned + 1))?;
        self.status_is_true(report, "4")
    }
}
