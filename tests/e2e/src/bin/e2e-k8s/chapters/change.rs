//! 3: the OAPs are restarted, and their number changes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use testkit::scenario::Report;

use super::without;
use crate::agents::Way;
use crate::layout::{HEADROOM, OAPS, REPLICAS, WITHOUT_CONNECTION};
use crate::world::World;

/// From `kubectl scale` to the quotas: pods start or end, endpoints change.
const QUOTAS_WITHIN: Duration = Duration::from_secs(20);

pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    restart(world, report, "3", HEADROOM)?;
    for replicas in [3, 5] {
        scale(world, report, "3", replicas)?;
    }
    Ok(())
}

/// Replaces all OAPs, one after the other; headroom in percent.
pub fn restart(world: &mut World, report: &mut Report, chapter: &str, headroom: u32) -> Result<()> {
    let step = format!("{chapter} OAPs restarted");
    let mark = world.clients()?.mark(&world.lab)?;
    let begun = Instant::now();
    without::restart(world)?;
    let replicas = REPLICAS as usize;
    world.quotas_follow(report, &step, replicas, QUOTAS_WITHIN, begun)?;
    world.attached(report, &step, &BTreeMap::new())?;
    world.all_connected(report, &step)?;
    world.nobody_waited(report, &step, &mark, WITHOUT_CONNECTION)?;
    world.counts_are_true(report, &step, Way::Exec)?;
    world.spread(report, &step, headroom)
}

/// Changes the number of OAPs.
pub fn scale(world: &mut World, report: &mut Report, chapter: &str, replicas: u32) -> Result<()> {
    let step = format!("{chapter} {replicas} OAPs");
    let mark = world.clients()?.mark(&world.lab)?;
    let begun = Instant::now();
    let number = format!("--replicas={replicas}");
    let scale = ["scale", "deployment/skywalking-oap", "-n", OAPS, &number];
    world.lab.kubectl(&scale)?;
    world.quotas_follow(report, &step, replicas as usize, QUOTAS_WITHIN, begun)?;
    world.wait_oaps(replicas)?;
    world.attached(report, &step, &BTreeMap::new())?;
    world.all_connected(report, &step)?;
    world.nobody_waited(report, &step, &mark, WITHOUT_CONNECTION)?;
    world.counts_are_true(report, &step, Way::Exec)?;
    world.views_agree(report, &step)
}
