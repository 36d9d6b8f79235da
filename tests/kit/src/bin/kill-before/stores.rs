//! Stores into BPF maps that are mapped into memory. They are no system calls. They are seen
//! because the tracer takes the right to write away from such a mapping as soon as it is made: each
//! of them faults then. Loads are as ever.
//!
//! To let one through, the thread is made to call `mprotect` and to go one instruction further.
//! What another thread stores at this moment is not seen.

#[cfg(not(target_arch = "x86_64"))]
pub use other::{Stores, kept_out_of};
#[cfg(target_arch = "x86_64")]
pub use x86_64::{Stores, kept_out_of};

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::fs;
    use std::time::Duration;

    use anyhow::{Context as _, Result, ensure};
    use nix::errno::Errno;
    use nix::libc::{self, PROT_READ, PROT_WRITE};
    use nix::sys::ptrace;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
    use nix::unistd::Pid;

    /// `SEGV_ACCERR` (include/uapi/asm-generic/siginfo.h): what is mapped there forbids it.
    const FORBIDDEN: i32 = 2;
    /// How long the instruction `syscall` is.
    const SYSCALL_BYTES: u64 = 2;
    /// Between two looks at a thread that is about to stop.
    const PAUSE: Duration = Duration::from_micros(20);

    /// A mapped BPF map.
    pub struct Mapping {
        start: u64,
        end: u64,
        writable: bool,
    }

    /// Keeps a program from storing into its mapped maps.
    #[derive(Default)]
    pub struct Stores {
        /// Where the program has an instruction `syscall`.
        syscall: Option<u64>,
    }

    impl Stores {
        /// At the end of a system call: takes the right to write away, if it has mapped a map.
        pub fn keep_out(&mut self, thread: Pid) -> Result<()> {
            let registers = ptrace::getregs(thread)?;
            if registers.orig_rax.cast_signed() != libc::SYS_mmap {
                return Ok(());
            }
            let map = map_at(thread, registers.rax)?;
            let Some(map) = map.filter(|map| map.writable) else {
                return Ok(());
            };
            self.syscall = Some(registers.rip - SYSCALL_BYTES);
            self.protect(thread, &map, PROT_READ)
        }

        /// Makes that store, and no other one.
        pub fn let_through(&self, thread: Pid, map: &Mapping) -> Result<()> {
            self.protect(thread, map, PROT_READ | PROT_WRITE)?;
            ptrace::step(thread, None)?;
            let stop = next_stop(thread)?;
            ensure!(
                stop == WaitStatus::Stopped(thread, Signal::SIGTRAP),
                "it stored, and then {stop:?}"
            );
            self.protect(thread, map, PROT_READ)
        }

        /// Has a thread that is stopped call `mprotect`.
        fn protect(&self, thread: Pid, map: &Mapping, protection: i32) -> Result<()> {
            let registers = ptrace::getregs(thread)?;
            let mut call = registers;
            call.rip = self.syscall.context("no system call was seen yet")?;
            call.rax = u64::try_from(libc::SYS_mprotect)?;
            // Not in a system call: none is begun anew (`arch_do_signal_or_restart`,
            // arch/x86/kernel/signal.c).
            call.orig_rax = u64::MAX;
            call.rdi = map.start;
            call.rsi = map.end - map.start;
            call.rdx = u64::try_from(protection)?;
            ptrace::setregs(thread, call)?;
            for _ in ["begin", "end"] {
                ptrace::syscall(thread, None)?;
                let stop = next_stop(thread)?;
                ensure!(
                    stop == WaitStatus::PtraceSyscall(thread),
                    "mprotect, and then {stop:?}"
                );
            }
            let result = ptrace::getregs(thread)?.rax;
            ensure!(result == 0, "mprotect: {}", result.cast_signed());
            ptrace::setregs(thread, registers)?;
            Ok(())
        }
    }

    /// At a SIGSEGV: the map that the thread was kept from storing into, if that is why.
    #[expect(unsafe_code, reason = "libc offers the address only so")]
    pub fn kept_out_of(thread: Pid) -> Result<Option<Mapping>> {
        let signal = ptrace::getsiginfo(thread)?;
        if signal.si_code != FORBIDDEN {
            return Ok(None);
        }
        // SAFETY: the kernel fills in the address for this code of a SIGSEGV
        // (`force_sig_fault`, kernel/signal.c).
        let address = unsafe { signal.si_addr() };
        map_at(thread, address.addr() as u64)
    }

    /// The next stop of a thread; `ESRCH` where it has ended, which is left to be heard of. To wait
    /// for it alone would not do: that a process has ended is not told before its other threads
    /// were waited for (`delay_group_leader`, include/linux/sched/signal.h).
    fn next_stop(thread: Pid) -> Result<WaitStatus> {
        let look = |of, what| {
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
            waitid(of, flags | what)
        };
        loop {
            match look(Id::Pid(thread), WaitPidFlag::WSTOPPED) {
                Ok(WaitStatus::StillAlive) => {}
                Ok(_) => return Ok(waitpid(thread, Some(WaitPidFlag::__WALL))?),
                // It has ended and can be heard of: it will never stop (`wait_consider_task`,
                // kernel/exit.c).
                Err(Errno::ECHILD) => return Err(Errno::ESRCH.into()),
                Err(error) => return Err(error.into()),
            }
            // The stop of a traced thread is told of whatever is asked for (`wait_task_stopped`,
            // kernel/exit.c): this one's may have come meanwhile, and another's is left for later.
            match look(Id::All, WaitPidFlag::WEXITED)? {
                WaitStatus::Exited(ended, _) | WaitStatus::Signaled(ended, ..) => {
                    if ended == thread {
                        return Err(Errno::ESRCH.into());
                    }
                    waitpid(ended, Some(WaitPidFlag::__WALL))?;
                }
                _ => std::thread::sleep(PAUSE),
            }
        }
    }

    /// The BPF map that is mapped at an address; `ESRCH` where the thread has ended.
    fn map_at(thread: Pid, address: u64) -> Result<Option<Mapping>> {
        let mappings = fs::read_to_string(format!("/proc/{thread}/maps")).or(Err(Errno::ESRCH))?;
        let mut maps = mappings.lines().filter_map(map_of);
        Ok(maps.find(|map| (map.start..map.end).contains(&address)))
    }

    /// `7f2a4c000000-7f2a4c004000 rw-s 00000000 00:0e 1055    anon_inode:bpf-map`
    fn map_of(line: &str) -> Option<Mapping> {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let writable = fields.next()?.contains('w');
        (fields.last()? == "anon_inode:bpf-map").then_some(())?;
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        Some(Mapping {
            start: number(start)?,
            end: number(end)?,
            writable,
        })
    }

    #[cfg(test)]
    mod tests {
        use super::map_of;

        #[test]
        fn a_mapped_map_is_read_as_the_kernel_prints_it() {
            let line = "7f2a4c000000-7f2a4c004000 rw-s 00000000 00:0e 1055   anon_inode:bpf-map";
            let map = map_of(line).expect("a map");
            assert_eq!(
                (map.start, map.end, map.writable),
                (0x7f2a_4c00_0000, 0x7f2a_4c00_4000, true)
            );
            for other in [
                "55e0c0000000-55e0c0001000 r-xp 00000000 fe:00 42   /usr/bin/balancer",
                "7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0    [stack]",
                "7f2a4c000000-7f2a4c004000 rw-p 00000000 00:00 0",
            ] {
                assert!(map_of(other).is_none(), "{other}");
            }
        }
    }
}

/// The registers have other names there: no store is seen.
#[cfg(not(target_arch = "x86_64"))]
mod other {
    use anyhow::Result;
    use nix::unistd::Pid;

    #[derive(Default)]
    pub struct Stores;

    impl Stores {
        pub fn keep_out(&mut self, _: Pid) -> Result<()> {
            Ok(())
        }

        pub fn let_through(&self, _: Pid, (): &()) -> Result<()> {
            Ok(())
        }
    }

    pub fn kept_out_of(_: Pid) -> Result<Option<()>> {
        Ok(None)
    }
}
