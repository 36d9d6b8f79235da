//! 4: daemons end in every way under load.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use testkit::scenario::{Check, Report};

use crate::checks::{PODS_START_WITHIN, wait};
use crate::daemons::Way;
use crate::fixture::Fixture;
use crate::layout::{self, SYSTEM};

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    deleted(fixture, report)?;
    killed(fixture, report)?;
    replaced(fixture, report)
}

fn deleted(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    fixture.look()?;
    let daemon = fixture
        .daemons
        .values()
        .next()
        .context("there is a daemon")?;
    let gone = BTreeSet::from([daemon.uid.clone()]);
    let delete = ["delete", "pod", &daemon.name, "-n", SYSTEM, "--wait=false"];
    fixture.cluster.kubectl(&delete)?;
    let step = "4 daemon pod deleted";
    fixture.daemons_ready(report, step, &gone)?;
    fixture.nothing_lost(report, step, &mark)?;
    fixture.counts_are_true(report, step, Way::Exec)
}

fn killed(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    fixture.look()?;
    let daemon = fixture
        .daemons
        .values()
        .nth(1)
        .context("there are daemons")?;
    let daemon = daemon.clone();
    let step = "4 daemon killed (-9)";
    kill(daemon.process()?, Signal::SIGKILL).context("cannot kill a daemon")?;
    wait(
        report,
        &format!("{step}: restarts, and ready"),
        PODS_START_WITHIN,
        "1, true",
        || {
            fixture.look()?;
            let now = fixture.daemons.get(&daemon.node);
            let seen = now.map_or("no pod".to_owned(), |now| {
                format!("{}, {}", now.restarts - daemon.restarts, now.ready)
            });
            Ok(Check::new("1, true", seen))
        },
    )?;
    fixture.nothing_lost(report, step, &mark)?;
    fixture.counts_are_true(report, step, Way::Exec)
}

/// Another configuration and another annotation: every daemon is replaced.
pub fn replaced(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    fixture.look()?;
    let old: BTreeSet<_> = fixture
        .daemons
        .values()
        .map(|daemon| daemon.uid.clone())
        .collect();
    let begun = Instant::now();
    let values = layout::by_pods(&fixture.cluster.product);
    fixture.cluster.helm_upgrade(&values)?;
    let step = "4 helm upgrade";
    fixture.daemons_ready(report, step, &old)?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell("4 helm upgrade: all daemons replaced", &took);
    fixture.nothing_lost(report, step, &mark)?;
    fixture.counts_are_true(report, step, Way::Exec)?;
    fixture.views_agree(report, step)
}
