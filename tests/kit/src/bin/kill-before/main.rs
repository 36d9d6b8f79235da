#![deny(unsafe_code)]
//! Runs a program and kills it just before one of its steps. A step changes the state of the kernel
//! or of a file system. There are two kinds, and each is numbered by itself:
//!
//! - `call`: a system call that changes something,
//! - `store`: a store into a BPF map that is mapped into memory; seen on x86-64 alone.
//!
//! `kill-before store 7 PROGRAM ARGUMENTS` kills it before its seventh store. Ends with 0 when it
//! has killed it, with 3 when the program has ended without so many. What it prints last is how
//! many it has seen: `steps: 41 calls, 150 stores`.

mod calls;
mod stores;

use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use stores::Stores;

/// `PTRACE_SYSCALL_INFO_ENTRY` and `PTRACE_SYSCALL_INFO_EXIT` (include/uapi/linux/ptrace.h).
const ENTRY: u8 = 1;
const EXIT: u8 = 2;
/// The traced program has ended too early.
const NOT_SO_MANY: u8 = 3;

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let mut word = || {
        arguments
            .next()
            .context("usage: kill-before call|store N PROGRAM …")
    };
    let kind = match word()?.to_str() {
        Some("call") => Kind::Call,
        Some("store") => Kind::Store,
        other => bail!("`call` or `store`, not {other:?}"),
    };
    let number = word()?.to_string_lossy().parse().context("which one?")?;
    // The shell waits until it is traced, and then becomes the program.
    let mut child = Command::new("sh")
        .args(["-c", "read -r go && exec \"$@\" </dev/null", "sh"])
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start sh")?;
    let root = Pid::from_raw(i32::try_from(child.id())?);
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(root, options).context("cannot trace it")?;
    ptrace::interrupt(root).context("cannot stop it")?;
    eprintln!("tracing process {root}");
    let mut go = child.stdin.take().context("its standard input")?;
    go.write_all(b"go\n").context("cannot let it go")?;
    drop(go);
    let mut tracer = Tracer {
        root,
        kill_before: (kind, number),
        calls: 0,
        stores: 0,
        maps: Stores::default(),
        runs: false,
        killed: false,
    };
    let outcome = tracer.follow();
    eprintln!("steps: {} calls, {} stores", tracer.calls, tracer.stores);
    outcome.map(|()| ExitCode::from(if tracer.killed { 0 } else { NOT_SO_MANY }))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Call,
    Store,
}

struct Tracer {
    root: Pid,
    kill_before: (Kind, usize),
    calls: usize,
    stores: usize,
    maps: Stores,
    /// The shell has become the program.
    runs: bool,
    killed: bool,
}

impl Tracer {
    /// Lets every thread go on until the step has come, and the program has ended.
    fn follow(&mut self) -> Result<()> {
        loop {
            let status = waitpid(None, Some(WaitPidFlag::__WALL)).context("cannot wait for it")?;
            if let WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) = status {
                if pid == self.root {
                    eprintln!("the process has ended: {status:?}");
                    return Ok(());
                }
                continue;
            }
            let stopped = self.stopped(status);
            // It may have been killed meanwhile: that is heard of next.
            if stopped.as_ref().is_err_and(is_gone) {
                continue;
            }
            stopped.with_context(|| format!("cannot let it go on after {status:?}"))?;
        }
    }

    /// Looks what a thread has stopped for, and lets it go on.
    fn stopped(&mut self, status: WaitStatus) -> Result<()> {
        let (thread, signal) = match status {
            WaitStatus::Stopped(thread, Signal::SIGSEGV) if self.is_store(thread)? => {
                (thread, None)
            }
            WaitStatus::Stopped(thread, signal) => {
                eprintln!("thread {thread} gets {signal}");
                (thread, Some(signal))
            }
            WaitStatus::PtraceSyscall(thread) => {
                if self.runs {
                    self.called(thread)?;
                }
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, _, event) => {
                self.runs |= event == ptrace::Event::PTRACE_EVENT_EXEC as i32;
                (thread, None)
            }
            _ => return Ok(()),
        };
        if !self.killed {
            ptrace::syscall(thread, signal)?;
        }
        Ok(())
    }

    /// A thread has come to the begin or the end of a system call.
    fn called(&mut self, thread: Pid) -> Result<()> {
        match ptrace::syscall_info(thread)?.op {
            ENTRY if calls::is_step(thread)? => self.step(Kind::Call),
            EXIT => self.maps.keep_out(thread),
            _ => Ok(()),
        }
    }

    /// Whether a thread was kept from a store into a map; if so, the store is made.
    fn is_store(&mut self, thread: Pid) -> Result<bool> {
        let Some(map) = stores::kept_out_of(thread)? else {
            return Ok(false);
        };
        self.step(Kind::Store)?;
        if !self.killed {
            self.maps.let_through(thread, &map)?;
        }
        Ok(true)
    }

    /// Counts a step that is about to be made, and kills the program if it is the one.
    fn step(&mut self, kind: Kind) -> Result<()> {
        let seen = match kind {
            Kind::Call => &mut self.calls,
            Kind::Store => &mut self.stores,
        };
        *seen += 1;
        if (kind, *seen) == self.kill_before {
            kill(self.root, Signal::SIGKILL).context("cannot kill it")?;
            self.killed = true;
        }
        Ok(())
    }
}

fn is_gone(error: &anyhow::Error) -> bool {
    error.downcast_ref() == Some(&Errno::ESRCH)
}
