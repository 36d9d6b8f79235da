//! What a daemon that runs for months as root gives up once it has started: capabilities, and
//! system calls that it never makes.
//!
//! Capabilities and seccomp filters belong to a thread, and a new thread begins with those of the
//! thread that starts it. So the daemon gives them up while it has one thread only, which is why
//! its runtime is of the single-threaded kind.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::unistd::{Uid, User, geteuid};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use tracing::{info, warn};

/// What has to work once the daemon has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Entering other netns than the one that the daemon was started in.
    pub other_netns: bool,
    /// Attaching what places connects, also when it was detached meanwhile.
    pub placing: bool,
    /// Moving established connections.
    pub moving: bool,
}

impl Kept {
    /// Each was found to be missed when it was left out, and is asked for by the kernel functions
    /// that are named here.
    fn capabilities(self) -> CapsHashSet {
        let mut kept = CapsHashSet::from([
            // Loading `steer` again, at a reload and for a new netns (`bpf_prog_load` and
            // `map_create`, kernel/bpf/syscall.c); the counts of sockets in a dump
            // (`bpf_sk_storage_diag_alloc`, net/core/bpf_sk_storage.c).
            Capability::CAP_BPF,
            // The verifier's trust in arithmetic with pointers, without which it refuses `steer`
            // (`bpf_allow_ptr_leaks`, include/linux/bpf.h).
            Capability::CAP_PERFMON,
            // Links in /proc/PID/fd and /proc/PID/ns, and copies of descriptors, of processes that
            // have any capability that we gave up, or another user (`__ptrace_may_access`,
            // kernel/ptrace.c).
            Capability::CAP_SYS_PTRACE,
            // The directory /proc/PID/fd of another user's process, mode 0500
            // (`proc_fd_permission`, fs/proc/fd.c).
            Capability::CAP_DAC_READ_SEARCH,
        ]);
        if self.placing {
            // Loading programs of the type `CGROUP_SOCK_ADDR` (`is_net_admin_prog_type`,
            // kernel/bpf/syscall.c).
            kept.insert(Capability::CAP_NET_ADMIN);
        }
        if self.moving {
            // Maps of sockets (`map_create`, kernel/bpf/syscall.c), and ending connections
            // (`sock_diag_rcv_msg`, net/core/sock_diag.c).
            kept.insert(Capability::CAP_NET_ADMIN);
        }
        if self.other_netns {
            // `netns_install`, net/core/net_namespace.c.
            kept.insert(Capability::CAP_SYS_ADMIN);
            // Opening the netns of a socket (`SIOCGSKNS` in `sock_ioctl`, net/socket.c).
            kept.insert(Capability::CAP_NET_ADMIN);
        }
        kept
    }
}

/// Whether this process may load programs and attach them at all: asked before anything is made.
///
/// # Errors
/// When it may not, which another user may.
pub fn suffice_to_start() -> Result<()> {
    let held = caps::read(None, CapSet::Effective).context("cannot read the capabilities")?;
    let has = |capability| held.contains(&capability);
    // `bpf_capable` and `sys_admin` (include/linux/capability.h): the wider one has the other in
    // it.
    let load = has(Capability::CAP_BPF) || has(Capability::CAP_SYS_ADMIN);
    ensure!(
        load && has(Capability::CAP_NET_ADMIN),
        "{} may not load programs into the kernel and attach them (CAP_BPF and CAP_NET_ADMIN are \
         needed): run it as root, with sudo for example",
        user(geteuid())
    );
    Ok(())
}

/// How a message calls a user.
pub fn user(id: Uid) -> String {
    match User::from_uid(id) {
        Ok(Some(user)) => format!("user {id} ({})", user.name),
        _ => format!("user {id}"),
    }
}

/// Gives up for good everything but `kept`, in the calling thread and in those that it starts from
/// now on. What the thread did not have is not missed here: the work that needs it fails and says
/// so.
///
/// # Errors
/// When the kernel refuses to take a capability or to set `no_new_privs`.
pub fn drop_to(kept: Kept) -> Result<()> {
    let held = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    let kept: CapsHashSet = held.intersection(&kept.capabilities()).copied().collect();
    shrink_bounding_set(&kept).context("cannot shrink the capability bounding set")?;
    let set = |kind, capabilities: &CapsHashSet| {
        caps::set(None, kind, capabilities)
            .with_context(|| format!("cannot give up {kind:?} capabilities"))
    };
    caps::clear(None, CapSet::Ambient).context("cannot give up Ambient capabilities")?;
    set(CapSet::Effective, &kept)?;
    set(CapSet::Permitted, &kept)?;
    set(CapSet::Inheritable, &CapsHashSet::new())?;
    prctl::set_no_new_privs().context("cannot set no_new_privs")?;
    if let Err(error) = filter_calls() {
        warn!("no system call is filtered: {error:#}");
    }
    info!("capabilities kept: {}", names(&kept));
    Ok(())
}

/// Whether what was kept is enough for `wanted`, which a new configuration asks for.
///
/// # Errors
/// When a capability was given up: only a new process has it again.
pub fn suffice_for(wanted: Kept) -> Result<()> {
    let held = caps::read(None, CapSet::Effective).context("cannot read the capabilities")?;
    ensure!(
        !wanted.other_netns || held.contains(&Capability::CAP_SYS_ADMIN),
        "entering other network namespaces needs CAP_SYS_ADMIN, which this daemon gave up when it started with \
         `namespaces: own`: restart it (TERM, then `balancer run`: nothing is lost meanwhile) to have the new `namespaces`"
    );
    ensure!(
        !wanted.placing || held.contains(&Capability::CAP_NET_ADMIN),
        "placing connects needs CAP_NET_ADMIN, which this daemon gave up when it started without `connect`: restart it (TERM, \
         then `balancer run`: nothing is lost meanwhile) to have it"
    );
    ensure!(
        !wanted.moving || held.contains(&Capability::CAP_NET_ADMIN),
        "moving connections needs CAP_NET_ADMIN, which this daemon gave up when it started with `move: off`: restart it (TERM, \
         then `balancer run`: nothing is lost meanwhile) to have it"
    );
    Ok(())
}

/// Takes `CAP_SETPCAP` (`cap_prctl_drop`, security/commoncap.c). Without it the set stays: it
/// bounds what executing a file can give, and nothing can be executed.
fn shrink_bounding_set(kept: &CapsHashSet) -> Result<()> {
    if !caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        return Ok(());
    }
    for capability in caps::read(None, CapSet::Bounding)?.difference(kept) {
        caps::drop(None, CapSet::Bounding, *capability)?;
    }
    Ok(())
}

fn names(capabilities: &CapsHashSet) -> String {
    let mut names: Vec<_> = capabilities.iter().map(ToString::to_string).collect();
    names.sort_unstable();
    match names.as_slice() {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}

/// What a daemon never does once it has started, root or not: run programs, look into the memory of
/// others, mount, load modules, open files by handle (which `CAP_DAC_READ_SEARCH` allows on every
/// file system), set clocks, make namespaces.
///
/// A list of what is denied, not of what is allowed: an allow-list would have to follow the C
/// library, the Rust runtime and the architecture (a new libc that prefers another call for the
/// same thing would break the daemon in the field), while what is here holds whatever these do.
const NEVER: &[libc::c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    libc::SYS_kcmp,
    // The C library's bindings do not name it everywhere.
    #[cfg(any(
        target_arch = "x86_64",
        all(target_arch = "aarch64", target_env = "gnu")
    ))]
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_migrate_pages,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_move_pages,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    // aya opens perf events for probes and trace points only, which the balancer has none of.
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    libc::SYS_vhangup,
];

/// Makes the calls of [`NEVER`], and entering a namespace of another kind than netns, fail with
/// `EPERM`.
fn filter_calls() -> Result<()> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules()?, SeccompAction::Allow, denied, architecture)?;
    seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?;
    Ok(())
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    // Without a rule of its own a call matches whatever its arguments are.
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = NEVER
        .iter()
        .copied()
        .chain(x32())
        .map(|number| (number, Vec::new()))
        .collect();
    let kind = SeccompCondition::new(
        1,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Ne,
        u64::from(libc::CLONE_NEWNET.unsigned_abs()),
    )?;
    rules.insert(libc::SYS_setns, vec![SeccompRule::new(vec![kind])?]);
    Ok(rules)
}

/// Some x86-64 kernels take the same calls by a second set of numbers (`__X32_SYSCALL_BIT`; 512 to
/// 547 are those with arguments of another shape, `arch/x86/entry/syscalls/syscall_64.tbl`), which
/// would go around the list.
#[cfg(target_arch = "x86_64")]
fn x32() -> impl Iterator<Item = libc::c_long> {
    const BIT: libc::c_long = 0x4000_0000;
    let listed = NEVER.iter().copied();
    listed
        .chain([libc::SYS_setns])
        .chain(512..=547)
        .map(|number| BIT | number)
}

#[cfg(not(target_arch = "x86_64"))]
fn x32() -> impl Iterator<Item = libc::c_long> {
    std::iter::empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;
    use nix::{
        errno::Errno,
        mount::{MntFlags, umount2},
        sched::{CloneFlags, setns, unshare},
    };
    use std::{path::Path, process::Command, thread};

    const ANY: Kept = Kept {
        other_netns: true,
        placing: false,
        moving: false,
    };
    const OWN: Kept = Kept {
        other_netns: false,
        placing: false,
        moving: false,
    };

    /// In a thread of its own: what is given up is gone for good.
    fn confined<R: Send + 'static>(kept: Kept, work: impl FnOnce() -> R + Send + 'static) -> R {
        let confined = move || {
            drop_to(kept).expect("everything can be given up");
            work()
        };
        thread::spawn(confined).join().expect("no panic")
    }

    fn held() -> [CapsHashSet; 5] {
        [
            CapSet::Effective,
            CapSet::Permitted,
            CapSet::Bounding,
            CapSet::Inheritable,
            CapSet::Ambient,
        ]
        .map(|kind| caps::read(None, kind).expect("readable"))
    }

    fn nothing() -> CapsHashSet {
        CapsHashSet::new()
    }

    #[test]
    fn who_may_load_nothing_is_told_to_be_root() {
        suffice_to_start().expect("root may");
        let without = |given_up: &'static [Capability]| {
            let start = move || {
                for capability in given_up {
                    caps::drop(None, CapSet::Effective, *capability).expect("dropped");
                }
                suffice_to_start()
            };
            thread::spawn(start).join().expect("no panic")
        };
        without(&[Capability::CAP_SYS_ADMIN]).expect("CAP_BPF is enough");
        let load = [Capability::CAP_BPF, Capability::CAP_SYS_ADMIN];
        for given_up in [&load[..], &[Capability::CAP_NET_ADMIN]] {
            let given_up: &'static [_] = given_up.to_vec().leak();
            let error = without(given_up).expect_err("not without").to_string();
            assert!(
                error.contains("user 0 (root)") && error.contains("sudo"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_kept_is_all_that_is_left_here_and_in_new_threads() {
        for kept in [OWN, ANY] {
            let (here, there) = confined(kept, || {
                let there = thread::spawn(held).join().expect("no panic");
                (held(), there)
            });
            let all = kept.capabilities();
            let expected = [all.clone(), all.clone(), all, nothing(), nothing()];
            assert_eq!(here, expected);
            assert_eq!(there, expected);
        }
    }

    /// With `CAP_SYS_ADMIN`, so that it is the filter that says no.
    #[test]
    fn calls_that_are_never_made_fail() {
        confined(ANY, || {
            let executed = Command::new("true").status();
            assert_eq!(
                executed.expect_err("not executed").raw_os_error(),
                Some(libc::EPERM)
            );
            assert_eq!(unshare(CloneFlags::CLONE_NEWNET), Err(Errno::EPERM));
            let unmounted = umount2("/nothing/is/here", MntFlags::empty());
            assert_eq!(unmounted, Err(Errno::EPERM));
        });
    }

    #[test]
    fn namespaces_of_the_network_are_the_only_ones_to_enter() {
        let other = netns::tests::fresh();
        let cookie = netns::cookie_of(&other).expect("cookie");
        confined(ANY, move || {
            assert_eq!(netns::cookie_of(&other).expect("entered"), cookie);
            assert_eq!(setns(&other, CloneFlags::empty()), Err(Errno::EPERM));
            let uts = netns::open(Path::new("/proc/thread-self/ns/uts")).expect("open");
            assert_eq!(setns(uts, CloneFlags::CLONE_NEWUTS), Err(Errno::EPERM));
        });
    }

    #[test]
    fn ones_own_namespace_needs_no_capability() {
        let other = netns::tests::fresh();
        let cookie = netns::cookie().expect("cookie");
        confined(OWN, move || {
            let own = netns::current().expect("open");
            assert_eq!(netns::cookie_of(own).expect("in place"), cookie);
            let entered = netns::cookie_of(&other);
            assert_eq!(
                entered.expect_err("another one").raw_os_error(),
                Some(libc::EPERM)
            );
        });
    }

    #[test]
    fn what_was_missing_before_is_not_an_error() {
        let work = || {
            for missing in [Capability::CAP_SYS_PTRACE, Capability::CAP_SETPCAP] {
                caps::drop(None, CapSet::Effective, missing).expect("dropped");
                caps::drop(None, CapSet::Permitted, missing).expect("dropped");
            }
            drop_to(OWN).expect("everything else can be given up");
            held()
        };
        let [effective, permitted, ..] = thread::spawn(work).join().expect("no panic");
        let mut expected = OWN.capabilities();
        expected.remove(&Capability::CAP_SYS_PTRACE);
        assert_eq!(effective, expected);
        assert_eq!(permitted, expected);
    }

    #[test]
    fn a_configuration_that_wants_more_is_told_so() {
        confined(OWN, || {
            suffice_for(OWN).expect("that was kept");
            let error = suffice_for(ANY).expect_err("that was not").to_string();
            assert!(
                error.contains("CAP_SYS_ADMIN") && error.contains("restart"),
                "{error}"
            );
        });
        confined(ANY, || {
            suffice_for(OWN)
                .and(suffice_for(ANY))
                .expect("all that was kept");
        });
    }

    /// The numbers of the other table are `execve`'s (520) and those of `mount`.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_other_numbers_of_the_same_calls_are_denied_too() {
        let rules = rules().expect("rules");
        for number in [520, libc::SYS_mount, libc::SYS_setns] {
            let rule = rules.get(&(0x4000_0000 | number));
            assert_eq!(rule, Some(&Vec::new()), "{number}");
        }
        assert!(!rules.contains_key(&libc::SYS_bpf));
    }

    #[test]
    fn nothing_kept_is_said_in_words() {
        assert_eq!(names(&nothing()), "none");
        assert_eq!(
            names(&OWN.capabilities()),
            "CAP_BPF, CAP_DAC_READ_SEARCH, CAP_PERFMON, CAP_SYS_PTRACE"
        );
    }
}
