//! Loading the kernel half: what it is told of the running kernel, its maps, its programs.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::{Program as Loaded, ProgramError, ProgramFd, SkMsg};
use aya::{Btf, Ebpf, EbpfLoader};
use nix::time::{ClockId, clock_gettime};
use tracing::info;

use super::Paths;
use super::programs::{GOAWAY, PLACED_SOCKETS, PROGRAMS, Program};
use crate::discover::kernel_offsets;
use crate::sys::bpffs::DetachedBpffs;
use crate::sys::{clock, memory};

/// The object that `cargo xtask build` made; empty when it was not built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/balancer.o"));

/// What loads the kernel half, told of the running kernel.
pub struct ObjectLoader(EbpfLoader<'static>);

impl ObjectLoader {
    /// Reads from the running kernel what the kernel half must be told. Once for all objects: that
    /// takes longer than loading one.
    pub fn new() -> Result<Self> {
        ensure!(
            !OBJECT.is_empty(),
            "this program was built without its kernel half: build it with `cargo xtask build`"
        );
        let mut loader = EbpfLoader::new();
        // Tens of megabytes that nothing in the kernel half is relocated by.
        loader.btf(None);
        let hz = clock::jiffies_per_second().context("cannot find out the kernel's tick rate")?;
        for (name, value) in kernel_offsets()?.into_iter().chain([("HZ", hz)]) {
            loader.override_global(name, forever(value), true);
        }
        Ok(Self(loader))
    }

    /// Creates or opens every map in the directory and makes the programs ready to be loaded for a
    /// netns; 0 for those that are not attached to one.
    pub fn open(&mut self, directory: &Path, netns: u64) -> Result<Ebpf> {
        self.open_other(OBJECT, directory, netns)
    }

    /// As [`Self::open`], with another object than the one that is built in.
    fn open_other(&mut self, object: &[u8], directory: &Path, netns: u64) -> Result<Ebpf> {
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

/// The loader borrows its constants: a few bytes for each netns that is ever guarded.
fn forever<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// Loads one program of an object, and says what that took.
pub fn load<'a>(object: &'a mut Ebpf, program: &Program) -> Result<&'a Loaded> {
    let name = program.name;
    let loaded = object
        .program_mut(name)
        .with_context(|| format!("the kernel half has no program `{name}`"))?;
    let before = processor_time()?;
    match loaded {
        Loaded::SkLookup(program) => program.load(),
        Loaded::SockOps(program) => program.load(),
        Loaded::CgroupSockAddr(program) => program.load(),
        _ => bail!("the program `{name}` of the kernel half has a type that no hook here takes"),
    }
    .map_err(|error| rejected(name, &error))?;
    let took = processor_time()?.saturating_sub(before);
    let verified = loaded.info().ok();
    let verified = verified.and_then(|info| info.verified_instruction_count());
    info!(
        "loaded {name} in {:.1} ms ({} instructions verified)",
        took.as_secs_f64() * 1e3,
        verified.unwrap_or(0)
    );
    Ok(loaded)
}

/// The map that the iterator goes over.
pub const PLACED_SOCKETS_MAP: &str = "PLACED_SOCKET";

/// Loads the iterator over the sockets that were placed. That takes the kernel's type information,
/// tens of megabytes for a moment.
pub fn load_placed_sockets(object: &mut Ebpf) -> Result<&ProgramFd> {
    let name = PLACED_SOCKETS;
    let Some(Loaded::Iter(program)) = object.program_mut(name) else {
        bail!("the kernel half has no iterator `{name}`");
    };
    let types = Btf::from_sys_fs().context("cannot read the kernel's type information")?;
    let loaded = program.load("bpf_sk_storage_map", &types);
    drop(types);
    memory::give_back();
    loaded.map_err(|error| forbidden(&error).unwrap_or_else(|| rejected(name, &error)))?;
    Ok(program.fd()?)
}

/// Loads the program that sees messages.
pub fn load_goaway(object: &mut Ebpf) -> Result<&mut SkMsg> {
    let Some(Loaded::SkMsg(program)) = object.program_mut(GOAWAY) else {
        bail!("the kernel half has no program `{GOAWAY}` for messages");
    };
    program.load().map_err(|error| rejected(GOAWAY, &error))?;
    Ok(program)
}

/// That a kernel forbids an iterator, as some do that are locked down, whatever is in it: EPERM.
/// The verifier minds what is in it with EACCES.
fn forbidden(error: &ProgramError) -> Option<anyhow::Error> {
    let ProgramError::LoadError { io_error, .. } = error else {
        return None;
    };
    if io_error.raw_os_error() != Some(libc::EPERM) {
        return None;
    }
    let error = io::Error::from_raw_os_error(libc::EPERM);
    Some(anyhow::Error::new(error).context(
        "the kernel forbids iterators over a socket storage, as some do that are locked down",
    ))
}

/// Whether the kernel did not permit something.
pub(super) fn is_not_permitted(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(|error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied)
}

/// This thread's: a busy machine must not look like a slow load.
fn processor_time() -> Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .context("cannot read the thread's processor time")?;
    Ok(Duration::from(time))
}

/// The verifier's log in full: without it nobody can tell what it minded.
fn rejected(program: &str, error: &ProgramError) -> anyhow::Error {
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => anyhow::anyhow!(
            "the kernel refused the program `{program}`: {io_error}. `balancer doctor` tells \
             whether a capability is missing (without CAP_PERFMON the verifier takes less) or the \
             kernel is too old (6.1 is the oldest supported). Anything else is a defect of this \
             build: please report it with this log of the verifier:\n{verifier_log}"
        ),
        other => anyhow::anyhow!("cannot load the program `{program}`: {other}"),
    }
}

/// Loads every program and lets go of them: whether this kernel takes them. Nothing is attached,
/// and the maps are pinned where nobody sees them. Without `CAP_SYS_ADMIN`, which the daemon can do
/// without where a BPF file system is mounted, they are pinned for a moment beside the state
/// directory. Returns why it forbids the iterator that counts are compared by, without which the
/// rest works; `None`: it takes that, too.
///
/// # Errors
/// When the kernel half is not built in, there is no place for the pins, or the kernel refuses
/// something.
pub fn trial(paths: &Paths) -> Result<Option<String>> {
    match detached_bpffs() {
        Ok(bpffs) => try_programs(bpffs.path()),
        Err(error) => {
            let beside = paths.state_dir().parent().unwrap_or(Path::new("/"));
            // Whatever keeps a directory from being made there, the missing privilege is to blame.
            let pins = tempfile::Builder::new()
                .prefix("balancer-trial-")
                .tempdir_in(beside)
                .map_err(|_| error)?;
            try_programs(pins.path())
        }
    }
}

fn try_programs(pins: &Path) -> Result<Option<String>> {
    let mut object = ObjectLoader::new()?.open(pins, 0)?;
    for program in &PROGRAMS {
        load(&mut object, program)?;
    }
    load_goaway(&mut object)?;
    match load_placed_sockets(&mut object) {
        Ok(_) => Ok(None),
        Err(error) if is_not_permitted(&error) => Ok(Some(format!("{error:#}"))),
        Err(error) => Err(error),
    }
}

/// Makes the maps of another object than the one that is built in, pinned where nobody sees them,
/// and its programs ready to be loaded.
///
/// # Errors
/// When no BPF file system can be made, or the kernel refuses a map.
pub fn open_detached(object: &[u8]) -> Result<(Ebpf, DetachedBpffs)> {
    let bpffs = detached_bpffs()?;
    let opened = ObjectLoader::new()?.open_other(object, bpffs.path(), 0)?;
    Ok((opened, bpffs))
}

fn detached_bpffs() -> Result<DetachedBpffs> {
    DetachedBpffs::new()
        .context("cannot make a BPF file system to try the programs in: is CAP_SYS_ADMIN there?")
}
