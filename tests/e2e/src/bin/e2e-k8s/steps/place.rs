//! 9: connects go to the OAP that should have them, and nobody is refused by a quota.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testkit::scenario::{Check, Report};

use super::{node, without};
use crate::checks::{PODS_START_WITHIN, wait};
use crate::clients::{Clients, Mark};
use crate::daemons::Way;
use crate::fixture::{Fixture, slashed, unevenness};
use crate::layout::{self, NODES, OAPS, REPLICAS, VICTIM, WORKLOADS};
use crate::oaps::Held;

/// No client may be without a connection for longer: it has one refused connect at the most, where
/// an OAP ends in that moment, and pauses for a second.
const WITHOUT: Duration = Duration::from_secs(5);
/// Who meets a dead node waits for its connect to end, which takes a client five seconds. The next
/// one goes elsewhere, or, where the node was not avoided yet when it began, there once more.
const WITHOUT_ON_DEAD_NODE: Duration = Duration::from_secs(12);
/// The fullest OAP may have so many times the mean,
const EVEN: f64 = 1.05;
/// or so many more than the emptiest.
const FEW: u32 = 2;
/// Clients that connect within so long.
const COME_WITHIN: Duration = Duration::from_secs(3);

/// What was there before something happened.
struct Before {
    mark: Mark,
    over_quota: u64,
}

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    switch(fixture, report, "on")?;
    event(fixture, report, "9 all come anew", WITHOUT, come_anew)?;
    event(
        fixture,
        report,
        "9 OAPs restarted",
        WITHOUT,
        without::restart,
    )?;
    event(fixture, report, "9 3 OAPs", WITHOUT, |fixture| {
        to(fixture, 3)
    })?;
    to(fixture, REPLICAS)?;
    event(
        fixture,
        report,
        "9 4 OAPs, all come anew",
        WITHOUT,
        come_anew,
    )?;
    node_killed(fixture, report)?;
    switch(fixture, report, "off")?;
    let told = standin::now();
    come_anew(fixture)?;
    fixture.reconnected(told)?;
    fixture.all_connected(report, "9 place off, all come anew")?;
    tell_spread(fixture, report, "9 place off, all come anew")
}

/// Placed, and a node dies.
pub fn run_short(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture
        .clients
        .as_mut()
        .context("there are clients")?
        .end_outside();
    switch(fixture, report, "on")?;
    event(fixture, report, "9 all come anew", WITHOUT, come_anew)?;
    node_killed(fixture, report)?;
    fixture.clients = Some(Clients::in_pods(&fixture.cluster)?);
    Ok(())
}

/// A node is killed, and comes back. Its clients end with it.
fn node_killed(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let clients = fixture.clients.as_mut().context("there are clients")?;
    clients.forget(VICTIM);
    let step = format!("9 {VICTIM} killed");
    event(fixture, report, &step, WITHOUT_ON_DEAD_NODE, kill)?;
    fixture.cluster.kubernetes.start_node(VICTIM);
    fixture.daemons_ready(report, "9 node back", &BTreeSet::new())?;
    fixture.wait_oaps(REPLICAS)
}

/// Puts the chart's `config.place` in force, and waits until every daemon says so.
fn switch(fixture: &mut Fixture, report: &mut Report, place: &str) -> Result<()> {
    fixture.look()?;
    fixture.keep_logs();
    let old: BTreeSet<_> = fixture
        .daemons
        .values()
        .map(|daemon| daemon.uid.clone())
        .collect();
    let values = layout::placing(&fixture.cluster.product, place);
    fixture.cluster.helm_upgrade(&values)?;
    let step = format!("9 place {place}");
    fixture.daemons_ready(report, &step, &old)?;
    let cluster = &fixture.cluster;
    cluster.wait_rolled_out(WORKLOADS, "deployment/workload", PODS_START_WITHIN)?;
    nodes_place(fixture, report, &step, place == "on")?;
    fixture.clients = Some(Clients::in_pods(&fixture.cluster)?);
    // A node knows of the connections that it has placed, and of none that are older.
    come_anew(fixture)?;
    fixture.all_connected(report, &step)
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
                let said: serde_json::Value = serde_json::from_str(&said).context("no JSON")?;
                Ok(said["placing"]["services"][0]["placed"] == true)
            });
            Ok(Check::new(
                &expected,
                slashed(placed.collect::<Result<Vec<_>>>()?),
            ))
        },
    )
}

/// Something happens. Then all have a connection again, nobody was refused by a quota or waited for
/// long, and all OAPs have as many.
fn event(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    longest: Duration,
    happens: impl FnOnce(&mut Fixture) -> Result<()>,
) -> Result<()> {
    let before = Before {
        mark: fixture.clients()?.mark(&fixture.cluster)?,
        over_quota: over_quota(fixture)?,
    };
    let begun = Instant::now();
    happens(fixture)?;
    fixture.all_connected(report, step)?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell(&format!("{step}: all connected"), &took);
    fixture.nobody_waited(report, step, &before.mark, longest)?;
    let refused = over_quota(fixture)?.saturating_sub(before.over_quota);
    report.check(
        &format!("{step}: refused by a quota"),
        &Check::new(0, refused),
    )?;
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

fn come_anew(fixture: &mut Fixture) -> Result<()> {
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

fn even(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    fixture.look()?;
    let held: Vec<u32> = fixture.held().into_iter().map(Held::admitted).collect();
    let most = held.iter().max().copied().unwrap_or(0);
    let least = held.iter().min().copied().unwrap_or(0);
    let seen = unevenness(&held);
    if seen > EVEN && most - least > FEW {
        tell_placed(fixture, report, step)?;
    }
    report.check(
        &format!("{step}: max/mean"),
        &Check::judged(
            format!("at most {EVEN}, or {FEW} apart"),
            format!("{seen:.3}: {}", slashed(&held)),
            seen <= EVEN || most - least <= FEW,
        ),
    )
}

/// What each node says of each endpoint: placed there, and what others have.
fn tell_placed(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    for daemon in fixture.daemons.values() {
        let said = daemon.ask(&fixture.cluster, Way::OnNode, &["status", "-o", "json"])?;
        let said: serde_json::Value = serde_json::from_str(&said).context("no JSON")?;
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

fn tell_spread(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    fixture.look()?;
    let held: Vec<u32> = fixture.held().into_iter().map(Held::admitted).collect();
    let seen = format!("{:.3}: {}", unevenness(&held), slashed(&held));
    report.tell(&format!("{step}: max/mean"), &seen);
    Ok(())
}
