//! The netns that are looked at: those that the configuration, or what is loaded, says are guarded.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use super::Check;
use crate::{
    config::{Config, NetnsScope},
    discover::{self, UnreachableNetns},
    sys::netns,
};

/// The guarded netns.
#[derive(Debug)]
pub(super) struct Guarded {
    pub(super) netns: Vec<GuardedNetns>,
    /// The finding about those that can't be reached; `None`: all can.
    pub(super) unreachable: Option<Check>,
}

impl Guarded {
    /// This one alone.
    pub(super) fn only(netns: GuardedNetns) -> Self {
        Self {
            netns: vec![netns],
            unreachable: None,
        }
    }
}

/// A netns, with a label for findings.
#[derive(Debug)]
pub(super) struct GuardedNetns {
    pub(super) label: String,
    pub(super) file: OwnedFd,
    /// It is guarded only while a backend listens there.
    pub(super) for_backends_alone: bool,
}

impl AsFd for GuardedNetns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

const NAME: &str = "network namespaces";
/// The label of the netns that we are in.
pub(super) const OWN: &str = "this network namespace";

/// What is guarded by a configuration, and a finding where that can't be reached. Without one: our
/// own netns.
pub(super) fn configured(config: Option<&Config>) -> Guarded {
    match config.map_or(&NetnsScope::Own, |config| &config.namespaces) {
        NetnsScope::Own => named(&["/proc/thread-self/ns/net".as_ref()], |_| OWN.to_owned()),
        NetnsScope::Paths(paths) => {
            let paths: Vec<&Path> = paths.iter().map(AsRef::as_ref).collect();
            named(&paths, |path| path.display().to_string())
        }
        NetnsScope::All | NetnsScope::Pods => {
            let (found, unreachable) = all();
            let netns = found.into_iter().map(|(_, netns)| netns).collect();
            Guarded { netns, unreachable }
        }
    }
}

/// The netns that we are in.
///
/// # Errors
/// When it can't be opened.
pub(super) fn own() -> io::Result<GuardedNetns> {
    Ok(GuardedNetns {
        label: OWN.to_owned(),
        file: netns::current()?,
        for_backends_alone: false,
    })
}

fn named(paths: &[&Path], label: impl Fn(&Path) -> String) -> Guarded {
    let mut found = Vec::new();
    let mut failed = Vec::new();
    let (mut permitted, mut only_absent) = (true, true);
    for path in paths {
        match reachable(path) {
            Ok(file) => found.push(GuardedNetns {
                label: label(path),
                file,
                for_backends_alone: false,
            }),
            Err(error) => {
                permitted &= error.kind() != io::ErrorKind::PermissionDenied;
                only_absent &= error.kind() == io::ErrorKind::NotFound;
                failed.push(format!("{}: {error}", path.display()));
            }
        }
    }
    let advice = if only_absent {
        "make it (`ip netns add NAME`): the daemon waits for it; or correct `namespaces:` in the \
         configuration (/run/netns/NAME or /proc/PID/ns/net)"
    } else if permitted {
        "correct `namespaces:` in the configuration (/run/netns/NAME or /proc/PID/ns/net)"
    } else {
        "run as root: entering a network namespace needs CAP_SYS_ADMIN"
    };
    let means = "what connects there is neither counted nor steered until it can be reached";
    let check = if only_absent {
        Check::warn
    } else {
        Check::fail
    };
    let unreachable =
        (!failed.is_empty()).then(|| check(NAME, super::listing(&failed), means, advice));
    Guarded {
        netns: found,
        unreachable,
    }
}

/// That a file is a netns is seen by entering it.
fn reachable(path: &Path) -> io::Result<OwnedFd> {
    let file = netns::open(path)?;
    netns::cookie_of(&file)?;
    Ok(file)
}

/// Every netns that a process lives in, with its cookie. But for our own, they may be guarded only
/// while a backend listens there.
pub(super) fn all() -> (Vec<(u64, GuardedNetns)>, Option<Check>) {
    match discover::live_netns() {
        Ok(found) => {
            let own = netns::cookie().ok();
            let label = |netns: discover::Netns| {
                let cookie = netns.cookie;
                let mut netns = GuardedNetns::from(netns);
                if Some(cookie) == own {
                    OWN.clone_into(&mut netns.label);
                    netns.for_backends_alone = false;
                }
                (cookie, netns)
            };
            let labelled = found.reachable.into_iter().map(label);
            (labelled.collect(), unreachable(&found.unreachable))
        }
        Err(error) => {
            let means = "the network namespaces can't be listed";
            let advice = "run as root, with the host's /proc (hostPID in Kubernetes)";
            let check = Check::fail(NAME, format!("{error:#}"), means, advice);
            (Vec::new(), Some(check))
        }
    }
}

fn unreachable(netns: &[UnreachableNetns]) -> Option<Check> {
    let failed: Vec<String> = netns
        .iter()
        .map(|netns| format!("the netns of process {}: {}", netns.pid, netns.error))
        .collect();
    let means = "what listens there is neither counted nor steered to";
    let advice = "see what forbids to enter it (a security module, a sandbox), or name the wanted \
                  network namespaces in `namespaces:`";
    (!failed.is_empty()).then(|| Check::warn(NAME, super::listing(&failed), means, advice))
}

impl From<discover::Netns> for GuardedNetns {
    fn from(netns: discover::Netns) -> Self {
        Self {
            label: format!("the netns of process {}", netns.pid),
            file: netns.into(),
            for_backends_alone: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::sys::file_id::FileId;

    fn config(namespaces: &str) -> Config {
        Config::parse(&format!("services:\n  - {{name: agents, port: 11800, policy: least-connections}}\nnamespaces: {namespaces}\n")).expect("a configuration")
    }

    #[test]
    fn our_own_is_the_default() {
        let here = FileId::of(netns::current().expect("open")).expect("its id");
        for config in [None, Some(config("own"))] {
            let Guarded { netns, unreachable } = configured(config.as_ref());
            assert_eq!((netns.len(), unreachable), (1, None));
            assert_eq!(FileId::of(&netns[0]).expect("its id"), here);
        }
    }

    #[test]
    fn all_has_our_own_among_them() {
        let here = FileId::of(netns::current().expect("open")).expect("its id");
        let Guarded { netns, unreachable } = configured(Some(&config("all")));
        assert_eq!(unreachable, None);
        let own = netns
            .iter()
            .find(|netns| FileId::of(netns).expect("its id") == here);
        let own = own.expect("it is among them");
        assert_eq!((own.label.as_str(), own.for_backends_alone), (OWN, false));
    }

    #[test]
    fn a_path_that_is_no_netns_is_named() {
        let Guarded { netns, unreachable } = configured(Some(&config(
            "[/proc/self/ns/net, /dev/null, /run/netns/no-such]",
        )));
        assert_eq!(
            netns
                .iter()
                .map(|netns| netns.label.as_str())
                .collect::<Vec<_>>(),
            ["/proc/self/ns/net"]
        );
        let check = unreachable.expect("two can't be reached");
        assert_eq!(check.status, Status::Fail);
        assert!(
            check.found.contains("/dev/null") && check.found.contains("/run/netns/no-such"),
            "{check:?}"
        );
        let absent = configured(Some(&config("[/run/netns/no-such]"))).unreachable;
        assert_eq!(
            absent.map(|check| check.status),
            Some(Status::Warn),
            "it may come"
        );
    }
}
