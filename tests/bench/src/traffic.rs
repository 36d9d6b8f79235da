//! Measurement 3: what open connections notice.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;
use testkit::fixtures::{Balancer, Machine};

use crate::drive::connect;
use crate::interrupt;
use crate::peers::envoy::{Envoy, Layer};
use crate::peers::haproxy::Haproxy;
use crate::peers::{FRONT, balancer_file};
use crate::programs::{self, Programs};
use crate::report::{Goal, Rows, Section};
use crate::serve::{self, SWALLOW, Servers};
use crate::settings::{POLICIES, Processor, Settings, USUAL, keep_to};
use crate::statistics::{Summary, as_f64, percentile};

/// Open connections of each subject.
const CONNECTIONS: usize = 64;
/// Bytes of a request, and of its response.
const MESSAGE: usize = 128;
/// Bytes handed over at a time when as many as possible are sent.
const BULK: usize = 64 << 10;
/// In every kernel, and without an opinion of its own on each connection: BBR would pace it by an
/// estimate, one for better and one for worse.
const CONGESTION_CONTROL: &str = "reno";
/// Connections that send as much as they can.
const STREAMS: usize = 2;

#[derive(Serialize)]
struct Row {
    subject: &'static str,
    p50_us: f64,
    p50_spread: f64,
    p99_us: f64,
    p99_spread: f64,
    gigabits: f64,
    gigabits_spread: f64,
    p50_ratio: f64,
    p50_ratio_spread: f64,
    gigabits_ratio: f64,
    gigabits_ratio_spread: f64,
    /// Runs of our programs during all that traffic; none for the others, who have no programs.
    program_runs: Option<u64>,
}

#[derive(Clone, Copy)]
struct Seen {
    p50: f64,
    p99: f64,
    gigabits: f64,
}

struct Subject {
    name: &'static str,
    connections: Vec<TcpStream>,
    rounds: Vec<Seen>,
}

/// Measures.
///
/// # Errors
/// When a subject can't be started, or a connection breaks.
pub fn measure(settings: &Settings) -> Result<Section> {
    let rounds = settings.pick(3, 25);
    let slice = settings.pick(Duration::from_millis(150), Duration::from_millis(700));
    let machines: [Machine; 5] = std::array::from_fn(|_| Machine::new());
    for machine in &machines {
        machine
            .netns
            .sysctl("net.ipv4.tcp_congestion_control", CONGESTION_CONTROL);
    }
    let balancer = Balancer::start(&machines[1], &balancer_file(POLICIES[0], USUAL, None));
    let mut servers = Vec::new();
    for machine in &machines {
        servers.push(Servers::in_one_thread(machine, USUAL)?);
    }
    balancer.wait_active(usize::from(USUAL));
    let backends = serve::backends(USUAL);
    let mut haproxy = Haproxy::start(settings, &machines[2], "traffic-haproxy", &backends)?;
    let mut envoy = Envoy::start(
        settings,
        &machines[3],
        "traffic-envoy",
        Layer::L4,
        &backends,
    )?;
    envoy.wait(&machines[3])?;
    let front = [FRONT];
    let mut subjects = Vec::new();
    for (name, machine, to) in [
        ("bare", &machines[0], &backends[..]),
        ("bare, again", &machines[4], &backends[..]),
        ("balancer", &machines[1], &front),
        ("haproxy", &machines[2], &front),
        ("envoy", &machines[3], &front),
    ] {
        subjects.push(Subject::connect(name, machine, to)?);
    }
    let _times = programs::take_times()?;
    let programs = Programs::of(&balancer)?;
    let before = programs.read()?;
    for round in 0..rounds {
        // Another one is first each time.
        let order = (0..subjects.len()).map(|turn| (turn + round) % subjects.len());
        for turn in order.collect::<Vec<_>>() {
            let subject = &mut subjects[turn];
            interrupt::check()?;
            subject.round(slice).context(subject.name)?;
        }
    }
    let after = programs.read()?;
    haproxy.check()?;
    envoy.check()?;
    let runs = after.iter().zip(&before);
    let runs = runs.map(|(after, before)| after.since(before).count).sum();
    Ok(section(&rows(&subjects, runs)))
}

impl Subject {
    fn connect(name: &'static str, machine: &Machine, to: &[SocketAddr]) -> Result<Self> {
        let open = || {
            let to = to.iter().cycle().take(CONNECTIONS);
            to.map(|to| connect(*to)).collect::<std::io::Result<_>>()
        };
        let connections: Vec<TcpStream> = machine.netns.run(open).context(name)?;
        for connection in &connections {
            connection.set_nodelay(true)?;
        }
        Ok(Self {
            name,
            connections,
            rounds: Vec::new(),
        })
    }

    fn round(&mut self, slice: Duration) -> Result<()> {
        let asking = || {
            keep_to(Processor::First)?;
            self.ask(slice)
        };
        let latencies = thread::scope(|scope| scope.spawn(asking).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let gigabits = self.pour(slice)?;
        self.rounds.push(Seen {
            p50: percentile(&latencies, 50),
            p99: percentile(&latencies, 99),
            gigabits,
        });
        Ok(())
    }

    /// Microseconds from request to response, one at a time, on one connection after the other.
    fn ask(&self, slice: Duration) -> Result<Vec<f64>> {
        let mut message = [b'x'; MESSAGE];
        let mut latencies = Vec::new();
        let began = Instant::now();
        for mut connection in self.connections.iter().cycle() {
            let asked = Instant::now();
            if asked - began >= slice {
                break;
            }
            connection.write_all(&message)?;
            connection.read_exact(&mut message)?;
            latencies.push(asked.elapsed().as_secs_f64() * 1e6);
        }
        Ok(latencies)
    }

    /// Gigabits a second in one direction. What the sockets still hold at the end is counted too: a
    /// few megabytes.
    fn pour(&self, slice: Duration) -> Result<f64> {
        let began = Instant::now();
        let stream = |mut connection: &TcpStream| -> Result<u64> {
            let bulk = vec![SWALLOW; BULK];
            let mut sent = 0;
            while began.elapsed() < slice {
                connection.write_all(&bulk)?;
                sent += BULK as u64;
            }
            Ok(sent)
        };
        let sent: Result<u64> = thread::scope(|scope| {
            let connections = self.connections.iter().take(STREAMS);
            let streams: Vec<_> = connections
                .map(|connection| scope.spawn(move || stream(connection)))
                .collect();
            let join = |stream: thread::ScopedJoinHandle<'_, _>| {
                stream
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            streams.into_iter().map(join).sum()
        });
        let seconds = began.elapsed().as_secs_f64();
        // What is still under way must not disturb the next subject.
        self.wait_until_quiet()?;
        Ok(as_f64(sent?) * 8.0 / 1e9 / seconds)
    }

    /// Until what was sent is acknowledged, end to end: bytes that a proxy holds are between two
    /// connections.
    fn wait_until_quiet(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        for mut connection in self.connections.iter().take(STREAMS) {
            loop {
                interrupt::pause(Duration::from_millis(5))?;
                // Answered only when it does not come together with what is swallowed.
                connection.write_all(b"x")?;
                connection.set_read_timeout(Some(Duration::from_millis(50)))?;
                let answered = connection.read(&mut [0]);
                connection.set_read_timeout(Some(Duration::from_secs(10)))?;
                if matches!(answered, Ok(1)) || Instant::now() > deadline {
                    break;
                }
            }
            // Answers to questions that were late.
            connection.set_read_timeout(Some(Duration::from_millis(5)))?;
            while matches!(connection.read(&mut [0; 64]), Ok(length) if length > 0) {}
            connection.set_read_timeout(Some(Duration::from_secs(10)))?;
        }
        Ok(())
    }
}

fn rows(subjects: &[Subject], runs: u64) -> Vec<Row> {
    let bare = &subjects[0].rounds;
    let row = |subject: &Subject| {
        let of = |value: fn(&Seen) -> f64| {
            Summary::of(&subject.rounds.iter().map(value).collect::<Vec<_>>())
        };
        let ratio = |value: fn(&Seen) -> f64| {
            let pairs = subject.rounds.iter().zip(bare);
            Summary::of(
                &pairs
                    .map(|(own, bare)| value(own) / value(bare))
                    .collect::<Vec<_>>(),
            )
        };
        let (p50, p99) = (of(|seen| seen.p50), of(|seen| seen.p99));
        let gigabits = of(|seen| seen.gigabits);
        let (p50_ratio, gigabits_ratio) = (ratio(|seen| seen.p50), ratio(|seen| seen.gigabits));
        Row {
            subject: subject.name,
            p50_us: p50.median,
            p50_spread: p50.spread,
            p99_us: p99.median,
            p99_spread: p99.spread,
            gigabits: gigabits.median,
            gigabits_spread: gigabits.spread,
            p50_ratio: p50_ratio.median,
            p50_ratio_spread: p50_ratio.spread,
            gigabits_ratio: gigabits_ratio.median,
            gigabits_ratio_spread: gigabits_ratio.spread,
            program_runs: (subject.name == "balancer").then_some(runs),
        }
    };
    subjects.iter().map(row).collect()
}

fn section(rows: &[Row]) -> Section {
    let mut table = Rows::new(
        1,
        &[
            "subject",
            "p50 µs",
            "p99 µs",
            "Gbit/s",
            "p50, of bare",
            "Gbit/s, of bare",
            "runs of our programs",
        ],
    );
    let pair = |value: f64, spread: f64, decimals: usize| {
        format!("{value:.decimals$} ± {spread:.decimals$}")
    };
    for row in rows {
        table.add([
            row.subject.to_owned(),
            pair(row.p50_us, row.p50_spread, 1),
            pair(row.p99_us, row.p99_spread, 1),
            pair(row.gigabits, row.gigabits_spread, 1),
            pair(row.p50_ratio, row.p50_ratio_spread, 3),
            pair(row.gigabits_ratio, row.gigabits_ratio_spread, 3),
            row.program_runs
                .map_or_else(String::new, |runs| runs.to_string()),
        ]);
    }
    Section {
        key: "established",
        title: "Established traffic",
        rows: json!(rows),
        table,
        goals: goals(rows),
        chart: None,
    }
}

fn goals(rows: &[Row]) -> Vec<Goal> {
    let find = |subject| rows.iter().find(|row| row.subject == subject);
    let (Some(row), Some(again)) = (find("balancer"), find("bare, again")) else {
        return Vec::new();
    };
    // As far as bare is from itself.
    let explained = |what: &str, ratio: f64, itself: f64, spread: f64| Goal {
        claim: format!("{what}: no difference from bare that the spread can't explain"),
        seen: format!("{ratio:.3} of bare; bare again {itself:.3} ± {spread:.3}"),
        met: (ratio - 1.0).abs() <= (itself - 1.0).abs() + (2.0 * spread).max(0.01),
    };
    let runs = row.program_runs.unwrap_or(u64::MAX);
    vec![
        explained(
            "latency",
            row.p50_ratio,
            again.p50_ratio,
            again.p50_ratio_spread,
        ),
        explained(
            "throughput",
            row.gigabits_ratio,
            again.gigabits_ratio,
            again.gigabits_ratio_spread,
        ),
        Goal {
            claim: "no program of ours runs for established traffic".to_owned(),
            seen: format!("{runs} runs"),
            met: runs == 0,
        },
    ]
}
