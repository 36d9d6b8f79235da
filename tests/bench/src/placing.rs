//! Measurement 8: what it costs a client's node to place connections.
//!
//! Clients connect to a frontend, once through kube-proxy's rule and once placed, beside clients
//! that visit the same servers directly. Then clients of a node that places visit the servers
//! directly: connects to elsewhere. In a dry run the endpoint is chosen, and nothing is noted at
//! the socket: kube-proxy's rule carries the connect on.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;
use testkit::fixtures::{Balancer, Machine};

use crate::drive::{Visits, drive_from};
use crate::peers::{FRONT, nft};
use crate::programs::{self, Runs};
use crate::report::{Chart, Goal, Rows, Section};
use crate::serve::{self, Servers};
use crate::settings::{BACKENDS, Settings, USUAL};
use crate::statistics::Summary;

/// What a run of the program may take with the usual number of endpoints, without what it notes at
/// the socket, in nanoseconds.
const BOUND: f64 = 1_000.0;
/// The program that places connects of IPv4 sockets.
const PROGRAM: &str = "place_connect4";

/// Who connects where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Bare,
    KubeProxy,
    Placed,
    DryRun,
    Elsewhere,
}

impl Subject {
    const ALL: [Self; 5] = [
        Self::Bare,
        Self::KubeProxy,
        Self::Placed,
        Self::DryRun,
        Self::Elsewhere,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::KubeProxy => "kube-proxy",
            Self::Placed => "placed",
            Self::DryRun => "dry run",
            Self::Elsewhere => "to elsewhere",
        }
    }
}

#[derive(Serialize)]
struct Row {
    subject: &'static str,
    endpoints: u16,
    per_second: f64,
    per_second_spread: f64,
    ratio_to_bare: f64,
    ratio_spread: f64,
    ratio_to_kube_proxy: f64,
    /// Nanoseconds a run of `place_connect4`, where it is attached.
    ns: Option<f64>,
}

/// The rounds of one subject.
#[derive(Default)]
struct Series {
    rates: Vec<f64>,
    to_bare: Vec<f64>,
    to_kube_proxy: Vec<f64>,
    costs: Vec<f64>,
}

impl Series {
    fn row(&self, subject: Subject, endpoints: u16) -> Row {
        let (rate, ratio) = (Summary::of(&self.rates), Summary::of(&self.to_bare));
        Row {
            subject: subject.name(),
            endpoints,
            per_second: rate.median,
            per_second_spread: rate.spread,
            ratio_to_bare: ratio.median,
            ratio_spread: ratio.spread,
            ratio_to_kube_proxy: Summary::of(&self.to_kube_proxy).median,
            ns: (!self.costs.is_empty()).then(|| Summary::of(&self.costs).median),
        }
    }
}

/// Measures.
///
/// # Errors
/// When a subject can't be started, or a client isn't served.
pub fn measure(settings: &Settings) -> Result<Section> {
    let rounds = settings.pick(3, 15);
    let slice = settings.pick(Duration::from_millis(80), Duration::from_millis(700));
    let machines: Vec<_> = BACKENDS
        .iter()
        .map(|_| [(); 4].map(|()| Machine::new()))
        .collect();
    let mut beside = Vec::new();
    for (machines, endpoints) in machines.iter().zip(BACKENDS) {
        beside.push(Beside::start(machines, endpoints)?);
    }
    // The first round warms up.
    for round in 0..=rounds {
        for machines in &mut beside {
            machines.round(round, slice)?;
        }
    }
    let _times = programs::take_times()?;
    for _ in 0..rounds {
        for machines in &mut beside {
            machines.cost(slice)?;
        }
    }
    let rows: Vec<_> = beside.iter().flat_map(Beside::rows).collect();
    Ok(section(&rows))
}

/// The same servers on four machines: alone, behind kube-proxy's rule, placed, and both in a dry
/// run.
struct Beside<'a> {
    endpoints: u16,
    machines: &'a [Machine; 4],
    /// The program where it places, and in the dry run.
    programs: [u32; 2],
    series: [Series; 5],
    // Dropped in this order: nobody hangs on to a machine that is gone.
    _balancers: [Balancer<'a>; 2],
    _servers: Vec<Servers>,
}

impl<'a> Beside<'a> {
    fn start(machines: &'a [Machine; 4], endpoints: u16) -> Result<Self> {
        let servers = machines.iter();
        let servers = servers.map(|machine| Servers::together(machine, endpoints));
        let servers: Vec<_> = servers.collect::<Result<_>>()?;
        let [_, kube_proxy, placing, dry_run] = machines;
        for machine in [kube_proxy, dry_run] {
            nft::service(machine, FRONT, &serve::backends(endpoints))?;
        }
        let balancers = [
            Balancer::start(placing, &file(endpoints, "on")),
            Balancer::start(dry_run, &file(endpoints, "dry-run")),
        ];
        let [placing, dry_run] = &balancers;
        Ok(Self {
            endpoints,
            machines,
            programs: [
                programs::attached(placing, PROGRAM)?,
                programs::attached(dry_run, PROGRAM)?,
            ],
            series: Default::default(),
            _balancers: balancers,
            _servers: servers,
        })
    }

    fn round(&mut self, round: usize, slice: Duration) -> Result<()> {
        let mut order: [usize; 5] = [0, 1, 2, 3, 4];
        // Being first is nobody's advantage.
        order.rotate_left(round % Subject::ALL.len());
        let mut seen = [Visits::default(); 5];
        for index in order {
            let subject = Subject::ALL[index];
            seen[index] = self.visits(subject, slice).context(subject.name())?;
        }
        if round == 0 {
            return Ok(());
        }
        let [bare, kube_proxy, ..] = seen.map(|visits| visits.per_second());
        for (series, visits) in self.series.iter_mut().zip(seen) {
            let rate = visits.per_second();
            series.rates.push(rate);
            series.to_bare.push(rate / bare);
            series.to_kube_proxy.push(rate / kube_proxy);
        }
        Ok(())
    }

    /// What a run of the program takes. Not in the same rounds: that the kernel takes times costs
    /// time, too.
    fn cost(&mut self, slice: Duration) -> Result<()> {
        let [placing, dry_run] = self.programs;
        for (subject, program) in [
            (Subject::Placed, placing),
            (Subject::DryRun, dry_run),
            (Subject::Elsewhere, placing),
        ] {
            let before = Runs::of(program)?;
            self.visits(subject, slice)?;
            let runs = Runs::of(program)?.since(&before);
            self.series[subject as usize].costs.push(runs.nanoseconds());
        }
        Ok(())
    }

    fn visits(&self, subject: Subject, slice: Duration) -> Result<Visits> {
        let [bare, kube_proxy, placing, dry_run] = self.machines;
        let servers = serve::backends(self.endpoints);
        match subject {
            Subject::Bare => drive_from(bare, &servers, slice),
            Subject::KubeProxy => drive_from(kube_proxy, &[FRONT], slice),
            Subject::Placed => drive_from(placing, &[FRONT], slice),
            Subject::DryRun => drive_from(dry_run, &[FRONT], slice),
            Subject::Elsewhere => drive_from(placing, &servers, slice),
        }
    }

    fn rows(&self) -> impl Iterator<Item = Row> {
        let named = Subject::ALL.iter().zip(&self.series);
        named.map(|(subject, series)| series.row(*subject, self.endpoints))
    }
}

/// A balancer's file: connects to the frontend go to so many endpoints, as far as the mode goes.
fn file(endpoints: u16, mode: &str) -> String {
    let endpoints: Vec<_> = serve::backends(endpoints)
        .iter()
        .map(|address| format!("\"{address}\""))
        .collect();
    format!(
        "mode: {mode}\nservices:\n  - name: agents\n    connect:\n      to: [\"{FRONT}\"]\n      endpoints: [{}]\n",
        endpoints.join(", ")
    )
}

fn section(rows: &[Row]) -> Section {
    let mut table = Rows::new(
        1,
        &[
            "subject",
            "endpoints",
            "connects/s",
            "ratio to bare",
            "to kube-proxy",
            "place_connect4, ns a run",
        ],
    );
    for row in rows {
        table.add([
            row.subject.to_owned(),
            row.endpoints.to_string(),
            format!("{:.0} ± {:.0}", row.per_second, row.per_second_spread),
            format!("{:.3} ± {:.3}", row.ratio_to_bare, row.ratio_spread),
            format!("{:.3}", row.ratio_to_kube_proxy),
            row.ns.map_or_else(String::new, |ns| format!("{ns:.0}")),
        ]);
    }
    let of = |subject: Subject, endpoints: u16, value: fn(&Row) -> f64| {
        let found = rows
            .iter()
            .find(|row| (row.subject, row.endpoints) == (subject.name(), endpoints));
        found.map_or(f64::NAN, value)
    };
    let ns = |row: &Row| row.ns.unwrap_or(f64::NAN);
    let goals = vec![
        Goal::at_least(
            &format!("placed, {USUAL} endpoints, to kube-proxy"),
            1.0,
            of(Subject::Placed, USUAL, |row| row.ratio_to_kube_proxy),
        ),
        Goal::at_least(
            &format!("to elsewhere, {USUAL} endpoints, to bare"),
            0.99,
            of(Subject::Elsewhere, USUAL, |row| row.ratio_to_bare),
        ),
        Goal::at_most(
            &format!("place_connect4 with {USUAL} endpoints, in a dry run"),
            BOUND,
            "ns",
            of(Subject::DryRun, USUAL, ns),
        ),
        Goal::at_most(
            "place_connect4 for a connect to elsewhere",
            150.0,
            "ns",
            of(Subject::Elsewhere, USUAL, ns),
        ),
    ];
    let line = |subject: Subject| {
        let costs = BACKENDS
            .iter()
            .map(|endpoints| Some(of(subject, *endpoints, ns)));
        (subject.name().to_owned(), costs.collect())
    };
    Section {
        key: "placing",
        title: "Placing",
        rows: json!(rows),
        table,
        goals,
        chart: Some(Chart {
            across: "endpoints",
            up: "place_connect4, nanoseconds a run",
            categories: BACKENDS.iter().map(ToString::to_string).collect(),
            lines: [Subject::Placed, Subject::DryRun, Subject::Elsewhere]
                .map(line)
                .to_vec(),
        }),
    }
}
