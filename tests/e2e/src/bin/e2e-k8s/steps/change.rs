//! 3: the OAPs are restarted, and their number changes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use testkit::scenario::Report;

use super::without;
use crate::daemons::Way;
use crate::fixture::Fixture;
use crate::layout::{HEADROOM, OAPS, REPLICAS, WITHOUT_CONNECTION};

/// From `kubectl scale` to the quotas: pods start or end, endpoints change.
const QUOTAS_WITHIN: Duration = Duration::from_secs(20);

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    restart(fixture, report, "3", HEADROOM)?;
    for replicas in [3, 5] {
        scale(fixture, report, "3", replicas)?;
    }
    Ok(())
}

/// Replaces all OAPs, one after the other; headroom in percent.
pub fn restart(
    fixture: &mut Fixture,
    report: &mut Report,
    number: &str,
    headroom: u32,
) -> Result<()> {
    let step = format!("{number} OAPs restarted");
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    let begun = Instant::now();
    without::restart(fixture)?;
    let replicas = REPLICAS as usize;
    fixture.quotas_follow(report, &step, replicas, QUOTAS_WITHIN, begun)?;
    fixture.attached(report, &step, &BTreeMap::new())?;
    fixture.all_connected(report, &step)?;
    fixture.nobody_waited(report, &step, &mark, WITHOUT_CONNECTION)?;
    fixture.counts_are_true(report, &step, Way::Exec)?;
    fixture.spread(report, &step, headroom)
}

/// Changes the number of OAPs.
pub fn scale(
    fixture: &mut Fixture,
    report: &mut Report,
    number: &str,
    replicas: u32,
) -> Result<()> {
    let step = format!("{number} {replicas} OAPs");
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    let begun = Instant::now();
    let number = format!("--replicas={replicas}");
    let scale = ["scale", "deployment/skywalking-oap", "-n", OAPS, &number];
    fixture.cluster.kubectl(&scale)?;
    fixture.quotas_follow(report, &step, replicas as usize, QUOTAS_WITHIN, begun)?;
    fixture.wait_oaps(replicas)?;
    fixture.attached(report, &step, &BTreeMap::new())?;
    fixture.all_connected(report, &step)?;
    fixture.nobody_waited(report, &step, &mark, WITHOUT_CONNECTION)?;
    fixture.counts_are_true(report, &step, Way::Exec)?;
    fixture.views_agree(report, &step)
}
