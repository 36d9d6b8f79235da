//! What is measured, how long, and where results go.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The numbers of backends that a cost is measured for.
pub const BACKENDS: [u16; 5] = [1, 3, 8, 64, 256];
/// The number of backends wherever one is enough.
pub const USUAL: u16 = 8;
/// Where results go in the target directory.
const RESULTS: &str = "bench";
/// The balancer's policies.
pub const POLICIES: [&str; 3] = ["least-connections", "round-robin", "source-hash"];

/// One of the things to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Measurement {
    /// Connections a second.
    Rate,
    /// Nanoseconds a run of the kernel programs.
    Syn,
    /// Latency and throughput of open connections.
    Traffic,
    /// Memory and time with very many connections.
    Scale,
    /// How fast a changed quota and a new daemon take effect.
    Control,
    /// 5,000 clients that lose their server at once.
    Storm,
    /// What it costs a client's node to place connections.
    Placing,
    /// How evenly clients and their messages are spread.
    Evenness,
    /// What the daemons of all nodes cost the API server.
    Agents,
}

impl Measurement {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 9] = [
        Self::Rate,
        Self::Syn,
        Self::Traffic,
        Self::Scale,
        Self::Control,
        Self::Storm,
        Self::Placing,
        Self::Evenness,
        Self::Agents,
    ];

    /// For people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Rate => "Connection rate",
            Self::Syn => "Cost of one connection in the kernel",
            Self::Traffic => "Established traffic",
            Self::Scale => "Very many connections",
            Self::Control => "Control",
            Self::Storm => "Storm recovery",
            Self::Placing => "Placing",
            Self::Evenness => "Evenness of load",
            Self::Agents => "Cost in the API server",
        }
    }
}

/// How this run measures.
pub struct Settings {
    quick: bool,
    target: PathBuf,
    /// Two runs at a time would measure each other.
    _lock: Flock<File>,
}

impl Settings {
    /// Where this program was built is where results go.
    ///
    /// # Errors
    /// When the directory for them can't be made, or another run is under way.
    pub fn new(quick: bool) -> Result<Self> {
        let own = std::env::current_exe().context("cannot tell where this program is")?;
        let target = own
            .ancestors()
            .nth(2)
            .context("this program is not in a target directory: start it as `cargo xtask bench`")?
            .to_owned();
        let results = target.join(RESULTS);
        fs::create_dir_all(&results)
            .with_context(|| format!("cannot make {}", results.display()))?;
        let lock = File::create(results.join("lock")).context("cannot make the lock file")?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| anyhow!("another run uses {} ({error})", results.display()))?;
        let settings = Self {
            quick,
            target,
            _lock: lock,
        };
        // Those of the last run.
        let _ = fs::remove_dir_all(settings.logs());
        fs::create_dir(settings.logs())
            .with_context(|| format!("cannot make {}", settings.logs().display()))?;
        Ok(settings)
    }

    /// Whether this is only to see that it works.
    pub const fn is_quick(&self) -> bool {
        self.quick
    }

    /// The first for a quick run, the second for a full one.
    pub fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Where results go.
    pub fn results(&self) -> PathBuf {
        self.target.join(RESULTS)
    }

    /// Where peers log, and have their configuration.
    pub fn logs(&self) -> PathBuf {
        self.results().join("peers")
    }

    /// The Envoy that `cargo xtask setup` has installed.
    pub fn envoy(&self) -> PathBuf {
        self.target.join("tools/envoy/bin/envoy")
    }

    /// The page that explains the figures.
    pub fn docs() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/performance.md")
    }
}

/// One of the processors that a thread may use.
#[derive(Clone, Copy)]
pub enum Processor {
    First,
    Last,
}

/// Keeps the calling thread, and those that it starts from now on, on one processor.
///
/// # Errors
/// When the kernel refuses it.
pub fn keep_to(which: Processor) -> Result<()> {
    let this_thread = Pid::from_raw(0);
    let allowed = sched_getaffinity(this_thread).context("cannot read the processors")?;
    let mut numbers =
        (0..CpuSet::count()).filter(|number| allowed.is_set(*number).unwrap_or(false));
    let number = match which {
        Processor::First => numbers.next(),
        Processor::Last => numbers.next_back(),
    };
    let mut only = CpuSet::new();
    only.set(number.context("no processor may be used")?)?;
    sched_setaffinity(this_thread, &only).context("cannot choose a processor")
}

/// Processors that this program may use.
pub fn processors() -> usize {
    available_parallelism().map_or(1, usize::from)
}
