//! The daemon: watch, compute, apply; once a tick and at every event.

mod attach;
mod group_quotas;
mod mode;
mod plan;
mod pod_resolver;
mod quotas;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use balancer_common::Reason;
use balancer_common::abi::{Event, EventKind};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use self::attach::GuardedNetns;
use self::mode::kubernetes::KubernetesMode;
use self::quotas::Quotas;
use crate::api::{Reply, Request, Response, Server};
use crate::config::{Config, NetnsScope};
use crate::dataplane::{Events, Lock, Paths, Plan, Writer, services, slots};
use crate::discover::cgroup2_mount;
use crate::sys::privileges::{Kept, drop_to, suffice_for};
use crate::sys::{clock, memory};

/// The longest time between two ticks; shorter where `fail_open_after` is short.
const TICK: Duration = Duration::from_secs(1);
/// Heartbeats that may be missed before the kernel fails open.
const BEATS: u32 = 4;

/// What `balancer run` was told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// Where `account` is attached; `None`: the root of the cgroup2 hierarchy.
    pub cgroup: Option<PathBuf>,
    /// The state directory on bpffs.
    pub state_dir: PathBuf,
    /// Where the verbs that change something reach the daemon.
    pub admin_socket: PathBuf,
    /// What to leave behind; `None`: SIGINT unloads, SIGTERM keeps.
    pub on_exit: Option<OnExit>,
}

/// What becomes of the data plane when the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExit {
    /// It stays for the next daemon, and fails open when none comes.
    Keep,
    /// It is taken out of the kernel.
    Unload,
}

/// At most one part in so many of the time is spent on comparing the counts with the socket table;
const CHECK_SHARE: u32 = 200;
/// where there are backends or connections that the kernel half does not see go;
const ADOPTED_SHARE: u32 = 30;
/// and where something may be wrong, which the next comparison tells.
const DOUBTFUL_SHARE: u32 = 20;
/// But it is done this often, however long it takes.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Why the loop ended.
#[derive(Clone, Copy, Debug)]
enum End {
    Interrupted,
    Terminated,
    Unloaded,
}

/// Runs the daemon until a signal or a request ends it.
///
/// # Errors
/// When it can't start; then nothing is left in the kernel that was not there before.
pub async fn run(options: Options) -> Result<()> {
    let config = Config::load(&options.config)?;
    let guarded = GuardedNetns::resolve(&config.namespaces)?;
    let cgroup = match &options.cgroup {
        Some(path) => path.clone(),
        None => cgroup2_mount()?,
    };
    let paths = Paths::new(&options.state_dir);
    let lock = Lock::for_daemon(&paths)?;
    let admin = Server::bind(&options.admin_socket, &options.state_dir)?;
    let signals = Signals::new()?;
    let cluster = match &config.kubernetes {
        Some(kubernetes) => Some(KubernetesMode::join(kubernetes).await?),
        None => None,
    };
    let writer = Writer::start(paths, lock, &cgroup)?;
    let mut agent = Daemon {
        options,
        config,
        guarded,
        cluster,
        quotas: Quotas::default(),
        plan: None,
        writer,
        next_check: Instant::now(),
    };
    let started = agent
        .start()
        .and_then(|()| agent.writer.loader.events())
        .and_then(|events| drop_to(kept(&agent.config)).map(|()| events));
    let events = match started {
        Ok(events) => events,
        Err(error) => {
            if let Err(left) = agent.writer.loader.withdraw() {
                warn!("what was loaded could not be taken out of the kernel: {left:#}");
            }
            return Err(error);
        }
    };
    memory::give_back();
    info!("ready");
    let end = agent.serve(events, admin, signals).await?;
    agent.finish(end)
}

fn kept(config: &Config) -> Kept {
    Kept {
        other_netns: config.namespaces != NetnsScope::Own,
    }
}

/// Never, where there is no cluster.
async fn cluster_changed(cluster: &mut Option<KubernetesMode>) {
    match cluster {
        Some(cluster) => cluster.changed().await,
        None => std::future::pending().await,
    }
}

/// The signals that mean something to the daemon.
struct Signals {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }
}

struct Daemon {
    options: Options,
    config: Config,
    guarded: GuardedNetns,
    /// Where the daemon is in a Kubernetes cluster.
    cluster: Option<KubernetesMode>,
    quotas: Quotas,
    /// What the maps should hold; `None`: the cluster has not told yet, and what an earlier daemon put in force stays.
    plan: Option<Plan>,
    writer: Writer,
    /// When the counts are compared with the socket table again.
    next_check: Instant,
}

impl Daemon {
    /// Rules first: a listener that comes up from then on registers itself. Then what listens already is registered, with what it
    /// holds, and has its quotas; only then does this build decide.
    fn start(&mut self) -> Result<()> {
        self.inherit()?;
        self.plan = self.wanted()?;
        self.writer.apply(self.plan.as_ref())?;
        self.check(true)?;
        slots::give_back_held(&mut self.writer.tables)?;
        if let Some(cluster) = &mut self.cluster {
            cluster.tie(&mut self.guarded, &mut self.writer)?;
        }
        self.share()?;
        // Not before: the quotas that the last daemon left may have been refusing nobody for a while. And not later: a data plane
        // that has never had a sign of life refuses nobody.
        self.writer.tables.beat(self.config.fail_open_after);
        self.writer.switch()?;
        self.guarded.attach(&mut self.writer)?;
        self.writer.loader.follow_logs();
        self.update()?;
        self.writer.tables.beat(self.config.fail_open_after);
        Ok(())
    }

    /// Ports of a cluster keep the names that the last daemon gave them.
    fn inherit(&mut self) -> Result<()> {
        if let (Some(cluster), Some(kubernetes)) = (&mut self.cluster, &self.config.kubernetes) {
            cluster.inherit(kubernetes, services::ports(&self.writer.tables)?);
        }
        Ok(())
    }

    /// What the maps should hold by what is known now.
    fn wanted(&mut self) -> Result<Option<Plan>> {
        match (&mut self.cluster, &self.config.kubernetes) {
            (Some(cluster), Some(kubernetes)) => cluster.plan(kubernetes, &self.writer),
            _ => Ok(Some(plan::of(&self.config, &self.guarded))),
        }
    }

    /// Computes quotas and puts them in force.
    fn share(&mut self) -> Result<()> {
        match (&mut self.cluster, &self.config.kubernetes) {
            (Some(cluster), Some(kubernetes)) => {
                cluster.share(kubernetes, &mut self.quotas, &mut self.writer)
            }
            _ => self
                .quotas
                .apply(&self.config, &self.guarded, &mut self.writer),
        }
    }

    async fn serve(
        &mut self,
        mut events: Events,
        mut admin: Server,
        mut signals: Signals,
    ) -> Result<End> {
        let mut tick = interval(TICK.min(self.config.fail_open_after / BEATS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => self.tick(),
                () = cluster_changed(&mut self.cluster) => self.follow(),
                batch = events.next() => self.on_events(&batch?),
                (request, reply) = admin.next() => {
                    if self.answer(&request, reply) {
                        return Ok(End::Unloaded);
                    }
                }
                _ = signals.hangup.recv() => {
                    self.reload();
                    tick = interval(TICK.min(self.config.fail_open_after / BEATS));
                }
                _ = signals.interrupt.recv() => return Ok(End::Interrupted),
                _ = signals.terminate.recv() => return Ok(End::Terminated),
            }
        }
    }

    /// What failed is tried again at the next tick; counting and steering go on meanwhile.
    fn tick(&mut self) {
        self.writer.tables.beat(self.config.fail_open_after);
        if let Err(error) = self.reconcile().and_then(|()| self.update()) {
            error!("the data plane could not be brought up to date: {error:#}");
        }
    }

    /// What the cluster has told is put in force at once.
    fn follow(&mut self) {
        if let Err(error) = self.on_cluster_change().and_then(|()| self.update()) {
            error!("the data plane could not be brought up to date: {error:#}");
        }
    }

    fn on_cluster_change(&mut self) -> Result<()> {
        let Some(cluster) = &mut self.cluster else {
            return Ok(());
        };
        cluster.refresh();
        let wanted = self.wanted()?;
        if wanted.is_none() || wanted == self.plan {
            return Ok(());
        }
        let new_ports = wanted.as_ref().map(Plan::ports_listened_on)
            != self.plan.as_ref().map(Plan::ports_listened_on);
        self.plan = wanted;
        self.apply_plan()?;
        if new_ports {
            // Who listens there already, and with how many connections.
            self.check(true)?;
        }
        Ok(())
    }

    fn apply_plan(&mut self) -> Result<()> {
        self.plan
            .as_ref()
            .map_or(Ok(()), |plan| self.writer.apply(Some(plan)))
    }

    /// What no event tells.
    fn reconcile(&mut self) -> Result<()> {
        self.on_cluster_change()?;
        if self.guarded.refresh() {
            self.plan = self.wanted()?;
            self.apply_plan()?;
            self.check(true)?;
            self.guarded.attach(&mut self.writer)?;
        } else if Instant::now() >= self.next_check {
            self.check(false)?;
        }
        Ok(())
    }

    fn update(&mut self) -> Result<()> {
        for freed in self.writer.empty.free(&mut self.writer.tables)? {
            debug!(
                "slot {} is free: its last connection has left",
                freed.slot()
            );
        }
        // `steer` before quotas: they confirm a newcomer's backends, which are active from then on.
        if let Some(cluster) = &mut self.cluster {
            cluster.guard(&mut self.guarded, &mut self.writer)?;
        } else {
            let newcomers = self.guarded.strangers(&mut self.writer, |_| true)?;
            self.guarded.guard(&newcomers, &mut self.writer);
        }
        self.share()?;
        self.guarded.release(&mut self.writer)?;
        self.writer.loader.follow_logs();
        Ok(())
    }

    /// Compares the counts with the socket table, so seldom that it takes only a small part of one processor.
    fn check(&mut self, first: bool) -> Result<()> {
        let before = clock::processor_time();
        let checked = self.guarded.check(&mut self.writer, first);
        let cost = clock::processor_time().saturating_sub(before);
        self.next_check = Instant::now() + TICK;
        checked?;
        let audit_totals = self.writer.audit.end(&self.writer.tables, cost);
        debug!(
            "comparison {}: {:.1} ms of processor time, drift {}, {} repairs so far",
            audit_totals.checks,
            cost.as_secs_f64() * 1e3,
            audit_totals.drift,
            audit_totals.repairs
        );
        let share = if first {
            // It also looks for owners and namespaces, which later ones don't.
            0
        } else if self.writer.audit.is_in_doubt() {
            DOUBTFUL_SHARE
        } else if self.writer.audit.has_adopted() {
            ADOPTED_SHARE
        } else {
            CHECK_SHARE
        };
        // A little less than a tick, so that not every other one finds it not yet due.
        let pause = (cost * share).clamp(TICK / 2, LONGEST_PAUSE);
        self.next_check = Instant::now() + pause;
        Ok(())
    }

    fn on_events(&mut self, events: &[Event]) {
        let mut changed = false;
        for event in events {
            changed |= self.report(event);
            self.note_refusal(event);
        }
        if changed && let Err(error) = self.update() {
            error!("the data plane could not be brought up to date: {error:#}");
        }
    }

    /// Whom nobody serves counts as a client, too.
    fn note_refusal(&mut self, event: &Event) {
        if let Some(cluster) = &mut self.cluster
            && EventKind::from_number(event.kind) == Some(EventKind::Refused)
            && let Some(port) = services::port_of(&self.writer.tables, event.service)
        {
            cluster.refused(event.netns, port, event.address.into());
        }
    }

    /// Logs an event; true: it is about a listener.
    fn report(&self, event: &Event) -> bool {
        let service = services::name(&self.writer.tables, event.service);
        let address = std::net::SocketAddr::new(event.address.into(), event.port);
        match EventKind::from_number(event.kind) {
            Some(EventKind::ListenerUp) => {
                info!(
                    "{service}: {address} listens (process {}): slot {}",
                    event.pid, event.slot
                );
            }
            Some(EventKind::ListenerDown) => {
                info!("{service}: {address} listens no more (slot {})", event.slot);
            }
            Some(EventKind::NoSlot) => warn!(
                "{service}: no slot is free for {address} (process {}): it serves without the balancer (at most 256 \
                 backends a service, 1024 in all)",
                event.pid
            ),
            Some(EventKind::NoStorage) => warn!(
                "{service}: the kernel had no memory to register {address} (process {}): it serves without the balancer",
                event.pid
            ),
            Some(EventKind::Refused) => {
                let reason = Reason::from_index(usize::from(event.reason));
                let (name, meaning) = reason.map_or(("unknown", "an unknown reason"), |reason| {
                    (reason.name(), reason.meaning())
                });
                warn!(
                    "{service}: refused {address}: {name} ({meaning}); at most ten of these a second are logged"
                );
            }
            None => warn!(
                "the kernel half sent an event of unknown kind {}",
                event.kind
            ),
        }
        !matches!(
            EventKind::from_number(event.kind),
            Some(EventKind::Refused) | None
        )
    }

    /// Puts the file in force again; a bad one changes nothing.
    fn reload(&mut self) {
        let loaded = Config::load(&self.options.config)
            .map_err(anyhow::Error::from)
            .and_then(|config| {
                suffice_for(kept(&config))?;
                ensure!(
                    config.kubernetes.is_some() == self.cluster.is_some(),
                    "a daemon does not become one of a cluster, or leave it, by a reload: restart it (TERM, then `balancer run`: nothing is \
                     lost meanwhile)"
                );
                Ok((GuardedNetns::resolve(&config.namespaces)?, config))
            });
        let (guarded, config) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                error!("the configuration was not reloaded, the old one stays in force: {error:#}");
                return;
            }
        };
        self.config = config;
        if let Err(error) = self.put_in_force(guarded) {
            error!("the new configuration is in force only in part: {error:#}");
        }
        self.tick();
        info!("reloaded {}", self.options.config.display());
    }

    fn put_in_force(&mut self, guarded: GuardedNetns) -> Result<()> {
        self.guarded = guarded;
        if let (Some(cluster), Some(kubernetes)) = (&mut self.cluster, &self.config.kubernetes) {
            cluster.reconfigure(kubernetes);
            cluster.refresh();
        }
        self.plan = self.wanted()?.or(self.plan.take());
        self.apply_plan()?;
        self.check(true)?;
        self.guarded.attach(&mut self.writer)
    }

    /// Answers a request; true: everything is unloaded and the daemon is to end.
    fn answer(&mut self, request: &Request, reply: Reply) -> bool {
        let answered = match request {
            Request::SetQuota {
                service,
                slot,
                quota,
            } => self
                .quotas
                .set(&mut self.writer, service, *slot, Some(*quota)),
            Request::ClearQuota { service, slot } => {
                self.quotas.set(&mut self.writer, service, *slot, None)
            }
            Request::Unload => {
                // The answer must come after the deed, and the deed ends the daemon.
                let response = match self.writer.loader.remove() {
                    Ok(()) => Response::Done {
                        message: "the data plane is out of the kernel; the daemon ends".into(),
                    },
                    Err(error) => Response::Failed {
                        message: format!("{error:#}"),
                    },
                };
                let done = matches!(response, Response::Done { .. });
                reply.send(&response);
                return done;
            }
            Request::Ping => {
                reply.send(&Response::Done {
                    message: "the daemon lives".into(),
                });
                return false;
            }
            Request::Cluster => {
                reply.send_long(&self.cluster_report());
                return false;
            }
        };
        let answered = answered.and_then(|message| {
            if let Some(plan) = &self.plan {
                services::refresh_ports(&mut self.writer.tables, plan)?;
            }
            self.share()?;
            Ok(message)
        });
        let response = match answered {
            Ok(message) => {
                info!("by hand: {message}");
                Response::Done { message }
            }
            Err(error) => Response::Failed {
                message: format!("{error:#}"),
            },
        };
        reply.send(&response);
        false
    }

    /// The `DaemonSet` that this daemon belongs to is gone: nobody will succeed it.
    fn is_dismissed(&self) -> bool {
        let dismissed = self.cluster.as_ref().is_some_and(KubernetesMode::dismissed);
        if dismissed {
            info!("the DaemonSet of this daemon is gone: no other will follow");
        }
        dismissed
    }

    fn cluster_report(&self) -> Response {
        let report = self
            .cluster
            .as_ref()
            .context("this daemon is not in a Kubernetes cluster: its configuration has no section `kubernetes`")
            .and_then(|cluster| cluster.report(&self.writer));
        match report {
            Ok(report) => Response::Cluster {
                cluster: Box::new(report),
            },
            Err(error) => Response::Failed {
                message: format!("{error:#}"),
            },
        }
    }

    fn finish(self, end: End) -> Result<()> {
        let unload = match (end, self.options.on_exit) {
            (End::Unloaded, _) => {
                info!("unloaded on request");
                return Ok(());
            }
            (_, Some(choice)) => choice == OnExit::Unload,
            (End::Interrupted, None) => true,
            (End::Terminated, None) => self.is_dismissed(),
        };
        if unload {
            self.writer.loader.remove()?;
            info!("the data plane is out of the kernel");
        } else {
            info!(
                "the data plane stays: it counts and steers, and refuses nobody once {:?} have passed without a daemon",
                self.config.fail_open_after
            );
        }
        Ok(())
    }
}
