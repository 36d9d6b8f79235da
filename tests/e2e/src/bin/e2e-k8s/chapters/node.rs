//! 8: a node dies, and comes back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testkit::scenario::{Report, Sight};

use crate::agents::Way;
use crate::checks::{PODS_START_WITHIN, wait};
use crate::layout::{OAPS, REPLICAS, VICTIM, WITHOUT_CONNECTION};
use crate::world::World;

/// The controllers give a node up that has been silent for 12 s, and their own watches may have pauses after the chapter before.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(60);
/// From then on.
const QUOTAS_WITHIN: Duration = Duration::from_secs(10);

pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    let clients = world.clients.as_mut().context("there are clients")?;
    clients.forget(VICTIM);
    let mark = world.clients()?.mark(&world.lab)?;
    world.look()?;
    let there = world.oaps.iter().filter(|oap| oap.node == VICTIM).count();
    let begun = Instant::now();
    world.lab.cluster.kill_node(VICTIM);
    let ready = REPLICAS as usize - there;
    let step = format!("8 {VICTIM} killed, with {there} OAPs");
    wait(
        report,
        &format!("{step}: OAPs that the Service goes to"),
        GIVEN_UP_WITHIN,
        "fewer",
        || Ok(Sight::new(ready, endpoints(world)?)),
    )?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell(&format!("{step}: Kubernetes gives it up"), &took);
    world.quotas_follow(report, &step, ready, QUOTAS_WITHIN, Instant::now())?;
    world.all_connected(report, "8 node killed: others")?;
    // Until then every other connect is lost on the dead node.
    world.nobody_waited(
        report,
        "8 node killed: others",
        &mark,
        GIVEN_UP_WITHIN + WITHOUT_CONNECTION,
    )?;
    world.counts_are_true(report, "8 node killed", Way::Exec)?;
    world.lab.cluster.start_node(VICTIM);
    // Its pods get their addresses anew, and connections of those before it are still in the other nodes' socket tables.
    world.reused = true;
    world.agents_ready(report, "8 node back", &BTreeSet::new())?;
    let step = "8 node back: OAPs ready";
    wait(report, step, PODS_START_WITHIN, "all", || {
        world.look()?;
        let ready = world.oaps.iter().filter(|oap| oap.ready).count();
        Ok(Sight::new(REPLICAS, ready))
    })?;
    world.counts_are_true(report, "8 node back", Way::Exec)?;
    world.views_agree(report, "8 node back")
}

/// How many pods the Service sends connections to.
fn endpoints(world: &World) -> Result<usize> {
    let slices = [
        "endpointslices",
        "-n",
        OAPS,
        "-o",
        "jsonpath={.items[*].endpoints[*].conditions.ready}",
    ];
    let ready = world.lab.kubectl(&[&["get"], &slices[..]].concat())?;
    Ok(ready.split(' ').filter(|ready| *ready == "true").count())
}
