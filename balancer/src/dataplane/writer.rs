//! The one writer of a data plane: its parts, for the daemon.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{Heartbeat, ListenRule, PortKey};

use super::audit::Audit;
use super::audit::handover::Handover;
use super::audit::migrated::Migrated;
use super::loader::Loader;
use super::lock::Lock;
use super::paths::Paths;
use super::tables::Tables;
use crate::sys::clock;

/// The one writer of a data plane.
pub struct Writer {
    /// The programs, loaded and attached.
    pub loader: Loader,
    pub(super) tables: Tables,
    /// The cgroup whose listeners are counted.
    pub(super) cgroup: PathBuf,
    pub(super) rules: BTreeMap<PortKey, ListenRule>,
    /// Since when a closed slot has been seen without connections.
    pub(super) empty_since: BTreeMap<u32, (u32, Instant)>,
    /// What the comparisons with the socket table have found so far.
    pub(super) audit: Audit,
    pub(super) handover: Handover,
    /// By the cookie of their namespace.
    pub(super) migrated: BTreeMap<u64, Migrated>,
}

impl Writer {
    /// Makes a data plane, or adopts the one that is there: see [`Loader::start`].
    ///
    /// # Errors
    /// When the pins are not what they should be, or the kernel refuses something.
    pub fn start(paths: Paths, lock: Lock, cgroup: &Path) -> Result<Self> {
        let handover = Handover::of(&paths)?;
        let (loader, tables) = Loader::start(paths, lock, cgroup)?;
        let audit = Audit::of(tables.audit_totals());
        Ok(Self {
            loader,
            tables,
            cgroup: cgroup.to_owned(),
            rules: BTreeMap::new(),
            empty_since: BTreeMap::new(),
            audit,
            handover,
            migrated: BTreeMap::new(),
        })
    }

    /// Makes this data plane the one that decides: see [`Loader::switch`].
    ///
    /// # Errors
    /// When the kernel refuses a program, or a pin can't be moved or removed.
    pub fn switch(&mut self) -> Result<()> {
        self.loader.switch()?;
        self.handover.close();
        Ok(())
    }

    /// The daemon lives.
    pub fn beat(&self, limit: Duration) {
        self.tables.beat(Heartbeat {
            last_ns: clock::monotonic_ns(),
            limit_ns: u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX),
        });
    }
}
