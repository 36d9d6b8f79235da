//! The command line: each verb parses, calls and prints. What they do is done elsewhere.

mod completions;
mod doctor;
mod drain;
mod explain;
mod metrics;
mod output;
mod ping;
mod quota;
mod rebalance;
mod reload;
mod run;
mod shed;
mod status;
mod unload;

#[cfg(test)]
mod tests;

use std::{env, ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use clap::{
    Args, CommandFactory, Parser, Subcommand,
    builder::{PathBufValueParser, TypedValueParser},
    error::{ContextKind, ContextValue, ErrorKind},
};
use nix::unistd::geteuid;

use crate::{
    api::{self, Request, Response},
    daemon::UNFIT,
    dataplane::{self, Paths, Reader},
    kubernetes::ClusterStatus,
};

/// Balances long-lived gRPC connections over their servers, in the kernel and without a hop.
///
/// `balancer run` counts the established connections of every backend, steers each new one to the
/// backend that should have it, and refuses it when all are at their quota. Established traffic
/// never passes through it. What it sets up in the kernel goes on working when the daemon dies;
/// after a while without it nobody is refused any more.
///
/// status, metrics, quota show, rebalance, explain, doctor and ping read, and change nothing. run,
/// reload, quota set, quota clear, shed, drain, undrain and unload change what the kernel does.
#[derive(Debug, Parser)]
#[command(
    name = "balancer",
    version,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage.",
    after_long_help = "\
Examples:
  balancer run --config /etc/balancer.yaml     balance what the file says
  balancer status                              who has how many connections, and who is refused
  balancer explain --from 10.0.0.7 --to 11800  where a connection from there would go now
  balancer doctor                              what this machine lacks

Exit codes: 0 done, 1 failed, 2 wrong usage."
)]
struct Cli {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    verb: Verb,
}

/// Which of the balancers on this machine is meant.
#[derive(Debug, Args)]
struct Place {
    /// Where the balancer keeps its state in the kernel, on a BPF file system
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "BALANCER_STATE_DIR",
        default_value = "/sys/fs/bpf/balancer",
        value_parser = absolute(),
        help_heading = "Which balancer (when several stand side by side)"
    )]
    state_dir: PathBuf,
    /// Where its daemon takes requests
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "BALANCER_ADMIN_SOCKET",
        default_value = "/run/balancer/admin.sock",
        value_parser = absolute(),
        help_heading = "Which balancer (when several stand side by side)"
    )]
    admin_socket: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(run::Run),
    Reload(reload::Reload),
    Status(status::Status),
    Metrics(metrics::Metrics),
    #[command(subcommand)]
    Quota(quota::Quota),
    Rebalance(rebalance::Rebalance),
    Shed(shed::Shed),
    Drain(drain::Drain),
    Undrain(drain::Undrain),
    Explain(explain::Explain),
    Doctor(doctor::Doctor),
    Ping(ping::Ping),
    Unload(unload::Unload),
    Completions(completions::Completions),
}

/// What `status` prints of a snapshot, for people.
pub fn status_text(snapshot: &dataplane::Snapshot) -> String {
    status::text(snapshot, &dataplane::DaemonNotes::default())
}

/// What `status -o json` prints of it.
///
/// # Errors
/// When it can't be written as JSON.
pub fn status_json(snapshot: &dataplane::Snapshot) -> serde_json::Result<String> {
    serde_json::to_string(&status::Json::new(
        snapshot,
        &dataplane::DaemonNotes::default(),
    ))
}

/// Runs the command line of this process: parses it, does what it says, prints. Returns the exit
/// code: 0 done, 1 failed, 2 wrong usage.
pub fn main() -> ExitCode {
    output::fit_terminal();
    let cli = match parse(&env::args_os().collect::<Vec<_>>()) {
        Ok(cli) => cli,
        // Help and version come this way too.
        Err(usage) => {
            return usage_failure(&usage);
        }
    };
    cli.verb
        .perform(&cli.place)
        .unwrap_or_else(|error| print_failure(&error))
}

/// Arguments that don't go together are wrong usage too, found out after parsing.
fn print_failure(error: &anyhow::Error) -> ExitCode {
    if let Some(usage) = error.downcast_ref() {
        return usage_failure(usage);
    }
    output::print_error(error);
    ExitCode::FAILURE
}

fn usage_failure(usage: &clap::Error) -> ExitCode {
    output::print_usage(usage);
    ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(2))
}

fn parse(arguments: &[OsString]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(arguments).map_err(|usage| {
        let is_help = !usage.use_stderr()
            || usage.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
        if is_help {
            return usage;
        }
        without_changing_verbs(usage_without_environment(arguments).unwrap_or(usage))
    })
}

/// What is wrong with the arguments alone. Where the environment sets an option, the parser shows
/// it as one that must be given.
fn usage_without_environment(arguments: &[OsString]) -> Option<clap::Error> {
    let unset = |command: clap::Command| command.mut_args(|arg| arg.env(None::<&str>));
    let command = unset(Cli::command()).mut_subcommand("run", unset);
    command.try_get_matches_from(arguments).err()
}

/// Takes the verbs that change something out of what is suggested for a misspelt one: who follows
/// a suggestion must not take the data plane out by it.
fn without_changing_verbs(mut usage: clap::Error) -> clap::Error {
    let Some(ContextValue::Strings(mut verbs)) = usage.remove(ContextKind::SuggestedSubcommand)
    else {
        return usage;
    };
    let changing = changing_verbs(&Cli::command());
    verbs.retain(|verb| !changing.contains(verb));
    if !verbs.is_empty() {
        usage.insert(
            ContextKind::SuggestedSubcommand,
            ContextValue::Strings(verbs),
        );
    }
    usage
}

/// The verbs below `command` that say of themselves that they change something.
fn changing_verbs(command: &clap::Command) -> Vec<String> {
    let mut changing = Vec::new();
    for verb in command.get_subcommands() {
        let about = verb.get_about().map(ToString::to_string);
        if about.is_some_and(|about| about.ends_with("(changes the kernel)")) {
            changing.push(verb.get_name().to_owned());
        }
        changing.extend(changing_verbs(verb));
    }
    changing
}

impl Verb {
    fn perform(&self, place: &Place) -> Result<ExitCode> {
        match self {
            Self::Run(run) => run.perform(place),
            Self::Reload(reload) => reload.perform(place),
            Self::Status(status) => status.perform(place),
            Self::Metrics(metrics) => metrics.perform(place),
            Self::Quota(quota) => quota.perform(place),
            Self::Rebalance(rebalance) => rebalance.perform(place),
            Self::Shed(shed) => shed.perform(place),
            Self::Drain(drain) => drain.perform(place),
            Self::Undrain(undrain) => undrain.perform(place),
            Self::Explain(explain) => return explain.perform(place),
            Self::Doctor(doctor) => return doctor.perform(place),
            Self::Ping(ping) => ping.perform(place),
            Self::Unload(unload) => unload.perform(place),
            Self::Completions(completions) => completions.perform(),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Place {
    fn paths(&self) -> Paths {
        Paths::new(&self.state_dir)
    }

    /// The balancer that is loaded there.
    fn reader(&self) -> Result<Reader> {
        let reader = dataplane::open(&self.paths()).with_context(|| {
            format!(
                "can't read the balancer's state in {}{}",
                self.state_dir.display(),
                hint_of_user()
            )
        })?;
        reader.ok_or_else(|| {
            if let Ok(Some(message)) = self.ask(&Request::Ping) {
                if message.contains(UNFIT) {
                    return anyhow!("nothing is loaded here: {message}");
                }
                return anyhow!(
                    "the daemon lives, but its pins are not in {}: is the BPF file system unmounted there, or another one mounted over it? Mount one \
                     (`mount -t bpf bpf /sys/fs/bpf`), and the daemon puts them back; its log has more",
                    self.state_dir.display()
                );
            }
            anyhow!(
                "no balancer is loaded at {}: it has not run since the machine started, was unloaded, or uses another directory; start it with \
                 `balancer run --config FILE`, or give its directory with --state-dir{}",
                self.state_dir.display(),
                hint_of_user()
            )
        })
    }

    /// Has the daemon do this. Its answer for the operator; `None` when there is no daemon.
    fn ask(&self, request: &Request) -> Result<Option<String>> {
        self.ask_within(request, api::ANSWERS_WITHIN)
    }

    /// Has the daemon do this within that time. Its answer for the operator; `None` when there is
    /// no daemon.
    fn ask_within(&self, request: &Request, within: Duration) -> Result<Option<String>> {
        match self.response(request, within)? {
            Some(Response::Done { message }) => Ok(Some(message)),
            Some(Response::Failed { message }) => bail!("the daemon refused: {message}"),
            Some(Response::Cluster { .. }) => bail!("the daemon answered something else"),
            None => Ok(None),
        }
    }

    fn response(&self, request: &Request, within: Duration) -> Result<Option<Response>> {
        let socket = &self.admin_socket;
        api::ask(socket, &self.state_dir, request, within, output::say)
    }

    /// Has the daemon do what `only` it does. Its answer for the operator.
    fn must_ask(&self, request: &Request, only: &str) -> Result<String> {
        self.ask(request)?.ok_or_else(|| {
            anyhow!(
                "no daemon answers at {}, and only it {only}: start it with `balancer run --config FILE`, or give its socket with --admin-socket",
                self.admin_socket.display()
            )
        })
    }

    /// What the daemon knows of its cluster.
    fn ask_for_cluster(&self) -> Result<ClusterStatus> {
        match self.response(&Request::Cluster, api::ANSWERS_WITHIN)? {
            Some(Response::Cluster { cluster }) => Ok(*cluster),
            Some(Response::Failed { message }) => bail!("the daemon refused: {message}"),
            Some(Response::Done { .. }) => bail!("the daemon answered something else"),
            None => bail!(
                "no daemon answers at {}: only a daemon knows of its cluster; see `balancer status` for what the kernel of this node counts",
                self.admin_socket.display()
            ),
        }
    }
}

/// Runs what asks an API server.
fn in_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start a runtime")?
        .block_on(work)
}

/// Reads a path as one from the root on: messages name it so, and the next verb may be run
/// elsewhere.
fn absolute() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(std::path::absolute::<PathBuf>)
}

/// What to try where another user would see more; empty for root.
fn hint_of_user() -> &'static str {
    if geteuid().is_root() {
        ""
    } else {
        " (you are not root: try again with sudo)"
    }
}
