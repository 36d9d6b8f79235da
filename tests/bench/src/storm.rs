//! Measurement 5, the storm: 5,000 clients lose their server at once and come back through the
//! balancer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use socket2::SockRef;
use testkit::fixtures::{Balancer, Machine};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, timeout};

use crate::interrupt;
use crate::peers::envoy::{Envoy, Layer};
use crate::peers::haproxy::Haproxy;
use crate::peers::{FRONT, balancer_file};
use crate::report::{Rows, Section};
use crate::serve::{self, Servers};
use crate::settings::{POLICIES, Settings, processors};
use crate::statistics::{Summary, as_f64, max_over_mean, percentile};
use crate::usage::resident;

const CLIENTS: usize = 5_000;
/// One that dies, and those that take its clients.
const BACKENDS: u16 = 5;
/// Of each backend, where there is one: 4 % more than an even share of the clients.
const QUOTA: u32 = 1_300;
/// A client that was refused or cut off tries again after so long.
const RETRY: Duration = Duration::from_millis(10);
/// A client that gets no answer gives up after so long.
const PATIENCE: Duration = Duration::from_secs(5);
const PLACED_WITHIN: Duration = Duration::from_secs(60);
/// Health checks of the peers have seen the new backends by then.
const NOTICED: Duration = Duration::from_millis(1500);

const SUBJECTS: [&str; 4] = ["balancer", "balancer, quota", "haproxy", "envoy"];

#[derive(Serialize)]
struct Row {
    subject: &'static str,
    clients: usize,
    /// Until half of them were served again, and all.
    half_ms: f64,
    all_ms: f64,
    all_spread: f64,
    max_over_mean: f64,
    /// Connects that were refused or cut off before they were served.
    failed_attempts: f64,
    /// Memory of the subject's process with all of them connected.
    rss_megabytes: f64,
    rounds: usize,
}

#[derive(Clone, Copy)]
struct Seen {
    half: f64,
    all: f64,
    evenness: f64,
    failed: f64,
    megabytes: f64,
}

/// Measures.
///
/// # Errors
/// When a subject can't be started, or some clients find no place.
pub fn measure(settings: &Settings) -> Result<Section> {
    let rounds = settings.pick(1, 7);
    let mut seen: [Vec<Seen>; 4] = Default::default();
    for _ in 0..rounds {
        for (subject, seen) in SUBJECTS.into_iter().zip(&mut seen) {
            seen.push(round(settings, subject).context(subject)?);
        }
    }
    let rows: Vec<_> = SUBJECTS
        .into_iter()
        .zip(&seen)
        .map(|(subject, seen)| row(subject, seen))
        .collect();
    Ok(section(&rows))
}

/// What stands between clients and servers.
enum Subject<'a> {
    Balancer(Balancer<'a>),
    Haproxy(Haproxy),
    Envoy(Envoy),
}

impl<'a> Subject<'a> {
    fn start(settings: &Settings, machine: &'a Machine, name: &str) -> Result<Self> {
        let backends = serve::backends(BACKENDS);
        Ok(match name {
            "haproxy" => Self::Haproxy(Haproxy::start(
                settings,
                machine,
                "storm-haproxy",
                &backends,
            )?),
            "envoy" => {
                let mut envoy =
                    Envoy::start(settings, machine, "storm-envoy", Layer::L4, &backends)?;
                envoy.wait(machine)?;
                Self::Envoy(envoy)
            }
            _ => {
                let file = balancer_file(POLICIES[0], BACKENDS, None);
                let balancer = Balancer::start(machine, &file);
                balancer.wait_active(1);
                Self::Balancer(balancer)
            }
        })
    }

    /// All backends listen: waits until it knows.
    fn notice(&self, name: &str) -> Result<()> {
        match self {
            Self::Balancer(balancer) => {
                balancer.wait_active(usize::from(BACKENDS));
                if name.ends_with("quota") {
                    balancer.configure(&balancer_file(POLICIES[0], BACKENDS, Some(QUOTA)));
                    balancer.reload();
                    balancer.wait_until(|service| {
                        service
                            .backends
                            .iter()
                            .all(|backend| backend.quota == Some(QUOTA))
                    });
                }
                Ok(())
            }
            Self::Haproxy(_) | Self::Envoy(_) => interrupt::pause(NOTICED),
        }
    }

    /// Memory of its process in megabytes.
    fn resident(&self) -> Result<f64> {
        resident(match self {
            Self::Balancer(balancer) => u32::try_from(balancer.pid().as_raw())?,
            Self::Haproxy(haproxy) => haproxy.id(),
            Self::Envoy(envoy) => envoy.id(),
        })
    }

    fn check(&mut self) -> Result<()> {
        match self {
            Self::Balancer(_) => Ok(()),
            Self::Haproxy(haproxy) => haproxy.check(),
            Self::Envoy(envoy) => envoy.check(),
        }
    }
}

fn round(settings: &Settings, name: &'static str) -> Result<Seen> {
    let machine = Machine::new();
    let mut servers = Servers::apart(&machine, 1)?;
    let mut subject = Subject::start(settings, &machine, name)?;
    let clients = Clients::arrive(&machine)?;
    clients.wait(0)?;
    for _ in 1..BACKENDS {
        servers.start(&machine, 1)?;
    }
    subject.notice(name)?;
    let killed = Instant::now();
    servers.kill_first();
    clients.wait(1)?;
    subject.check()?;
    let times: Vec<_> = clients
        .came_back()
        .iter()
        .map(|at| at.saturating_duration_since(killed).as_secs_f64() * 1e3)
        .collect();
    let loads: Vec<_> = servers.loads()?.into_iter().map(as_f64).collect();
    Ok(Seen {
        half: percentile(&times, 50),
        all: percentile(&times, 100),
        evenness: max_over_mean(&loads),
        failed: as_f64(clients.counters.failed.load(Ordering::Relaxed)),
        megabytes: subject.resident()?,
    })
}

/// What all clients write down.
#[derive(Default)]
struct Counters {
    /// How many have been served: for the first time, and again.
    served: [AtomicUsize; 2],
    came_back: Mutex<Vec<Instant>>,
    failed: AtomicUsize,
}

/// The clients; gone when dropped.
struct Clients {
    counters: Arc<Counters>,
    runtime: Option<Runtime>,
}

impl Clients {
    fn arrive(machine: &Machine) -> Result<Self> {
        let counters = Arc::new(Counters::default());
        // Its threads begin where the thread is that starts them.
        let runtime = machine.netns.run(|| {
            Builder::new_multi_thread()
                .worker_threads(processors())
                .enable_all()
                .build()
        });
        let runtime = runtime.context("cannot start a runtime")?;
        for _ in 0..CLIENTS {
            runtime.spawn(live(Arc::clone(&counters)));
        }
        Ok(Self {
            counters,
            runtime: Some(runtime),
        })
    }

    /// Until all have been served so many times more than once.
    fn wait(&self, again: usize) -> Result<()> {
        let deadline = Instant::now() + PLACED_WITHIN;
        loop {
            let served = self.counters.served[again].load(Ordering::Relaxed);
            if served >= CLIENTS {
                // Failures of the beginning don't count.
                if again == 0 {
                    self.counters.failed.store(0, Ordering::Relaxed);
                }
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "only {served} of {CLIENTS} clients were served within {PLACED_WITHIN:?}, with {} failed attempts",
                self.counters.failed.load(Ordering::Relaxed)
            );
            interrupt::pause(Duration::from_millis(10))?;
        }
    }

    fn came_back(&self) -> Vec<Instant> {
        let times = &self.counters.came_back;
        times.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// A client that wants one connection, always.
async fn live(counters: Arc<Counters>) {
    let mut times = 0;
    loop {
        let Ok(Ok(mut stream)) = timeout(PATIENCE, connect()).await else {
            counters.failed.fetch_add(1, Ordering::Relaxed);
            sleep(RETRY).await;
            continue;
        };
        if let Some(served) = counters.served.get(times) {
            if times == 1 {
                let now = Instant::now();
                let times = &counters.came_back;
                times
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(now);
            }
            served.fetch_add(1, Ordering::Relaxed);
        }
        times += 1;
        // Nothing is asked any more: this ends with the connection.
        let _ = stream.read(&mut [0]).await;
    }
}

/// Served once a byte has come back.
async fn connect() -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(FRONT).await?;
    // Closed with a RST, so that no TIME_WAIT is left.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    stream.write_all(b"x").await?;
    stream.read_exact(&mut [0]).await?;
    Ok(stream)
}

fn row(subject: &'static str, seen: &[Seen]) -> Row {
    let of = |value: fn(&Seen) -> f64| Summary::of(&seen.iter().map(value).collect::<Vec<_>>());
    let all = of(|seen| seen.all);
    Row {
        subject,
        clients: CLIENTS,
        half_ms: of(|seen| seen.half).median,
        all_ms: all.median,
        all_spread: all.spread,
        max_over_mean: of(|seen| seen.evenness).median,
        failed_attempts: of(|seen| seen.failed).median,
        rss_megabytes: of(|seen| seen.megabytes).median,
        rounds: all.rounds,
    }
}

fn section(rows: &[Row]) -> Section {
    let mut table = Rows::new(
        1,
        &[
            "subject",
            "half back, ms",
            "all back, ms",
            "max/mean",
            "failed attempts",
            "RSS, MB",
        ],
    );
    for row in rows {
        table.add([
            row.subject.to_owned(),
            format!("{:.0}", row.half_ms),
            format!("{:.0} ± {:.0}", row.all_ms, row.all_spread),
            format!("{:.3}", row.max_over_mean),
            format!("{:.0}", row.failed_attempts),
            format!("{:.0}", row.rss_megabytes),
        ]);
    }
    Section {
        key: "storm",
        title: "Storm recovery",
        rows: json!(rows),
        table,
        goals: Vec::new(),
        chart: None,
    }
}
