#![forbid(unsafe_code)]
//! Runs a program and kills it just before one of the changes that it makes to the kernel's or a
//! file system's state: `kill-before 7 PROGRAM ARGUMENTS` before the seventh. Ends with 0 when it
//! has killed it, with 3 when the program has ended without so many.

use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// `PTRACE_SYSCALL_INFO_ENTRY` (include/uapi/linux/ptrace.h).
const ENTRY: u8 = 1;
/// The traced program has ended too early.
const NOT_SO_MANY: u8 = 3;

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let which = arguments.next().context("before which change?")?;
    let which: usize = which.to_string_lossy().parse().context("a number")?;
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
    follow(root, which)
}

/// Lets every thread go on until the change has come.
fn follow(root: Pid, which: usize) -> Result<ExitCode> {
    let (mut changes, mut runs, mut killed) = (0, false, false);
    loop {
        let status = waitpid(None, Some(WaitPidFlag::__WALL)).context("cannot wait for it")?;
        let (thread, signal) = match status {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) if pid == root => {
                eprintln!("it made {changes} changes");
                return Ok(ExitCode::from(if killed { 0 } else { NOT_SO_MANY }));
            }
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::PtraceSyscall(thread) => {
                if runs && !killed && is_entry(thread) && is_change(thread) {
                    changes += 1;
                    if changes == which {
                        kill(root, Signal::SIGKILL).context("cannot kill it")?;
                        killed = true;
                        continue;
                    }
                }
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, _, event) => {
                runs |= event == ptrace::Event::PTRACE_EVENT_EXEC as i32;
                (thread, None)
            }
            _ => continue,
        };
        // A thread may have been killed meanwhile: that is heard of next.
        let gone_on = ptrace::syscall(thread, signal);
        ensure!(
            matches!(gone_on, Ok(()) | Err(nix::errno::Errno::ESRCH)),
            "cannot let {thread} go on: {gone_on:?}"
        );
    }
}

fn is_entry(thread: Pid) -> bool {
    ptrace::syscall_info(thread).is_ok_and(|info| info.op == ENTRY)
}

/// Whether the system call that a thread is about to make changes a map's elements, a pin, a link
/// or a directory, or takes a listener's file.
#[cfg(target_arch = "x86_64")]
fn is_change(thread: Pid) -> bool {
    const BPF: u64 = 321;
    // MAP_UPDATE_ELEM, MAP_DELETE_ELEM, OBJ_PIN, PROG_ATTACH, PROG_DETACH, LINK_CREATE,
    // LINK_UPDATE, LINK_DETACH.
    const COMMANDS: [u64; 8] = [2, 3, 6, 8, 9, 28, 29, 34];
    // bind, rename, mkdir, rmdir, unlink, mkdirat, unlinkat, renameat, renameat2, pidfd_getfd.
    const CALLS: [u64; 10] = [49, 82, 83, 84, 87, 258, 263, 264, 316, 438];
    let Ok(registers) = ptrace::getregs(thread) else {
        return false;
    };
    match registers.orig_rax {
        BPF => COMMANDS.contains(&registers.rdi),
        call => CALLS.contains(&call),
    }
}

/// The registers have other names there: every system call counts.
#[cfg(not(target_arch = "x86_64"))]
fn is_change(_: Pid) -> bool {
    true
}
