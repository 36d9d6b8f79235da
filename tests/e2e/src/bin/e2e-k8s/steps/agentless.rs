//! 10: one node has no daemon. Its clients are left to kube-proxy, all others are placed, and it is
//! named.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use testkit::scenario::{Check, Report, interrupt};

use super::place::{self, Before, WITHOUT, come_anew};
use super::without;
use crate::checks::{PODS_START_WITHIN, wait};
use crate::daemons::{self, Way};
use crate::fixture::{Fixture, slashed, unevenness};
use crate::layout::{self, FAIL_OPEN_AFTER, NODES, SWITCH, WITHOUT_CONNECTION, WITHOUT_DAEMON};
use crate::oaps::Held;

/// A pod that no daemon tells of is named after a minute.
const NAMED_WITHIN: Duration = Duration::from_secs(90);
/// When all come anew the fullest OAP of a node with a daemon may have so many times the mean of
/// these: a third of the clients come where chance has them, and what they make uneven is told when
/// the others have come, too. What is on the node without one nobody knows: there the OAPs may have
/// any number.
const EVEN_AMONG_COUNTED: f64 = 1.15;

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let values = layout::placing_unless_labelled(&fixture.cluster.product);
    place::switch(fixture, report, "10 place on", &values, true)?;
    take_away(fixture, report)?;
    named(fixture, report)?;
    happens(fixture, report, "10 all come anew", WITHOUT, come_anew)?;
    counted_are_even(fixture, report, "10 all come anew")?;
    // The clients of that node meet OAPs that have ended, as without a balancer.
    let step = "10 OAPs restarted";
    happens(fixture, report, step, WITHOUT_CONNECTION, without::restart)?;
    let step = "10 after that, all come anew";
    happens(fixture, report, step, WITHOUT, come_anew)?;
    counted_are_even(fixture, report, step)?;
    label(fixture, "on")?;
    fixture.daemons_ready(report, "10 daemon back", &BTreeSet::new())?;
    // A node knows of the connections that it has placed, and of none that are older.
    come_anew(fixture)?;
    fixture.all_connected(report, "10 daemon back")?;
    let step = "10 daemon back, all come anew";
    place::event(fixture, report, step, WITHOUT, come_anew)
}

/// Ends the daemon of the node, and waits until the node places nobody any more.
fn take_away(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    label(fixture, "off")?;
    let step = format!("10 {WITHOUT_DAEMON} without a daemon: daemons");
    let rest = NODES.iter().filter(|node| **node != WITHOUT_DAEMON);
    let rest = slashed(rest);
    wait(report, &step, PODS_START_WITHIN, "the others", || {
        fixture.daemons = daemons::look(&fixture.cluster)?;
        Ok(Check::new(&rest, slashed(fixture.daemons.keys())))
    })?;
    // A second more: it is the last heartbeat that counts.
    interrupt::pause(FAIL_OPEN_AFTER + Duration::from_secs(1))
}

fn label(fixture: &Fixture, value: &str) -> Result<()> {
    let label = format!("{SWITCH}={value}");
    let arguments = ["label", "node", WITHOUT_DAEMON, &label, "--overwrite"];
    fixture.cluster.kubectl(&arguments).map(drop)
}

/// `doctor --cluster` names the node, and so do the daemons, which miss its pods.
fn named(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let cluster = &fixture.cluster;
    let step = "10 doctor --cluster: nodes without a daemon";
    report.wait(step, PODS_START_WITHIN, || {
        let named = cluster.named_by_doctor("nodes without a daemon")?;
        Ok(Check::new(WITHOUT_DAEMON, named))
    })?;
    let there = (fixture.oaps.iter()).any(|oap| oap.node == WITHOUT_DAEMON);
    report.check("10 an OAP is on that node", &Check::new(true, there))?;
    let step = "10 status --cluster: daemons that name the node";
    wait(report, step, NAMED_WITHIN, "all", || {
        let views = fixture.daemons.values().map(|daemon| {
            let view = daemon.cluster_status(cluster, Way::OnNode)?;
            let mut problems = view.problems.iter();
            Ok(problems.any(|problem| problem.contains(WITHOUT_DAEMON)))
        });
        let naming: Vec<bool> = views.collect::<Result<_>>()?;
        let naming = naming.iter().filter(|names| **names).count();
        Ok(Check::new(fixture.daemons.len(), naming))
    })
}

/// Something happens. All have a connection again; how many each OAP has is told.
fn happens(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    longest: Duration,
    happens: impl FnOnce(&mut Fixture) -> Result<()>,
) -> Result<()> {
    let before = Before::now(fixture)?;
    happens(fixture)?;
    fixture.all_connected(report, step)?;
    fixture.nobody_waited(report, step, before.mark(), longest)?;
    place::tell_outages(fixture, report, step, &before)?;
    place::tell_spread(fixture, report, step)?;
    let nodes = (fixture.oaps.iter()).map(|oap| oap.node.as_str());
    report.tell(&format!("{step}: nodes of the OAPs"), &slashed(nodes));
    Ok(())
}

/// The OAPs that a daemon counts have as many connections.
fn counted_are_even(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    fixture.look()?;
    let held = fixture.oaps.iter().zip(fixture.held());
    let counted = held.filter(|(oap, _)| oap.node != WITHOUT_DAEMON);
    let counted: Vec<u32> = counted.map(|(_, held)| Held::admitted(held)).collect();
    let seen = unevenness(&counted);
    report.check(
        &format!("{step}: max/mean of the OAPs on other nodes"),
        &Check::judged(
            format!("at most {EVEN_AMONG_COUNTED}"),
            format!("{seen:.3}: {}", slashed(&counted)),
            seen <= EVEN_AMONG_COUNTED,
        ),
    )
}
