//! Listeners that were there before the kernel half are registered as it would have done.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use aya::maps::MapError;
use balancer_common::abi::{
    Address, Backend, BackendState, Connection, ListenRule, MAX_SLOTS, SlotState,
};
use balancer_common::pool::Pool;
use tracing::{info, warn};

use super::super::plan::Rules;
use super::super::services;
use super::super::slots::{self, NoSlot};
use super::super::tables::{ONLY_NEW, ONLY_OLD, Tables, backend_of};
use super::socket_table::{SocketTable, bound_to};
use crate::discover::{self, Listener, cgroup2_mount, listeners};
use crate::sys::netns;
use crate::sys::sock_diag::{Family, Socket};

/// When a listener is tried again that can't be registered: looking for its owner takes a look at
/// every process.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// What is known of listeners that a rule claims and nobody has registered.
#[derive(Debug, Default)]
pub struct Unregistered {
    /// The cookies of unregistered listeners at the last pass. One that is not among them may be
    /// registering itself.
    last: HashSet<u64>,
    /// The cookies of unregistered listeners at this pass.
    this: HashSet<u64>,
    /// The cookies of listeners that can't be registered, and when that is tried again.
    retry_at: HashMap<u64, Instant>,
    /// The cookies of listeners outside of the cgroup, which are nobody's business.
    outside: HashSet<u64>,
    /// How many listeners of each service lack a slot, by the service's id.
    without_slot: BTreeMap<u16, u64>,
    /// How many listeners of each service this pass is the first to see, by the service's id.
    new: BTreeMap<u16, u64>,
    /// How many the kernel half said lack a slot when the pass began, by the service's id.
    without_slot_before: BTreeMap<u16, u64>,
}

impl Unregistered {
    /// Begins a pass.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn begin(&mut self, tables: &Tables) -> Result<()> {
        let count = |id| (id, tables.unregistered_word(id).load(Ordering::SeqCst));
        self.without_slot_before = services::ids(tables)?.into_values().map(count).collect();
        self.without_slot.clear();
        self.new.clear();
        self.this.clear();
        Ok(())
    }

    /// Ends a pass.
    pub fn end(&mut self, tables: &Tables) {
        for (service, before) in &self.without_slot_before {
            let number = |of: &BTreeMap<u16, u64>| of.get(service).copied().unwrap_or(0);
            let lacking = number(&self.without_slot);
            // A new one may be registering itself: it lacks a slot if the kernel half says so.
            let now = lacking + number(&self.new).min(before.saturating_sub(lacking));
            // Where the kernel half has just found another one, the next pass tells.
            let word = tables.unregistered_word(*service);
            let _ = word.compare_exchange(*before, now, Ordering::SeqCst, Ordering::SeqCst);
        }
        self.last = std::mem::take(&mut self.this);
        self.retry_at.retain(|cookie, _| self.last.contains(cookie));
        self.outside.retain(|cookie| self.last.contains(cookie));
    }

    fn lacks_slot(&mut self, service: u16) {
        *self.without_slot.entry(service).or_insert(0) += 1;
    }

    fn is_new(&mut self, service: u16) {
        *self.new.entry(service).or_insert(0) += 1;
    }

    /// Notes that a listener can't be registered now; says whether that is the first time.
    fn retry_later(&mut self, cookie: u64) -> bool {
        let retry = Instant::now() + RETRY_AFTER;
        self.retry_at.insert(cookie, retry).is_none()
    }

    fn is_due(&self, cookie: u64) -> bool {
        let retry = self.retry_at.get(&cookie);
        retry.is_none_or(|retry| *retry <= Instant::now())
    }
}

/// Whose listeners get a slot by a rule for any netns although strangers have many.
#[derive(Debug, Default)]
pub enum Known {
    /// Everybody's, as long as such rules may give away slots.
    #[default]
    All,
    /// All those whose sockets were made in cgroups with these ids.
    Cgroups(HashSet<u64>),
}

impl Known {
    /// Whether nothing is known that would tell strangers' listeners from others: this node does
    /// not tell which cgroups pods have, for one.
    pub fn is_everybody(&self) -> bool {
        match self {
            Self::All => true,
            Self::Cgroups(ids) => ids.is_empty(),
        }
    }

    /// Whether a listener is known not to be a stranger's.
    pub fn has(&self, socket: &Socket) -> bool {
        match self {
            Self::All => false,
            Self::Cgroups(ids) => socket.cgroup.is_some_and(|id| ids.contains(&id)),
        }
    }

    /// Whether there is room for one more listener that is not known.
    const fn leaves_room(&self, pool: &Pool) -> bool {
        match self {
            Self::All => pool.has_any(),
            Self::Cgroups(_) => pool.has_room(),
        }
    }
}

/// A listener that a rule claims.
struct Claimant<'a> {
    socket: &'a Socket,
    address: Address,
    rule: ListenRule,
}

/// What registers the listeners of one netns.
pub struct Adopter<'a> {
    /// The maps.
    pub tables: &'a mut Tables,
    /// The rules in force.
    pub rules: &'a Rules,
    /// The cgroup whose listeners are counted.
    pub cgroup: &'a Path,
    /// The cookie of the netns.
    pub netns: u64,
    /// Whether listeners are registered at first sight; else only if the last pass saw them too.
    pub eager: bool,
    /// Whose listeners always get a slot.
    pub known: &'a Known,
    /// What is known of unregistered listeners.
    pub unregistered: &'a mut Unregistered,
}

impl Adopter<'_> {
    /// Registers the listeners that the rules in force claim and nobody has registered; says
    /// whether there was any. One that can't be registered is named in the log. Must run inside the
    /// netns.
    ///
    /// # Errors
    /// When the socket table can't be read.
    pub fn adopt(&mut self, table: &SocketTable) -> Result<bool> {
        let claimants = self.claimants(table)?;
        if claimants.is_empty() {
            return Ok(false);
        }
        let current = netns::current().context("cannot open the network namespace")?;
        let ports: BTreeSet<u16> = claimants
            .iter()
            .map(|one| one.socket.local.port())
            .collect();
        let ports: Vec<u16> = ports.into_iter().collect();
        let listeners = listeners(&current, &ports).context("cannot list the listeners")?;
        let listeners: HashMap<u64, Listener> = listeners
            .into_iter()
            .map(|listener| (listener.socket.cookie, listener))
            .collect();
        let mut adopted = false;
        for claimant in claimants {
            if let Some(listener) = listeners.get(&claimant.socket.cookie) {
                adopted |= self.adopt_or_say_why(&claimant, listener);
            }
        }
        Ok(adopted)
    }

    fn claimants<'t>(&mut self, table: &'t SocketTable) -> Result<Vec<Claimant<'t>>> {
        let mut claimants = Vec::new();
        let mut pool = slots::pool(self.tables, self.netns)?;
        let mut cgroups = None;
        for socket in &table.listeners {
            let address = bound_to(socket.local.ip());
            let rule = self.rules.of(self.netns, address, socket.local.port());
            let Some(rule) = rule.filter(|_| !self.is_registered(socket)) else {
                continue;
            };
            let cookie = socket.cookie;
            self.unregistered.this.insert(cookie);
            if self.unregistered.outside.contains(&cookie) {
                continue;
            }
            let cgroups = match &cgroups {
                Some(cgroups) => cgroups,
                None => cgroups.insert(cgroup_ids(self.cgroup)?),
            };
            if !within(cgroups.as_ref(), socket) {
                self.unregistered.outside.insert(cookie);
                continue;
            }
            let is_stranger = self.may_be_strangers(socket, rule);
            if is_stranger && !self.known.leaves_room(&pool) {
                continue;
            }
            if slots::room_for(self.tables, rule.service).is_err() {
                if !is_stranger {
                    self.unregistered.lacks_slot(rule.service);
                }
            } else if !(self.eager || self.unregistered.last.contains(&cookie)) {
                if !is_stranger {
                    self.unregistered.is_new(rule.service);
                }
            } else if self.eager || self.unregistered.is_due(cookie) {
                if rule.flags & ListenRule::CANDIDATE != 0 {
                    pool.add(false, true);
                }
                claimants.push(Claimant {
                    socket,
                    address,
                    rule,
                });
            }
        }
        Ok(claimants)
    }

    /// Whether anybody at all may have made the listener.
    fn may_be_strangers(&self, socket: &Socket, rule: ListenRule) -> bool {
        rule.flags & ListenRule::CANDIDATE != 0 && !self.known.has(socket)
    }

    fn adopt_or_say_why(&mut self, claimant: &Claimant<'_>, listener: &Listener) -> bool {
        let local = claimant.socket.local;
        let error = match self.adopt_listener(claimant, listener) {
            Ok(slot) => {
                info!("adopted the listener on {local}: slot {slot}");
                return true;
            }
            Err(error) => error,
        };
        if error.is::<NoSlot>() && !self.may_be_strangers(claimant.socket, claimant.rule) {
            // Not put off: nobody is refused for its service meanwhile.
            self.unregistered.lacks_slot(claimant.rule.service);
            return false;
        }
        if self.unregistered.retry_later(claimant.socket.cookie) {
            warn!(
                "the listener on {local} serves without the balancer, it can't be adopted: \
                 {error:#}"
            );
        }
        false
    }

    /// Whether the listener's storage names a slot that is its own and active.
    fn is_registered(&self, socket: &Socket) -> bool {
        self.own_slot(socket)
            .is_some_and(|(_, state)| state.is(BackendState::Active))
    }

    /// The slot that a listener's storage names, if it is still its own.
    fn own_slot(&self, socket: &Socket) -> Option<(u32, SlotState)> {
        let id = backend_of(socket).filter(|id| (id.slot as usize) < MAX_SLOTS)?;
        let state = self.tables.slot_state(id.slot);
        (state.generation() == id.generation).then_some((id.slot, state))
    }

    fn adopt_listener(&mut self, claimant: &Claimant<'_>, listener: &Listener) -> Result<u32> {
        if listener.socket.mptcp {
            bail!(
                "it is an MPTCP listener, whose TCP socket no descriptor reaches: it must listen \
                 anew while the daemon or its data plane is there (Go servers: or start it with \
                 GODEBUG=multipathtcp=0)"
            );
        }
        let file = listener.file().context(
            "no descriptor of it can be had (its process is gone or hidden, or CAP_SYS_PTRACE is \
             missing)",
        )?;
        let own = self.hold_own_slot(claimant.socket);
        let (slot, state) = match own {
            Some(own) => own,
            None => slots::claim(self.tables, claimant.rule.service)?,
        };
        let backend = Backend {
            slot_state: state.with(BackendState::Held).0,
            ..self.backend(claimant, listener)
        };
        let flags = match (own, &claimant.socket.storage) {
            (Some(_), _) => None,
            (None, Some(_)) => Some(ONLY_OLD),
            (None, None) => Some(ONLY_NEW),
        };
        if let Err(error) = self.fill(slot, state, backend, &file, flags) {
            let before = own.map_or(BackendState::Free, |_| BackendState::Closed);
            self.tables.set_slot_state(slot, state.with(before));
            return Err(error);
        }
        Ok(slot)
    }

    /// A listener that had a slot and lost it, to a daemon that died over registering it or to a
    /// change of the rules, gets it back, with the connections that are counted there.
    fn hold_own_slot(&self, socket: &Socket) -> Option<(u32, SlotState)> {
        let (slot, state) = self.own_slot(socket)?;
        let lost = [BackendState::Closed, BackendState::Held].contains(&state.state());
        let held = lost && self.tables.change_state(slot, state, BackendState::Held);
        held.then_some((slot, state))
    }

    /// Fills a held slot with a listener and makes it active. From the moment that the listener's
    /// storage is set, the kernel half counts every connection that it accepts. Where the daemon is
    /// killed before the end, the slot stays held, for the next daemon to go on with.
    fn fill(
        &mut self,
        slot: u32,
        state: SlotState,
        backend: Backend,
        file: &OwnedFd,
        storage: Option<u64>,
    ) -> Result<()> {
        self.tables.write_backend(slot, backend)?;
        if let Some(flags) = storage {
            let connection = Connection {
                slot: u16::try_from(slot)?,
                class: Connection::UNCOUNTED,
                generation: state.generation(),
            };
            self.tables.set_connection(file, connection, flags)?;
        }
        if let Err(error) = self.tables.listeners.set(slot, &file.as_raw_fd(), 0) {
            let unsteerable = Backend {
                flags: backend.flags | Backend::UNSTEERABLE,
                map_error: errno_of(&error),
                ..backend
            };
            self.tables.write_backend(slot, unsteerable)?;
        }
        // In this order: a member that is not active is passed by, while an active backend that is
        // no member would be seen by nobody, and is not adopted again.
        self.tables.join(backend.service, slot);
        self.tables
            .set_slot_state(slot, state.with(BackendState::Active));
        Ok(())
    }

    fn backend(&self, claimant: &Claimant<'_>, listener: &Listener) -> Backend {
        let (socket, rule) = (&listener.socket, claimant.rule);
        let flags = [
            (socket.family == Family::V6, Backend::V6),
            (socket.v6only == Some(true), Backend::V6_ONLY),
            (rule.flags & ListenRule::CANDIDATE != 0, Backend::CANDIDATE),
        ];
        let flags = flags.iter().filter(|(is_set, _)| *is_set);
        Backend {
            netns: self.netns,
            address: claimant.address,
            port: socket.local.port(),
            service: rule.service,
            weight: rule.weight,
            uid: socket.uid,
            device: socket.interface,
            flags: flags.fold(Backend::ADOPTED, |flags, (_, flag)| flags | flag),
            pid: listener.owners.first().map_or(0, |owner| owner.pid),
            cgroup: socket.cgroup.unwrap_or(0),
            ..Backend::EMPTY
        }
    }
}

/// The number of the error that the kernel gave, 0 where it was not the kernel.
fn errno_of(error: &MapError) -> u32 {
    let MapError::SyscallError(error) = error else {
        return 0;
    };
    let errno = error.io_error.raw_os_error();
    errno
        .and_then(|errno| u32::try_from(errno).ok())
        .unwrap_or(0)
}

/// The ids of a cgroup and of those below it; `None`: it is the root, which has all.
fn cgroup_ids(cgroup: &Path) -> Result<Option<HashSet<u64>>> {
    if cgroup2_mount()? == cgroup {
        return Ok(None);
    }
    let ids = discover::cgroup_ids(cgroup);
    let ids = ids.with_context(|| format!("cannot read the cgroups below {}", cgroup.display()))?;
    Ok(Some(ids))
}

/// Whether a socket was made in one of the cgroups: connections of others pass by `account`.
fn within(cgroups: Option<&HashSet<u64>>, socket: &Socket) -> bool {
    match (cgroups, socket.cgroup) {
        (Some(ids), Some(id)) => ids.contains(&id),
        (None, _) | (_, None) => true,
    }
}
