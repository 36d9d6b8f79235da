//! An OAP that hangs: stopped under load, it goes on after a while. Stopped again, it is killed.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use testkit::scenario::{Check, Report, interrupt};

use crate::agents::Kind;
use crate::checks::{AGENTS_CONNECT_WITHIN, DAEMON_FOLLOWS_WITHIN};
use crate::cluster::Cluster;
use crate::fixture::{Fixture, slashed};
use crate::layout::{AGENTS, NODES};

/// How long it is stopped at the least: longer than the deadline of a Java agent's calls.
const STOPPED_FOR: Duration = Duration::from_secs(25);
/// The reason of the state `hung`.
const NOT_READ: &str = "it does not read what its connections have received";
/// How soon agents are elsewhere whose connections end.
const MOVED_WITHIN: Duration = Duration::from_secs(15);
/// Room for all of them, also on two OAPs.
const QUOTA: u32 = 8;

impl Fixture<'_> {
    /// 5: an OAP is stopped, and goes on.
    pub fn oap_hangs(&mut self, report: &mut Report) -> Result<()> {
        self.set_quota(report, "5", QUOTA)?;
        let before = self.loads(AGENTS)?;
        let most = before.sorted()[0];
        let victim = before.connections.iter().position(|own| *own == most);
        let victim = victim.context("there are OAPs")?;
        let stuck = self.agents_of(victim)?;
        let begun = Instant::now();
        self.cluster.stop(victim)?;
        self.is_named(report, victim)?;
        self.others_serve(report, victim)?;
        interrupt::pause(STOPPED_FOR.saturating_sub(begun.elapsed()))?;
        report.check(
            "5 its agents, none of which has a time-out for this",
            &Check::new(
                format!("{} there", stuck.len()),
                format!("{} there", self.agents_of(victim)?.len()),
            ),
        )?;
        self.cluster.go_on(victim)?;
        self.goes_on(report, victim, &stuck)?;
        self.is_ended(report, victim)
    }

    /// `status` says which OAP, and why; a probe that only connects does not see it.
    fn is_named(&mut self, report: &mut Report, victim: usize) -> Result<()> {
        let step = format!("5 OAP {} stopped: status says", victim + 1);
        self.serve(report, &step, only_hung(victim))?;
        let reason = self.health(AGENTS)[victim].1.clone();
        report.check(
            "5 and why",
            &Check::new(NOT_READ, reason.as_deref().unwrap_or("nothing")),
        )?;
        let probe = TcpStream::connect_timeout(&Cluster::rest(victim), AGENTS_CONNECT_WITHIN);
        report.check(
            "5 a probe that connects to its port 12800 succeeds",
            &Check::new(true, probe.is_ok()),
        )
    }

    /// The OAPs are in these states.
    fn serve(&mut self, report: &mut Report, step: &str, states: [&str; NODES]) -> Result<()> {
        let expected = slashed(states);
        self.wait(report, step, DAEMON_FOLLOWS_WITHIN, |fixture| {
            let states = fixture.health(AGENTS).into_iter().map(|(state, _)| state);
            Ok(Check::new(&expected, slashed(states)))
        })
    }

    /// Agents that come while it is stopped report to the others.
    fn others_serve(&mut self, report: &mut Report, victim: usize) -> Result<()> {
        let next = self.start_agents(&[Kind::Java, Kind::Python])?;
        self.wait(
            report,
            "5 OAPs of two agents more",
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                let homes = fixture.homes()?.into_iter();
                let homes: Vec<_> = homes.filter(|(name, _)| next.contains(name)).collect();
                let stuck = homes.iter().filter(|(_, home)| *home == victim).count();
                let seen = format!("{} on others, {stuck} there", homes.len() - stuck);
                Ok(Check::new("2 on others, 0 there", seen))
            },
        )?;
        self.segments_are_made(report, "5", &next)?;
        self.nothing_is_lost(report, "5 segments of these two", |agent| {
            next.contains(agent.name())
        })
    }

    /// It serves those that it had, and has its share of those that come.
    fn goes_on(
        &mut self,
        report: &mut Report,
        victim: usize,
        stuck: &BTreeSet<String>,
    ) -> Result<()> {
        let step = format!("5 OAP {} goes on: status says", victim + 1);
        self.serve(report, &step, ["serving"; NODES])?;
        self.report_again(report, "5 its agents report again", stuck)?;
        self.start_agents(&[Kind::Python, Kind::Python, Kind::Python])?;
        self.wait(
            report,
            "5 three agents more: agent connections, sorted",
            AGENTS_CONNECT_WITHIN,
            |fixture| {
                let spread = fixture.loads(AGENTS)?.sorted();
                Ok(Check::new("6/5/5", slashed(spread)))
            },
        )?;
        self.status_is_true(report, "5")
    }
    /// It is stopped again, and killed, as a liveness probe does that wants an answer: then its
    /// agents leave.
    fn is_ended(&mut self, report: &mut Report, victim: usize) -> Result<()> {
        self.cluster.stop(victim)?;
        let step = format!("5 OAP {} stopped again", victim + 1);
        self.serve(report, &step, only_hung(victim))?;
        self.cluster.kill(victim);
        let mut spread = [QUOTA; NODES];
        spread[victim] = 0;
        let expected = slashed(spread);
        let step = format!("5 OAP {} killed: agent connections", victim + 1);
        self.wait(report, &step, MOVED_WITHIN, |fixture| {
            let loads = fixture.loads(AGENTS)?;
            Ok(Check::new(&expected, slashed(loads.connections)))
        })
    }
}

/// The states of all OAPs while one hangs.
fn only_hung(victim: usize) -> [&'static str; NODES] {
    let mut states = ["serving"; NODES];
    states[victim] = "hung";
    states
}
