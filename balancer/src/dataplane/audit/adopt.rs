//! What runs already when the daemon comes: listeners are registered as the kernel half would have done, and the
//! connections that they had, which the kernel half can't follow, are shared out among them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData, MapError, SkStorage};
use balancer_common::abi::{
    Address, Backend, BackendState, Connection, ListenRule, MAX_MEMBERS, MAX_SLOTS, SlotState,
};
use tracing::{info, warn};

use super::super::plain::Plain;
use super::super::plan::rule_of;
use super::super::tables::{SlotView, connection_of, every_slot};
use super::super::writer::Writer;
use super::socket_table::SocketTable;
use crate::discover::{Listener, SocketOwner, owners};
use crate::sys::sock_diag::{Family, Socket};

/// `BPF_NOEXIST`: never take a listener from the kernel half, which may register it at this very moment.
pub(in crate::dataplane) const ONLY_NEW: u64 = 1;
/// `BPF_EXIST`: in place of what a former tenant of its slot has left.
pub(in crate::dataplane) const ONLY_OLD: u64 = 2;
/// When a listener is tried again that can't be registered: looking for its owner takes a look at every process.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// Why a listener has no slot, told apart from other reasons: while that is so, nobody is refused.
#[derive(Debug)]
struct NoSlot(&'static str, usize);

const ALL_TAKEN: NoSlot = NoSlot("all slots are taken", MAX_SLOTS);

impl fmt::Display for NoSlot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ({})", self.0, self.1)
    }
}

impl std::error::Error for NoSlot {}

/// A listener that a rule claims.
struct Claimant<'a> {
    socket: &'a Socket,
    address: Address,
    rule: ListenRule,
}

impl Writer {
    /// Registers the listeners of a census that the rules in force claim and nobody has registered; says whether there was any. One that
    /// can't be registered is named in the log. One that was not there at the last comparison may be registering itself at
    /// this moment, and is left alone unless `eager`. Must run inside the namespace.
    ///
    /// # Errors
    /// When the socket table can't be read.
    pub(in crate::dataplane) fn adopt(
        &mut self,
        netns: u64,
        socket_table: &SocketTable,
        eager: bool,
    ) -> Result<bool> {
        let claimants = self.claimants(netns, socket_table, eager);
        if claimants.is_empty() {
            return Ok(false);
        }
        let cgroups = cgroup_ids(&self.cgroup);
        let current = crate::sys::netns::current().context("cannot open the network namespace")?;
        let listeners: HashMap<u64, Listener> = crate::discover::listeners(&current)
            .context("cannot list the listeners")?
            .into_iter()
            .map(|listener| (listener.socket.cookie, listener))
            .collect();
        let mut adopted = false;
        for claimant in claimants {
            let cookie = claimant.socket.cookie;
            let Some(listener) = listeners.get(&cookie) else {
                continue;
            };
            if within(cgroups.as_ref(), claimant.socket) {
                adopted |= self.adopt_or_say_why(netns, &claimant, listener);
            } else {
                self.retry_later(cookie);
            }
        }
        Ok(adopted)
    }

    fn claimants<'a>(
        &mut self,
        netns: u64,
        socket_table: &'a SocketTable,
        eager: bool,
    ) -> Vec<Claimant<'a>> {
        let now = Instant::now();
        let mut claimants = Vec::new();
        for socket in &socket_table.listeners {
            let address = bound_to(socket.local.ip());
            let Some(rule) = rule_of(&self.rules, netns, address, socket.local.port()) else {
                continue;
            };
            if self.is_registered(socket) {
                continue;
            }
            self.audit.saw().unregistered.insert(socket.cookie);
            let seen = eager || self.audit.was_unregistered(socket.cookie);
            let due = eager
                || (self.audit.unadoptable.get(&socket.cookie)).is_none_or(|retry| *retry <= now);
            if seen && self.room_for(rule.service).is_err() {
                self.audit.saw().lacks_slot(rule.service);
            } else if seen && due {
                claimants.push(Claimant {
                    socket,
                    address,
                    rule,
                });
            }
        }
        claimants
    }

    fn adopt_or_say_why(
        &mut self,
        netns: u64,
        claimant: &Claimant<'_>,
        listener: &Listener,
    ) -> bool {
        let local = claimant.socket.local;
        match self.adopt_listener(netns, claimant, listener) {
            Ok(slot) => {
                info!("adopted the listener on {local}: slot {slot}");
                true
            }
            Err(error) => {
                if error.is::<NoSlot>() {
                    self.audit.saw().lacks_slot(claimant.rule.service);
                }
                if self.retry_later(claimant.socket.cookie) {
                    warn!(
                        "the listener on {local} serves without the balancer, it can't be adopted: {error:#}"
                    );
                }
                false
            }
        }
    }

    /// Whether that is the first time.
    fn retry_later(&mut self, cookie: u64) -> bool {
        let retry = Instant::now() + RETRY_AFTER;
        self.audit.unadoptable.insert(cookie, retry).is_none()
    }

    /// Its storage names a slot that is its own and listens.
    fn is_registered(&self, socket: &Socket) -> bool {
        self.own_slot(socket)
            .is_some_and(|(_, slot_state)| slot_state.is(BackendState::Active))
    }

    /// The slot that a listener's storage names, if it is still its own.
    fn own_slot(&self, socket: &Socket) -> Option<(u32, SlotState)> {
        let connection = connection_of(socket)?;
        let slot = u32::from(connection.slot);
        if slot as usize >= MAX_SLOTS {
            return None;
        }
        let slot_state = SlotState(self.tables.slot_state(slot).load(Ordering::SeqCst));
        (slot_state.generation() == connection.generation).then_some((slot, slot_state))
    }

    fn adopt_listener(
        &mut self,
        netns: u64,
        claimant: &Claimant<'_>,
        listener: &Listener,
    ) -> Result<u32> {
        if listener.socket.mptcp {
            bail!(
                "it is an MPTCP listener, whose TCP socket no descriptor reaches: it must listen anew while the daemon or its data \
                 plane is there (Go servers: or start it with GODEBUG=multipathtcp=0)"
            );
        }
        let file = listener.file().context(
            "no descriptor of it can be had (its process is gone or hidden, or CAP_SYS_PTRACE is missing)",
        )?;
        let service = claimant.rule.service;
        let own = self.hold_own_slot(claimant);
        let (slot, slot_state) = match own {
            Some(own) => own,
            None => self.claim(service)?,
        };
        let backend = Backend {
            slot_state: slot_state.with(BackendState::Held).0,
            ..backend_of(netns, claimant.address, listener, claimant.rule)
        };
        let has_storage = claimant.socket.storage.is_some();
        let flags = match (own, has_storage) {
            (Some(_), _) => None,
            (None, true) => Some(ONLY_OLD),
            (None, false) => Some(ONLY_NEW),
        };
        if let Err(error) = self.fill(slot, slot_state, backend, &file, flags) {
            let state = if own.is_some() {
                BackendState::Closed
            } else {
                BackendState::Free
            };
            self.tables
                .slot_state(slot)
                .store(slot_state.with(state).0, Ordering::SeqCst);
            return Err(error);
        }
        Ok(slot)
    }

    /// A listener that had a slot and lost it, to a daemon that died over registering it or to a change of the rules, gets it back, with
    /// the connections that are counted there.
    fn hold_own_slot(&self, claimant: &Claimant<'_>) -> Option<(u32, SlotState)> {
        let (slot, slot_state) = self.own_slot(claimant.socket)?;
        matches!(
            slot_state.state(),
            BackendState::Closed | BackendState::Held
        )
        .then_some(())?;
        self.hold(slot, slot_state).then_some((slot, slot_state))
    }

    fn hold(&self, slot: u32, slot_state: SlotState) -> bool {
        let held = slot_state.with(BackendState::Held).0;
        self.tables
            .slot_state(slot)
            .compare_exchange(slot_state.0, held, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    fn room_for(&self, service: u16) -> Result<(), NoSlot> {
        let words = self.tables.members(service);
        let members: u32 = words.iter().map(|word| word.count_ones()).sum();
        if members as usize >= MAX_MEMBERS {
            return Err(NoSlot(
                "its service has all the backends that one can have",
                MAX_MEMBERS,
            ));
        }
        let first = self.free_slots().next();
        first.map(drop).ok_or(ALL_TAKEN)
    }

    fn free_slots(&self) -> impl Iterator<Item = (u32, SlotState)> {
        every_slot()
            .map(|slot| {
                (
                    slot,
                    SlotState(self.tables.slot_state(slot).load(Ordering::SeqCst)),
                )
            })
            .filter(|(_, slot_state)| slot_state.is(BackendState::Free))
    }

    /// Claims the first free slot, as the kernel half does.
    fn claim(&self, service: u16) -> Result<(u32, SlotState), NoSlot> {
        self.room_for(service)?;
        let mut free = self.free_slots();
        free.find(|(slot, slot_state)| self.hold(*slot, *slot_state))
            .ok_or(ALL_TAKEN)
    }

    /// From the moment that its storage is set, every connection that it accepts is counted by the kernel half. Killed before the
    /// end, the slot stays held, for the next daemon to go on with.
    fn fill(
        &mut self,
        slot: u32,
        slot_state: SlotState,
        backend: Backend,
        file: &OwnedFd,
        storage: Option<u64>,
    ) -> Result<()> {
        self.tables.write_backend(slot, backend)?;
        if let Some(flags) = storage {
            let connection = Connection {
                slot: u16::try_from(slot)?,
                class: Connection::UNCOUNTED,
                generation: slot_state.generation(),
            };
            self.set_storage(connection, file, flags)?;
        }
        if let Err(error) = self.tables.listeners.set(slot, &file.as_raw_fd(), 0) {
            let errno = errno_of(&error);
            let flags = backend.flags | Backend::UNSTEERABLE;
            self.tables.write_backend(
                slot,
                Backend {
                    flags,
                    map_error: errno,
                    ..backend
                },
            )?;
        }
        self.tables
            .slot_state(slot)
            .store(slot_state.with(BackendState::Active).0, Ordering::SeqCst);
        self.tables.join(backend.service, slot);
        Ok(())
    }

    pub(in crate::dataplane) fn set_storage(
        &self,
        connection: Connection,
        file: &OwnedFd,
        flags: u64,
    ) -> Result<()> {
        let mut storage: SkStorage<MapData, Plain<Connection>> =
            SkStorage::try_from(Map::SkStorage(self.tables.connection_data()?))?;
        storage.insert(&file.as_raw_fd(), Plain(connection), flags).context(
            "its socket storage can't be set (the kernel half has just registered it, or memory is short)",
        )
    }

    /// Which slot each connection belongs to: by its own address, and among listeners of one address by its process.
    pub(in crate::dataplane) fn shares(
        &self,
        adopted: &[&SlotView],
        connections: &[&Socket],
    ) -> Result<BTreeMap<u32, u64>> {
        let mut shares = BTreeMap::new();
        let mut processes = None;
        for socket in connections {
            let fitting: Vec<&SlotView> = fitting(adopted, socket.local);
            let slot = match fitting.as_slice() {
                [] => continue,
                [only] => only.slot(),
                [first, ..] => {
                    let processes = match &processes {
                        Some(known) => known,
                        None => {
                            processes.insert(owners(connections.iter().map(|socket| socket.inode))?)
                        }
                    };
                    let owned = |view: &&&SlotView| is_owner(processes.get(&socket.inode), view);
                    fitting
                        .iter()
                        .find(owned)
                        .map_or(first.slot(), |view| view.slot())
                }
            };
            let service = fitting[0].member.backend.service;
            *shares.entry(slot).or_insert(0) += self.share(service, socket)?;
        }
        Ok(shares)
    }
}

/// The number of the error that the kernel gave, 0 where it was not the kernel.
fn errno_of(error: &MapError) -> u32 {
    let MapError::SyscallError(error) = error else {
        return 0;
    };
    error
        .io_error
        .raw_os_error()
        .and_then(|errno| u32::try_from(errno).ok())
        .unwrap_or(0)
}

fn is_owner(owners: Option<&Vec<SocketOwner>>, view: &SlotView) -> bool {
    owners.is_some_and(|owners| {
        owners
            .iter()
            .any(|owner| owner.pid == view.member.backend.pid)
    })
}

/// The adopted listeners that a connection with that local address can have come from: those of the exact address,
/// else those of the wildcard.
pub(in crate::dataplane) fn fitting<'a>(
    adopted: &[&'a SlotView],
    local: SocketAddr,
) -> Vec<&'a SlotView> {
    let local_address = bound_to(local.ip());
    let of = |wildcard: bool| {
        adopted
            .iter()
            .copied()
            .filter(|view| {
                let backend = &view.member.backend;
                backend.port == local.port()
                    && if wildcard {
                        backend.address.is_any()
                    } else {
                        backend.address == local_address
                    }
            })
            .collect::<Vec<_>>()
    };
    let exact = of(false);
    let mut fitting = if exact.is_empty() { of(true) } else { exact };
    // A slot that a daemon died over registering has the same address as the one that its listener has got since.
    fitting.sort_by_key(|view| !view.slot_state().is(BackendState::Active));
    fitting
}

/// An address as the maps hold it: mapped IPv4 of a dual-stack socket is IPv4.
fn bound_to(address: IpAddr) -> Address {
    Address::from(address.to_canonical())
}

fn backend_of(netns: u64, address: Address, listener: &Listener, rule: ListenRule) -> Backend {
    let socket = &listener.socket;
    let mut flags = Backend::ADOPTED;
    if socket.family == Family::V6 {
        flags |= Backend::V6;
    }
    if socket.v6only == Some(true) {
        flags |= Backend::V6_ONLY;
    }
    if rule.flags & ListenRule::CANDIDATE != 0 {
        flags |= Backend::CANDIDATE;
    }
    Backend {
        netns,
        address,
        port: socket.local.port(),
        service: rule.service,
        weight: rule.weight,
        uid: socket.uid,
        device: socket.interface,
        flags,
        pid: listener.owners.first().map_or(0, |owner| owner.pid),
        ..Backend::EMPTY
    }
}

/// The ids of a cgroup and of those below it; `None`: it is the root, which has all.
fn cgroup_ids(cgroup: &Path) -> Option<HashSet<u64>> {
    let is_root = crate::discover::cgroup2_mount().is_ok_and(|root| root == cgroup);
    (!is_root).then(|| crate::discover::cgroup_ids(cgroup))
}

/// Whether a socket was made in one of the cgroups: connections of others pass by `account`.
fn within(cgroups: Option<&HashSet<u64>>, socket: &Socket) -> bool {
    match (cgroups, socket.cgroup) {
        (Some(ids), Some(id)) => ids.contains(&id),
        (None, _) | (_, None) => true,
    }
}
