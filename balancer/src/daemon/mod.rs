//! The daemon: watch, compute, apply; once a tick and at every event.

mod attach;
mod down;
mod event_log;
mod health;
mod heartbeat;
mod log_limit;
mod mode;
mod moves;
mod neighbours;
mod place;
mod quotas;
mod rebalancing;
mod reconcile;
mod refusal_log;
mod requests;
mod retry;
mod search;
mod signals;
mod strangers;
mod turned_away;
mod unfit;

use std::path::PathBuf;

use anyhow::{Context as _, Error, Result};
use tracing::{error, info, warn};

use self::attach::GuardedNetns;
#[doc(hidden)]
pub use self::event_log::log as log_event;
pub use self::log_limit::LogLimit;
use self::mode::Mode;
#[doc(hidden)]
pub use self::mode::fuzzing;
pub use self::mode::status_from_outside;
use self::neighbours::ensure_sole;
use self::reconcile::{Daemon, kept};
use self::signals::{Signal, Signals};
pub use self::unfit::UNFIT;
use self::unfit::Unfit;
use crate::api::Server;
use crate::config::Config;
use crate::dataplane::{Events, Lock, Paths, Writer};
use crate::discover::{cgroup, ensure_bpffs};
use crate::doctor;
use crate::sys::privileges::{drop_to, suffice_to_start};
use crate::sys::{limits, memory, netns};

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

/// Why the loop ended.
#[derive(Clone, Copy, Debug)]
enum End {
    Interrupted,
    Terminated,
    Unloaded,
}

/// A daemon that has started.
struct Started {
    daemon: Daemon,
    events: Events,
    admin: Server,
}

/// Why a daemon can't start.
enum Failure {
    /// The file, its environment or another daemon is in the way.
    Other(Error),
    /// This machine lacks something, or its kernel refuses something.
    Machine(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// Runs the daemon until a signal or a request ends it. On a node of a cluster that can't be
/// guarded it stays, says so, and tries again after a while: one that ended there would end the
/// rollout to all nodes.
///
/// # Errors
/// When it can't start; then nothing is left in the kernel that was not there before.
pub async fn run(options: Options) -> Result<()> {
    // Who reloads or ends it while it starts must not kill it half way.
    let mut signals = Signals::new()?;
    if let Err(error) = limits::raise_open_files() {
        warn!("cannot raise the limit of open files: {error}");
    }
    let mut unfit = Unfit::default();
    loop {
        let config = Config::load(&options.config)?;
        let error = match start(&options, &config).await {
            Ok(started) => return serve_to_the_end(started, &options, signals).await,
            Err(Failure::Other(error)) => return Err(error),
            Err(Failure::Machine(error)) => error,
        };
        let Some(kubernetes) = &config.kubernetes else {
            return Err(error);
        };
        let ended = unfit
            .stay(&options, kubernetes, error, &mut signals)
            .await?;
        if ended.is_some() {
            return Ok(());
        }
    }
}

async fn start(options: &Options, config: &Config) -> Result<Started, Failure> {
    suffice_to_start().map_err(Failure::Machine)?;
    let guarded = GuardedNetns::resolve(&config.namespaces).map_err(Failure::Machine)?;
    let cgroup = cgroup(options.cgroup.as_deref()).map_err(Failure::Machine)?;
    netns::cookie()
        .context("cannot read the cookie of a network namespace (Linux 5.14)")
        .map_err(Failure::Machine)?;
    if ensure_bpffs(&options.state_dir).map_err(Failure::Machine)? {
        info!("mounted the BPF file system");
    }
    let paths = Paths::new(&options.state_dir);
    let lock = Lock::for_daemon(&paths)?;
    ensure_sole(&config.services, &guarded.named_cookies(), &paths)?;
    let admin = Server::bind(&options.admin_socket, &options.state_dir)?;
    let mode = Mode::start(config).await?;
    let writer = Writer::start(paths, lock, &cgroup).map_err(Failure::Machine)?;
    let mut daemon = Daemon::new(config, guarded, mode, writer);
    let started = daemon.start().and_then(|()| daemon.writer.loader.events());
    let events = match started {
        Ok(events) => events,
        Err(error) => {
            withdraw(&daemon);
            return Err(Failure::Machine(error));
        }
    };
    // From here on there is no second start in this process.
    let narrowed = drop_to(kept(config)).and_then(|()| daemon.follow_heartbeat());
    if let Err(error) = narrowed {
        withdraw(&daemon);
        return Err(error.into());
    }
    warn_of_mistakes(config);
    memory::give_back();
    info!("ready");
    Ok(Started {
        daemon,
        events,
        admin,
    })
}

fn withdraw(daemon: &Daemon) {
    if let Err(left) = daemon.writer.loader.withdraw() {
        error!("what the failed start has put into the kernel is left there: {left:#}");
    }
}

async fn serve_to_the_end(started: Started, options: &Options, signals: Signals) -> Result<()> {
    let Started {
        mut daemon,
        events,
        admin,
    } = started;
    let end = serve(&mut daemon, options, events, admin, signals).await?;
    let none_follows = match (end, options.on_exit) {
        (End::Terminated, None) => daemon.mode.none_follows().await,
        _ => None,
    };
    finish(&daemon, end, options.on_exit, none_follows.as_deref())
}

/// Warns of what the file says and this machine makes nothing of.
fn warn_of_mistakes(config: &Config) {
    match doctor::mistakes(config) {
        Ok(mistakes) => {
            for mistake in mistakes {
                warn!("{}: {mistake}", mistake.service);
            }
        }
        Err(error) => warn!("the file could not be compared with this machine: {error}"),
    }
}

async fn serve(
    daemon: &mut Daemon,
    options: &Options,
    mut events: Events,
    mut admin: Server,
    mut signals: Signals,
) -> Result<End> {
    loop {
        daemon.turn();
        let busy = daemon.is_busy();
        tokio::select! {
            () = tokio::task::yield_now(), if busy => {
                daemon.go_on();
            }
            _ = daemon.ticks.tick() => daemon.tick(),
            () = daemon.mode.changed() => daemon.on_cluster_change(),
            batch = events.next() => daemon.on_events(&batch?),
            (request, reply) = admin.next() => {
                if requests::answer(daemon, &options.config, &request, reply) {
                    return Ok(End::Unloaded);
                }
            }
            signal = signals.next() => match signal {
                Signal::Hangup => {
                    // Nobody waits for an answer, and the log has the error.
                    let _ = daemon.reload(&options.config);
                }
                Signal::Interrupt => return Ok(End::Interrupted),
                Signal::Terminate => return Ok(End::Terminated),
            }
        }
    }
}

/// `none_follows`: why no other daemon does.
fn finish(
    daemon: &Daemon,
    end: End,
    on_exit: Option<OnExit>,
    none_follows: Option<&str>,
) -> Result<()> {
    let unload = match (end, on_exit) {
        (End::Unloaded, _) => {
            info!("unloaded on request");
            return Ok(());
        }
        (_, Some(choice)) => choice == OnExit::Unload,
        (End::Interrupted, None) => true,
        (End::Terminated, None) => {
            if let Some(why) = none_follows {
                info!("no other daemon will follow: {why}");
            }
            none_follows.is_some()
        }
    };
    if unload {
        let left_open = daemon.writer.left_open();
        daemon.writer.loader.remove()?;
        info!("the data plane is out of the kernel");
        if let Some(left_open) = left_open {
            info!("{left_open}");
        }
    } else {
        info!(
            "the data plane stays: it counts and steers, and refuses nobody once {:?} have passed \
             without a daemon",
            daemon.fail_open_after()
        );
    }
    Ok(())
}
