//! Loading the kernel half: its constants, its pins, the shape of what is already pinned.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::{ProgramError, ProgramInfo, SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use nix::time::{ClockId, clock_gettime};
use tracing::info;

use super::tables::{LAYOUT, MapShape};
use super::{Paths, pins};
use crate::discover::kernel_offsets;
use crate::sys::{bpf, bpffs::DetachedBpffs, clock};

/// The object that `cargo xtask build` made; empty when it was not built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/balancer.o"));

/// What loads the kernel half, told of the running kernel.
pub struct Kernel(EbpfLoader<'static>);

impl Kernel {
    /// Reads what the kernel half must be told from the running kernel, once for all objects: that takes longer than loading one.
    pub fn read() -> Result<Self> {
        ensure!(
            !OBJECT.is_empty(),
            "this program was built without its kernel half: build it with `cargo xtask build`"
        );
        let hz = clock::jiffies_per_second().context("cannot find out the kernel's tick rate")?;
        let at = kernel_offsets()?;
        let constants: [(&str, u32); 16] = [
            ("HZ", hz),
            ("AT_HALF_OPEN", at.accept_qlen),
            ("AT_YOUNG", at.accept_young),
            ("AT_FAST_OPEN", at.fastopen_qlen),
            ("AT_QUEUE", at.ack_backlog),
            ("AT_BACKLOG", at.max_ack_backlog),
            ("AT_OVERFLOW", at.ts_recent_stamp),
            ("AT_REUSEPORT", at.reuseport_cb),
            ("AT_GROUP_OVERFLOW", at.synq_overflow_ts),
            ("AT_NET", at.netns),
            ("AT_SYNCOOKIES", at.sysctl_tcp_syncookies),
            ("AT_UID", at.uid),
            ("AT_V6_ONLY", at.ipv6only),
            ("V6_ONLY_BIT", at.ipv6only_mask),
            ("AT_TGID", at.task_tgid),
            ("AT_PID", at.task_pid),
        ];
        let mut loader = EbpfLoader::new();
        // Tens of megabytes that nothing in the kernel half is relocated by.
        loader.btf(None);
        for (name, value) in constants {
            loader.override_global(name, forever(value), true);
        }
        Ok(Self(loader))
    }

    /// Creates or opens every map in the directory and makes the programs ready to be loaded for a namespace.
    pub fn open_object(&mut self, directory: &Path, netns: u64) -> Result<Ebpf> {
        self.open(OBJECT, directory, netns)
    }

    /// The same with another object than the one that is built in.
    pub(super) fn open(&mut self, object: &[u8], directory: &Path, netns: u64) -> Result<Ebpf> {
        self.0
            .default_map_pin_directory(directory)
            .override_global("NETNS", forever(netns), true);
        self.0.load(object).with_context(|| {
            format!(
                "cannot create the maps under {} (is it on a BPF file system? are we root?)",
                directory.display()
            )
        })
    }
}

/// The loader borrows its constants: a few bytes for each namespace that is ever guarded.
fn forever<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// Loads `account`.
pub fn account(object: &mut Ebpf) -> Result<&mut SockOps> {
    let program: &mut SockOps = object
        .program_mut("account")
        .context("the kernel half has no program `account`")?
        .try_into()?;
    let took = timed("account", || program.load())?;
    say_loaded("account", took, program.info());
    Ok(program)
}

/// Loads `steer`.
pub fn steer(object: &mut Ebpf) -> Result<&mut SkLookup> {
    let program: &mut SkLookup = object
        .program_mut("steer")
        .context("the kernel half has no program `steer`")?
        .try_into()?;
    let took = timed("steer", || program.load())?;
    say_loaded("steer", took, program.info());
    Ok(program)
}

/// What the verifier and the JIT took, in this thread's processor time: a busy machine must not look like a slow load.
fn timed(program: &str, load: impl FnOnce() -> Result<(), ProgramError>) -> Result<Duration> {
    let before = processor_time()?;
    load().map_err(|error| rejected(program, &error))?;
    Ok(processor_time()?.saturating_sub(before))
}

fn processor_time() -> Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .context("cannot read the thread's processor time")?;
    Ok(Duration::from(time))
}

fn say_loaded(program: &str, took: Duration, info: Result<ProgramInfo, ProgramError>) {
    let instructions = info
        .ok()
        .and_then(|info| info.verified_instruction_count())
        .unwrap_or(0);
    info!(
        "loaded {program} in {:.1} ms ({instructions} instructions verified)",
        took.as_secs_f64() * 1e3
    );
}

/// Loads both programs and lets go of them: whether this kernel takes them. Nothing is attached, and the maps are pinned where
/// nobody sees them.
///
/// # Errors
/// When the kernel half is not built in, no BPF file system can be made, or the kernel refuses something.
pub fn trial() -> Result<()> {
    let bpffs = detached_bpffs()?;
    let mut object = Kernel::read()?.open_object(bpffs.path(), 0)?;
    account(&mut object)?;
    steer(&mut object)?;
    Ok(())
}

pub(super) fn detached_bpffs() -> Result<DetachedBpffs> {
    DetachedBpffs::new()
        .context("cannot make a BPF file system to try the programs in: is CAP_SYS_ADMIN there?")
}

/// The verifier's log in full: without it nobody can tell what it minded.
fn rejected(program: &str, error: &ProgramError) -> anyhow::Error {
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => anyhow::anyhow!(
            "the kernel refused the program `{program}`: {io_error}. `balancer doctor` tells whether a capability is missing \
             (without CAP_PERFMON the verifier takes less) or the kernel is too old (6.1 is the oldest supported). Anything else \
             is a defect of this build: please report it with this log of the verifier:\n{verifier_log}"
        ),
        other => anyhow::anyhow!("cannot load the program `{program}`: {other}"),
    }
}

/// Compares what is pinned in a directory with what this build expects: the shape of every map, and of every link what it attaches
/// to what.
///
/// # Errors
/// Names the pin that is missing or different: nothing that this build does not know is ever used.
pub fn check(directory: &Path) -> Result<()> {
    check_maps(directory)?;
    let links =
        Paths::links(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for link in links {
        pins::open_own_link(&link)?;
    }
    Ok(())
}

/// Compares every pinned map with the shape that this build expects.
///
/// # Errors
/// Names the map that is missing or different.
pub fn check_maps(directory: &Path) -> Result<()> {
    for (name, expected) in LAYOUT {
        let path = directory.join(name);
        let map = bpf::obj_get(&path).with_context(|| {
            format!(
                "cannot open the pinned map {} (missing, or no pin): `balancer unload` clears the rest, with its counters",
                path.display()
            )
        })?;
        let strange = |found: String| {
            format!(
                "the pinned map {} was made by something else (it is {found}, this build needs {expected:?}): \
                 `balancer unload` removes it, with its counters",
                path.display()
            )
        };
        if bpf::Object::of(&map)? != Some(bpf::Object::Map) {
            bail!(strange("no map".to_owned()));
        }
        let found = shape(
            &bpf::map_info(&map).with_context(|| format!("cannot query {}", path.display()))?,
        );
        if found != *expected {
            bail!(strange(format!("{found:?}")));
        }
    }
    Ok(())
}

fn shape(info: &bpf::MapInfo) -> MapShape {
    MapShape {
        kind: info.kind,
        key: info.key_size,
        value: info.value_size,
        entries: info.max_entries,
        flags: info.flags,
    }
}
