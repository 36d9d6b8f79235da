//! 8: a node dies, and comes back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testkit::scenario::{Check, Report, interrupt};

use crate::checks::{PODS_START_WITHIN, wait};
use crate::daemons::Way;
use crate::fixture::Fixture;
use crate::layout::{OAPS, REPLICAS, SYSTEM, VICTIM, WITHOUT_CONNECTION};

/// The controllers give a node up that has been silent for 12 s. Their own watches may have pauses
/// after the step before, and their processor others to serve: more than a minute was seen.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(120);
/// From then on.
const QUOTAS_WITHIN: Duration = Duration::from_secs(10);
/// Pods of a node that is no more are looked for every 20 s, and have 40 s.
const COLLECTED_WITHIN: Duration = Duration::from_secs(90);

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let clients = fixture.clients.as_mut().context("there are clients")?;
    clients.forget(VICTIM);
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    fixture.look()?;
    let there = fixture.oaps.iter().filter(|oap| oap.node == VICTIM).count();
    let begun = Instant::now();
    fixture.cluster.kubernetes.kill_node(VICTIM);
    let ready = REPLICAS as usize - there;
    let step = format!("8 {VICTIM} killed, with {there} OAPs");
    wait(
        report,
        &format!("{step}: OAPs that the Service goes to"),
        GIVEN_UP_WITHIN,
        "fewer",
        || Ok(Check::new(ready, endpoints(fixture)?)),
    )?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell(&format!("{step}: Kubernetes gives it up"), &took);
    fixture.quotas_follow(report, &step, ready, QUOTAS_WITHIN, Instant::now())?;
    fixture.all_connected(report, "8 node killed: others")?;
    // Until then every other connect is lost on the dead node.
    fixture.nobody_waited(
        report,
        "8 node killed: others",
        &mark,
        GIVEN_UP_WITHIN + WITHOUT_CONNECTION,
    )?;
    fixture.counts_are_true(report, "8 node killed", Way::Exec)?;
    report_goes(fixture, report)?;
    fixture.cluster.kubernetes.start_node(VICTIM);
    // Its pods get their addresses anew, and connections of those before it are still in the other
    // nodes' socket tables.
    fixture.reused = true;
    fixture.daemons_ready(report, "8 node back", &BTreeSet::new())?;
    let step = "8 node back: OAPs ready";
    wait(report, step, PODS_START_WITHIN, "all", || {
        fixture.look()?;
        let ready = fixture.oaps.iter().filter(|oap| oap.ready).count();
        Ok(Check::new(REPLICAS, ready))
    })?;
    fixture.counts_are_true(report, "8 node back", Way::Exec)?;
    fixture.views_agree(report, "8 node back")
}

/// Waits until Kubernetes has given the node up that was killed: no pod of it is an endpoint.
pub fn wait_given_up(fixture: &mut Fixture) -> Result<()> {
    fixture.look()?;
    let alive = fixture.oaps.iter().filter(|oap| oap.node != VICTIM).count();
    let deadline = Instant::now() + GIVEN_UP_WITHIN;
    // Pods that stand in for those of the dead node may come before the last look.
    while endpoints(fixture)? > alive.max(1) {
        ensure!(Instant::now() < deadline, "{VICTIM} is not given up");
        interrupt::pause(Duration::from_millis(200))?;
        fixture.look()?;
    }
    Ok(())
}

/// A node that is deleted takes the pod of its daemon along, and that its report.
fn report_goes(fixture: &Fixture, report: &mut Report) -> Result<()> {
    let name = format!("configmap/balancer-{VICTIM}");
    let get = ["get", "configmaps", "-n", SYSTEM, "-o", "name"];
    let is_there = || -> Result<bool> {
        Ok(fixture
            .cluster
            .kubectl(&get)?
            .lines()
            .any(|line| line == name))
    };
    let before = Check::new(true, is_there()?);
    report.check("8 node killed: its report is there", &before)?;
    fixture
        .cluster
        .kubectl(&["delete", "node", VICTIM, "--wait=false"])?;
    let step = "8 node deleted: its report is there";
    report.wait(step, COLLECTED_WITHIN, || {
        Ok(Check::new(false, is_there()?))
    })
}

/// How many pods the Service sends connections to.
fn endpoints(fixture: &Fixture) -> Result<usize> {
    let slices = [
        "endpointslices",
        "-n",
        OAPS,
        "-o",
        "jsonpath={.items[*].endpoints[*].conditions.ready}",
    ];
    let ready = fixture.cluster.kubectl(&[&["get"], &slices[..]].concat())?;
    Ok(ready.split(' ').filter(|ready| *ready == "true").count())
}
