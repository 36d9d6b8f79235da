//! What this machine lacks for the balancer, and what would go wrong: found, what it means, what to
//! do.
//!
//! Nothing is changed: programs and maps that are loaded to see whether the kernel takes them are
//! attached to nothing, and gone at once.

mod attached;
mod cluster;
mod features;
mod fleet;
mod guarded;
mod listening;
mod loaded;
mod machine;
mod mistakes;
mod placing;
mod services;
mod unplaced;

use std::{
    fmt::Display,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use balancer_common::BackendState;
use serde::Serialize;

pub use self::fleet::of_cluster;
use self::guarded::Guarded;
use self::listening::CheckedService;
pub use self::mistakes::{Kind, Mistake};
use self::services::NoServices;
use crate::config::{Config, NetnsScope};
use crate::dataplane::{Reader, ServiceSnapshot, Snapshot};
use crate::kubernetes::ClusterStatus;

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the data plane is, or would be, pinned.
    pub state_dir: PathBuf,
    /// The cgroup whose sockets are counted; `None`: the root of the hierarchy.
    pub cgroup: Option<PathBuf>,
    /// The services to check; `None`: those of the data plane that is loaded.
    pub config: Option<Config>,
    /// What the daemon of this node says of what it can't do here; `None`: there is no daemon, or
    /// nothing is wrong.
    pub unfit: Option<String>,
    /// The cluster as the daemon of this node knows it; `None`: there is none, or no daemon tells.
    pub cluster: Option<ClusterStatus>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// The balancer runs, but something won't go as one would think.
    Warn,
    /// The balancer can't do its work.
    Fail,
}

/// One thing that was looked at. Its JSON is what `doctor -o json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at, in one or two words that are the same on every machine.
    pub name: &'static str,
    /// How bad it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What that means for the balancer.
    pub means: String,
    /// What to do about it; `None` where all is well.
    pub advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>, means: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            found: found.into(),
            means: means.into(),
            advice: None,
        }
    }

    fn warn(
        name: &'static str,
        found: impl Into<String>,
        means: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            advice: Some(advice.into()),
            status: Status::Warn,
            ..Self::ok(name, found, means)
        }
    }

    fn fail(
        name: &'static str,
        found: impl Into<String>,
        means: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, found, means, advice)
        }
    }

    /// A warning that names what was found. Where nothing was, all is well: what to say then, and
    /// what it means.
    fn warn_of(
        name: &'static str,
        found: &[String],
        well: (&str, &str),
        means: impl Into<String>,
        advice: &str,
    ) -> Self {
        if found.is_empty() {
            Self::ok(name, well.0, well.1)
        } else {
            Self::warn(name, listing(found), means, advice)
        }
    }
}

/// All findings, in the order in which they are best read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The findings, good and bad.
    pub checks: Vec<Check>,
}

impl Report {
    /// The worst finding.
    pub fn worst(&self) -> Status {
        let statuses = self.checks.iter().map(|check| check.status);
        statuses.max().unwrap_or(Status::Ok)
    }
}

/// What to say of the running kernel where it is older than any on which the balancer is tried.
pub fn kernel_too_old() -> Option<String> {
    features::too_old(&features::release())
}

/// The mistakes in a file that shows on this machine; none for a cluster, whose file names no
/// addresses.
///
/// # Errors
/// When listening sockets or their owners can't be listed.
pub fn mistakes(config: &Config) -> io::Result<Vec<Mistake>> {
    let services = of_file(config);
    if services.is_empty() {
        return Ok(Vec::new());
    }
    mistakes::with_owners(&services, &guarded::configured(Some(config)))
}

/// Adds to each service which [`mistakes`] are in force in the netns that we are in, where it is
/// guarded, without the owners of listeners; and on which of its backends nobody listens.
///
/// # Errors
/// When listening sockets or maps can't be read.
pub fn add_warnings(
    snapshot: &mut Snapshot,
    reader: &Reader,
    state_dir: &Path,
) -> anyhow::Result<()> {
    let mistakes = mistakes_here(snapshot, reader, state_dir)?;
    for service in &mut snapshot.services {
        let of_service = |mistake: &&Mistake| mistake.service == service.name;
        let mistakes: Vec<_> = mistakes.iter().filter(of_service).collect();
        let said = |address: &SocketAddr| {
            let mut mistakes = mistakes.iter();
            mistakes.any(|mistake| mistake.found == address.to_string())
        };
        let down = service.down.iter().map(|down| down.address);
        let down: Vec<_> = down.filter(|address| !said(address)).collect();
        let warnings = mistakes.iter().map(ToString::to_string);
        service.warnings.extend(warnings);
        service.warnings.extend(down_beside_others(service, &down));
    }
    Ok(())
}

/// The mistakes in force in the netns that we are in; none where it is not guarded.
fn mistakes_here(
    snapshot: &Snapshot,
    reader: &Reader,
    state_dir: &Path,
) -> anyhow::Result<Vec<Mistake>> {
    let mut services = snapshot.services.iter();
    let is_any_virtual = services.any(|service| service.virtual_port);
    let own = loaded::own_netns(state_dir).filter(|_| is_any_virtual);
    let Some(own) = own else {
        return Ok(Vec::new());
    };
    let (services, guarded) = (loaded::services(reader, snapshot)?, Guarded::only(own));
    let listeners = listening::listeners(&services, &guarded.netns)?;
    Ok(mistakes::of(&services, &guarded, &listeners))
}

/// What to say of backends of a virtual port that are down, where others are not: where all are,
/// the service has no backend.
fn down_beside_others(service: &ServiceSnapshot, down: &[SocketAddr]) -> Option<String> {
    let mut backends = service.backends.iter();
    let is_alone = backends.all(|backend| backend.state == BackendState::Closed);
    if is_alone || down.is_empty() || !service.virtual_port {
        return None;
    }
    Some(format!(
        "nobody listens on {}: the other backends take the connections. What to do: start the \
         server, or correct the address in the file",
        listing(down)
    ))
}

fn of_file(config: &Config) -> Vec<CheckedService> {
    config.services.iter().map(CheckedService::from).collect()
}

/// Looks at everything. What can't be looked at is a finding, too.
pub fn run(options: &Options) -> Report {
    let config = options.config.as_ref();
    let mut checks = features::checks();
    checks.push(features::programs(&options.state_dir));
    let own_alone = config.is_some_and(|config| config.namespaces == NetnsScope::Own);
    checks.extend(machine::checks(&options.state_dir, own_alone));
    checks.extend(options.unfit.as_ref().map(|said| machine::unfit(said)));
    let (loaded, check) = loaded::data_plane(&options.state_dir);
    checks.push(check);
    if let Some(loaded) = &loaded {
        checks.push(loaded::reload(&options.state_dir));
        checks.push(loaded::counts(&loaded.snapshot.daemon));
        checks.push(loaded::older_connections(&loaded.snapshot.services));
        checks.push(loaded::health(&loaded.snapshot.services));
        checks.extend(placing::checks(
            &options.state_dir,
            &loaded.snapshot.placing,
        ));
        checks.extend(loaded::counted_cgroup(&options.state_dir));
    }
    if let Some(kubernetes) = config.and_then(|config| config.kubernetes.as_ref()) {
        checks.extend(cluster::checks(kubernetes));
    }
    checks.extend(options.cluster.as_ref().map(cluster::problems));
    checks.extend(options.cluster.iter().flat_map(unplaced::checks));
    checks.extend((loaded.as_ref()).and_then(|loaded| cluster::translated(&loaded.snapshot)));

    // In a cluster the file names no addresses: the loaded data plane knows them.
    let file = config.filter(|config| config.kubernetes.is_none());
    let guarded = match (file, &loaded) {
        (None, Some(_)) => loaded::guarded_netns(&options.state_dir),
        _ => guarded::configured(config),
    };
    checks.extend(guarded.unreachable.clone());
    checks.extend(machine::settings(&guarded.netns));
    let options = &Options {
        // Where nobody has named one, that of the data plane, which is there already.
        cgroup: (options.cgroup.clone()).or_else(|| loaded::cgroup(&options.state_dir)),
        ..options.clone()
    };
    checks.extend(attached::checks(options, &guarded.netns));
    let connects = match (file, &loaded) {
        (Some(file), _) => !file.connects.is_empty(),
        (None, Some(loaded)) => !loaded.snapshot.placing.is_empty(),
        (None, None) => false,
    };
    let services = match (file, loaded) {
        (Some(file), _) => of_file(file),
        (None, Some(loaded)) => loaded.services,
        (None, None) => Vec::new(),
    };
    if services.is_empty() {
        checks.push(services::none(match config {
            _ if connects => NoServices::ConnectsAlone,
            Some(_) => NoServices::InCluster,
            None => NoServices::NothingNamed,
        }));
    } else {
        let cgroup = attached::cgroup(options.cgroup.as_deref()).ok();
        checks.extend(services::checks(&services, &guarded, cgroup.as_deref()));
    }
    Report { checks }
}

/// The first few of many things in one line.
fn listing<T: Display>(items: &[T]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<_> = items.iter().take(SHOWN).map(ToString::to_string).collect();
    let shown = shown.join(", ");
    match items.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_run_the_balancer() {
        let options = Options {
            state_dir: "/sys/fs/bpf/no-such-balancer".into(),
            cgroup: None,
            config: None,
            cluster: None,
            unfit: None,
        };
        let report = run(&options);
        let failed: Vec<_> = report
            .checks
            .iter()
            .filter(|check| check.status == Status::Fail)
            .collect();
        assert!(failed.is_empty(), "{failed:#?}");
        let mut names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
        names.sort_unstable();
        let distinct = names.len();
        names.dedup();
        assert_eq!(names.len(), distinct, "every name stands for one finding");
        for check in &report.checks {
            assert!(
                !check.found.is_empty() && !check.means.is_empty(),
                "{check:?}"
            );
            assert_eq!(
                check.advice.is_none(),
                check.status == Status::Ok,
                "{check:?}"
            );
        }
    }

    #[test]
    fn the_worst_counts() {
        let report = |checks: &[Check]| Report {
            checks: checks.to_vec(),
        };
        let (good, bad) = (Check::ok("a", "b", "c"), Check::fail("a", "b", "c", "d"));
        assert_eq!(report(&[]).worst(), Status::Ok);
        assert_eq!(
            report(&[good.clone(), bad.clone(), good.clone()]).worst(),
            Status::Fail
        );
    }

    #[test]
    fn a_long_list_is_cut() {
        let items: Vec<String> = (0..10).map(|number| number.to_string()).collect();
        assert_eq!(listing(&items), "0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
        assert_eq!(listing(&items[..2]), "0, 1");
    }
}
