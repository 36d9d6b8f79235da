//! Taking a copy of another process's file descriptor.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

/// A process that can't be mistaken for another one which gets its number later.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Takes hold of a process (`pidfd_open(2)`).
    ///
    /// # Errors
    /// `ESRCH` where there is no such process.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid =
            libc::pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
        // SAFETY: the call takes two integers and no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        owned(fd).map(Self)
    }

    /// Copies the process's file descriptor `number` into this process (`pidfd_getfd(2)`); both then name the same open file.
    ///
    /// # Errors
    /// `EBADF` where the process has no such descriptor, `EPERM` without `CAP_SYS_PTRACE` over it, `ESRCH` where it has ended.
    pub fn file(&self, number: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: the call takes three integers and no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), number, 0) };
        owned(fd)
    }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: a system call that returns a new file descriptor gave it to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        net::TcpListener,
        os::fd::AsFd as _,
        process::{Command, Stdio},
    };

    #[test]
    fn a_listener_of_another_process_can_be_copied() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut child = Command::new("sleep")
            .arg("30")
            .stdin(Stdio::from(OwnedFd::from(
                listener.try_clone().expect("clone"),
            )))
            .spawn()
            .expect("spawn");
        let copied = Process::open(child.id()).and_then(|process| process.file(0));
        child.kill().expect("kill");
        child.wait().expect("wait");
        let copied = TcpListener::from(copied.expect("copied"));
        assert_eq!(
            copied.local_addr().expect("address"),
            listener.local_addr().expect("address")
        );
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        assert_eq!(
            Process::open(u32::MAX).expect_err("no pid").raw_os_error(),
            Some(libc::ESRCH)
        );
        let own = Process::open(std::process::id()).expect("ourselves");
        assert_eq!(
            own.file(1_000_000).expect_err("no fd").raw_os_error(),
            Some(libc::EBADF)
        );
        assert!(own.0.as_fd().as_raw_fd() > 2);
    }
}
