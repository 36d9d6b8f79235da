//! 1: OAPs, clients and a Service, without the balancer.

use anyhow::Result;
use testkit::scenario::Report;

use crate::checks::PODS_START_WITHIN;
use crate::clients::Clients;
use crate::layout::{self, OAPS, REPLICAS, SHOP};
use crate::oaps::Held;
use crate::world::{World, slashed, unevenness};

pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    let lab = &world.lab;
    lab.cluster.admin().apply(&layout::oaps(REPLICAS));
    lab.wait_rolled_out(OAPS, "deployment/skywalking-oap", PODS_START_WITHIN)?;
    lab.cluster.admin().apply(&layout::clients());
    lab.wait_rolled_out(SHOP, "deployment/shop", PODS_START_WITHIN)?;
    let mut clients = Clients::in_pods(lab)?;
    clients.start_outside(lab)?;
    world.clients = Some(clients);
    world.all_connected(report, "1 no balancer")?;
    look(world, report, "1 no balancer: connections of each OAP")?;
    restart(world)?;
    world.all_connected(report, "1 no balancer, OAPs restarted")?;
    look(world, report, "1 no balancer, OAPs restarted")
}

/// Replaces the OAPs one after the other, and waits until that is done.
pub fn restart(world: &mut World) -> Result<()> {
    let restart = [
        "rollout",
        "restart",
        "deployment/skywalking-oap",
        "-n",
        OAPS,
    ];
    world.lab.kubectl(&restart)?;
    world
        .lab
        .wait_rolled_out(OAPS, "deployment/skywalking-oap", PODS_START_WITHIN)?;
    world.wait_oaps(REPLICAS)
}

fn look(world: &mut World, report: &mut Report, step: &str) -> Result<()> {
    world.look()?;
    let held: Vec<u32> = world.held().into_iter().map(Held::admitted).collect();
    world.uneven = unevenness(&held);
    let seen = format!("{}, max/mean {:.2}", slashed(&held), world.uneven);
    report.tell(step, &seen);
    Ok(())
}
