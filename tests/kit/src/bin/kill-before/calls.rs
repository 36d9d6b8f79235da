//! System calls that are steps.

use anyhow::Result;
use nix::unistd::Pid;

/// Whether the system call that a thread is about to make changes a map's elements, a pin, a link,
/// a file or a directory, has a lock taken or a socket listen, or takes a listener's descriptor.
#[cfg(target_arch = "x86_64")]
pub fn is_step(thread: Pid) -> Result<bool> {
    use nix::libc;

    /// `bpf(2)`: `MAP_UPDATE_ELEM`, `MAP_DELETE_ELEM`, `OBJ_PIN`, `PROG_ATTACH`, `PROG_DETACH`,
    /// `LINK_CREATE`, `LINK_UPDATE`, `LINK_DETACH`.
    const COMMANDS: [u64; 8] = [2, 3, 6, 8, 9, 28, 29, 34];
    const CALLS: [i64; 22] = [
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_flock,
        libc::SYS_ftruncate,
        libc::SYS_rename,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_mkdir,
        libc::SYS_mkdirat,
        libc::SYS_rmdir,
        libc::SYS_creat,
        libc::SYS_link,
        libc::SYS_linkat,
        libc::SYS_symlink,
        libc::SYS_symlinkat,
        libc::SYS_unlink,
        libc::SYS_unlinkat,
        libc::SYS_chmod,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_mount,
        libc::SYS_pidfd_getfd,
    ];
    let registers = nix::sys::ptrace::getregs(thread)?;
    let creates = |flags: u64| flags & u64::from(libc::O_CREAT.unsigned_abs()) != 0;
    Ok(match registers.orig_rax.cast_signed() {
        libc::SYS_bpf => COMMANDS.contains(&registers.rdi),
        libc::SYS_open => creates(registers.rsi),
        libc::SYS_openat => creates(registers.rdx),
        libc::SYS_write => is_file(thread, registers.rdi),
        call => CALLS.contains(&call),
    })
}

/// Whether a descriptor is of a file with a name. Standard output and error are the log.
#[cfg(target_arch = "x86_64")]
fn is_file(thread: Pid, descriptor: u64) -> bool {
    let link = std::fs::read_link(format!("/proc/{thread}/fd/{descriptor}"));
    descriptor > 2 && link.is_ok_and(|file| file.is_absolute())
}

/// The registers have other names there: every system call counts.
#[cfg(not(target_arch = "x86_64"))]
pub fn is_step(_: Pid) -> Result<bool> {
    Ok(true)
}
