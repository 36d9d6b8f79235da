//! The one writer of a data plane: its parts, for the daemon.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use balancer_common::abi::BackendId;
use tracing::warn;

use super::audit::{Audit, Handover};
use super::endpoints::Endpoints;
use super::loader::Loader;
use super::lock::Lock;
use super::look::{self, Depth, HealthLooks};
use super::moving::why_unmovable;
use super::paths::Paths;
use super::placing::Placing;
use super::plan::{Plan, Rules};
use super::read::snapshot;
use super::services;
use super::slots::EmptySlots;
use super::tables::{SlotView, Tables};
use crate::sys::sock_diag::Socket;

/// The one writer of a data plane.
pub struct Writer {
    /// The programs, loaded and attached.
    pub loader: Loader,
    /// The pinned maps.
    pub tables: Tables,
    /// The rules in force.
    pub rules: Rules,
    /// The closed slots that can soon be given away.
    pub empty: EmptySlots,
    /// The comparison of the counts with the socket table.
    pub audit: Audit,
    /// What looks at backends have seen.
    pub looks: HealthLooks,
    /// The endpoints in the maps.
    pub endpoints: Endpoints,
}

/// A connection of a backend.
#[derive(Clone, Debug)]
pub struct Found {
    /// The server's end.
    pub socket: Socket,
    /// Why it can't be moved, in words; `None`: it can.
    pub unmovable: Option<&'static str>,
}

impl Writer {
    /// Makes a data plane, or adopts the one that is there: see [`Loader::start`].
    ///
    /// # Errors
    /// When the pins are not what they should be, or the kernel refuses something.
    pub fn start(paths: Paths, lock: Lock, cgroup: &Path) -> Result<Self> {
        let handover = Handover::of(&paths)?;
        let (loader, tables) = Loader::start(paths, lock, cgroup)?;
        Ok(Self {
            endpoints: Endpoints::adopt(&tables.place)?,
            audit: Audit::new(tables.audit_totals(), handover, cgroup),
            loader,
            tables,
            looks: HealthLooks::default(),
            rules: Rules::default(),
            empty: EmptySlots::default(),
        })
    }

    /// Puts a plan in force; without one, goes on with the rules that are in the kernel, while it
    /// is not known what they should be. Returns the names of the services that there was no room
    /// for.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn apply(&mut self, plan: Option<&Plan>) -> Result<Vec<String>> {
        if let Some(plan) = plan {
            return services::apply(&mut self.tables, plan, &mut self.rules);
        }
        self.rules = services::rules(&self.tables)?;
        Ok(Vec::new())
    }

    /// The established connections of backends of one netns that can be moved: those that a process
    /// has accepted, and that are not exempt. Must run inside that netns.
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn connections(&self, slots: &[SlotView]) -> Result<Vec<(BackendId, Socket)>> {
        let all = self.all_connections(slots)?.into_iter();
        let movable = all.filter(|(_, found)| found.unmovable.is_none());
        Ok(movable
            .map(|(backend, found)| (backend, found.socket))
            .collect())
    }

    /// All established connections of backends of one netns. Must run inside that netns.
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn all_connections(&self, slots: &[SlotView]) -> Result<Vec<(BackendId, Found)>> {
        let services = slots.iter();
        let services = services.map(|view| (view.id(), view.member.backend.service));
        let services: HashMap<BackendId, u16> = services.collect();
        let found = |(backend, socket): (BackendId, Socket)| {
            let service = services.get(&backend).copied().unwrap_or_default();
            let unmovable = why_unmovable(&self.tables, service, &socket)?;
            Ok((backend, Found { socket, unmovable }))
        };
        let all = look::connections(&self.tables, slots)?;
        all.into_iter().map(found).collect()
    }

    /// Makes this data plane the one that decides: see [`Loader::switch`].
    ///
    /// # Errors
    /// When the kernel refuses a program, or a pin can't be moved or removed.
    pub fn switch(&mut self, step: impl Fn()) -> Result<()> {
        self.loader.switch(step)?;
        self.audit.end_handover();
        Ok(())
    }

    /// Attaches the programs that place clients' connections, or detaches them: see
    /// [`Loader::set_placing`].
    ///
    /// # Errors
    /// When the kernel refuses a program, or a pin can't be made or removed.
    pub fn set_placing(&mut self, on: bool) -> Result<Placing> {
        let placing = self.loader.set_placing(on)?;
        if placing == Placing::On
            && let Err(error) = self.audit.placed.begin(&mut self.loader)
        {
            warn!("what this node places is not compared with its sockets: {error:#}");
        }
        Ok(placing)
    }

    /// What becomes of connections without the data plane: see [`snapshot::Snapshot::left_open`].
    pub fn left_open(&self) -> Option<String> {
        let snapshot = snapshot::take(&self.tables, &[]);
        snapshot.ok().and_then(|snapshot| snapshot.left_open())
    }

    /// Compares the counts of one netns with its socket table: see [`Audit::check`].
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn check(&mut self, netns: u64, eager: bool) -> Result<()> {
        self.audit
            .check(&mut self.tables, &self.rules, netns, eager)
    }

    /// Looks at the health of one netns' backends: see [`HealthLooks::look`].
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn look(&mut self, netns: u64, depth: Depth) -> Result<()> {
        self.looks.look(&self.tables, netns, depth)
    }
}
