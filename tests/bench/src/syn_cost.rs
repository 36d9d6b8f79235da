//! Measurement 2: nanoseconds a run of the kernel programs, while connections come as fast as they
//! can.

use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer::sys::bpf::prog_by_id;
use serde::Serialize;
use serde_json::json;
use testbpf::prog_test_run;
use testkit::fixtures::foreign::{Answer, SkLookup};
use testkit::fixtures::{Balancer, Machine};

use crate::drive::drive;
use crate::peers::{FRONT, balancer_file, set_policy};
use crate::programs::{self, NAMES, Programs, Runs};
use crate::report::{Chart, Goal, Rows, Section};
use crate::serve::Servers;
use crate::settings::{BACKENDS, POLICIES, Settings, USUAL};
use crate::statistics::{Summary, as_f64, median};

/// Runs in a row, and how often so many.
const ALONE_TIMES: u32 = 1_000;
const ALONE_BATCHES: usize = 11;
/// What steer may cost with the usual number of backends, in nanoseconds.
const BOUND: f64 = 200.0;

#[derive(Serialize)]
struct Row {
    program: &'static str,
    policy: Option<&'static str>,
    backends: u16,
    ns: f64,
    ns_spread: f64,
    /// The same in a tight loop, where everything is in the processor's caches; only what decides
    /// look-ups can be run so.
    ns_alone: Option<f64>,
    runs_per_connection: f64,
}

#[derive(Default)]
struct Series {
    costs: Vec<f64>,
    runs: Vec<f64>,
    alone: Vec<f64>,
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
            ns_alone: (!self.alone.is_empty()).then(|| median(&self.alone)),
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
    let program = prog_by_id(programs.steer()).context("steer is gone")?;
    series[0].alone.push(alone(machine, program)?);
    Ok(())
}

/// Nanoseconds a run of a program that decides look-ups, for the same SYN over and over.
fn alone(machine: &Machine, program: impl AsFd + Send + Sync) -> Result<f64> {
    let syn = syn();
    let batch = || prog_test_run(&program, &syn, ALONE_TIMES);
    let mut times = Vec::new();
    for _ in 0..ALONE_BATCHES {
        // The kernel takes the netns of the caller.
        let time = machine.netns.run(batch);
        let time = time.context("cannot run steer on trial (BPF_PROG_TEST_RUN)")?;
        times.push(time.as_secs_f64() * 1e9);
    }
    Ok(median(&times))
}

/// `struct bpf_sk_lookup` (`include/uapi/linux/bpf.h`) of a SYN for the virtual port.
fn syn() -> Vec<u8> {
    const AF_INET: u32 = 2;
    const TCP: u32 = 6;
    const SOURCE_PORT: u16 = 40_000;
    let host = Ipv4Addr::LOCALHOST.octets();
    let mut syn = vec![0; 8];
    syn.extend(AF_INET.to_ne_bytes());
    syn.extend(TCP.to_ne_bytes());
    syn.extend(host);
    syn.extend([0; 16]);
    syn.extend(SOURCE_PORT.to_be_bytes());
    syn.extend([0; 2]);
    syn.extend(host);
    syn.extend([0; 16]);
    // The only port in the byte order of the host.
    syn.extend(u32::from(FRONT.port()).to_ne_bytes());
    syn.extend([0; 4]);
    syn.extend([0; 4]);
    syn
}

/// What the kernel's clock makes of an `sk_lookup` program that looks at one field and passes: the
/// part of every figure that is not ours.
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
            "ns alone",
            "runs a connection",
        ],
    );
    for row in rows {
        table.add([
            row.program.to_owned(),
            row.policy.unwrap_or("").to_owned(),
            row.backends.to_string(),
            format!("{:.0} ± {:.0}", row.ns, row.ns_spread),
            row.ns_alone
                .map_or_else(String::new, |alone| format!("{alone:.0}")),
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
    for policy in POLICIES {
        let what = format!("steer, {policy} with {USUAL} backends,");
        let seen = steer(policy, USUAL).unwrap_or(f64::NAN);
        goals.push(Goal::at_most(&what, BOUND, "ns", seen));
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
