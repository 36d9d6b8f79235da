//! The data plane that is loaded already, if one is.

use std::{
    collections::{BTreeSet, HashSet},
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{
    Check,
    guarded::{self, Guarded, GuardedNetns},
    listening::CheckedService,
};
use crate::{
    dataplane::{
        self, DaemonNotes, DaemonSnapshot, DaemonState, FailedReload, Link, Paths, Reader,
        ServiceSnapshot, Snapshot,
    },
    discover::{cgroup2_mount, cgroups},
    health::in_words,
    sys::{
        bpf::{self, LinkTarget},
        file_id::FileId,
        netns,
    },
};

/// What is loaded.
pub(super) struct Loaded {
    pub(super) snapshot: Snapshot,
    pub(super) services: Vec<CheckedService>,
}

impl Loaded {
    fn read(reader: &Reader) -> Result<Self> {
        let snapshot = reader.snapshot()?;
        Ok(Self {
            services: services(reader, &snapshot)?,
            snapshot,
        })
    }
}

/// The services of the loaded data plane.
pub(super) fn services(reader: &Reader, snapshot: &Snapshot) -> Result<Vec<CheckedService>> {
    let listed = reader.listed()?;
    let none = BTreeSet::new();
    let service = |service: &ServiceSnapshot| {
        CheckedService::loaded(service, listed.get(&service.id).unwrap_or(&none))
    };
    Ok(snapshot.services.iter().map(service).collect())
}

/// What is loaded under a state directory, and what to say of it.
pub(super) fn data_plane(state_dir: &Path) -> (Option<Loaded>, Check) {
    const NAME: &str = "data plane";
    let loaded_there = || {
        let reader = dataplane::open(&Paths::new(state_dir))?;
        reader.map(|reader| Loaded::read(&reader)).transpose()
    };
    match loaded_there() {
        Ok(None) => (
            None,
            Check::ok(
                NAME,
                format!("nothing is loaded at {}", state_dir.display()),
                "`balancer run` loads it",
            ),
        ),
        Ok(Some(there)) => {
            let notes = DaemonNotes::read(&Paths::new(state_dir));
            let check = loaded(there.services.len(), &there.snapshot.daemon, &notes);
            (Some(there), check)
        }
        Err(error) => (
            None,
            Check::warn(
                NAME,
                format!("{error:#}"),
                "what is loaded can't be read, so its services were not looked at",
                "run as root; if another version of the balancer loaded it, use that one, or `balancer unload` first",
            ),
        ),
    }
}

fn loaded(services: usize, daemon: &DaemonSnapshot, notes: &DaemonNotes) -> Check {
    const NAME: &str = "data plane";
    let found = match services {
        1 => "loaded, with one service".to_owned(),
        services => format!("loaded, with {services} services"),
    };
    if let DaemonState::Dead(pid) = notes.state(daemon) {
        let refusing = if daemon.refuses {
            "it refuses over quota for a while yet, then nobody"
        } else {
            "nobody is refused any more"
        };
        return Check::warn(
            NAME,
            format!("{found}; its daemon, process {pid}, is gone"),
            format!(
                "connections are counted and steered as before, but {refusing} (fail open), and quotas stay as they are"
            ),
            "start `balancer run`, or take the data plane out with `balancer unload`",
        );
    }
    if daemon.refuses {
        return Check::ok(
            NAME,
            format!("{found}; its daemon lives"),
            "connections are counted, steered and, over quota, refused",
        );
    }
    let silence = daemon.heartbeat_age.map_or_else(
        || "no daemon has ever lived".to_owned(),
        |age| format!("its daemon has given no heartbeat for {} s", age.as_secs()),
    );
    Check::warn(
        NAME,
        format!("{found}; {silence}"),
        "connections are counted and steered as before, but nobody is refused any more (fail open), and quotas stay as they are",
        "`balancer ping` says whether it is dead or hangs, and what to do; or take the data plane out with `balancer unload`",
    )
}

/// Whether what the file said when it was last read again is in force.
pub(super) fn reload(state_dir: &Path) -> Check {
    reload_of(
        DaemonNotes::read(&Paths::new(state_dir))
            .failed_reload
            .as_ref(),
    )
}

fn reload_of(failed: Option<&FailedReload>) -> Check {
    const NAME: &str = "reload";
    failed.map_or_else(
        || {
            Check::ok(
                NAME,
                "none has failed",
                "what the daemon last read in its file is in force",
            )
        },
        |failed| {
            Check::warn(
                NAME,
                format!("failed {} s ago: {}", failed.age.as_secs(), failed.error),
                "what the file says is not in force, or in part, and a daemon that is started anew may not take it",
                "correct what the error names, then `balancer reload`",
            )
        },
    )
}

/// What the comparisons of the counts with the socket table have found; nothing where nothing is
/// loaded.
pub(super) fn counts(daemon: &DaemonSnapshot) -> Check {
    const NAME: &str = "counts";
    let totals = &daemon.audit_totals;
    if totals.repairs == 0 && totals.drift == 0 {
        return Check::ok(
            NAME,
            format!(
                "right in each of {} comparisons with the socket table",
                totals.checks
            ),
            "the counts are those of the socket table",
        );
    }
    Check::warn(
        NAME,
        format!(
            "put right {} times in {} comparisons with the socket table; {} connections off at the last one",
            totals.repairs, totals.checks, totals.drift
        ),
        "something keeps the kernel half from seeing connections come or go: they are miscounted until a comparison puts that right",
        "see the check `other sock_ops`: a program that sets the callback flags of sockets without keeping those that are set does it. \
         Where there is none, please report it with the daemon's log",
    )
}

/// Connections through virtual ports that nobody counts.
pub(super) fn older_connections(services: &[ServiceSnapshot]) -> Check {
    let unattributed = services.iter().filter(|service| service.unattributed > 0);
    let found: Vec<String> = unattributed
        .map(|service| format!("{}: {} connections", service.name, service.unattributed))
        .collect();
    Check::warn_of(
        "older connections",
        &found,
        (
            "none without a backend",
            "each connection through a virtual port is counted on its backend",
        ),
        "established connections through a virtual port are older than the data plane, and the processes that hold them leave open which \
         backend each is of: nobody counts them, so new clients may exceed the quota by as many",
        "wait until they end, or start the server again that the daemon's log names. Next time end the daemon with TERM, which leaves the \
         data plane in place",
    )
}

/// Whether the cgroup that the loaded data plane counts in still exists.
pub(super) fn counted_cgroup(state_dir: &Path) -> Option<Check> {
    cgroup_id(state_dir).map(cgroup_of)
}

/// The cgroup that the loaded data plane counts in; `None`: that is the root, or not known.
pub(super) fn cgroup(state_dir: &Path) -> Option<PathBuf> {
    let id = cgroup_id(state_dir)?;
    let root = cgroup2_mount().ok()?;
    let is_it = |path: &PathBuf| FileId::at(path).is_ok_and(|file| file.inode == id);
    let mut cgroups = cgroups(&root).filter_map(Result::ok);
    cgroups.find(is_it).filter(|path| *path != root)
}

/// The id that the link of the loaded data plane shows: 0 once the cgroup is gone.
fn cgroup_id(state_dir: &Path) -> Option<u64> {
    let links = Paths::links(&Paths::new(state_dir).current()).unwrap_or_default();
    let link = links.into_iter().find(|link| link.netns().is_none())?;
    let info = bpf::obj_get(&link.pin).and_then(bpf::link_info).ok()?;
    match info.target {
        LinkTarget::Cgroup { id, .. } => Some(id),
        _ => None,
    }
}

fn cgroup_of(id: u64) -> Check {
    const NAME: &str = "counted cgroup";
    if id != 0 {
        return Check::ok(
            NAME,
            format!("the data plane is attached to the one with id {id}"),
            "what listens and connects in it is counted",
        );
    }
    Check::fail(
        NAME,
        "the cgroup that the loaded data plane is attached to is gone",
        "nothing that listens or connects is counted any more; quotas are judged by the last counts",
        "make the cgroup again and start the servers in it: a daemon that lives attaches itself \
         there; or start the daemon with another --cgroup",
    )
}

/// The netns that the loaded data plane is attached to.
pub(super) fn guarded_netns(state_dir: &Path) -> Guarded {
    let cookies = attached(&Paths::new(state_dir).current());
    let (mut found, unreachable) = guarded::all();
    found.retain(|(cookie, _)| cookies.contains(cookie));
    let netns = found.into_iter().map(|(_, netns)| GuardedNetns {
        for_backends_alone: false,
        ..netns
    });
    Guarded {
        netns: netns.collect(),
        unreachable,
    }
}

/// The netns that we are in, where the loaded data plane is attached to it.
pub(super) fn own_netns(state_dir: &Path) -> Option<GuardedNetns> {
    let cookies = attached(&Paths::new(state_dir).current());
    let own = netns::cookie().ok()?;
    (cookies.contains(&own)).then(guarded::own)?.ok()
}

/// The cookies in the names of the links' pins.
fn attached(directory: &Path) -> HashSet<u64> {
    let links = Paths::links(directory).unwrap_or_default();
    links.iter().filter_map(Link::netns).collect()
}

/// Which backends don't serve, or don't listen, and since when.
pub(super) fn health(services: &[ServiceSnapshot]) -> Check {
    let unhealthy = |service: &ServiceSnapshot| {
        let backends = service.backends.iter().filter_map(|backend| {
            let health = backend.health?;
            let since = format_args!("{} s", health.age.as_secs());
            let words = in_words(health.state, since)?;
            Some(format!("{}: {} is {words}", service.name, backend.address))
        });
        let down = service.down.iter().map(|down| {
            let since = down
                .since
                .map(|since| format!(", since {} s", since.as_secs()));
            format!(
                "{}: {} is down{}",
                service.name,
                down.address,
                since.unwrap_or_default()
            )
        });
        backends.chain(down).collect::<Vec<_>>()
    };
    let found: Vec<String> = services.iter().flat_map(unhealthy).collect();
    Check::warn_of(
        "health",
        &found,
        (
            "no backend is seen not to serve",
            "each can be given connections; with `health: off` none is looked at",
        ),
        "new connections go to the others, unless more than half of a service's backends don't \
         serve; after 10 s a computed quota makes room for its clients there",
        "look at its process: stopped, out of threads, memory or files, waiting for another server; \
         start it where it is down",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Effect;
    use crate::doctor::Status;
    use balancer_common::Policy;
    use balancer_common::abi::AuditTotals;
    use std::{fs, time::Duration};

    fn ended(pid: u32) -> DaemonNotes {
        DaemonNotes {
            ended: Some(pid),
            ..DaemonNotes::default()
        }
    }

    fn daemon(refuses: bool, age: Option<u64>) -> DaemonSnapshot {
        DaemonSnapshot {
            refuses,
            heartbeat_age: age.map(Duration::from_secs),
            fail_open_after: Duration::from_secs(30),
            audit_totals: AuditTotals::default(),
        }
    }

    #[test]
    fn nothing_loaded_is_no_fault() {
        let (loaded, check) = data_plane(Path::new("/sys/fs/bpf/no-such-balancer"));
        assert!(loaded.is_none());
        assert_eq!(check.status, Status::Ok);
    }

    #[test]
    fn a_data_plane_without_its_daemon_is_told() {
        let none = DaemonNotes::default();
        assert_eq!(loaded(2, &daemon(true, Some(0)), &none).status, Status::Ok);
        let check = loaded(2, &daemon(false, Some(90)), &none);
        assert_eq!(check.status, Status::Warn);
        assert_eq!(
            check.found,
            "loaded, with 2 services; its daemon has given no heartbeat for 90 s"
        );
        assert!(check.advice.expect("advice").contains("`balancer ping`"));
        assert_eq!(
            loaded(1, &daemon(false, None), &none).found,
            "loaded, with one service; no daemon has ever lived"
        );
    }

    #[test]
    fn a_daemon_whose_process_is_gone_is_told_before_the_kernel_misses_it() {
        let other_numbers = loaded(1, &daemon(true, Some(0)), &ended(77));
        assert_eq!(other_numbers.status, Status::Ok, "{other_numbers:?}");
        for (refuses, refused) in [(true, "for a while yet"), (false, "nobody is refused")] {
            let check = loaded(1, &daemon(refuses, Some(3)), &ended(77));
            assert_eq!(
                (check.status, &*check.found),
                (
                    Status::Warn,
                    "loaded, with one service; its daemon, process 77, is gone"
                )
            );
            assert!(check.means.contains(refused), "{check:?}");
        }
    }

    #[test]
    fn a_reload_that_failed_is_told_with_its_error() {
        assert_eq!(reload_of(None).status, Status::Ok);
        let check = reload_of(Some(&FailedReload {
            age: Duration::from_secs(75),
            error: "the old one stays in force: a.yaml:3:5: no".to_owned(),
        }));
        assert_eq!(
            (check.status, &*check.found),
            (
                Status::Warn,
                "failed 75 s ago: the old one stays in force: a.yaml:3:5: no"
            )
        );
        assert!(check.advice.expect("advice").contains("`balancer reload`"));
    }

    #[test]
    fn connections_that_nobody_counts_are_told_by_service() {
        let service = |name: &str, unattributed| ServiceSnapshot {
            id: 0,
            name: name.to_owned(),
            port: 11800,
            address: None,
            policy: Policy::LeastConnections,
            virtual_port: true,
            effect: Effect::On,
            rule: String::new(),
            sentence: String::new(),
            keepalive: None,
            quota_override: None,
            unattributed,
            backends: Vec::new(),
            down: Vec::new(),
            verdicts: Vec::new(),
            warnings: Vec::new(),
        };
        let mut services = [service("agents", 0), service("als", 0)];
        assert_eq!(older_connections(&services).status, Status::Ok);
        services[1].unattributed = 40;
        let check = older_connections(&services);
        assert_eq!(
            (check.status, &*check.found),
            (Status::Warn, "als: 40 connections")
        );
    }

    #[test]
    fn a_cgroup_that_is_gone_fails_with_advice() {
        assert_eq!(cgroup_of(77).status, Status::Ok);
        let gone = cgroup_of(0);
        assert_eq!(gone.status, Status::Fail);
        assert!(gone.advice.expect("advice").contains("--cgroup"));
    }

    #[test]
    fn the_pins_tell_the_netns() {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["link_steer_7", "link_steer_9", "link_account_1", "COUNTS"] {
            fs::write(directory.path().join(name), "").expect("written");
        }
        assert_eq!(attached(directory.path()), HashSet::from([7, 9]));
    }
}
