//! 8: a node dies, and comes back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use balancer_tests::story::{Report, Sight};

use crate::agents::Way;
use crate::checks::{PODS_START_WITHIN, wait};
use crate::layout::{REPLICAS, VICTIM};
use crate::world::World;

/// The controllers give a node up after 12 s here; 40 s is usual.
const QUOTAS_WITHIN: Duration = Duration::from_secs(45);

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
    world.quotas_follow(report, &step, ready, QUOTAS_WITHIN, begun)?;
    world.all_connected(report, "8 node killed: others")?;
    world.nobody_waited(report, "8 node killed: others", &mark)?;
    world.counts_are_true(report, "8 node killed", Way::Exec)?;
    world.lab.cluster.start_node(VICTIM);
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
