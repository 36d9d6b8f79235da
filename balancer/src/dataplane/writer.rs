//! The daemon's side: load, attach, adopt, replace, change.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::programs::CgroupAttachMode;
use aya::programs::links::FdLink;
use balancer_common::abi::{Heartbeat, ListenRule, PortKey};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use tracing::info;

use super::events::{self, Events};
use super::load::{self, Kernel, check_pins};
use super::lock::Lock;
use super::tables::Tables;
use super::{Paths, pins};
use crate::sys::clock;

/// The one writer of a data plane.
pub struct Writer {
    paths: Paths,
    kernel: Kernel,
    pub(super) tables: Tables,
    /// The cgroup whose listeners are counted.
    pub(super) cgroup: PathBuf,
    pub(super) rules: BTreeMap<PortKey, ListenRule>,
    /// Since when a closed slot has been seen without connections.
    pub(super) empty_since: BTreeMap<u32, (u32, Instant)>,
    /// The loaded objects: they own the kernel half's log buffers.
    objects: Vec<Ebpf>,
    adopted: bool,
    _lock: Lock,
}

impl Writer {
    /// Takes the right to write, making the state directory where it is missing.
    ///
    /// # Errors
    /// When another process has it, or the directory can't be made.
    pub fn lock(paths: &Paths) -> Result<Lock> {
        pins::lock(paths)
    }

    /// Makes a data plane, or adopts the one that is there; attaches `account` to the cgroup.
    ///
    /// # Errors
    /// When the pins are of another build, or the kernel refuses something. Nothing is
    /// left behind then that was not there before.
    pub fn start(
        paths: Paths,
        lock: Lock,
        cgroup: &Path,
        heartbeat_limit: Duration,
    ) -> Result<Self> {
        let kernel = Kernel::read()?;
        pins::remove_directory(&paths.staging())?;
        let directory = paths.current();
        let adopted = directory.exists();
        let working = if adopted {
            directory.clone()
        } else {
            paths.staging()
        };
        if adopted {
            check_pins(&directory)?;
        } else {
            pins::make_directory(&working)?;
        }
        let started = Self::attach_account(&kernel, &working, cgroup, heartbeat_limit);
        let (object, tables) = match started {
            Ok(started) => started,
            Err(error) => {
                if !adopted {
                    pins::remove_directory(&working)?;
                }
                return Err(error);
            }
        };
        if !adopted {
            renameat2(
                AT_FDCWD,
                &working,
                AT_FDCWD,
                &directory,
                RenameFlags::RENAME_NOREPLACE,
            )
            .with_context(|| {
                format!(
                    "cannot rename {} to {}",
                    working.display(),
                    directory.display()
                )
            })?;
        }
        info!(
            "{} the data plane in {}",
            if adopted { "adopted" } else { "made" },
            directory.display()
        );
        Ok(Self {
            paths,
            kernel,
            tables,
            cgroup: cgroup.to_owned(),
            rules: BTreeMap::new(),
            empty_since: BTreeMap::new(),
            objects: vec![object],
            adopted,
            _lock: lock,
        })
    }

    fn attach_account(
        kernel: &Kernel,
        directory: &Path,
        cgroup: &Path,
        limit: Duration,
    ) -> Result<(Ebpf, Tables)> {
        let mut object = kernel.open_object(directory, 0)?;
        let tables = Tables::open(directory)?;
        tables.beat(beat(limit));
        let target = fs::File::open(cgroup)
            .with_context(|| format!("cannot open the cgroup {}", cgroup.display()))?;
        let id = target
            .metadata()
            .with_context(|| format!("cannot query the cgroup {}", cgroup.display()))?
            .ino();
        let program = load::account(&mut object)?;
        let pin = Paths::account(directory, id);
        if pin.exists() {
            pins::replace(&pin, program.fd()?.as_fd())?;
        } else {
            let link = program.attach(&target, CgroupAttachMode::Single).with_context(|| {
                format!(
                    "cannot attach `account` to the cgroup {} (is it a cgroup2 directory? EPERM: an older program sits \
                     there that allows no other; `balancer doctor` names it)",
                    cgroup.display()
                )
            })?;
            let link: FdLink = program.take_link(link)?.try_into()?;
            link.pin(&pin)
                .with_context(|| format!("cannot pin {}", pin.display()))?;
        }
        pins::remove_other_pins(directory, |path| {
            Paths::cgroup_of(path).is_some_and(|other| other != id)
        })?;
        Ok((object, tables))
    }

    /// Attaches `steer` to a network namespace, or replaces the one that is there.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn guard(&mut self, netns: BorrowedFd<'_>, cookie: u64) -> Result<()> {
        let directory = self.paths.current();
        let mut object = self.kernel.open_object(&directory, cookie)?;
        let program = load::steer(&mut object)?;
        let pin = Paths::steer(&directory, cookie);
        if pin.exists() {
            pins::replace(&pin, program.fd()?.as_fd())?;
        } else {
            let link = program.attach(netns).with_context(|| {
                format!("cannot attach `steer` to the network namespace with cookie {cookie} (at most 64 programs a namespace)")
            })?;
            let link: FdLink = program.take_link(link)?.into();
            link.pin(&pin)
                .with_context(|| format!("cannot pin {}", pin.display()))?;
        }
        self.objects.push(object);
        Ok(())
    }

    /// Whether `steer` is attached to a namespace.
    pub fn guards(&self, cookie: u64) -> bool {
        Paths::steer(&self.paths.current(), cookie).exists()
    }

    /// Detaches `steer` from every namespace that is not wanted.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn unguard_others(&self, wanted: &HashSet<u64>) -> Result<()> {
        pins::remove_other_pins(&self.paths.current(), |path| {
            Paths::netns_of(path).is_some_and(|cookie| !wanted.contains(&cookie))
        })
    }

    /// Passes on what the kernel half of the programs loaded since the last call logs. Must be called inside a runtime.
    pub fn follow_logs(&mut self) {
        self.objects.drain(..).for_each(events::follow_log);
    }

    /// The events of the kernel half. Must be called inside a runtime.
    ///
    /// # Errors
    /// When the ring can't be opened.
    pub fn events(&self) -> Result<Events> {
        Events::open(&self.paths.current())
    }

    /// Whether the data plane was there before.
    pub const fn adopted(&self) -> bool {
        self.adopted
    }

    /// The daemon lives.
    pub fn beat(&self, limit: Duration) {
        self.tables.beat(beat(limit));
    }

    /// Takes everything out of the kernel.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn remove(&self) -> Result<()> {
        pins::remove_data_plane(&self.paths)
    }
}

fn beat(limit: Duration) -> Heartbeat {
    Heartbeat {
        last_ns: clock::monotonic_ns(),
        limit_ns: u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX),
    }
}
