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

/// A netns, with a label for findings.
#[derive(Debug)]
pub(super) struct GuardedNetns {
    pub(super) label: String,
    pub(super) file: OwnedFd,
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
pub(super) fn configured(config: Option<&Config>) -> (Vec<GuardedNetns>, Option<Check>) {
    match config.map_or(&NetnsScope::Own, |config| &config.namespaces) {
        NetnsScope::Own => named(&["/proc/thread-self/ns/net".as_ref()], |_| OWN.to_owned()),
        NetnsScope::Paths(paths) => {
            let paths: Vec<&Path> = paths.iter().map(AsRef::as_ref).collect();
            named(&paths, |path| path.display().to_string())
        }
        NetnsScope::All | NetnsScope::Pods => {
            let (found, check) = all();
            (found.into_iter().map(|(_, netns)| netns).collect(), check)
        }
    }
}

fn named(paths: &[&Path], label: impl Fn(&Path) -> String) -> (Vec<GuardedNetns>, Option<Check>) {
    let mut found = Vec::new();
    let mut failed = Vec::new();
    let mut permitted = true;
    for path in paths {
        match reachable(path) {
            Ok(file) => found.push(GuardedNetns {
                label: label(path),
                file,
            }),
            Err(error) => {
                permitted &= error.kind() != io::ErrorKind::PermissionDenied;
                failed.push(format!("{}: {error}", path.display()));
            }
        }
    }
    let advice = if permitted {
        "correct `namespaces:` in the configuration (/run/netns/NAME or /proc/PID/ns/net), or make \
         the network namespace first"
    } else {
        "run as root: entering a network namespace needs CAP_SYS_ADMIN"
    };
    let means = "what connects there is neither counted nor steered until it can be reached";
    let check =
        (!failed.is_empty()).then(|| Check::fail(NAME, super::listing(&failed), means, advice));
    (found, check)
}

/// That a file is a netns is seen by entering it.
fn reachable(path: &Path) -> io::Result<OwnedFd> {
    let file = netns::open(path)?;
    netns::cookie_of(&file)?;
    Ok(file)
}

/// Every netns that a process lives in, with its cookie.
pub(super) fn all() -> (Vec<(u64, GuardedNetns)>, Option<Check>) {
    match discover::live_netns() {
        Ok(found) => {
            let reachable = found.reachable.into_iter();
            let labelled = reachable.map(|netns| (netns.cookie, netns.into()));
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
            let (found, check) = configured(config.as_ref());
            assert_eq!((found.len(), check), (1, None));
            assert_eq!(FileId::of(&found[0]).expect("its id"), here);
        }
    }

    #[test]
    fn all_has_our_own_among_them() {
        let here = FileId::of(netns::current().expect("open")).expect("its id");
        let (found, check) = configured(Some(&config("all")));
        assert_eq!(check, None);
        assert!(
            found
                .iter()
                .any(|netns| FileId::of(netns).expect("its id") == here)
        );
    }

    #[test]
    fn a_path_that_is_no_netns_is_named() {
        let (found, check) = configured(Some(&config(
            "[/proc/self/ns/net, /dev/null, /run/netns/no-such]",
        )));
        assert_eq!(
            found
                .iter()
                .map(|netns| netns.label.as_str())
                .collect::<Vec<_>>(),
            ["/proc/self/ns/net"]
        );
        let check = check.expect("two can't be reached");
        assert_eq!(check.status, Status::Fail);
        assert!(
            check.found.contains("/dev/null") && check.found.contains("/run/netns/no-such"),
            "{check:?}"
        );
    }
}
