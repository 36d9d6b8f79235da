//! How often the kernel programs ran, and for how long: the kernel's own statistics
//! (`BPF_ENABLE_STATS`).

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use balancer::dataplane::Paths;
use balancer::sys::bpf::{link_program, obj_get};
use testkit::fixtures::Balancer;

use crate::statistics::as_f64;

/// The programs by name.
pub const NAMES: [&str; 2] = ["steer", "account"];

/// While this lives the kernel takes the times of all programs, which costs two looks at its clock
/// a run.
///
/// # Errors
/// When the kernel refuses.
pub fn take_times() -> Result<OwnedFd> {
    enable_stats(Stats::RunTime).context("cannot enable the kernel's statistics of BPF programs")
}

/// The programs of an instance that are attached.
pub struct Programs {
    ids: Vec<(String, u32)>,
}

impl Programs {
    /// Found by the links that its daemon has pinned. A reload may attach others.
    ///
    /// # Errors
    /// When they are not there.
    pub fn of(balancer: &Balancer<'_>) -> Result<Self> {
        let one = |name: &&str| Ok(((*name).to_owned(), attached(balancer, name)?));
        Ok(Self {
            ids: NAMES.iter().map(one).collect::<Result<_>>()?,
        })
    }

    /// The id of `steer`.
    pub fn steer(&self) -> u32 {
        let found = self.ids.iter().find(|(name, _)| name == NAMES[0]);
        found.map_or(0, |(_, id)| *id)
    }

    /// What each has done so far, in the order of [`NAMES`].
    ///
    /// # Errors
    /// When one of them is gone.
    pub fn read(&self) -> Result<[Runs; 2]> {
        let mut runs = [Runs::default(); 2];
        for (runs, name) in runs.iter_mut().zip(NAMES) {
            let id = self.ids.iter().find(|(own, _)| own == name);
            let (_, id) = id.context("both programs were found")?;
            *runs = Runs::of(*id)?;
        }
        Ok(runs)
    }
}

/// The id of an instance's program that is attached, by the one link that its daemon has pinned.
///
/// # Errors
/// When it is not there.
pub fn attached(balancer: &Balancer<'_>, name: &str) -> Result<u32> {
    let directory = Paths::new(balancer.state()).current();
    let prefix = format!("link_{name}_");
    let pins = directory
        .read_dir()
        .with_context(|| format!("cannot read {}", directory.display()))?;
    let mut found = Vec::new();
    for entry in pins {
        let pin: PathBuf = entry?.path();
        let file = pin.file_name().unwrap_or_default().to_string_lossy();
        if file.starts_with(&prefix) {
            let link = obj_get(&pin).with_context(|| format!("cannot open {file}"))?;
            found.push(link_program(link)?);
        }
    }
    ensure!(
        found.len() == 1,
        "{} should hold one link of {name}: {found:?}",
        directory.display()
    );
    Ok(found[0])
}

/// Runs of a program.
#[derive(Clone, Copy, Debug, Default)]
pub struct Runs {
    /// How often it ran.
    pub count: u64,
    /// For how long.
    pub time: Duration,
}

impl Runs {
    /// Of the program with that id.
    ///
    /// # Errors
    /// When it is gone.
    pub fn of(id: u32) -> Result<Self> {
        for program in loaded_programs() {
            // Others come and go while one looks.
            if let Ok(program) = program
                && program.id() == id
            {
                return Ok(Self {
                    count: program.run_count(),
                    time: program.run_time(),
                });
            }
        }
        anyhow::bail!("the program with id {id} is not loaded any more")
    }

    /// What came since.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            count: self.count - before.count,
            time: self.time.saturating_sub(before.time),
        }
    }

    /// Nanoseconds a run.
    pub fn nanoseconds(&self) -> f64 {
        self.time.as_secs_f64() * 1e9 / as_f64(self.count)
    }
}
