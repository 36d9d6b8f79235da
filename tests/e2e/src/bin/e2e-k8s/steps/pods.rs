//! 5: the total follows from the number of monitored pods, and the headroom is small.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use testkit::scenario::{Check, Report};

use super::change;
use crate::checks::{living, quotas, wait};
use crate::daemons::{Group, Way};
use crate::fixture::{Fixture, slashed};
use crate::layout::{CLIENT_PODS, CONNECTIONS, REPLICAS, TIGHT_HEADROOM, WITHOUT_CONNECTION};

/// At once, but for what a client gets that was refused for long: it goes away a minute later,
/// slowly.
const QUOTAS_WITHIN: Duration = Duration::from_secs(120);
/// A source that was refused for long counts as starved for so long at most, when it does not come
/// back.
const ROOM_FOR_REFUSED: Duration = Duration::from_secs(180);
/// By chance nobody is refused: then they come once more.
const TRIES: u32 = 3;

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    // They are of no pod.
    let clients = fixture.clients.as_mut().context("there are clients")?;
    clients.end_outside();
    change::scale(fixture, report, "5", REPLICAS)?;
    // Quotas are lowered slowly. New OAPs begin with what is right.
    change::restart(fixture, report, "5", TIGHT_HEADROOM)?;
    by_pods(fixture, report, "5 OAPs restarted", Way::Exec)?;
    come_anew(fixture, report)?;
    fixture.spread(report, "5 all come anew", TIGHT_HEADROOM)
}

/// The quota of every OAP that follows from the pods.
pub fn quota() -> u32 {
    (CLIENT_PODS * CONNECTIONS * (100 + TIGHT_HEADROOM)).div_ceil(100 * REPLICAS)
}

/// The daemons say that, and how it comes about.
pub fn by_pods(fixture: &mut Fixture, report: &mut Report, step: &str, way: Way) -> Result<()> {
    let words = format!("{CLIENT_PODS} pods × {CONNECTIONS}");
    let expected = format!("{words}: {}", quota());
    let step = format!("{step}: total, and quotas");
    wait(report, &step, QUOTAS_WITHIN, &expected, || {
        if way == Way::Exec {
            fixture.look()?;
        }
        let groups = fixture.groups(way)?;
        let other = groups
            .iter()
            .find(|group| !group.sentence.contains(&words) || quotas(group) != quota().to_string());
        Ok(Check::new(
            &expected,
            other.map_or(expected.clone(), |group| {
                format!("{}: {}", group.sentence, quotas(group))
            }),
        ))
    })
}

/// The daemons compute that again, and quotas that were raised meanwhile have gone down to it, as
/// slowly as the rule has it: a source that was refused for long has its room for three minutes at
/// most, and a tenth goes in a minute. Raised they are at once: while the API server is away nodes
/// count as lost, and so a pod less shares the total for a moment when it is back.
pub fn by_pods_in_time(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    let begun = Instant::now();
    let computed = format!("/ {REPLICAS} ready) = {}", quota());
    let each = format!("{step}: daemons that compute {}", quota());
    wait(report, &each, QUOTAS_WITHIN, "all", || {
        let groups = fixture.groups(Way::Exec)?;
        let computing = groups
            .iter()
            .filter(|group| group.sentence.contains(&computed));
        Ok(Check::new(fixture.daemons.len(), computing.count()))
    })?;
    let highest = fixture.groups(Way::Exec)?.iter().filter_map(highest).max();
    let highest = highest.unwrap_or_else(quota);
    let patience = ROOM_FOR_REFUSED + lowered_within(highest, quota());
    let all = format!("{step}: quotas, from {highest}");
    wait(report, &all, patience, &quota().to_string(), || {
        let groups = fixture.groups(Way::Exec)?;
        let seen: BTreeSet<String> = groups.iter().map(quotas).collect();
        Ok(Check::new(quota(), slashed(seen)))
    })?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell(&format!("{step}: quotas follow"), &took);
    Ok(())
}

fn highest(group: &Group) -> Option<u32> {
    living(group).filter_map(|backend| backend.quota).max()
}

/// How long a quota takes to go down by a tenth a minute, and two steps more, for it is a whole
/// number.
fn lowered_within(from: u32, to: u32) -> Duration {
    let minutes = (f64::from(from.max(to)) / f64::from(to)).ln() / (1.0_f64 / 0.9).ln();
    Duration::from_secs(60).mul_f64(minutes + 2.0)
}

fn come_anew(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    let begun = Instant::now();
    for _ in 0..TRIES {
        let told = standin::now();
        fixture
            .clients()?
            .reconnect(&fixture.cluster, Duration::from_secs(3))?;
        fixture.reconnected(told)?;
        fixture.all_connected(report, "5 all come anew")?;
        if mark.refused(&fixture.clients()?.tally(&fixture.cluster)?) > 0 {
            break;
        }
    }
    let tally = fixture.clients()?.tally(&fixture.cluster)?;
    let refused = mark.refused(&tally);
    report.check(
        "5 all come anew: connects refused, timed out, failed",
        &Check::judged(
            "some, 0, 0",
            format!(
                "{refused}, {}, {}",
                mark.timed_out(&tally),
                mark.failed(&tally)
            ),
            refused > 0 && mark.timed_out(&tally) == 0 && mark.failed(&tally) == 0,
        ),
    )?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell("5 all come anew: all connected", &took);
    fixture.nobody_waited(report, "5 all come anew", &mark, WITHOUT_CONNECTION)?;
    fixture.counts_are_true(report, "5 all come anew", Way::Exec)?;
    fixture.within_quotas(report, "5 all come anew")
}
