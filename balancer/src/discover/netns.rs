//! The netns in which processes live.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use anyhow::{Context as _, Result, bail};
use caps::{CapSet, Capability};

use super::processes::{pids, sockets_of, threads};
use crate::sys::{file_id::FileId, netns, socket};

/// A netns in which a thread lives. It can't end while this is held.
#[derive(Debug)]
pub struct Netns {
    /// The kernel gives this to no other netns until it reboots.
    pub cookie: u64,
    /// The file that stands for it in `/proc/PID/ns/net` while it lives.
    pub id: FileId,
    /// One of the processes in it.
    pub pid: u32,
    /// The thread of that process by which it was found.
    pub tid: u32,
    file: OwnedFd,
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Netns> for OwnedFd {
    fn from(netns: Netns) -> Self {
        netns.file
    }
}

/// An open netns. It can't end while this is held, so it is not kept.
#[derive(Debug)]
pub struct OpenNetns {
    /// The number that the kernel gives to no other netns until it reboots.
    pub cookie: u64,
    /// The descriptor that keeps it alive.
    pub file: OwnedFd,
}

impl From<Netns> for OpenNetns {
    fn from(netns: Netns) -> Self {
        let Netns { cookie, file, .. } = netns;
        Self { cookie, file }
    }
}

/// A thread of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Thread {
    /// Number of the process.
    pub pid: u32,
    /// Number of the thread; 0: not known.
    pub tid: u32,
}

/// A netns that can't be entered.
#[derive(Debug)]
pub struct UnreachableNetns {
    /// The file that stands for it in `/proc/PID/ns/net`.
    pub id: FileId,
    /// One of the processes in it.
    pub pid: u32,
    /// What entering it failed with.
    pub error: io::Error,
}

/// All netns that a thread lives in, each once, in the order of their processes' numbers.
#[derive(Debug, Default)]
pub struct LiveNetns {
    /// Those that can be entered.
    pub reachable: Vec<Netns>,
    /// Those that can't.
    pub unreachable: Vec<UnreachableNetns>,
}

/// Looks for all netns that a thread lives in.
///
/// A netns that only a file, a mount or a socket keeps alive is not among them.
///
/// # Errors
/// Where `/proc` can't be read, or there is a netns to enter and `CAP_SYS_ADMIN` is missing,
/// without which none but the own can be entered.
pub fn live_netns() -> Result<LiveNetns> {
    live_netns_by(|file| netns::cookie_of(file))
}

fn live_netns_by(enter: impl Fn(&OwnedFd) -> io::Result<u64>) -> Result<LiveNetns> {
    let mut seen = HashSet::new();
    let mut found = LiveNetns::default();
    let mut pids = pids().context("cannot list the processes in /proc: is it mounted?")?;
    pids.sort_unstable();
    for pid in pids {
        for tid in threads(pid) {
            let path = thread(pid, tid);
            // A thread may end at any time, so whatever can't be read is passed over; another may
            // stand for the same netns.
            let Ok(id) = FileId::at(&path) else { continue };
            if seen.contains(&id) {
                continue;
            }
            let Some(file) = open(&path, id) else {
                continue;
            };
            seen.insert(id);
            match enter(&file) {
                Ok(cookie) => found.reachable.push(Netns {
                    cookie,
                    id,
                    pid,
                    tid,
                    file,
                }),
                Err(error) if is_privilege_missing(&error) => bail!(
                    "cannot enter the network namespace of process {pid} (needs CAP_SYS_ADMIN): \
                     {error}"
                ),
                Err(error) => found.unreachable.push(UnreachableNetns { id, pid, error }),
            }
        }
    }
    Ok(found)
}

/// Whether a netns could not be entered for want of the capability that each other one needs too
/// (`netns_install`, `net/core/net_namespace.c`).
fn is_privilege_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
        && !caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).unwrap_or(false)
}

/// The netns of a thread; of a process, where its thread is not known.
fn thread(pid: u32, tid: u32) -> PathBuf {
    match tid {
        0 => format!("/proc/{pid}/ns/net").into(),
        tid => format!("/proc/{pid}/task/{tid}/ns/net").into(),
    }
}

/// A netns that is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetnsHint {
    /// Cookie of the netns.
    pub cookie: u64,
    /// Threads that listened there.
    pub listened: Vec<Thread>,
}

/// Finds netns: first by the threads that listened there, then by the sockets of their processes,
/// which may have left it since, then among all that there are. A netns that is not found, or can't
/// be entered, is missing in the result.
///
/// # Errors
/// Where [`live_netns`] fails.
pub fn find_netns(wanted: &[NetnsHint]) -> Result<Vec<OpenNetns>> {
    let mut found = Vec::new();
    let mut lost = HashSet::new();
    for wanted in wanted {
        match wanted.by_thread().or_else(|| wanted.by_socket()) {
            Some(file) => found.push(OpenNetns {
                cookie: wanted.cookie,
                file,
            }),
            None => {
                lost.insert(wanted.cookie);
            }
        }
    }
    if !lost.is_empty() {
        let others = live_netns()?
            .reachable
            .into_iter()
            .filter(|netns| lost.contains(&netns.cookie))
            .map(OpenNetns::from);
        found.extend(others);
    }
    Ok(found)
}

impl NetnsHint {
    fn by_thread(&self) -> Option<OwnedFd> {
        let fits =
            |file: &OwnedFd| netns::cookie_of(file).is_ok_and(|cookie| cookie == self.cookie);
        let open = |pid, tid| netns::open(&thread(pid, tid)).ok().filter(fits);
        let mut tried = HashSet::new();
        self.listened
            .iter()
            .flat_map(|thread| [*thread, Thread { tid: 0, ..*thread }])
            .filter(|thread| tried.insert(*thread))
            .find_map(|thread| open(thread.pid, thread.tid))
    }

    fn by_socket(&self) -> Option<OwnedFd> {
        let mut tried = HashSet::new();
        self.listened
            .iter()
            .filter(|thread| tried.insert(thread.pid))
            .flat_map(|thread| sockets_of(thread.pid))
            .filter_map(|(_, owner)| owner.file().ok())
            .find(|file| socket::netns_cookie(file).is_ok_and(|cookie| cookie == self.cookie))
            .and_then(|file| socket::netns(&file).ok())
    }
}

/// Opens a process's netns, unless the process moved since it was looked at.
fn open(path: &std::path::Path, expected: FileId) -> Option<OwnedFd> {
    let open = || -> io::Result<Option<OwnedFd>> {
        let file = netns::open(path)?;
        Ok((FileId::of(&file)? == expected).then_some(file))
    };
    open().ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::process::CommandExt as _, process::Command};

    /// Runs `work` while two processes live in a netns; their numbers are its argument.
    fn with_two_inside<R>(netns: &OwnedFd, work: impl FnOnce(&[u32]) -> R) -> R {
        let mut children = netns::inside(netns, || {
            [(); 2].map(|()| {
                Command::new("sleep")
                    .arg("30")
                    .process_group(0)
                    .spawn()
                    .expect("spawn")
            })
        })
        .expect("inside");
        let result = work(&children.each_ref().map(std::process::Child::id));
        for child in &mut children {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
        result
    }

    #[test]
    fn a_netns_that_cannot_be_entered_is_told_once_beside_the_others() {
        let netns = netns::tests::fresh();
        let id = FileId::of(&netns).expect("id");
        let refuse = |file: &OwnedFd| {
            if FileId::of(file)? == id {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            netns::cookie_of(file)
        };
        with_two_inside(&netns, |pids| {
            let found = live_netns_by(refuse).expect("the others are found");
            let [refused] = &found.unreachable[..] else {
                panic!("once: {found:?}")
            };
            assert!(refused.id == id && pids.contains(&refused.pid), "{found:?}");
            assert_eq!(refused.error.raw_os_error(), Some(libc::EPERM));
            let own = netns::cookie().expect("cookie");
            assert!(found.reachable.iter().any(|netns| netns.cookie == own));
            assert!(found.reachable.iter().all(|netns| netns.id != id));
        });
    }

    #[test]
    fn without_the_capability_that_all_need_the_look_fails() {
        let netns = netns::tests::fresh();
        let error = with_two_inside(&netns, |_| {
            let without = || {
                let admin = Capability::CAP_SYS_ADMIN;
                caps::drop(None, CapSet::Effective, admin).expect("it can be given up");
                live_netns()
            };
            std::thread::spawn(without).join().expect("no panic")
        });
        let error = error.expect_err("none can be entered").to_string();
        assert!(error.contains("CAP_SYS_ADMIN"), "{error}");
    }

    #[test]
    fn our_own_and_a_childs_namespace_are_found_once() {
        let netns = netns::tests::fresh();
        let (found, pids) = with_two_inside(&netns, |pids| (live_netns(), pids.to_vec()));
        let found = found.expect("namespaces").reachable;
        let with = |cookie: u64| {
            found
                .iter()
                .filter(|netns| netns.cookie == cookie)
                .collect::<Vec<_>>()
        };
        let [other] = with(netns::cookie_of(&netns).expect("cookie"))[..] else {
            panic!("once: {found:?}")
        };
        assert!(pids.contains(&other.pid));
        assert_eq!(other.id, FileId::of(&netns).expect("id"));
        assert_eq!(
            netns::cookie_of(other).expect("it can be entered"),
            other.cookie
        );
        assert_eq!(with(netns::cookie().expect("cookie")).len(), 1);
    }

    #[test]
    fn a_namespace_is_found_by_what_listened_there() {
        let netns = netns::tests::fresh();
        let cookie = netns::cookie_of(&netns).expect("cookie");
        let own = std::process::id();
        let look = |listened: &[Thread]| {
            let wanted = NetnsHint {
                cookie,
                listened: listened.to_vec(),
            };
            let found = find_netns(&[wanted]).expect("find");
            found
                .iter()
                .map(|found| {
                    assert_eq!(netns::cookie_of(&found.file).expect("cookie"), found.cookie);
                    found.cookie
                })
                .collect::<Vec<_>>()
        };
        // Only our file keeps it alive: there is nothing to find it by.
        let process = Thread { pid: own, tid: 0 };
        assert!(look(&[process]).is_empty());
        let listener = netns::inside(&netns, || {
            let tid = nix::unistd::gettid().as_raw().cast_unsigned();
            let thread = Thread { pid: own, tid };
            assert_eq!(look(&[thread]), [cookie], "by its thread");
            assert_eq!(look(&[]), [cookie], "among all threads");
            std::net::TcpListener::bind("127.0.0.1:0").expect("bind")
        })
        .expect("inside");
        assert_eq!(look(&[process]), [cookie], "by a socket of its process");
        drop(listener);
    }
}
