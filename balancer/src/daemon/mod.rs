//! The daemon: watch, compute, apply; once a tick and at every event.

mod attach;
mod down;
mod event_log;
mod health;
mod heartbeat;
mod log_limit;
mod mode;
mod neighbours;
mod place;
mod quotas;
mod reconcile;
mod refusal_log;
mod requests;
mod retry;
mod search;
mod signals;
mod strangers;
mod turned_away;

use std::path::PathBuf;

use anyhow::Result;
use tracing::{error, info, warn};

use self::attach::GuardedNetns;
#[doc(hidden)]
pub use self::event_log::log as log_event;
pub use self::log_limit::LogLimit;
use self::mode::Mode;
#[doc(hidden)]
pub use self::mode::fuzzing;
use self::neighbours::ensure_sole;
use self::reconcile::{Daemon, kept};
use self::signals::{Signal, Signals};
use crate::api::Server;
use crate::config::Config;
use crate::dataplane::{Events, Lock, Paths, Writer};
use crate::discover::cgroup;
use crate::doctor;
use crate::sys::privileges::{drop_to, suffice_to_start};
use crate::sys::{limits, memory};

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

/// Runs the daemon until a signal or a request ends it.
///
/// # Errors
/// When it can't start; then nothing is left in the kernel that was not there before.
pub async fn run(options: Options) -> Result<()> {
    // Who reloads or ends it while it starts must not kill it half way.
    let signals = Signals::new()?;
    if let Err(error) = limits::raise_open_files() {
        warn!("cannot raise the limit of open files: {error}");
    }
    let config = Config::load(&options.config)?;
    suffice_to_start()?;
    let guarded = GuardedNetns::resolve(&config.namespaces)?;
    let cgroup = cgroup(options.cgroup.as_deref())?;
    let paths = Paths::new(&options.state_dir);
    let lock = Lock::for_daemon(&paths)?;
    ensure_sole(&config.services, &guarded.named_cookies(), &paths)?;
    let admin = Server::bind(&options.admin_socket, &options.state_dir)?;
    let mode = Mode::start(&config).await?;
    let writer = Writer::start(paths, lock, &cgroup)?;
    let mut daemon = Daemon::new(&config, guarded, mode, writer);
    let started = daemon
        .start()
        .and_then(|()| daemon.writer.loader.events())
        .and_then(|events| {
            drop_to(kept(&config))?;
            daemon.follow_heartbeat()?;
            Ok(events)
        });
    let events = match started {
        Ok(events) => events,
        Err(error) => {
            if let Err(left) = daemon.writer.loader.withdraw() {
                error!("what the failed start has put into the kernel is left there: {left:#}");
            }
            return Err(error);
        }
    };
    warn_of_mistakes(&config);
    memory::give_back();
    info!("ready");
    let end = serve(&mut daemon, &options, events, admin, signals).await?;
    finish(&daemon, end, options.on_exit)
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

fn finish(daemon: &Daemon, end: End, on_exit: Option<OnExit>) -> Result<()> {
    let unload = match (end, on_exit) {
        (End::Unloaded, _) => {
            info!("unloaded on request");
            return Ok(());
        }
        (_, Some(choice)) => choice == OnExit::Unload,
        (End::Interrupted, None) => true,
        (End::Terminated, None) if daemon.mode.is_uninstalled() => {
            info!("the DaemonSet of this daemon is gone: no other will follow");
            true
        }
        (End::Terminated, None) => false,
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
