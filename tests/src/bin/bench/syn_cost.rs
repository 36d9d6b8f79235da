//! Measurement 2: nanoseconds a run of the kernel programs, while connections come as fast as they can.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::fixtures::foreign::{Answer, SkLookup};
use balancer_tests::fixtures::{Balancer, Machine};
use serde::Serialize;
use serde_json::json;

use crate::drive::drive;
use crate::peers::{FRONT, balancer_file, set_policy};
use crate::programs::{self, NAMES, Programs, Runs};
use crate::report::{Chart, Goal, Rows, Section};
use crate::serve::Servers;
use crate::settings::{BACKENDS, POLICIES, Settings, USUAL};
use crate::statistics::{Summary, as_f64};

/// What steer may cost with the usual number of backends and with the most, in nanoseconds.
const BOUNDS: [(u16, f64); 2] = [(USUAL, 200.0), (256, 600.0)];

#[derive(Serialize)]
struct Row {
    program: &'static str,
    policy: Option<&'static str>,
    backends: u16,
    ns: f64,
    ns_spread: f64,
    runs_per_connection: f64,
}

#[derive(Default)]
struct Series {
    costs: Vec<f64>,
    runs: Vec<f64>,
}

impl Series {
    fn row(&self, program: &'static str, policy: Option<&'static str>, backends: u16) -> Row {
        let cost = Summary::of(&self.costs);
        Row {
            program,
            policy,
            backends,
            ns: cost.median,
            ns_spread: cost.spread,
            runs_per_connection: Summary::of(&self.runs).median,
        }
    }
}

/// Measures.
///
/// # Errors
/// When the kernel takes no times, or a client isn't served.
pub fn measure(settings: &Settings) -> Result<Section> {
    let rounds = settings.pick(2, 11);
    let slice = settings.pick(Duration::from_millis(150), Duration::from_millis(700));
    let machines: Vec<_> = BACKENDS.iter().map(|_| Machine::new()).collect();
    let mut subjects = Vec::new();
    for (machine, backends) in machines.iter().zip(BACKENDS) {
        let balancer = Balancer::start(machine, &balancer_file(POLICIES[0], backends, None));
        let servers = Servers::together(machine, backends)?;
        balancer.wait_active(usize::from(backends));
        subjects.push((machine, backends, balancer, servers));
    }
    let _times = programs::take_times()?;
    let mut all: Vec<[[Series; 2]; 3]> = BACKENDS.iter().map(|_| Default::default()).collect();
    for _ in 0..rounds {
        for ((machine, backends, balancer, _), series) in subjects.iter().zip(&mut all) {
            for (policy, series) in POLICIES.iter().zip(series) {
                set_policy(balancer, policy, *backends);
                one(machine, balancer, slice, series).with_context(|| (*policy).to_owned())?;
            }
        }
    }
    drop(subjects);
    let mut rows = vec![floor(rounds, slice)?];
    for (series, backends) in all.iter().zip(BACKENDS) {
        for (series, policy) in series.iter().zip(POLICIES) {
            let named = series.iter().zip(NAMES);
            rows.extend(named.map(|(series, name)| series.row(name, Some(policy), backends)));
        }
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.program));
    Ok(section(&rows))
}

fn one(
    machine: &Machine,
    balancer: &Balancer<'_>,
    slice: Duration,
    series: &mut [Series; 2],
) -> Result<()> {
    let programs = Programs::of(balancer)?;
    let before = programs.read()?;
    let visits = drive(&machine.netns, &[FRONT], slice)?;
    let after = programs.read()?;
    for (series, (after, before)) in series.iter_mut().zip(after.iter().zip(&before)) {
        let runs = after.since(before);
        ensure!(
            runs.count >= visits.served,
            "a program ran {} times for {} connections",
            runs.count,
            visits.served
        );
        series.costs.push(runs.nanoseconds());
        series.runs.push(as_f64(runs.count) / as_f64(visits.served));
    }
    Ok(())
}

/// What the kernel's clock makes of an `sk_lookup` program that looks at one field and passes: the part of every figure that is not ours.
fn floor(rounds: usize, slice: Duration) -> Result<Row> {
    let machine = Machine::new();
    let servers = Servers::together(&machine, 1)?;
    let program = SkLookup::load("bench_floor", FRONT.port(), Answer::Pass);
    let _attached = program.attach(&machine.netns);
    let mut series = Series::default();
    for _ in 0..rounds {
        let before = Runs::of(program.id())?;
        let visits = drive(&machine.netns, servers.addresses(), slice)?;
        let after = Runs::of(program.id())?;
        let runs = after.since(&before);
        series.costs.push(runs.nanoseconds());
        series.runs.push(as_f64(runs.count) / as_f64(visits.served));
    }
    Ok(series.row("nothing", None, 1))
}

fn section(rows: &[Row]) -> Section {
    let mut table = Rows::new(
        2,
        &[
            "program",
            "policy",
            "backends",
            "ns a run",
            "runs a connection",
        ],
    );
    for row in rows {
        table.add([
            row.program.to_owned(),
            row.policy.unwrap_or("").to_owned(),
            row.backends.to_string(),
            format!("{:.0} ± {:.0}", row.ns, row.ns_spread),
            format!("{:.2}", row.runs_per_connection),
        ]);
    }
    let steer = |policy: &str, backends: u16| {
        let found = rows.iter().find(|row| {
            row.program == NAMES[0] && row.policy == Some(policy) && row.backends == backends
        });
        found.map(|row| row.ns)
    };
    let mut goals = Vec::new();
    for (backends, bound) in BOUNDS {
        for policy in POLICIES {
            let what = format!("steer, {policy} with {backends} backends,");
            let seen = steer(policy, backends).unwrap_or(f64::NAN);
            goals.push(Goal::at_most(&what, bound, "ns", seen));
        }
    }
    let line = |policy: &&str| {
        let costs = BACKENDS.iter().map(|backends| steer(policy, *backends));
        ((*policy).to_owned(), costs.collect())
    };
    Section {
        key: "syn_cost",
        title: "Cost of one connection in the kernel",
        rows: json!(rows),
        table,
        goals,
        chart: Some(Chart {
            across: "backends",
            up: "steer, nanoseconds a run",
            categories: BACKENDS.iter().map(ToString::to_string).collect(),
            lines: POLICIES.iter().map(line).collect(),
        }),
    }
}
