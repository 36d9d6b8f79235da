//! Processes and the sockets that they hold, through `/proc`.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, DirEntry},
    io, iter,
    os::fd::{OwnedFd, RawFd},
    path::Path,
    str::FromStr,
};

use crate::sanitize;
use crate::sys::{limits::seen, pidfd::Process};

/// A process's descriptor of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketOwner {
    /// Number of the process that has it.
    pub pid: u32,
    /// The number of the descriptor in that process.
    pub fd: RawFd,
}

impl SocketOwner {
    /// Copies the descriptor into this process. The owner may meanwhile have closed it and opened
    /// something else under the same number: compare [`crate::sys::socket::cookie`].
    ///
    /// # Errors
    /// Where [`Process::open`] or [`Process::file`] fails.
    pub fn file(self) -> io::Result<OwnedFd> {
        Process::open(self.pid)?.file(self.fd)
    }

    /// What [`process_name`] calls the owner.
    pub fn name(self) -> String {
        process_name(self.pid)
    }
}

/// The name of a process (`/proc/PID/comm`) and its number, which alone is left once it has ended.
pub fn process_name(pid: u32) -> String {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    // A process chooses its name, with ends of lines in it if it likes.
    match sanitize::for_message(comm.trim_end(), 64).as_str() {
        "" => format!("process {pid}"),
        name => format!("{name} (process {pid})"),
    }
}

/// The descriptors of sockets, by the inodes that the socket table names.
pub type Owners = HashMap<u32, Vec<SocketOwner>>;

/// Finds who holds sockets, by the inodes that the socket table names. A socket of which no process
/// has a descriptor is missing in the result, and so are those of processes that we may not look
/// into.
///
/// # Errors
/// Where `/proc` can't be read, or descriptors or memory are short.
pub fn owners(inodes: impl IntoIterator<Item = u32>) -> io::Result<Owners> {
    let inodes: HashSet<u32> = inodes.into_iter().collect();
    let mut found = Owners::new();
    if inodes.is_empty() {
        return Ok(found);
    }
    for socket in pids()?.into_iter().flat_map(sockets_of) {
        if let Some((inode, owner)) = socket?
            && inodes.contains(&inode)
        {
            found.entry(inode).or_default().push(owner);
        }
    }
    Ok(found)
}

/// Those of these sockets that one process holds, by the inodes that the socket table names.
/// Nothing where it has ended or may not be looked into.
///
/// # Errors
/// Where descriptors or memory are short.
pub fn owned_by(
    pid: u32,
    is_wanted: impl Fn(u32) -> bool,
) -> io::Result<HashMap<u32, SocketOwner>> {
    let mut found = HashMap::new();
    for socket in sockets_of(pid) {
        if let Some((inode, owner)) = socket?
            && is_wanted(inode)
        {
            found.insert(inode, owner);
        }
    }
    Ok(found)
}

/// The sockets that a process holds, with their inodes, and `None` for each other descriptor, so
/// that whoever goes through them can look at the clock. Nothing where it has ended or may not be
/// looked into; an error where descriptors or memory are short.
pub(super) fn sockets_of(pid: u32) -> impl Iterator<Item = io::Result<Option<(u32, SocketOwner)>>> {
    let socket = move |descriptor: DirEntry| {
        let Some(inode) = socket_inode(&descriptor.path())? else {
            return Ok(None);
        };
        Ok(number(&descriptor).map(|fd| (inode, SocketOwner { pid, fd })))
    };
    entries(format!("/proc/{pid}/fd")).map(move |descriptor| descriptor.and_then(socket))
}

/// The entries of a directory that may be gone; an error only where descriptors or memory are
/// short.
fn entries(directory: String) -> impl Iterator<Item = io::Result<DirEntry>> {
    let (listed, failed) = match seen(fs::read_dir(directory)) {
        Ok(listed) => (listed, None),
        Err(error) => (None, Some(error)),
    };
    let entries = listed.into_iter().flatten();
    failed
        .into_iter()
        .map(Err)
        .chain(entries.filter_map(|entry| seen(entry).transpose()))
}

/// All processes that there are now.
///
/// # Errors
/// Where `/proc` can't be read.
pub(super) fn pids() -> io::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| number(&entry)).collect())
}

/// The threads of a process, the main one first; that one alone where the others may not be listed.
/// An error where descriptors or memory are short.
pub(super) fn threads(pid: u32) -> impl Iterator<Item = io::Result<u32>> {
    let all = entries(format!("/proc/{pid}/task"))
        .filter_map(|task| task.map(|task| number(&task)).transpose());
    let others = all.filter(move |tid| !matches!(tid, Ok(tid) if *tid == pid));
    iter::once(Ok(pid)).chain(others)
}

/// Whether a process has ended or is about to: it is gone, a zombie, exits, or was killed. False
/// also where that can't be read now.
pub fn is_ending(pid: u32) -> bool {
    match seen(fs::read_to_string(format!("/proc/{pid}/stat"))) {
        Ok(Some(stat)) => is_ending_by(&stat),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// By `/proc/PID/stat` (`proc_pid_stat(5)`).
fn is_ending_by(stat: &str) -> bool {
    const PF_EXITING: u64 = 0x4;
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    // The name before it may hold anything.
    let Some((_, fields)) = stat.rsplit_once(')') else {
        return false;
    };
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // The first of these fields is the third of the file.
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or_default();
    let bits = |number| field(number).parse::<u64>().unwrap_or(0);
    matches!(field(3), "Z" | "X") || bits(9) & PF_EXITING != 0 || bits(31) & SIGKILL != 0
}

/// The number that a directory entry of `/proc` has for a name.
fn number<N: FromStr>(entry: &DirEntry) -> Option<N> {
    entry.file_name().to_str()?.parse().ok()
}

/// The inode out of `socket:[4242]`.
fn socket_inode(descriptor: &Path) -> io::Result<Option<u32>> {
    let target = seen(fs::read_link(descriptor))?;
    let inode = |target: &Path| {
        let inode = target.to_str()?.strip_prefix("socket:[")?;
        inode.strip_suffix(']')?.parse().ok()
    };
    Ok(target.as_deref().and_then(inode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
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
        let mut expected = [&listener, &second].map(|socket| SocketOwner {
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
            SocketOwner {
                pid: u32::MAX,
                fd: 0
            }
            .name(),
            format!("process {}", u32::MAX)
        );
    }

    #[test]
    fn a_process_ends_from_the_signal_on_that_kills_it() {
        let mut child = std::process::Command::new("sleep")
            .arg("30")
            .spawn()
            .expect("spawn");
        assert!(!is_ending(child.id()) && !is_ending(std::process::id()));
        child.kill().expect("kill");
        assert!(is_ending(child.id()), "killed");
        child.wait().expect("wait");
        assert!(is_ending(child.id()), "gone");
    }

    #[test]
    fn a_name_is_one_line_without_control_characters() {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("a\u{1b}[31m\nok  b");
        std::os::unix::fs::symlink("/bin/cat", &program).expect("a link");
        let mut child = std::process::Command::new(&program)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("spawn");
        // It has its name once it answers.
        let (mut to, mut from) = child.stdin.take().zip(child.stdout.take()).expect("piped");
        to.write_all(b"x").expect("written");
        from.read_exact(&mut [0]).expect("read");
        let pid = child.id();
        let name = SocketOwner { pid, fd: 0 }.name();
        drop(to);
        child.wait().expect("it ends");
        assert_eq!(name, format!("a\\u{{1b}}[31m\\nok  b (process {pid})"));
    }

    #[test]
    fn what_stat_shows_of_an_end() {
        let stat = |state, flags, signals| {
            let before = format!("7 (a) Z (b) {state} 1 7 7 0 -1 {flags} ");
            format!("{before}{}{signals} 0 0 0\n", "0 ".repeat(21))
        };
        assert!(!is_ending_by(&stat("S", 0x40_0040, 0)));
        assert!(!is_ending_by(&stat("T", 0, 1 << 14)), "SIGTERM");
        assert!(is_ending_by(&stat("Z", 0, 0)));
        assert!(is_ending_by(&stat("X", 0, 0)));
        assert!(is_ending_by(&stat("D", 0x40_0044, 0)), "exiting");
        assert!(is_ending_by(&stat("R", 0, 1 << 8)), "SIGKILL");
    }
}
