//! 9: connects go to the OAP that should have them, nobody is refused by a quota, and what is
//! established moves to an OAP that joins.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use testkit::scenario::{Check, Report};

use super::{node, without};
use crate::checks::{PODS_START_WITHIN, wait};
use crate::clients::{Clients, Mark};
use crate::daemons::Way;
use crate::fixture::{Fixture, slashed, unevenness};
use crate::layout::{self, NODES, OAPS, REPLICAS, VICTIM, WORKLOAD, WORKLOADS};
use crate::oaps::Held;
use crate::picture;
use crate::recording::Recording;

/// No client may be without a connection for longer: it has one refused connect at the most, where
/// an OAP ends in that moment, and pauses for a second.
pub const WITHOUT: Duration = Duration::from_secs(5);
/// Who meets a dead node waits for its connect to end, which takes a client five seconds. The next
/// one goes elsewhere, or, where the node was not avoided yet when it began, there once more.
const WITHOUT_ON_DEAD_NODE: Duration = Duration::from_secs(12);
/// The fullest OAP may have so many times the mean,
const EVEN: f64 = 1.05;
/// or so many more than the emptiest.
const FEW: u32 = 2;
/// What is established is even again after so long.
const EVENS_OUT_WITHIN: Duration = Duration::from_secs(180);
/// Clients that connect within so long.
const COME_WITHIN: Duration = Duration::from_secs(3);

/// What was there before something happened.
pub struct Before {
    mark: Mark,
    over_quota: u64,
}

impl Before {
    /// Now.
    pub fn now(fixture: &mut Fixture) -> Result<Self> {
        Ok(Self {
            mark: fixture.clients()?.mark(&fixture.cluster)?,
            over_quota: over_quota(fixture)?,
        })
    }

    /// How many connects quotas have refused since.
    fn refused_by_quota(&self, fixture: &mut Fixture) -> Result<u64> {
        Ok(over_quota(fixture)?.saturating_sub(self.over_quota))
    }

    /// What clients had seen.
    pub const fn mark(&self) -> &Mark {
        &self.mark
    }
}

/// What happens to OAPs and clients.
type Happens = fn(&mut Fixture) -> Result<()>;

/// The main events, in their order: with everybody placed, and with nobody.
const EVENTS: [(&str, Happens); 4] = [
    ("all come anew", come_anew),
    ("OAPs restarted", without::restart),
    ("3 OAPs", |fixture| to(fixture, 3)),
    ("4 OAPs, all come anew", |fixture| {
        to(fixture, REPLICAS)?;
        come_anew(fixture)
    }),
];

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    switch_on(fixture, report, "9 place on")?;
    let mut recording = Recording::begin("placed by the balancer");
    for (what, happens) in EVENTS {
        recording.mark(what);
        event(fixture, report, &format!("9 {what}"), WITHOUT, happens)?;
    }
    recording.mark("one more joins");
    joins(fixture, report, "9 one more joins")?;
    recording.mark("a node killed");
    forget_victim(fixture)?;
    let step = format!("9 {VICTIM} killed");
    event(fixture, report, &step, WITHOUT_ON_DEAD_NODE, kill)?;
    recording.end();
    node_back(fixture, report, "9 node back")?;
    fixture.recordings.push(recording);
    Ok(())
}

/// The same events with nobody placed, as without this feature: what is seen then is told.
pub fn run_off(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let values = layout::placing(&fixture.cluster.product, "off");
    switch(fixture, report, "11 place off", &values, false)?;
    let mut recording = Recording::begin("left to kube-proxy, with quotas");
    for (what, happens) in EVENTS {
        recording.mark(what);
        unplaced(fixture, report, &format!("11 place off, {what}"), happens)?;
    }
    recording.mark("a node killed");
    forget_victim(fixture)?;
    let step = format!("11 place off, {VICTIM} killed");
    unplaced(fixture, report, &step, kill)?;
    recording.end();
    node_back(fixture, report, "11 node back")?;
    fixture.recordings.push(recording);
    picture::draw(&fixture.recordings, &fixture.cluster.picture())
}

/// Placed, and a node dies.
pub fn run_short(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture
        .clients
        .as_mut()
        .context("there are clients")?
        .end_outside();
    switch_on(fixture, report, "9 place on")?;
    event(fixture, report, "9 all come anew", WITHOUT, come_anew)?;
    forget_victim(fixture)?;
    let step = format!("9 {VICTIM} killed");
    event(fixture, report, &step, WITHOUT_ON_DEAD_NODE, kill)?;
    node_back(fixture, report, "9 node back")?;
    fixture.clients = Some(Clients::in_pods(&fixture.cluster)?);
    Ok(())
}

/// The clients of the node that is killed end with it.
fn forget_victim(fixture: &mut Fixture) -> Result<()> {
    let clients = fixture.clients.as_mut().context("there are clients")?;
    clients.forget(VICTIM);
    Ok(())
}

fn node_back(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    fixture.cluster.kubernetes.start_node(VICTIM);
    fixture.daemons_ready(report, step, &BTreeSet::new())?;
    fixture.wait_oaps(REPLICAS)
}

/// Has everybody placed.
pub fn switch_on(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    let values = layout::placing(&fixture.cluster.product, "on");
    switch(fixture, report, step, &values, true)
}

/// Puts the chart's values in force, and waits until every daemon says that it places, or not.
pub fn switch(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    values: &Value,
    places: bool,
) -> Result<()> {
    fixture.look()?;
    fixture.keep_logs();
    let old: BTreeSet<_> = fixture
        .daemons
        .values()
        .map(|daemon| daemon.uid.clone())
        .collect();
    fixture.cluster.helm_upgrade(values)?;
    fixture.daemons_ready(report, step, &old)?;
    nodes_place(fixture, report, step, places)?;
    all_clients(fixture)?;
    // A node knows of the connections that it has placed, and of none that are older.
    come_anew(fixture)?;
    fixture.all_connected(report, step)
}

/// Those of all nodes, as soon as they run.
pub fn all_clients(fixture: &mut Fixture) -> Result<()> {
    let cluster = &fixture.cluster;
    let workload = format!("deployment/{WORKLOAD}");
    cluster.wait_rolled_out(WORKLOADS, &workload, PODS_START_WITHIN)?;
    fixture.clients = Some(Clients::in_pods(cluster)?);
    Ok(())
}

/// Waits until every node places, or none.
fn nodes_place(fixture: &mut Fixture, report: &mut Report, step: &str, on: bool) -> Result<()> {
    let expected = slashed(NODES.map(|_| on));
    wait(
        report,
        &format!("{step}: nodes that place"),
        PODS_START_WITHIN,
        &expected,
        || {
            fixture.look()?;
            let placed = fixture.daemons.values().map(|daemon| {
                let asked = ["status", "--cluster", "-o", "json"];
                let said = daemon.ask(&fixture.cluster, Way::OnNode, &asked)?;
                let said: Value = serde_json::from_str(&said).context("no JSON")?;
                Ok(said["placing"]["services"][0]["placed"] == true)
            });
            Ok(Check::new(
                &expected,
                slashed(placed.collect::<Result<Vec<_>>>()?),
            ))
        },
    )
}

/// Something happens while nobody is placed. All have a connection again in the end; how long that
/// took, who was refused and how uneven it is then is told.
fn unplaced(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    happens: impl FnOnce(&mut Fixture) -> Result<()>,
) -> Result<()> {
    let before = Before::now(fixture)?;
    happens(fixture)?;
    fixture.all_connected(report, step)?;
    tell_outages(fixture, report, step, &before)?;
    tell_spread(fixture, report, step)
}

/// The longest time of a client without a connection since then, and who was refused.
pub fn tell_outages(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    before: &Before,
) -> Result<()> {
    let tally = fixture.clients()?.tally(&fixture.cluster)?;
    let longest = before.mark.longest_outage(&tally).as_secs_f64();
    let by_quota = before.refused_by_quota(fixture)?;
    let (refused, timed_out) = (before.mark.refused(&tally), before.mark.timed_out(&tally));
    report.tell(
        &format!("{step}: longest without one; refused, by a quota, timed out"),
        &format!("{longest:.1} s; {refused}, {by_quota}, {timed_out}"),
    );
    Ok(())
}

/// Something happens. Then all have a connection again, nobody was refused by a quota or waited for
/// long, and all OAPs have as many.
pub fn event(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    longest: Duration,
    happens: impl FnOnce(&mut Fixture) -> Result<()>,
) -> Result<()> {
    let before = Before::now(fixture)?;
    let begun = Instant::now();
    happens(fixture)?;
    fixture.all_connected(report, step)?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell(&format!("{step}: all connected"), &took);
    fixture.nobody_waited(report, step, &before.mark, longest)?;
    no_quota_refused(fixture, report, step, &before)?;
    let tally = fixture.clients()?.tally(&fixture.cluster)?;
    let mark = &before.mark;
    let (refused, timed_out) = (mark.refused(&tally), mark.timed_out(&tally));
    let seen = format!("{refused}, {timed_out}, {}", mark.failed(&tally));
    report.tell(
        &format!("{step}: connects refused, timed out, failed"),
        &seen,
    );
    fixture.counts_are_true(report, step, Way::Exec)?;
    even(fixture, report, step)
}

/// All clients open a new connection.
pub fn come_anew(fixture: &mut Fixture) -> Result<()> {
    let told = standin::now();
    fixture
        .clients()?
        .reconnect(&fixture.cluster, COME_WITHIN)?;
    fixture.reconnected(told)
}

fn to(fixture: &mut Fixture, replicas: u32) -> Result<()> {
    let number = format!("--replicas={replicas}");
    let scale = ["scale", "deployment/skywalking-oap", "-n", OAPS, &number];
    fixture.cluster.kubectl(&scale)?;
    fixture.wait_oaps(replicas)
}

fn kill(fixture: &mut Fixture) -> Result<()> {
    fixture.cluster.kubernetes.kill_node(VICTIM);
    node::wait_given_up(fixture)
}

/// How many connects quotas have refused, on all nodes that run.
fn over_quota(fixture: &mut Fixture) -> Result<u64> {
    fixture.look()?;
    let mut refused = 0;
    for daemon in fixture.daemons.values() {
        let status = daemon.status(&fixture.cluster, Way::OnNode)?;
        let verdicts = status
            .services
            .iter()
            .map(|service| service.verdicts("over-quota") + service.verdicts("over-quota-cookie"));
        refused += verdicts.sum::<u64>();
    }
    Ok(refused)
}

fn no_quota_refused(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    before: &Before,
) -> Result<()> {
    report.check(
        &format!("{step}: refused by a quota"),
        &Check::new(0, before.refused_by_quota(fixture)?),
    )
}

/// An OAP joins, and nobody comes anew: what is established moves.
fn joins(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    to(fixture, REPLICAS - 1)?;
    fixture.all_connected(report, step)?;
    let before = Before::now(fixture)?;
    to(fixture, REPLICAS)?;
    evens_out(fixture, report, step)?;
    fixture.all_connected(report, step)?;
    fixture.nobody_waited(report, step, &before.mark, WITHOUT)?;
    no_quota_refused(fixture, report, step, &before)
}

fn are_even(held: &[u32]) -> bool {
    let most = held.iter().max().copied().unwrap_or(0);
    let least = held.iter().min().copied().unwrap_or(0);
    unevenness(held) <= EVEN || most - least <= FEW
}

/// All OAPs have as many connections: at once, or after some have moved.
fn even(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    tell_spread(fixture, report, step)?;
    if !are_even(&admitted(fixture)?) {
        tell_placed(fixture, report, step)?;
    }
    evens_out(fixture, report, step)
}

fn evens_out(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    let expected = format!("at most {EVEN}, or {FEW} apart");
    wait(
        report,
        &format!("{step}: max/mean, with moving"),
        EVENS_OUT_WITHIN,
        &expected,
        || {
            let held = admitted(fixture)?;
            let seen = format!("{:.3}: {}", unevenness(&held), slashed(&held));
            Ok(Check::judged(&expected, seen, are_even(&held)))
        },
    )
}

/// How many connections each OAP has.
fn admitted(fixture: &mut Fixture) -> Result<Vec<u32>> {
    fixture.look()?;
    Ok(fixture.held().into_iter().map(Held::admitted).collect())
}

/// What each node says of each endpoint: placed there, and what others have.
fn tell_placed(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    for daemon in fixture.daemons.values() {
        let said = daemon.ask(&fixture.cluster, Way::OnNode, &["status", "-o", "json"])?;
        let said: Value = serde_json::from_str(&said).context("no JSON")?;
        let endpoints = said["placing"][0]["endpoints"].as_array();
        let seen = endpoints.into_iter().flatten().map(|endpoint| {
            let number = |key: &str| endpoint[key].to_string();
            format!(
                "{} placed, {} in flight, {} of others, {} failed",
                number("established"),
                number("in_flight"),
                number("others"),
                number("failed")
            )
        });
        let seen: Vec<_> = seen.collect();
        report.tell(
            &format!("{step}: placed by {}", daemon.node),
            &seen.join("; "),
        );
        report.tell(
            &format!("{step}: why, on {}", daemon.node),
            &said["placing"][0]["verdicts"].to_string(),
        );
    }
    Ok(())
}

/// How many connections the OAPs have.
pub fn tell_spread(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    let held = admitted(fixture)?;
    let seen = format!("{:.3}: {}", unevenness(&held), slashed(&held));
    report.tell(&format!("{step}: max/mean"), &seen);
    Ok(())
}
