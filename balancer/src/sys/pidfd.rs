//! Taking a copy of another process's file descriptor.

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// A process that can't be mistaken for another one which gets its number later.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Takes hold of a process (`pidfd_open(2)`).
    ///
    /// # Errors
    /// `ESRCH` where there is no such process.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(rustix::io::Errno::SRCH)?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// Copies the process's file descriptor `number` into this process (`pidfd_getfd(2)`). Both
    /// then name the same open file.
    ///
    /// # Errors
    /// `EBADF` where the process has no such descriptor, `EPERM` without `CAP_SYS_PTRACE` over it,
    /// `ESRCH` where it has ended.
    pub fn file(&self, number: RawFd) -> io::Result<OwnedFd> {
        Ok(pidfd_getfd(&self.0, number, PidfdGetfdFlags::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        net::TcpListener,
        os::fd::AsRawFd as _,
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
        assert!(own.0.as_raw_fd() > 2);
    }
}
