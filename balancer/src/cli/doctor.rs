//! `balancer doctor`

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::{
    Place, in_runtime,
    output::{Output, wrapped},
};
use crate::{
    api::Request,
    config::Config,
    daemon::UNFIT,
    doctor::{self, Check, Report, Status},
    kubernetes,
};

/// Say what this machine lacks, and what would go wrong (changes nothing)
///
/// Tries what the balancer needs instead of comparing version numbers, and looks for what would get
/// in its way. With --config it also looks at the listeners of the file's services. Exit code 1 if
/// the balancer can't work here.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Example:
  balancer doctor --config /etc/balancer.yaml
  balancer doctor --cluster                    the nodes of a cluster, from any machine")]
pub(super) struct Doctor {
    /// A configuration file whose services to look at
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Look at the balancer of a whole Kubernetes cluster instead of this machine: from any machine
    /// with a kubeconfig (KUBECONFIG or ~/.kube/config)
    #[arg(long, conflicts_with_all = ["config", "cgroup"])]
    cluster: bool,
    /// The namespace of that balancer [default: the only one that there is]
    #[arg(long, value_name = "NAME", requires = "cluster")]
    namespace: Option<String>,
    /// The cgroup that `run` is to count in [default: the root of the cgroup2 mount]
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

impl Doctor {
    pub(super) fn perform(&self, place: &Place) -> Result<ExitCode> {
        if self.cluster {
            return self.show(&of_cluster(self.namespace.as_deref())?);
        }
        let config = self.config.as_deref().map(Config::load).transpose()?;
        let is_in_cluster = |config: &Config| config.kubernetes.is_some();
        let report = doctor::run(&doctor::Options {
            state_dir: place.state_dir.clone(),
            cgroup: self.cgroup.clone(),
            // A daemon that does not answer is found by its heartbeat.
            cluster: config
                .as_ref()
                .filter(|config| is_in_cluster(config))
                .and_then(|_| place.ask_for_cluster().ok()),
            unfit: (place.ask(&Request::Ping).ok().flatten())
                .filter(|message| message.contains(UNFIT)),
            config,
        });
        self.show(&report)
    }

    fn show(&self, report: &Report) -> Result<ExitCode> {
        self.output.show(&Json::new(report), || text(report))?;
        Ok(if report.worst() == Status::Fail {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

fn of_cluster(namespace: Option<&str>) -> Result<Report> {
    in_runtime(async {
        let connection = kubernetes::connection_of_user()?;
        let version = kubernetes::reachable(&connection).await?;
        let survey = kubernetes::survey(&connection, namespace).await?;
        Ok(doctor::of_cluster(&survey, &connection.server, &version))
    })
}

#[derive(Serialize)]
pub(super) struct Json<'a> {
    schema: u32,
    checks: &'a [Check],
}

impl<'a> Json<'a> {
    pub(super) fn new(report: &'a Report) -> Self {
        Self {
            schema: 1,
            checks: &report.checks,
        }
    }
}

/// The names of the checks with that status.
fn names(report: &Report, status: Status) -> Vec<&'static str> {
    let those = report.checks.iter().filter(|check| check.status == status);
    those.map(|check| check.name).collect()
}

pub(super) fn text(report: &Report) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let mark = match check.status {
            Status::Ok => "ok  ",
            Status::Warn => "WARN",
            Status::Fail => "FAIL",
        };
        text += &found(&format!("{mark}  {}: ", check.name), &check.found);
        text += &wrapped("      ", &check.means);
        if let Some(advice) = &check.advice {
            text += &wrapped("      -> ", advice);
        }
    }
    text + "\n" + &summary(report)
}

/// What was found; a log that follows it in lines of its own, as the verifier's does, stays in
/// them.
fn found(first: &str, text: &str) -> String {
    let (sentence, log) = text.split_once('\n').unwrap_or((text, ""));
    let log = log
        .lines()
        .map(|line| format!("{}\n", format!("      {line}").trim_end()));
    std::iter::once(wrapped(first, sentence))
        .chain(log)
        .collect()
}

/// The sentence at the end, which names what is to be looked at.
fn summary(report: &Report) -> String {
    let all = report.checks.len();
    let (fail, warn) = (names(report, Status::Fail), names(report, Status::Warn));
    let sentence = match (fail.len(), warn.len()) {
        (0, 0) => format!("All {all} checks are ok."),
        (0, warnings) => {
            let which = named("warn", &warn);
            format!("The balancer works here; {warnings} of {all} checks {which}.")
        }
        (failures, warnings) => {
            let which = named("fail", &fail);
            let also = match warnings {
                0 => String::new(),
                _ => format!("; {warnings} {}", named("warn", &warn)),
            };
            format!(
                "The balancer can't work here as it should: {failures} of {all} checks {which}{also}."
            )
        }
    };
    wrapped("", &sentence)
}

/// `warns: tcp_syncookies`, or `warn: backends, tcp_syncookies`.
fn named(verb: &str, checks: &[&str]) -> String {
    let ending = if checks.len() == 1 { "s" } else { "" };
    format!("{verb}{ending}: {}", checks.join(", "))
}
