//! Measurement 5: how fast what the daemon does takes effect.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use balancer::api::{ANSWERS_WITHIN, Request, Response, ask};
use serde::Serialize;
use serde_json::json;
use testkit::fixtures::{Balancer, Machine, Netns, Signal};

use crate::drive::visit;
use crate::hold::HeldConnections;
use crate::interrupt;
use crate::peers::{FRONT, balancer_file};
use crate::report::{Goal, Rows, Section};
use crate::serve::Servers;
use crate::settings::{POLICIES, Settings, USUAL};
use crate::statistics::{median, percentile};

const QUOTA_BOUND_MS: f64 = 1.0;
const START_BOUND_MS: f64 = 300.0;
/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two connects while a daemon starts: it needs the processors itself.
const PAUSE: Duration = Duration::from_micros(500);

#[derive(Serialize)]
struct Row {
    what: &'static str,
    median_ms: f64,
    p99_ms: f64,
    rounds: usize,
}

impl Row {
    fn of(what: &'static str, milliseconds: &[f64]) -> Self {
        Self {
            what,
            median_ms: median(milliseconds),
            p99_ms: percentile(milliseconds, 99),
            rounds: milliseconds.len(),
        }
    }
}

/// Measures.
///
/// # Errors
/// When nothing changes for the clients.
pub fn measure(settings: &Settings) -> Result<Section> {
    let (raised, lowered) = quotas(settings.pick(20, 200))?;
    let starts = starts(settings.pick(3, 25))?;
    let rows = [
        Row::of("quota raised: until the first SYN was let in", &raised),
        Row::of("quota lowered: until the first SYN was refused", &lowered),
        Row::of("daemon started: until the first SYN was steered", &starts),
    ];
    Ok(section(&rows))
}

/// A client's connect that ended differently from the one before.
struct Change {
    served: bool,
    ended: Instant,
}

/// Connects without a pause or with one until told to stop, and tells of each change.
fn knock(
    netns: &Netns,
    pause: Option<Duration>,
    stop: &AtomicBool,
    tell: &Sender<Change>,
) -> Result<()> {
    netns.enter();
    let mut before = None;
    while !stop.load(Ordering::Relaxed) {
        let served = match visit(FRONT) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => false,
            Err(error) => bail!("{FRONT}: {error}"),
        };
        if before.replace(served) != Some(served) {
            let ended = Instant::now();
            // Nobody listens any more at the end.
            let _ = tell.send(Change { served, ended });
        }
        if let Some(pause) = pause {
            thread::sleep(pause);
        }
    }
    Ok(())
}

/// Runs `work` while a client knocks.
fn beside_a_client<T>(
    machine: &Machine,
    pause: Option<Duration>,
    work: impl FnOnce(&Receiver<Change>) -> Result<T>,
) -> Result<T> {
    let stop = AtomicBool::new(false);
    let (tell, hear) = channel();
    thread::scope(|scope| {
        let client = scope.spawn(|| knock(&machine.netns, pause, &stop, &tell));
        let done = {
            let _stops = Stops(&stop);
            work(&hear)
        };
        let knocked = client
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        knocked.and(done)
    })
}

/// Stops the client when dropped, also while a panic unwinds: the scope waits for it.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until the client is served, or is no more.
fn hear(changes: &Receiver<Change>, served: bool) -> Result<Instant> {
    interrupt::check()?;
    let what = if served { "served" } else { "refused" };
    loop {
        let change = changes
            .recv_timeout(PATIENCE)
            .with_context(|| format!("no client was {what} within {PATIENCE:?}"))?;
        if change.served == served {
            return Ok(change.ended);
        }
    }
}

/// Milliseconds from asking the daemon for another quota until a client's connect has ended as it
/// demands.
fn quotas(rounds: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let machine = Machine::new();
    let balancer = Balancer::start(&machine, &balancer_file(POLICIES[0], USUAL, Some(1)));
    let servers = Servers::together(&machine, USUAL)?;
    balancer.wait_active(usize::from(USUAL));
    let _full = HeldConnections::gather(&machine, servers.addresses().len(), &[FRONT])?;
    let done = beside_a_client(&machine, None, |changes| {
        let (mut raised, mut lowered) = (Vec::new(), Vec::new());
        hear(changes, false)?;
        for _ in 0..rounds {
            let asked = set(&balancer, 100)?;
            raised.push(between(asked, hear(changes, true)?));
            let asked = set(&balancer, 1)?;
            lowered.push(between(asked, hear(changes, false)?));
        }
        Ok((raised, lowered))
    })?;
    Ok(done)
}

/// Asks as `balancer quota set` does; returns when it was asked.
fn set(balancer: &Balancer<'_>, quota: u32) -> Result<Instant> {
    let request = Request::SetQuota {
        service: "agents".to_owned(),
        slot: None,
        quota,
    };
    let asked = Instant::now();
    match ask(
        &balancer.socket(),
        balancer.state(),
        &request,
        ANSWERS_WITHIN,
        |_| {},
    )? {
        Some(Response::Done { .. }) => Ok(asked),
        other => bail!("the daemon did not set a quota: {other:?}"),
    }
}

/// Milliseconds from starting a daemon beside servers that run already until the first client is
/// served at the virtual port.
fn starts(rounds: usize) -> Result<Vec<f64>> {
    let machine = Machine::new();
    let _servers = Servers::together(&machine, USUAL)?;
    let mut balancer = Balancer::prepare(&machine, &balancer_file(POLICIES[0], USUAL, None));
    beside_a_client(&machine, Some(PAUSE), |changes| {
        let mut times = Vec::new();
        hear(changes, false)?;
        for _ in 0..rounds {
            let began = Instant::now();
            balancer.spawn();
            times.push(between(began, hear(changes, true)?));
            balancer.wait_ready();
            let ended = balancer.stop(Signal::SIGINT);
            ensure!(ended.success(), "the daemon ended with {ended}");
            hear(changes, false)?;
        }
        Ok(times)
    })
}

fn between(began: Instant, ended: Instant) -> f64 {
    ended.saturating_duration_since(began).as_secs_f64() * 1e3
}

fn section(rows: &[Row]) -> Section {
    let mut table = Rows::new(1, &["what", "median ms", "p99 ms", "rounds"]);
    for row in rows {
        table.add([
            row.what.to_owned(),
            format!("{:.2}", row.median_ms),
            format!("{:.2}", row.p99_ms),
            row.rounds.to_string(),
        ]);
    }
    let bounds = [QUOTA_BOUND_MS, QUOTA_BOUND_MS, START_BOUND_MS];
    let goals = rows
        .iter()
        .zip(bounds)
        .map(|(row, bound)| Goal::at_most(row.what, bound, "ms", row.median_ms));
    Section {
        key: "control",
        title: "Control",
        goals: goals.collect(),
        rows: json!(rows),
        table,
        chart: None,
    }
}
