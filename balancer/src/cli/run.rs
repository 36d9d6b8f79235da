//! `balancer run`

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use tracing_subscriber::{EnvFilter, filter::FilterExt as _, prelude::*};

use super::{Place, absolute};
use crate::{
    config::ConfigError,
    daemon, doctor,
    terminal::{Colours, stderr},
};

/// Balance what a configuration file says, until told to stop (changes the kernel)
///
/// Loads the balancer into the kernel, or takes over what an earlier run left there without a gap,
/// and keeps it up to date: new listeners join, quotas follow the number of ready backends. Needs
/// root.
///
/// Signals: HUP reads the file again, as `balancer reload` does (a bad one is reported and the old
/// one stays in force); INT (Ctrl-C) takes everything out of the kernel; TERM leaves it in place
/// for the next run.
///
/// Once it has started it keeps only the capabilities that it still needs. So a file with other
/// `namespaces` than `own` takes a restart where it was started with `own`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Example, a file for three servers behind one port:
  services:
    - name: agents
      port: 11800                  # what clients connect to
      backends: [\"127.0.0.1:21801\", \"127.0.0.1:21802\", \"127.0.0.1:21803\"]
      quota: {clients: 300, headroom: 15%}
and the command:
  balancer run --config /etc/balancer.yaml")]
pub(super) struct Run {
    /// The configuration file (YAML)
    #[arg(long, value_name = "FILE", value_parser = absolute())]
    config: PathBuf,
    /// The cgroup whose listeners and connections are counted [default: the root of the cgroup2
    /// mount]
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// What becomes of the state in the kernel at the end, whichever signal ends it [default: INT
    /// unloads, TERM keeps]
    #[arg(long, value_name = "WHAT", value_enum)]
    on_exit: Option<OnExit>,
    /// What to log to standard error: error, warn, info, debug, trace, or by module as in
    /// `info,balancer::daemon=debug`
    #[arg(long, value_name = "FILTER", env = "BALANCER_LOG", default_value = "info", value_parser = log_filter)]
    log: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnExit {
    /// Leave it for the next run: counting and steering go on, refusing for as long as
    /// `fail_open_after`
    Keep,
    /// Take everything out
    Unload,
}

/// The Kubernetes client logs each attempt that fails; the daemon says once what is wrong, and once
/// that it is over.
const QUIET: &str = "kube_client=off,kube_runtime=off";

impl Run {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let wanted = EnvFilter::new(format!("{QUIET},{}", self.log));
        let log = tracing_subscriber::fmt::layer()
            // What is logged is made safe before it is coloured.
            .with_ansi(stderr(Colours::Kept).is_terminal())
            .with_writer(|| stderr(Colours::Kept))
            // It would report a log that nobody reads any more to that same log, and panic.
            .log_internal_errors(false);
        tracing_subscriber::registry()
            .with(log.with_filter(wanted.and(daemon::LogLimit)))
            .init();
        let options = daemon::Options {
            config: self.config.clone(),
            cgroup: self.cgroup.clone(),
            state_dir: place.state_dir.clone(),
            admin_socket: place.admin_socket.clone(),
            on_exit: self.on_exit.map(|on_exit| match on_exit {
                OnExit::Keep => daemon::OnExit::Keep,
                OnExit::Unload => daemon::OnExit::Unload,
            }),
        };
        // One thread: it gives up its capabilities, which a thread that runs already would keep.
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("can't start the daemon's runtime")?
            .block_on(daemon::run(options))
            .map_err(on_this_kernel)
    }
}

/// Whatever went wrong on a kernel that is too old: it is the likely cause, unless the file is.
fn on_this_kernel(error: anyhow::Error) -> anyhow::Error {
    match doctor::kernel_too_old() {
        Some(sentence) if !error.is::<ConfigError>() => error.context(sentence),
        _ => error,
    }
}

/// Checked while parsing, so that a bad filter is wrong usage.
fn log_filter(filter: &str) -> Result<String, String> {
    match EnvFilter::try_new(filter) {
        Ok(_) => Ok(filter.to_owned()),
        Err(error) => Err(format!(
            "{error}; write for example debug, or info,balancer::daemon=debug"
        )),
    }
}
