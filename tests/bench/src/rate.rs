//! Measurement 1: connections a second, from connect to reset.
//!
//! Bare is the same number of listeners on the same ports; its clients visit them in turn, so that
//! the balancer's part is all that differs: one port for all of them, and that somebody chooses.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;
use testkit::fixtures::{Balancer, Machine};

use crate::drive::{Visits, drive};
use crate::hold::HeldConnections;
use crate::peers::envoy::{Envoy, Layer};
use crate::peers::haproxy::Haproxy;
use crate::peers::{FRONT, balancer_file, nft, set_policy};
use crate::report::{Chart, Goal, Rows, Section};
use crate::serve::{self, FIRST_PORT, Servers};
use crate::settings::{BACKENDS, POLICIES, Settings, USUAL};
use crate::statistics::Summary;

/// Far more than there are at a time.
const NO_LIMIT: u32 = 1_000_000;
/// The quota of each backend of the service that is full.
const FULL: u32 = 4;
/// The port of that service.
const FULL_PORT: u16 = 11900;
/// Of so many connects one finds room.
const ATTEMPTS: usize = 10;
/// The port of the backend that has room; those that are full come before it.
const ROOM: u16 = FIRST_PORT + USUAL;

/// One subject.
#[derive(Serialize)]
struct Row {
    subject: &'static str,
    policy: Option<&'static str>,
    backends: u16,
    /// Share of the connects that are refused.
    refused: f64,
    per_second: f64,
    per_second_spread: f64,
    ratio_to_bare: f64,
    ratio_spread: f64,
    rounds: usize,
}

/// A subject with its rounds so far.
struct Series {
    subject: &'static str,
    policy: Option<&'static str>,
    backends: u16,
    /// Most of its connects find no room.
    full: bool,
    rates: Vec<f64>,
    ratios: Vec<f64>,
    refused: f64,
}

impl Series {
    fn add(&mut self, visits: &Visits, bare: &Visits) {
        self.rates.push(visits.per_second());
        self.ratios.push(visits.per_second() / bare.per_second());
        self.refused = visits.refused_share();
    }

    fn row(&self) -> Row {
        let (rate, ratio) = (Summary::of(&self.rates), Summary::of(&self.ratios));
        Row {
            subject: self.subject,
            policy: self.policy,
            backends: self.backends,
            refused: self.refused,
            per_second: rate.median,
            per_second_spread: rate.spread,
            ratio_to_bare: ratio.median,
            ratio_spread: ratio.spread,
            rounds: rate.rounds,
        }
    }
}

/// A subject, its policy where it has one, and what its clients saw.
type Outcome = (&'static str, Option<&'static str>, Visits);

/// All series, found by what they are.
#[derive(Default)]
struct Table(Vec<Series>);

impl Table {
    fn of(
        &mut self,
        subject: &'static str,
        policy: Option<&'static str>,
        backends: u16,
        full: bool,
    ) -> &mut Series {
        let place = self.0.iter().position(|series| {
            (series.subject, series.policy, series.backends) == (subject, policy, backends)
                && series.full == full
        });
        let place = place.unwrap_or_else(|| {
            self.0.push(Series {
                subject,
                policy,
                backends,
                full,
                rates: Vec::new(),
                ratios: Vec::new(),
                refused: 0.0,
            });
            self.0.len() - 1
        });
        &mut self.0[place]
    }

    /// Adds what one round saw.
    fn take(&mut self, round: Self) {
        for series in round.0 {
            let all = self.of(series.subject, series.policy, series.backends, series.full);
            all.rates.extend(series.rates);
            all.ratios.extend(series.ratios);
            all.refused = series.refused;
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
        .map(|_| [Machine::new(), Machine::new()])
        .collect();
    let mut pairs = Vec::new();
    for (machines, backends) in machines.iter().zip(BACKENDS) {
        pairs.push(Pair::start(machines, backends)?);
    }
    let peers: [Machine; 3] = std::array::from_fn(|_| Machine::new());
    let mut peers = Peers::start(settings, &peers)?;
    let full = [Machine::new(), Machine::new(), Machine::new()];
    let full = Full::start(&full)?;
    let mut table = Table::default();
    // The first round warms up.
    for round in 0..=rounds {
        let mut now = Vec::new();
        for pair in &mut pairs {
            now.push(pair.round(round % 2 == 0, slice, &mut peers)?);
        }
        now.push(full.round(slice)?);
        if round > 0 {
            for seen in now {
                table.take(seen);
            }
        }
    }
    Ok(section(&table))
}

/// The same servers twice: without and with a balancer in front.
struct Pair<'a> {
    backends: u16,
    bare: &'a Machine,
    steered: &'a Machine,
    balancer: Balancer<'a>,
    servers: [Servers; 2],
}

impl<'a> Pair<'a> {
    fn start([bare, steered]: &'a [Machine; 2], backends: u16) -> Result<Self> {
        // First: listeners register themselves as they appear.
        let balancer = Balancer::start(steered, &balancer_file(POLICIES[0], backends, None));
        let servers = [
            Servers::together(bare, backends)?,
            Servers::together(steered, backends)?,
        ];
        balancer.wait_active(usize::from(backends));
        Ok(Self {
            backends,
            bare,
            steered,
            balancer,
            servers,
        })
    }

    /// Bare comes first and last in turns, so that being first is nobody's advantage.
    fn round(&mut self, first: bool, slice: Duration, peers: &mut Peers<'_>) -> Result<Table> {
        let early = first.then(|| self.bare(slice)).transpose()?;
        let mut seen = Vec::new();
        if self.backends == USUAL {
            seen.extend(peers.round(slice)?);
        }
        for policy in POLICIES {
            set_policy(&self.balancer, policy, self.backends);
            let visits =
                drive(&self.steered.netns, &[FRONT], slice).with_context(|| policy.to_owned())?;
            seen.push(("balancer", Some(policy), visits));
        }
        let bare = early.map_or_else(|| self.bare(slice), Ok)?;
        let mut table = Table::default();
        for (subject, policy, visits) in [("bare", None, bare)].into_iter().chain(seen) {
            let series = table.of(subject, policy, self.backends, false);
            series.add(&visits, &bare);
        }
        Ok(table)
    }

    fn bare(&self, slice: Duration) -> Result<Visits> {
        drive(&self.bare.netns, self.servers[0].addresses(), slice).context("bare")
    }
}

/// The others, each with the usual number of backends.
struct Peers<'a> {
    machines: &'a [Machine; 3],
    haproxy: Haproxy,
    envoy: Envoy,
    servers: [Servers; 3],
}

impl<'a> Peers<'a> {
    fn start(settings: &Settings, machines: &'a [Machine; 3]) -> Result<Self> {
        let [nft, haproxy, envoy] = machines;
        let servers = [
            Servers::together(nft, USUAL)?,
            Servers::together(haproxy, USUAL)?,
            Servers::together(envoy, USUAL)?,
        ];
        nft::limit(nft, FIRST_PORT..=FIRST_PORT + USUAL - 1, NO_LIMIT)?;
        let backends = serve::backends(USUAL);
        let mut peers = Self {
            haproxy: Haproxy::start(settings, haproxy, "rate-haproxy", &backends)?,
            envoy: Envoy::start(settings, envoy, "rate-envoy", Layer::L4, &backends)?,
            machines,
            servers,
        };
        peers.envoy.wait(envoy)?;
        Ok(peers)
    }

    fn round(&mut self, slice: Duration) -> Result<Vec<Outcome>> {
        self.haproxy.check()?;
        self.envoy.check()?;
        let direct = self.servers[0].addresses();
        let [nft, haproxy, envoy] = self.machines;
        let turns = [
            ("nft", nft, direct),
            ("haproxy", haproxy, &[FRONT][..]),
            ("envoy", envoy, &[FRONT][..]),
        ];
        let mut seen = Vec::new();
        for (subject, machine, to) in turns {
            let visits = drive(&machine.netns, to, slice).context(subject)?;
            seen.push((subject, None, visits));
        }
        Ok(seen)
    }
}

/// Nine of ten connects are refused: bare by a port where nobody listens, by the others because
/// every backend has its quota.
struct Full<'a> {
    machines: &'a [Machine; 3],
    // Dropped in this order: nobody hangs on to a machine that is gone.
    _balancer: Balancer<'a>,
    _held: [HeldConnections; 2],
    _servers: [Servers; 3],
}

impl<'a> Full<'a> {
    fn start(machines: &'a [Machine; 3]) -> Result<Self> {
        let [bare, nft, steered] = machines;
        let quoted: Vec<_> = serve::backends(USUAL)
            .iter()
            .map(|address| format!("\"{address}\""))
            .collect();
        let balancer = Balancer::start(
            steered,
            &format!(
                "services:\n  - name: full\n    port: {FULL_PORT}\n    backends: [{}]\n    quota: {{ per_backend: {FULL} }}\n  \
                 - name: agents\n    port: {}\n    backends: [\"{}\"]\n",
                quoted.join(", "),
                FRONT.port(),
                local(ROOM),
            ),
        );
        let servers = [
            Servers::together(bare, USUAL + 1)?,
            Servers::together(nft, USUAL + 1)?,
            Servers::together(steered, USUAL + 1)?,
        ];
        balancer.wait_active(usize::from(USUAL));
        nft::limit(nft, FIRST_PORT..=FIRST_PORT + USUAL - 1, FULL)?;
        let held = usize::try_from(FULL)? * usize::from(USUAL);
        let held = [
            HeldConnections::gather(nft, held, &serve::backends(USUAL))?,
            HeldConnections::gather(steered, held, &[local(FULL_PORT)])?,
        ];
        Ok(Self {
            machines,
            _balancer: balancer,
            _held: held,
            _servers: servers,
        })
    }

    fn round(&self, slice: Duration) -> Result<Table> {
        let mut table = Table::default();
        let [bare, nft, steered] = self.machines;
        let full = serve::backends(USUAL);
        let turns = [
            ("bare", bare, mix(&[local(FULL_PORT)], local(ROOM))),
            ("nft", nft, mix(&full, local(ROOM))),
            ("balancer", steered, mix(&[local(FULL_PORT)], FRONT)),
        ];
        let mut reference = None;
        for (subject, machine, to) in turns {
            let visits = drive(&machine.netns, &to, slice).context(subject)?;
            let reference = reference.get_or_insert(visits);
            let policy = (subject == "balancer").then_some(POLICIES[0]);
            table
                .of(subject, policy, USUAL, true)
                .add(&visits, reference);
        }
        Ok(table)
    }
}

/// Connects of which one in [`ATTEMPTS`] finds room.
fn mix(full: &[SocketAddr], room: SocketAddr) -> Vec<SocketAddr> {
    let refused = full.iter().cycle().take(ATTEMPTS - 1);
    refused.copied().chain([room]).collect()
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn section(table: &Table) -> Section {
    let mut rows: Vec<_> = table.0.iter().map(Series::row).collect();
    rows.sort_by_key(|row| (row.refused > 0.0, row.backends));
    let mut shown = Rows::new(
        2,
        &[
            "subject",
            "policy",
            "backends",
            "refused",
            "connects/s",
            "ratio to bare",
        ],
    );
    for row in &rows {
        shown.add([
            row.subject.to_owned(),
            row.policy.unwrap_or("").to_owned(),
            row.backends.to_string(),
            format!("{:.0} %", row.refused * 100.0),
            format!("{:.0} ± {:.0}", row.per_second, row.per_second_spread),
            format!("{:.3} ± {:.3}", row.ratio_to_bare, row.ratio_spread),
        ]);
    }
    Section {
        key: "connection_rate",
        title: "Connection rate",
        goals: goals(&rows),
        chart: Some(chart(&rows)),
        rows: json!(rows),
        table: shown,
    }
}

fn goals(rows: &[Row]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for row in rows
        .iter()
        .filter(|row| row.policy.is_some() && row.backends == USUAL && row.refused == 0.0)
    {
        let what = format!(
            "{} with {USUAL} backends, of bare",
            row.policy.unwrap_or_default()
        );
        goals.push(Goal::at_least(&what, 0.98, row.ratio_to_bare));
    }
    goals
}

fn chart(rows: &[Row]) -> Chart {
    let mut names: Vec<(&str, Option<&str>)> = Vec::new();
    for row in rows.iter().filter(|row| row.refused == 0.0) {
        if !names.contains(&(row.subject, row.policy)) {
            names.push((row.subject, row.policy));
        }
    }
    let line = |(subject, policy): (&str, Option<&str>)| {
        let value = |backends: &u16| {
            rows.iter()
                .find(|row| {
                    (row.subject, row.policy, row.backends) == (subject, policy, *backends)
                        && row.refused == 0.0
                })
                .map(|row| row.ratio_to_bare)
        };
        let name = policy.map_or_else(
            || subject.to_owned(),
            |policy| format!("{subject}, {policy}"),
        );
        (name, BACKENDS.iter().map(value).collect())
    };
    Chart {
        across: "backends",
        up: "connects a second, of bare",
        categories: BACKENDS.iter().map(ToString::to_string).collect(),
        lines: names.into_iter().map(line).collect(),
    }
}
