//! The network namespaces in which processes live.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use nix::sys::stat::stat;

use super::processes::pids;
use crate::sys::netns::{self, Identity};

/// A network namespace. It can't end while this is held.
#[derive(Debug)]
pub struct Namespace {
    /// The kernel gives this to no other namespace until it reboots.
    pub cookie: u64,
    /// Which one it is while it lives.
    pub identity: Identity,
    /// One of the processes in it.
    pub pid: u32,
    file: OwnedFd,
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Namespace> for OwnedFd {
    fn from(namespace: Namespace) -> Self {
        namespace.file
    }
}

/// All network namespaces that a process lives in, each once, in the order of their processes' numbers.
///
/// Namespaces that only a thread, a file or a mount keeps alive are not among them.
///
/// # Errors
/// Where `/proc` can't be read, or a namespace can't be entered (`CAP_SYS_ADMIN`).
pub fn namespaces() -> Result<Vec<Namespace>> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut pids = pids().context("cannot list the processes in /proc: is it mounted?")?;
    pids.sort_unstable();
    for pid in pids {
        // A process may end at any time, so whatever can't be read is passed over; another process may stand for the same namespace.
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let Ok(stat) = stat(&path) else { continue };
        let identity = Identity {
            device: stat.st_dev,
            inode: stat.st_ino,
        };
        if seen.contains(&identity) {
            continue;
        }
        let Some(file) = open(&path, identity) else {
            continue;
        };
        let cookie = netns::cookie_of(&file).with_context(|| {
            format!("cannot enter the network namespace of process {pid} (needs CAP_SYS_ADMIN)")
        })?;
        seen.insert(identity);
        found.push(Namespace {
            cookie,
            identity,
            pid,
            file,
        });
    }
    Ok(found)
}

/// Opens a process's namespace, unless the process moved since it was looked at.
fn open(path: &std::path::Path, expected: Identity) -> Option<OwnedFd> {
    let open = || -> io::Result<Option<OwnedFd>> {
        let file = netns::open(path)?;
        Ok((netns::identity(&file)? == expected).then_some(file))
    };
    open().ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::process::CommandExt as _, process::Command};

    #[test]
    fn our_own_and_a_childs_namespace_are_found_once() {
        let netns = netns::tests::fresh();
        // One process in this namespace and two in the other.
        let mut children = netns::inside(&netns, || {
            [(); 2].map(|()| {
                Command::new("sleep")
                    .arg("30")
                    .process_group(0)
                    .spawn()
                    .expect("spawn")
            })
        })
        .expect("inside");
        let found = namespaces();
        for child in &mut children {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
        let found = found.expect("namespaces");
        let with = |cookie: u64| {
            found
                .iter()
                .filter(|namespace| namespace.cookie == cookie)
                .collect::<Vec<_>>()
        };
        let [other] = with(netns::cookie_of(&netns).expect("cookie"))[..] else {
            panic!("once: {found:?}")
        };
        assert!(children.iter().any(|child| child.id() == other.pid));
        assert_eq!(other.identity, netns::identity(&netns).expect("identity"));
        assert_eq!(
            netns::cookie_of(other).expect("it can be entered"),
            other.cookie
        );
        assert_eq!(with(netns::cookie().expect("cookie")).len(), 1);
    }
}
