//! Processes and the sockets that they hold, through `/proc`.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs, io,
    os::fd::{OwnedFd, RawFd},
    path::Path,
};

use crate::sys::pidfd::Process;

/// A process's descriptor of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    /// The process.
    pub pid: u32,
    /// Its file descriptor.
    pub fd: RawFd,
}

impl Owner {
    /// Copies the descriptor into this process. The owner may meanwhile have closed it and opened something else under the same
    /// number: compare [`crate::sys::socket::cookie`].
    ///
    /// # Errors
    /// Those of [`Process::open`] and [`Process::file`].
    pub fn file(self) -> io::Result<OwnedFd> {
        Process::open(self.pid)?.file(self.fd)
    }

    /// The owner's name (`/proc/PID/comm`), or its number where it has ended.
    pub fn name(self) -> String {
        let comm = fs::read_to_string(format!("/proc/{}/comm", self.pid)).unwrap_or_default();
        match comm.trim_end() {
            "" => format!("process {}", self.pid),
            name => format!("{name} (process {})", self.pid),
        }
    }
}

/// Finds who holds sockets, by the inodes that the socket table names. A socket of which no process has a descriptor is missing in
/// the result, and so are those of processes that we may not look into.
///
/// # Errors
/// Where `/proc` can't be read.
pub fn owners(inodes: impl IntoIterator<Item = u32>) -> io::Result<HashMap<u32, Vec<Owner>>> {
    let inodes: HashSet<u32> = inodes.into_iter().collect();
    let mut found: HashMap<u32, Vec<Owner>> = HashMap::new();
    if inodes.is_empty() {
        return Ok(found);
    }
    for pid in pids()? {
        // A process may end at any time, so whatever can't be read is passed over.
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            let Some(inode) = socket_inode(&descriptor.path()) else {
                continue;
            };
            let Some(fd) = number(&descriptor.file_name()) else {
                continue;
            };
            if inodes.contains(&inode) {
                found.entry(inode).or_default().push(Owner { pid, fd });
            }
        }
    }
    Ok(found)
}

/// The sockets that a process holds; none where it has ended or may not be looked into.
pub(super) fn sockets_of(pid: u32) -> Vec<Owner> {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    descriptors
        .flatten()
        .filter(|descriptor| socket_inode(&descriptor.path()).is_some())
        .filter_map(|descriptor| number(&descriptor.file_name()).map(|fd| Owner { pid, fd }))
        .collect()
}

/// All processes that there are now.
///
/// # Errors
/// Where `/proc` can't be read.
pub(super) fn pids() -> io::Result<Vec<u32>> {
    Ok(fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| number(&entry.file_name()))
        .collect())
}

pub(super) fn number<N: std::str::FromStr>(name: &OsStr) -> Option<N> {
    name.to_str()?.parse().ok()
}

/// The inode out of `socket:[4242]`.
fn socket_inode(descriptor: &Path) -> Option<u32> {
    let target = fs::read_link(descriptor).ok()?;
    target
        .to_str()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::TcpListener, os::fd::AsRawFd as _};

    fn inode(listener: &TcpListener) -> u32 {
        u32::try_from(nix::sys::stat::fstat(listener).expect("stat").st_ino).expect("small")
    }

    #[test]
    fn every_descriptor_of_a_socket_is_found_and_can_be_copied() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let second = listener.try_clone().expect("clone");
        let mut found = owners([inode(&listener)]).expect("owners");
        let mut owners = found.remove(&inode(&listener)).expect("we have it");
        let pid = std::process::id();
        // A child that another test starts has all our descriptors until it executes its program.
        owners.retain(|owner| owner.pid == pid);
        owners.sort();
        let mut expected = [&listener, &second].map(|socket| Owner {
            pid,
            fd: socket.as_raw_fd(),
        });
        expected.sort();
        assert_eq!(owners, expected);
        assert!(found.is_empty());
        let copy = TcpListener::from(owners[0].file().expect("copied"));
        assert_eq!(inode(&copy), inode(&listener));
        assert!(
            owners[0].name().ends_with(&format!("(process {pid})")),
            "{}",
            owners[0].name()
        );
    }

    #[test]
    fn nobody_holds_what_is_not_there() {
        assert!(owners([0]).expect("owners").is_empty());
        assert!(owners([]).expect("owners").is_empty());
        assert_eq!(
            Owner {
                pid: u32::MAX,
                fd: 0
            }
            .name(),
            format!("process {}", u32::MAX)
        );
    }
}
