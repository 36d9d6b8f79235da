//! What runs already when the daemon comes: listeners are registered as the kernel half would have done, and the
//! connections that they had, which the kernel half can't follow, are counted from the socket table until they are gone.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, bail};
use aya::maps::{Map, MapData, MapError, SkStorage};
use balancer_common::abi::{
    Address, Backend, BackendState, Connection, Counts, Life, ListenRule, MAX_MEMBERS, MAX_SLOTS,
};
use tracing::{info, warn};

use super::plan::rule_of;
use super::tables::{SlotView, slot_of};
use super::wire::Wire;
use super::writer::Writer;
use crate::discover::{Listener, Owner, owners};
use crate::sys::sock_diag::{Family, Query, Socket, State, States, tcp_sockets};

/// `BPF_NOEXIST`: never take a listener from the kernel half, which may register it at this very moment.
const ONLY_NEW: u64 = 1;

impl Writer {
    /// Registers the listeners of a namespace that the rules in force claim and nobody has registered. One that can't
    /// be registered is named in the log. Must run inside that namespace.
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn adopt(&mut self, netns: u64) -> Result<()> {
        let registered: HashSet<u64> = self
            .dump(State::Listen)?
            .into_iter()
            .filter(|socket| slot_of(socket).is_some())
            .map(|socket| socket.cookie)
            .collect();
        let cgroups = cgroup_ids(&self.cgroup)?;
        let current = crate::sys::netns::current().context("cannot open the network namespace")?;
        let listeners =
            crate::discover::listeners(&current).context("cannot list the listeners")?;
        for listener in listeners {
            let socket = &listener.socket;
            let address = bound_to(socket.local.ip());
            let Some(rule) = rule_of(&self.rules, netns, address, socket.local.port()) else {
                continue;
            };
            if registered.contains(&socket.cookie) || !within(cgroups.as_ref(), socket) {
                continue;
            }
            match self.adopt_listener(netns, address, &listener, rule) {
                Ok(slot) => info!("adopted the listener on {}: slot {slot}", socket.local),
                Err(error) => warn!(
                    "the listener on {} serves without the balancer, it can't be adopted: {error:#}",
                    socket.local
                ),
            }
        }
        self.recount(netns)
    }

    fn adopt_listener(
        &mut self,
        netns: u64,
        address: Address,
        listener: &Listener,
        rule: ListenRule,
    ) -> Result<u32> {
        let file = listener.file().context(
            "no descriptor of it can be had (its process is gone or hidden, or CAP_SYS_PTRACE is missing)",
        )?;
        let backend = backend_of(netns, address, listener, rule);
        let (slot, life) = self.claim(rule.service)?;
        let backend = Backend {
            life: life.with(BackendState::Claimed).0,
            ..backend
        };
        if let Err(error) = self.fill(slot, life, backend, &file) {
            let free = life.with(BackendState::Free).0;
            self.tables.life(slot).store(free, Ordering::SeqCst);
            return Err(error);
        }
        Ok(slot)
    }

    /// Claims the first free slot, as the kernel half does.
    fn claim(&self, service: u16) -> Result<(u32, Life)> {
        let members: u32 = self
            .tables
            .members(service)
            .iter()
            .map(|word| word.count_ones())
            .sum();
        if members as usize >= MAX_MEMBERS {
            bail!("its service has {MAX_MEMBERS} backends already");
        }
        for slot in 0..u32::try_from(MAX_SLOTS)? {
            let word = self.tables.life(slot);
            let life = Life(word.load(Ordering::SeqCst));
            let claimed = life.with(BackendState::Claimed).0;
            let exchange =
                |old| word.compare_exchange(old, claimed, Ordering::SeqCst, Ordering::SeqCst);
            if life.is(BackendState::Free) && exchange(life.0).is_ok() {
                return Ok((slot, life));
            }
        }
        bail!("all {MAX_SLOTS} slots are taken")
    }

    /// From the moment that its storage is set, every connection that it accepts is counted by the kernel half.
    fn fill(&mut self, slot: u32, life: Life, backend: Backend, file: &OwnedFd) -> Result<()> {
        self.tables.write_backend(slot, backend)?;
        let connection = Connection {
            slot: u16::try_from(slot)?,
            class: Connection::UNCOUNTED,
            generation: life.generation(),
        };
        let mut storage: SkStorage<MapData, Wire<Connection>> =
            SkStorage::try_from(Map::SkStorage(self.tables.connection_data()?))?;
        storage.insert(&file.as_raw_fd(), Wire(connection), ONLY_NEW).context(
            "its socket storage can't be set (the kernel half has just registered it, or memory is short)",
        )?;
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
            .life(slot)
            .store(life.with(BackendState::Active).0, Ordering::SeqCst);
        self.tables.join(backend.service, slot);
        Ok(())
    }

    /// Counts the connections of adopted listeners that the kernel half can't follow, and closes the slots of adopted
    /// listeners that are gone. Must run inside the namespace.
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn recount(&mut self, netns: u64) -> Result<()> {
        let adopted: Vec<SlotView> = self.adopted_in(netns)?;
        if adopted.is_empty() {
            return Ok(());
        }
        let listening: HashSet<u32> = self
            .dump(State::Listen)?
            .iter()
            .filter_map(slot_of)
            .collect();
        for view in &adopted {
            if view.life().is(BackendState::Active) && !listening.contains(&view.slot()) {
                info!("slot {}: its adopted listener is gone", view.slot());
                self.close(view);
            }
        }
        let strangers: Vec<Socket> = self
            .dump(State::Established)?
            .into_iter()
            .filter(|socket| slot_of(socket).is_none())
            .collect();
        let shares = self.shares(&adopted, &strangers)?;
        for view in &adopted {
            let count = shares.get(&view.slot()).copied().unwrap_or(0);
            self.tables
                .adopted_word(view.slot())
                .store(count, Ordering::SeqCst);
        }
        Ok(())
    }

    /// The namespaces in which something adopted lives.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn adopted_namespaces(&self) -> Result<HashSet<u64>> {
        let adopted = |view: &SlotView| view.member.backend.flags & Backend::ADOPTED != 0;
        Ok(self
            .slots()?
            .iter()
            .filter(|view| adopted(view))
            .map(|view| view.member.backend.netns)
            .collect())
    }

    fn adopted_in(&self, netns: u64) -> Result<Vec<SlotView>> {
        let mut views = self.slots()?;
        views.retain(|view| {
            let backend = &view.member.backend;
            backend.netns == netns && backend.flags & Backend::ADOPTED != 0
        });
        Ok(views)
    }

    /// Which slot each connection belongs to: by its own address, and among listeners of one address by its process.
    fn shares(&self, adopted: &[SlotView], connections: &[Socket]) -> Result<BTreeMap<u32, u64>> {
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
            let exempt = self.tables.is_exempt(service, socket.remote.ip())?;
            *shares.entry(slot).or_insert(0) += if exempt { Counts::ONE_EXEMPT } else { 1 };
        }
        Ok(shares)
    }

    fn dump(&self, state: State) -> Result<Vec<Socket>> {
        let mut sockets = Vec::new();
        for family in [Family::V4, Family::V6] {
            let mut query = Query::new(family, States::of(&[state]));
            query.storage = Some(self.tables.connection_map());
            sockets
                .extend(tcp_sockets(&query).context("cannot read the socket table (sock_diag)")?);
        }
        Ok(sockets)
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

fn is_owner(owners: Option<&Vec<Owner>>, view: &SlotView) -> bool {
    owners.is_some_and(|owners| {
        owners
            .iter()
            .any(|owner| owner.pid == view.member.backend.pid)
    })
}

/// The adopted listeners that a connection with that local address can have come from: those of the exact address,
/// else those of the wildcard.
fn fitting(adopted: &[SlotView], local: SocketAddr) -> Vec<&SlotView> {
    let local_address = bound_to(local.ip());
    let of = |wildcard: bool| {
        adopted
            .iter()
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
    if exact.is_empty() { of(true) } else { exact }
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
fn cgroup_ids(cgroup: &Path) -> Result<Option<HashSet<u64>>> {
    if crate::discover::cgroup2_mount().is_ok_and(|root| root == cgroup) {
        return Ok(None);
    }
    let mut ids = HashSet::new();
    let mut directories = vec![cgroup.to_owned()];
    while let Some(directory) = directories.pop() {
        let metadata = fs::metadata(&directory)
            .with_context(|| format!("cannot query {}", directory.display()))?;
        ids.insert(metadata.ino());
        for entry in fs::read_dir(&directory)
            .with_context(|| format!("cannot list {}", directory.display()))?
        {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(Some(ids))
}

/// Whether a socket was made in one of the cgroups: connections of others pass by `account`.
fn within(cgroups: Option<&HashSet<u64>>, socket: &Socket) -> bool {
    match (cgroups, socket.cgroup) {
        (Some(ids), Some(id)) => ids.contains(&id),
        (None, _) | (_, None) => true,
    }
}
