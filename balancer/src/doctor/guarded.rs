//! The network namespaces that are looked at: those that the configuration says are guarded.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use super::Check;
use crate::{
    config::{Config, NetnsScope},
    discover,
    sys::netns,
};

/// A network namespace with what to call it.
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
/// What our own namespace is called.
pub(super) const OWN: &str = "this network namespace";

/// The namespaces, and a finding where one can't be reached.
pub(super) fn namespaces(config: Option<&Config>) -> (Vec<GuardedNetns>, Option<Check>) {
    match config.map_or(&NetnsScope::Own, |config| &config.namespaces) {
        NetnsScope::Own => named(&["/proc/thread-self/ns/net".as_ref()], |_| OWN.to_owned()),
        NetnsScope::Paths(paths) => {
            let paths: Vec<&Path> = paths.iter().map(AsRef::as_ref).collect();
            named(&paths, |path| path.display().to_string())
        }
        NetnsScope::All | NetnsScope::Pods => {
            let (found, check) = all();
            (
                found.into_iter().map(|(_, namespace)| namespace).collect(),
                check,
            )
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
    let check = (!failed.is_empty()).then(|| unreachable(&failed, permitted));
    (found, check)
}

fn unreachable(failed: &[String], permitted: bool) -> Check {
    let advice = if permitted {
        "correct `namespaces:` in the configuration (/run/netns/NAME or /proc/PID/ns/net), or make the namespace first"
    } else {
        "run as root: entering a network namespace needs CAP_SYS_ADMIN"
    };
    Check::fail(
        NAME,
        super::listing(failed),
        "what connects there is neither counted nor steered until it can be reached",
        advice,
    )
}

/// That a file is a network namespace is seen by entering it.
fn reachable(path: &Path) -> io::Result<OwnedFd> {
    let file = netns::open(path)?;
    netns::cookie_of(&file)?;
    Ok(file)
}

/// Every namespace that a process lives in, with its cookie.
pub(super) fn all() -> (Vec<(u64, GuardedNetns)>, Option<Check>) {
    match discover::live_netns() {
        Ok(found) => (
            found
                .into_iter()
                .map(|namespace| (namespace.cookie, GuardedNetns::from(namespace)))
                .collect(),
            None,
        ),
        Err(error) => {
            let check = Check::fail(
                NAME,
                format!("{error:#}"),
                "the namespaces can't be listed",
                "run as root, with the host's /proc (hostPID in Kubernetes)",
            );
            (Vec::new(), Some(check))
        }
    }
}

impl From<discover::Netns> for GuardedNetns {
    fn from(namespace: discover::Netns) -> Self {
        Self {
            label: format!("the namespace of process {}", namespace.pid),
            file: namespace.into(),
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
        let here = FileId::of(netns::current().expect("open")).expect("identity");
        for config in [None, Some(config("own"))] {
            let (found, check) = namespaces(config.as_ref());
            assert_eq!((found.len(), check), (1, None));
            assert_eq!(FileId::of(&found[0]).expect("identity"), here);
        }
    }

    #[test]
    fn all_has_our_own_among_them() {
        let here = FileId::of(netns::current().expect("open")).expect("identity");
        let (found, check) = namespaces(Some(&config("all")));
        assert_eq!(check, None);
        assert!(
            found
                .iter()
                .any(|namespace| FileId::of(namespace).expect("identity") == here)
        );
    }

    #[test]
    fn a_path_that_is_no_namespace_is_named() {
        let (found, check) = namespaces(Some(&config(
            "[/proc/self/ns/net, /dev/null, /run/netns/no-such]",
        )));
        assert_eq!(
            found
                .iter()
                .map(|namespace| namespace.label.as_str())
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
