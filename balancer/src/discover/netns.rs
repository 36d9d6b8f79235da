//! The netns in which processes live.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use caps::{CapSet, Capability};

use super::processes::{SocketOwner, pids, sockets_of, threads};
use crate::sys::{
    file_id::FileId,
    limits::{is_shortage, seen},
    netns, socket,
};

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

/// Where a netns was found, and may be found again without a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A thread lives in it.
    Thread(Thread),
    /// A process has a socket of it.
    Socket(SocketOwner),
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

/// What the look at one thread has found.
#[derive(Debug)]
pub enum Look {
    /// Nothing new.
    Nothing,
    /// A netns.
    Found(Netns),
    /// A netns that can't be entered.
    Unreachable(UnreachableNetns),
}

/// Looks for all netns that a thread lives in, and keeps them open.
///
/// A netns that only a file, a mount or a socket keeps alive is not among them.
///
/// # Errors
/// As [`look_everywhere`].
pub fn live_netns() -> Result<LiveNetns> {
    let mut found = LiveNetns::default();
    for look in look_everywhere()? {
        match look? {
            Look::Nothing => {}
            Look::Found(netns) => found.reachable.push(netns),
            Look::Unreachable(netns) => found.unreachable.push(netns),
        }
    }
    Ok(found)
}

/// Looks at one thread of the machine after the other, as the iterator is asked: each netns is
/// found once.
///
/// # Errors
/// Where `/proc` can't be read or descriptors or memory are short; or where there is a netns to
/// enter and `CAP_SYS_ADMIN` is missing, without which none but the own can be entered.
pub fn look_everywhere() -> Result<impl Iterator<Item = Result<Look>> + Send> {
    look_everywhere_by(|file| netns::cookie_of(file))
}

fn look_everywhere_by(
    enter: impl Fn(&OwnedFd) -> io::Result<u64> + Send,
) -> Result<impl Iterator<Item = Result<Look>> + Send> {
    let mut pids = pids().context("cannot list the processes in /proc: is it mounted?")?;
    pids.sort_unstable();
    let of_process = |pid| threads(pid).map(move |tid| tid.map(|tid| Thread { pid, tid }));
    let mut known = HashSet::new();
    let look = move |thread: io::Result<Thread>| look_at(thread?, &mut known, &enter);
    Ok(pids.into_iter().flat_map(of_process).map(look))
}

/// A thread may end at any time, so whatever can't be read of it is passed over; another may stand
/// for the same netns.
fn look_at(
    at: Thread,
    known: &mut HashSet<FileId>,
    enter: impl Fn(&OwnedFd) -> io::Result<u64>,
) -> Result<Look> {
    let Thread { pid, tid } = at;
    let path = thread(pid, tid);
    let id = seen(FileId::at(&path)).with_context(|| cannot_look(pid))?;
    let Some(id) = id.filter(|id| !known.contains(id)) else {
        return Ok(Look::Nothing);
    };
    let file = open(&path, id).with_context(|| cannot_look(pid))?;
    let Some(file) = file else {
        return Ok(Look::Nothing);
    };
    let entered = enter(&file);
    known.insert(id);
    Ok(match entered {
        Ok(cookie) => Look::Found(Netns {
            cookie,
            id,
            pid,
            tid,
            file,
        }),
        Err(error) if is_shortage(&error) => return Err(error).with_context(|| cannot_look(pid)),
        Err(error) if is_privilege_missing(&error) => bail!(
            "cannot enter the network namespace of process {pid} (needs CAP_SYS_ADMIN): {error}"
        ),
        Err(error) => Look::Unreachable(UnreachableNetns { id, pid, error }),
    })
}

fn cannot_look(pid: u32) -> String {
    format!(
        "cannot look at the network namespaces of process {pid}: descriptors (`ulimit -n`, \
         LimitNOFILE=) or memory are short"
    )
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
    /// Where it may be: threads that listened there, a socket by which it was found before.
    pub places: Vec<Place>,
}

impl NetnsHint {
    /// Opens the netns where it is at one of the places; `None`: it isn't, and a [`Search`] may
    /// find it.
    ///
    /// # Errors
    /// Where descriptors or memory are short.
    pub fn open(&self) -> io::Result<Option<FoundNetns>> {
        let mut tried = HashSet::new();
        let places = self.places.iter().flat_map(|place| match place {
            Place::Thread(thread) => {
                let process = Thread { tid: 0, ..*thread };
                [Some(*place), Some(Place::Thread(process))]
            }
            Place::Socket(_) => [Some(*place), None],
        });
        for place in places.flatten().filter(|place| tried.insert(*place)) {
            if let Some(file) = self.open_at(place)? {
                let open = OpenNetns {
                    cookie: self.cookie,
                    file,
                };
                return Ok(Some(FoundNetns { open, place }));
            }
        }
        Ok(None)
    }

    fn open_at(&self, place: Place) -> io::Result<Option<OwnedFd>> {
        match place {
            Place::Thread(Thread { pid, tid }) => {
                let Some(file) = seen(netns::open(&thread(pid, tid)))? else {
                    return Ok(None);
                };
                let cookie = seen(netns::cookie_of(&file))?;
                Ok((cookie == Some(self.cookie)).then_some(file))
            }
            Place::Socket(owner) => {
                let Some(socket) = seen(owner.file())? else {
                    return Ok(None);
                };
                let cookie = seen(socket::netns_cookie(&socket))?;
                if cookie == Some(self.cookie) {
                    seen(socket::netns(&socket))
                } else {
                    Ok(None)
                }
            }
        }
    }

    fn pids(&self) -> impl Iterator<Item = u32> {
        self.places.iter().map(|place| match place {
            Place::Thread(thread) => thread.pid,
            Place::Socket(owner) => owner.pid,
        })
    }
}

/// A netns that was looked for, and where it was found.
#[derive(Debug)]
pub struct FoundNetns {
    /// The netns.
    pub open: OpenNetns,
    /// Where it was found.
    pub place: Place,
}

/// A search for netns that are at none of the places where they were expected: among the sockets of
/// the processes that listened there, which may have left them since, then among all threads. One
/// look answers for all of them, and a search can be interrupted after each.
pub struct Search {
    /// The cookies of the netns that have not been found yet.
    wanted: HashSet<u64>,
    looks: Box<dyn Iterator<Item = Result<Sight>> + Send>,
    /// Every netns that it came by could be entered.
    certain: bool,
}

/// What one look of a search has seen.
enum Sight {
    Nothing,
    /// The netns with that cookie, or a socket of it, as the place says.
    Netns(u64, Place, OwnedFd),
    Unreachable,
}

/// How far a search has come.
#[derive(Debug)]
pub enum Progress {
    /// It has found one of the netns.
    Found(FoundNetns),
    /// Its time is over for now.
    Interrupted,
    /// It has looked everywhere.
    AtEnd,
}

impl Search {
    /// Begins a search.
    ///
    /// # Errors
    /// Where `/proc` can't be read.
    pub fn new(hints: &[NetnsHint]) -> Result<Self> {
        let mut pids: Vec<u32> = hints.iter().flat_map(NetnsHint::pids).collect();
        pids.sort_unstable();
        pids.dedup();
        let threads = look_everywhere()?.map(|look| look.map(Sight::from));
        Ok(Self {
            wanted: hints.iter().map(|hint| hint.cookie).collect(),
            looks: Box::new(pids.into_iter().flat_map(sockets_seen).chain(threads)),
            certain: true,
        })
    }

    /// Goes on until then, with one look at the least, or until a netns is found.
    ///
    /// # Errors
    /// Where [`look_everywhere`] fails: then the search has no result.
    pub fn go_on(&mut self, until: Instant) -> Result<Progress> {
        while !self.wanted.is_empty() {
            match self.looks.next().transpose()? {
                None => break,
                Some(Sight::Nothing) => {}
                Some(Sight::Unreachable) => self.certain = false,
                Some(Sight::Netns(cookie, place, file)) => {
                    if let Some(found) = self.take(cookie, place, file)? {
                        return Ok(Progress::Found(found));
                    }
                }
            }
            if Instant::now() >= until {
                return Ok(Progress::Interrupted);
            }
        }
        Ok(Progress::AtEnd)
    }

    fn take(&mut self, cookie: u64, place: Place, file: OwnedFd) -> Result<Option<FoundNetns>> {
        if !self.wanted.contains(&cookie) {
            return Ok(None);
        }
        let file = match place {
            Place::Thread(_) => Some(file),
            Place::Socket(owner) => {
                seen(socket::netns(&file)).with_context(|| cannot_look(owner.pid))?
            }
        };
        Ok(file.map(|file| {
            self.wanted.remove(&cookie);
            let open = OpenNetns { cookie, file };
            FoundNetns { open, place }
        }))
    }

    /// The netns that were not found.
    pub const fn missing(&self) -> &HashSet<u64> {
        &self.wanted
    }

    /// Whether it could look at everything that it came by.
    pub const fn is_certain(&self) -> bool {
        self.certain
    }
}

/// Opens a netns at one of the places, or searches for it to the end.
///
/// # Errors
/// As [`Search::go_on`].
pub fn find_netns(hint: NetnsHint) -> Result<Option<OpenNetns>> {
    let at_once = hint.open().context("cannot open a network namespace")?;
    if let Some(found) = at_once {
        return Ok(Some(found.open));
    }
    let mut search = Search::new(&[hint])?;
    loop {
        match search.go_on(Instant::now())? {
            Progress::Found(found) => return Ok(Some(found.open)),
            Progress::Interrupted => {}
            Progress::AtEnd => return Ok(None),
        }
    }
}

impl From<Look> for Sight {
    fn from(look: Look) -> Self {
        match look {
            Look::Nothing => Self::Nothing,
            Look::Unreachable(_) => Self::Unreachable,
            Look::Found(netns) => {
                let (pid, tid) = (netns.pid, netns.tid);
                Self::Netns(netns.cookie, Place::Thread(Thread { pid, tid }), netns.file)
            }
        }
    }
}

/// Looks at one descriptor of a process after the other.
fn sockets_seen(pid: u32) -> impl Iterator<Item = Result<Sight>> {
    sockets_of(pid).map(move |descriptor| {
        let sight = match descriptor {
            Ok(Some((_, owner))) => socket_seen(owner),
            Ok(None) => Ok(Sight::Nothing),
            Err(error) => Err(error),
        };
        sight.with_context(|| cannot_look(pid))
    })
}

fn socket_seen(owner: SocketOwner) -> io::Result<Sight> {
    let Some(socket) = seen(owner.file())? else {
        return Ok(Sight::Nothing);
    };
    let cookie = seen(socket::netns_cookie(&socket))?;
    Ok(cookie.map_or(Sight::Nothing, |cookie| {
        Sight::Netns(cookie, Place::Socket(owner), socket)
    }))
}

/// Opens a process's netns, unless the process moved since it was looked at.
fn open(path: &Path, expected: FileId) -> io::Result<Option<OwnedFd>> {
    let Some(file) = seen(netns::open(path))? else {
        return Ok(None);
    };
    Ok((FileId::of(&file)? == expected).then_some(file))
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
            let looks = look_everywhere_by(refuse).expect("processes are listed");
            let mut found = LiveNetns::default();
            for look in looks {
                match look.expect("the others are found") {
                    Look::Nothing => {}
                    Look::Found(netns) => found.reachable.push(netns),
                    Look::Unreachable(netns) => found.unreachable.push(netns),
                }
            }
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

    /// Where a netns is found: at one of the places, or by a search that is interrupted at each
    /// look.
    fn find(cookie: u64, places: &[Place]) -> (Option<Place>, Option<Place>) {
        let places = places.to_vec();
        let hint = NetnsHint { cookie, places };
        let is_it = |found: FoundNetns| {
            let there = netns::cookie_of(&found.open.file).expect("cookie");
            assert_eq!((there, found.open.cookie), (cookie, cookie));
            found.place
        };
        let at_once = hint.open().expect("nothing is short").map(is_it);
        let mut search = Search::new(&[hint]).expect("processes are listed");
        let mut looks = 0;
        let searched = loop {
            looks += 1;
            match search.go_on(Instant::now()).expect("nothing is short") {
                Progress::Found(found) => break Some(is_it(found)),
                Progress::Interrupted => {}
                Progress::AtEnd => break None,
            }
        };
        assert!(looks > 1, "it can be interrupted");
        assert_eq!(search.missing().contains(&cookie), searched.is_none());
        (at_once, searched)
    }

    #[test]
    fn a_namespace_is_found_by_what_listened_there() {
        let netns = netns::tests::fresh();
        let cookie = netns::cookie_of(&netns).expect("cookie");
        let own = std::process::id();
        // Only our file keeps it alive: there is nothing to find it by.
        let process = Place::Thread(Thread { pid: own, tid: 0 });
        assert_eq!(find(cookie, &[process]), (None, None));
        let listener = netns::inside(&netns, || {
            let tid = nix::unistd::gettid().as_raw().cast_unsigned();
            let thread = Place::Thread(Thread { pid: own, tid });
            assert_eq!(find(cookie, &[thread]), (Some(thread), Some(thread)));
            assert_eq!(find(cookie, &[]), (None, Some(thread)), "among all threads");
            std::net::TcpListener::bind("127.0.0.1:0").expect("bind")
        })
        .expect("inside");
        let (at_once, searched) = find(cookie, &[process]);
        assert_eq!(at_once, None);
        let socket = searched.expect("by a socket of its process");
        assert!(matches!(socket, Place::Socket(owner) if owner.pid == own));
        assert_eq!(find(cookie, &[socket]).0, Some(socket));
        drop(listener);
        assert_eq!(find(cookie, &[socket]), (None, None));
    }
}
