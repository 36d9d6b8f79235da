//! Measurement 4: very many established connections.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use testkit::fixtures::{Balancer, Machine, Service, Signal, diag};

use crate::hold::{HeldConnections, MOST};
use crate::interrupt;
use crate::peers::{FRONT, balancer_file};
use crate::report::{Goal, Rows, Section};
use crate::serve::{FIRST_PORT, Servers};
use crate::settings::{POLICIES, Settings};
use crate::slab::Slab;
use crate::statistics::{as_f64, median};
use crate::usage::{processor_time, resident};

/// What a connection may cost on top, and the daemon.
const BYTES_BOUND: f64 = 300.0;
const MEGABYTES_BOUND: f64 = 15.0;
/// Memory that is freed a little later (RCU) has been by then.
const SETTLES: Duration = Duration::from_millis(1500);
/// A cache whose part is smaller is not listed, in bytes a connection.
const WORTH_LISTING: f64 = 16.0;
const COMPARISONS_LOG: [&str; 2] = ["--log", "info,balancer::daemon=debug"];

#[derive(Serialize)]
struct Row {
    connections: usize,
    backends: u16,
    rounds: usize,
    /// Slab memory of both ends of a connection, without the balancer.
    bare_bytes: f64,
    /// What the balancer adds to that.
    own_bytes: f64,
    own_bytes_by_cache: BTreeMap<String, f64>,
    counts_exact: bool,
    status_ms: f64,
    /// From killing the daemon until the next one is ready.
    takeover_ms: f64,
    counted: Daemon,
    /// From starting the first daemon until it is ready, with all connections there already.
    adopt_ms: f64,
    adopted: Daemon,
}

/// The daemon beside connections that nothing happens to.
#[derive(Clone, Copy, Serialize)]
struct Daemon {
    rss_megabytes: f64,
    processor_percent: f64,
    /// Processor time of a comparison with the socket table.
    comparison_ms: f64,
}

/// One round with so many connections.
struct Round {
    bare: BTreeMap<String, f64>,
    balanced: BTreeMap<String, f64>,
    exact: bool,
    status_ms: f64,
    takeover_ms: f64,
    counted: Daemon,
    adopt_ms: f64,
    adopted: Daemon,
}

/// Measures.
///
/// # Errors
/// When connections can't be opened, or the system does not say what they cost.
pub fn measure(settings: &Settings) -> Result<Section> {
    let plan: Vec<(usize, u32)> = settings.pick(vec![(10_000, 1)], vec![(50_000, 3), (200_000, 2)]);
    let window = settings.pick(Duration::from_secs(2), Duration::from_secs(30));
    let mut rows = Vec::new();
    for (connections, rounds) in &plan {
        let backends = u16::try_from(connections.div_ceil(MOST))?.max(4);
        let mut all = Vec::new();
        for _ in 0..*rounds {
            all.push(round(*connections, backends, window)?);
        }
        rows.push(row(*connections, backends, &all));
    }
    Ok(section(&rows))
}

fn round(connections: usize, backends: u16, window: Duration) -> Result<Round> {
    let (bare, adopt_ms, adopted, adopted_exact) =
        without(connections, backends, window).context("without a balancer")?;
    let (balanced, status_ms, takeover_ms, counted, exact) =
        with(connections, backends, window).context("with a balancer")?;
    Ok(Round {
        bare,
        balanced,
        exact: exact && adopted_exact,
        status_ms,
        takeover_ms,
        counted,
        adopt_ms,
        adopted,
    })
}

type Grown = BTreeMap<String, f64>;

/// Connections straight to the backends; then a daemon comes and adopts them.
fn without(
    connections: usize,
    backends: u16,
    window: Duration,
) -> Result<(Grown, f64, Daemon, bool)> {
    let machine = machine();
    let mut servers = Servers::apart(&machine, backends)?;
    let to = servers.addresses().to_vec();
    let (held, grown) = gather(&machine, connections, &to)?;
    let file = balancer_file(POLICIES[0], backends, None);
    let mut balancer = Balancer::prepare(&machine, &file).with_arguments(&COMPARISONS_LOG);
    let began = Instant::now();
    balancer.launch();
    let adopt_ms = milliseconds(began);
    let ports: Vec<_> = to.iter().map(SocketAddr::port).collect();
    let exact = is_exact(&machine, &ports, &balancer, &mut servers)?;
    let daemon = observe(&balancer, window)?;
    drop(held);
    balancer.stop(Signal::SIGINT);
    Ok((grown, adopt_ms, daemon, exact))
}

/// Connections through the balancer; then its daemon is killed and the next one takes over.
fn with(
    connections: usize,
    backends: u16,
    window: Duration,
) -> Result<(Grown, f64, f64, Daemon, bool)> {
    let machine = machine();
    let file = balancer_file(POLICIES[0], backends, None);
    let mut balancer = Balancer::prepare(&machine, &file).with_arguments(&COMPARISONS_LOG);
    balancer.launch();
    let mut servers = Servers::apart(&machine, backends)?;
    balancer.wait_active(usize::from(backends));
    let (held, grown) = gather(&machine, connections, &[FRONT])?;
    let mut exact = is_exact(&machine, &[FRONT.port()], &balancer, &mut servers)?;
    let daemon = observe(&balancer, window)?;
    let status_ms = status_time(&balancer);
    balancer.stop(Signal::SIGKILL);
    let began = Instant::now();
    balancer.launch();
    let takeover_ms = milliseconds(began);
    exact &= is_exact(&machine, &[FRONT.port()], &balancer, &mut servers)?;
    drop(held);
    balancer.wait_until(|service| service.established() == 0);
    let agent = balancer.status().agent;
    exact &= agent.repairs == Some(0) && agent.drift == Some(0);
    balancer.stop(Signal::SIGINT);
    Ok((grown, status_ms, takeover_ms, daemon, exact))
}

fn machine() -> Machine {
    let machine = Machine::new();
    // A source address has no more connections to a port than this.
    machine
        .netns
        .sysctl("net.ipv4.ip_local_port_range", "10000 65000");
    machine
        .netns
        .sysctl("net.ipv4.ip_local_reserved_ports", &reserved());
    machine
}

/// The servers' own ports.
fn reserved() -> String {
    format!("{},{FIRST_PORT}-{}", FRONT.port(), FIRST_PORT + 300)
}

/// Opens the connections; the slab memory that they took, a connection, by cache.
fn gather(
    machine: &Machine,
    connections: usize,
    to: &[SocketAddr],
) -> Result<(HeldConnections, Grown)> {
    interrupt::pause(SETTLES)?;
    let before = Slab::read()?;
    let held = HeldConnections::gather(machine, connections, to)?;
    interrupt::pause(SETTLES)?;
    let mut grown = Slab::read()?.since(&before);
    for bytes in grown.values_mut() {
        *bytes /= as_f64(connections);
    }
    Ok((held, grown))
}

/// Whether the counts are those of the socket table in all, and those of each server's process.
fn is_exact(
    machine: &Machine,
    ports: &[u16],
    balancer: &Balancer<'_>,
    servers: &mut Servers,
) -> Result<bool> {
    let table: usize = machine
        .netns
        .run(|| ports.iter().map(|port| diag::accepted(*port).len()).sum());
    let service: Service = balancer.service();
    let counted: Vec<u64> = servers
        .addresses()
        .iter()
        .map(|address| service.backend(*address).established.into())
        .collect();
    let accepted = servers.loads()?;
    let total: usize = usize::try_from(counted.iter().sum::<u64>())?;
    if total != table || counted != accepted {
        eprintln!(
            "counts differ: {counted:?} counted, {accepted:?} accepted, {table} in the socket table"
        );
    }
    Ok(total == table && counted == accepted)
}

fn observe(balancer: &Balancer<'_>, window: Duration) -> Result<Daemon> {
    let pid = u32::try_from(balancer.pid().as_raw())?;
    let (began, before) = (Instant::now(), processor_time(pid)?);
    while began.elapsed() < window {
        interrupt::pause(Duration::from_millis(200))?;
    }
    let used = processor_time(pid)?.saturating_sub(before);
    Ok(Daemon {
        rss_megabytes: resident(pid)?,
        processor_percent: used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0,
        comparison_ms: comparison_time(&balancer.logs())?,
    })
}

/// The processor time of the audits, as the daemon logs it: `audit 7: 3.2 ms of processor time`.
fn comparison_time(logs: &str) -> Result<f64> {
    let times: Vec<f64> = logs
        .lines()
        .filter_map(|line| {
            let (_, audit) = line.split_once("audit ")?;
            let (_, time) = audit.split_once(": ")?;
            time.split_once(" ms")?.0.parse().ok()
        })
        .collect();
    ensure!(
        !times.is_empty(),
        "the daemon's log tells of no audit:\n{logs}"
    );
    // The first one also looks for owners; where there is no other, it must do.
    let usual = if times.len() > 1 { &times[1..] } else { &times };
    Ok(median(usual))
}

fn status_time(balancer: &Balancer<'_>) -> f64 {
    let times: Vec<_> = (0..9)
        .map(|_| {
            let began = Instant::now();
            balancer.must(&["status", "-o", "json"]);
            milliseconds(began)
        })
        .collect();
    median(&times)
}

fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

fn row(connections: usize, backends: u16, rounds: &[Round]) -> Row {
    let of = |value: &dyn Fn(&Round) -> f64| median(&rounds.iter().map(value).collect::<Vec<_>>());
    let daemon = |pick: fn(&Round) -> &Daemon| Daemon {
        rss_megabytes: of(&|round| pick(round).rss_megabytes),
        processor_percent: of(&|round| pick(round).processor_percent),
        comparison_ms: of(&|round| pick(round).comparison_ms),
    };
    let own = |round: &Round, cache: &str| {
        let of = |grown: &Grown| grown.get(cache).copied().unwrap_or(0.0);
        of(&round.balanced) - of(&round.bare)
    };
    let caches = rounds.first().map(|round| round.balanced.keys());
    let by_cache: BTreeMap<_, _> = caches
        .into_iter()
        .flatten()
        .map(|cache| (cache.clone(), of(&|round| own(round, cache))))
        .filter(|(_, bytes)| bytes.abs() >= WORTH_LISTING)
        .collect();
    Row {
        connections,
        backends,
        rounds: rounds.len(),
        bare_bytes: of(&|round| round.bare.values().sum()),
        own_bytes: of(&|round| {
            round.balanced.values().sum::<f64>() - round.bare.values().sum::<f64>()
        }),
        own_bytes_by_cache: by_cache,
        counts_exact: rounds.iter().all(|round| round.exact),
        status_ms: of(&|round| round.status_ms),
        takeover_ms: of(&|round| round.takeover_ms),
        counted: daemon(|round| &round.counted),
        adopt_ms: of(&|round| round.adopt_ms),
        adopted: daemon(|round| &round.adopted),
    }
}

fn section(rows: &[Row]) -> Section {
    let counts: Vec<_> = rows.iter().map(|row| row.connections.to_string()).collect();
    let headings: Vec<_> = std::iter::once("connections")
        .chain(counts.iter().map(String::as_str))
        .collect();
    let mut table = Rows::new(1, &headings);
    let mut line = |title: &str, cell: &dyn Fn(&Row) -> String| {
        table.add(std::iter::once(title.to_owned()).chain(rows.iter().map(cell)));
    };
    line("slab bytes of both ends, bare", &|row| {
        format!("{:.0}", row.bare_bytes)
    });
    line("slab bytes that the balancer adds", &|row| {
        format!("{:.0}", row.own_bytes)
    });
    line("of them", &|row| {
        let caches = row.own_bytes_by_cache.iter();
        let caches: Vec<_> = caches
            .map(|(cache, bytes)| format!("{cache} {bytes:+.0}"))
            .collect();
        caches.join(", ")
    });
    line("counts exact", &|row| {
        if row.counts_exact { "yes" } else { "NO" }.to_owned()
    });
    line("`status`, ms", &|row| format!("{:.1}", row.status_ms));
    line("next daemon ready, ms", &|row| {
        format!("{:.0}", row.takeover_ms)
    });
    line("daemon: RSS, MB", &|row| {
        format!("{:.1}", row.counted.rss_megabytes)
    });
    line("daemon: processor, %", &|row| {
        format!("{:.2}", row.counted.processor_percent)
    });
    line("daemon: comparison, ms", &|row| {
        format!("{:.1}", row.counted.comparison_ms)
    });
    line("adopting: first daemon ready, ms", &|row| {
        format!("{:.0}", row.adopt_ms)
    });
    line("adopted: RSS, MB", &|row| {
        format!("{:.1}", row.adopted.rss_megabytes)
    });
    line("adopted: processor, %", &|row| {
        format!("{:.2}", row.adopted.processor_percent)
    });
    line("adopted: comparison, ms", &|row| {
        format!("{:.1}", row.adopted.comparison_ms)
    });
    Section {
        key: "scale",
        title: "Very many connections",
        goals: rows.iter().flat_map(goals).collect(),
        rows: json!(rows),
        table,
        chart: None,
    }
}

fn goals(row: &Row) -> Vec<Goal> {
    let with = |what: &str| format!("{what} with {} connections", row.connections);
    let largest = row.counted.rss_megabytes.max(row.adopted.rss_megabytes);
    vec![
        Goal::at_most(
            &with("own state a connection"),
            BYTES_BOUND,
            "B",
            row.own_bytes,
        ),
        Goal::at_most(&with("daemon's memory"), MEGABYTES_BOUND, "MB", largest),
        Goal {
            claim: with("counts are those of the socket table"),
            seen: if row.counts_exact { "all" } else { "not all" }.to_owned(),
            met: row.counts_exact,
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::comparison_time;

    #[test]
    fn the_time_of_audits_is_read_from_the_log() {
        let line = |number: u32, time: f64| {
            format!(
                "2026-01-01T00:00:00.0Z DEBUG balancer::daemon::reconcile: audit {number}: {time:.1} ms \
                 of processor time, drift 0, 0 repairs so far\n"
            )
        };
        let first = line(1, 9.0);
        assert!((comparison_time(&first).unwrap() - 9.0).abs() < 1e-9);
        let three = first + &line(2, 1.5) + &line(3, 1.5);
        assert!((comparison_time(&three).unwrap() - 1.5).abs() < 1e-9);
        comparison_time("2026-01-01T00:00:00.0Z  INFO balancer::daemon: ready\n").unwrap_err();
    }
}
