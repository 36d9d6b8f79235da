//! Network namespaces (netns): which one a file names, and running code inside one.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, SockFlag, SockType},
};

use super::{file_id::FileId, socket};

/// Opens the netns of the calling thread.
///
/// # Errors
/// Where `/proc` isn't mounted, or no more files may be opened.
pub fn current() -> io::Result<OwnedFd> {
    open(Path::new("/proc/thread-self/ns/net"))
}

/// Opens a netns by path: `/proc/PID/ns/net`, `/run/netns/NAME`.
///
/// # Errors
/// Whatever `open(2)` fails with. That the file is a netns is seen only when it is used.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    File::open(path).map(OwnedFd::from)
}

/// The cookie of the calling thread's netns: a number that the kernel never gives twice until it
/// reboots, and that BPF programs get from `bpf_get_netns_cookie`.
///
/// # Errors
/// Where a socket can't be made, or the kernel is older than 5.14 (`ENOPROTOOPT`).
pub fn cookie() -> io::Result<u64> {
    let socket = nix::sys::socket::socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    socket::netns_cookie(&socket)
}

/// The cookie of another netns.
///
/// # Errors
/// Where [`inside`] or [`cookie`] fails.
pub fn cookie_of(netns: impl AsFd) -> io::Result<u64> {
    inside(netns, cookie)?
}

/// Runs `work` in a netns: in place where the calling thread is there already, else on a thread of
/// its own that ends with it, so that no other code is ever seen there.
///
/// A panic in `work` goes on in the caller.
///
/// # Errors
/// Where the file names no netns (`EINVAL`), no thread can be started, or the netns is another one
/// and `CAP_SYS_ADMIN` is missing (`EPERM`; `netns_install`, `net/core/net_namespace.c`).
pub fn inside<R: Send>(netns: impl AsFd, work: impl FnOnce() -> R + Send) -> io::Result<R> {
    let netns = netns.as_fd();
    if is_current(netns) {
        return Ok(work());
    }
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, move || {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
        worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether the calling thread is in that netns; false also where that can't be told.
fn is_current(netns: BorrowedFd<'_>) -> bool {
    let here = current().and_then(FileId::of);
    here.is_ok_and(|here| FileId::of(netns).is_ok_and(|there| there == here))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use nix::sched::unshare;

    /// A netns that lives as long as this file is open.
    pub(crate) fn fresh() -> OwnedFd {
        thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root may make a network namespace");
            current().expect("it can be opened")
        })
        .join()
        .expect("no panic")
    }

    #[test]
    fn inside_runs_there_and_leaves_the_caller_here() {
        let (netns, here) = (fresh(), current().expect("open"));
        let seen = inside(&netns, || FileId::of(current().expect("open")))
            .expect("inside")
            .expect("identity");
        assert_eq!(seen, FileId::of(&netns).expect("identity"));
        assert_ne!(seen, FileId::of(&here).expect("identity"));
        assert_eq!(
            FileId::of(current().expect("open")).expect("identity"),
            FileId::of(&here).expect("identity")
        );
    }

    #[test]
    fn inside_the_current_one_no_thread_is_started() {
        let caller = thread::current().id();
        let here = inside(current().expect("open"), || thread::current().id());
        assert_eq!(here.expect("inside"), caller);
        let elsewhere = inside(fresh(), || thread::current().id());
        assert_ne!(elsewhere.expect("inside"), caller);
    }

    #[test]
    fn cookies_tell_namespaces_apart() {
        let (first, second) = (fresh(), fresh());
        let cookies =
            [cookie(), cookie_of(&first), cookie_of(&second)].map(|cookie| cookie.expect("cookie"));
        assert!(
            cookies[0] != cookies[1] && cookies[1] != cookies[2] && cookies[0] != cookies[2],
            "{cookies:?}"
        );
        assert_eq!(cookie_of(&first).expect("again"), cookies[1]);
        assert!(cookies.iter().all(|cookie| *cookie != 0));
    }

    #[test]
    fn a_file_that_is_no_namespace_is_an_error() {
        let other = open(Path::new("/proc/self/ns/mnt")).expect("open");
        assert_eq!(
            inside(&other, || ())
                .expect_err("not a netns")
                .raw_os_error(),
            Some(libc::EINVAL)
        );
        let file = open(Path::new("/dev/null")).expect("open");
        assert!(inside(&file, || ()).is_err());
        assert_eq!(
            open(Path::new("/run/no-such-namespace"))
                .expect_err("absent")
                .kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn a_panic_inside_reaches_the_caller() {
        let netns = fresh();
        let caught = std::panic::catch_unwind(|| inside(&netns, || panic!("from inside")));
        assert_eq!(
            caught.expect_err("it panicked").downcast_ref::<&str>(),
            Some(&"from inside")
        );
    }
}
