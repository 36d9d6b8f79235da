//! The slots in the maps: quotas in, closed ones out.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::maps::MapError;
use balancer_common::abi::{
    Backend, BackendId, BackendState, MAX_MEMBERS, MAX_SLOTS, Silence, SlotPolicy, SlotState,
};
use balancer_common::pool::Pool;
use tracing::{debug, info};

use super::tables::{SlotView, Tables, every_slot};
use crate::quota::in_force::written_for_server;
use crate::quota::{InForce, Quota, QuotaSource};

/// A closed slot is given away only after so long without a connection: a last one may be on its
/// way out.
const QUARANTINE: Duration = Duration::from_secs(1);

/// The quota and weight of one backend, and the server's that it is a listener of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotQuota {
    /// The backend: quota and weight are valid for its generation alone.
    pub id: BackendId,
    /// The quota that holds for the backend, and its source.
    pub in_force: InForce,
    /// The backend's part relative to the others of its service.
    pub weight: u32,
    /// The slot of the server's first listener.
    pub first_slot: u32,
    /// The quota of the server, of which `in_force` has the backend's part.
    pub server_quota: Quota,
}

/// Gives a backend its quota and weight, in force at the next SYN.
pub fn set_quota(tables: &Tables, wanted: SlotQuota) {
    let InForce { quota, source } = wanted.in_force;
    let slot = wanted.id.slot;
    let is_closed = source.is_by_hand() && wanted.server_quota == Quota::Limited(0);
    let closed = if is_closed { SlotPolicy::CLOSED } else { 0 };
    let policy = SlotPolicy::new(
        wanted.id.generation,
        quota.to_map(),
        wanted.weight,
        source.flags() | closed,
    )
    .of_server(wanted.first_slot, wanted.server_quota.to_map());
    let present = tables.policy(slot);
    let words = |policy: SlotPolicy| (policy.quota, policy.weight, policy.server);
    if words(present) == words(policy) {
        return;
    }
    // The quota's word carries the generation that makes the others valid: it goes last.
    tables
        .server_word(slot)
        .store(policy.server, Ordering::SeqCst);
    tables
        .weight_word(slot)
        .store(policy.weight, Ordering::SeqCst);
    tables
        .quota_word(slot)
        .store(policy.quota, Ordering::SeqCst);
}

/// The quotas of a service hold until the next computation, which does not lower them slowly: like
/// one that was set by hand and cleared. Those that are unlimited go down at once anyway.
///
/// # Errors
/// When a map can't be read.
pub fn forget_computed(tables: &Tables, service: u16) -> Result<()> {
    for view in tables.slots()? {
        let policy = view.member.policy;
        let written = written_for_server(&policy, view.slot_state());
        let is_computed = written.is_some_and(|written| {
            !written.source.is_by_hand() && written.quota != Quota::Unlimited
        });
        if view.member.backend.service == service && is_computed {
            let source = QuotaSource::Service.flags();
            let word = u64::from(source) << 32 | u64::from(policy.weight());
            let weight = tables.weight_word(view.slot());
            weight.store(word, Ordering::SeqCst);
        }
    }
    Ok(())
}

/// Closes a slot: no SYN is sent to it any more, and what it holds is counted on.
pub fn close(tables: &Tables, view: &SlotView) {
    if tables.change_state(view.slot(), view.slot_state(), BackendState::Closed) {
        tables.leave(view.member.backend.service, view.slot());
    }
}

/// Why a listener has no slot, and the limit that it would exceed. It is told apart from other
/// errors: while a listener lacks a slot, nobody is refused.
#[derive(Debug)]
pub struct NoSlot(&'static str, usize);

const ALL_TAKEN: NoSlot = NoSlot("all slots are taken", MAX_SLOTS);

impl fmt::Display for NoSlot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ({})", self.0, self.1)
    }
}

impl std::error::Error for NoSlot {}

/// Whether a service can have one more backend.
///
/// # Errors
/// The limit that one more would exceed.
pub fn room_for(tables: &Tables, service: u16) -> Result<(), NoSlot> {
    let words = tables.members(service);
    let members: u32 = words.iter().map(|word| word.count_ones()).sum();
    if members as usize >= MAX_MEMBERS {
        return Err(NoSlot(
            "its service has all the backends that one can have",
            MAX_MEMBERS,
        ));
    }
    let first = free_slots(tables).next();
    first.map(drop).ok_or(ALL_TAKEN)
}

/// The slots that rules for any netns have given away, as one more listener of a netns finds them.
///
/// # Errors
/// When a map can't be read.
pub fn pool(tables: &Tables, netns: u64) -> Result<Pool> {
    let mut pool = Pool::default();
    for SlotView { member, .. } in &tables.slots()? {
        let backend = &member.backend;
        if backend.flags & Backend::CANDIDATE != 0 {
            let confirmed = member.policy.is_for(backend.slot_state());
            pool.add(confirmed, backend.netns == netns);
        }
    }
    Ok(pool)
}

/// Claims the first free slot, as the kernel half does.
///
/// # Errors
/// When there is none, or the service can have no more backends.
pub fn claim(tables: &Tables, service: u16) -> Result<(u32, SlotState), NoSlot> {
    room_for(tables, service)?;
    free_slots(tables)
        .find(|(slot, state)| tables.change_state(*slot, *state, BackendState::Held))
        .ok_or(ALL_TAKEN)
}

fn free_slots(tables: &Tables) -> impl Iterator<Item = (u32, SlotState)> {
    every_slot()
        .map(|slot| (slot, tables.slot_state(slot)))
        .filter(|(_, state)| state.is(BackendState::Free))
}

/// Closes the slots of a netns that is gone, with all its sockets; returns those that still counted
/// connections, and how many.
///
/// # Errors
/// When a map can't be read.
pub fn close_netns(tables: &Tables, netns: u64) -> Result<Vec<(SlotView, u64)>> {
    let mut counted = Vec::new();
    let mut slots = tables.slots()?;
    slots.retain(|view| view.member.backend.netns == netns);
    for view in slots {
        close(tables, &view);
        tables.set_adopted(view.slot(), 0);
        let word = tables.established_word(view.slot());
        let left = word.swap(0, Ordering::SeqCst);
        if left != 0 {
            counted.push((view, left & u64::from(u32::MAX)));
        }
    }
    Ok(counted)
}

/// Since when each closed backend has been seen without connections.
#[derive(Debug, Default)]
pub struct EmptySlots(HashMap<BackendId, Instant>);

impl EmptySlots {
    /// Frees the closed slots that have had no connection for a while; returns them.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn free(&mut self, tables: &mut Tables) -> Result<Vec<SlotView>> {
        let now = Instant::now();
        let mut empty = tables.slots()?;
        empty.retain(|view| {
            view.slot_state().is(BackendState::Closed) && view.member.counts.established == 0
        });
        let ids: HashSet<BackendId> = empty.iter().map(SlotView::id).collect();
        self.0.retain(|id, _| ids.contains(id));
        let mut freed = Vec::new();
        for view in empty {
            let since = *self.0.entry(view.id()).or_insert(now);
            if now.duration_since(since) >= QUARANTINE && free(tables, &view)? {
                self.0.remove(&view.id());
                freed.push(view);
            }
        }
        Ok(freed)
    }
}

/// Frees a closed slot; false: it is not closed any more. The slot is claimed first: from then on a
/// socket that listens again takes another one.
fn free(tables: &mut Tables, view: &SlotView) -> Result<bool> {
    let claimed = tables.change_state(view.slot(), view.slot_state(), BackendState::Held);
    if claimed {
        give_back(tables, view.slot(), view.slot_state())?;
    }
    Ok(claimed)
}

/// Makes a held slot free for the next backend, which has another generation and may be another
/// service's: a daemon that died over it may have left it a member.
fn give_back(tables: &mut Tables, slot: u32, slot_state: SlotState) -> Result<()> {
    tables.leave_all(slot);
    clear_listener(tables, slot)?;
    tables.set_silence(slot, Silence::default());
    let generation = slot_state.generation().wrapping_add(1);
    tables.set_slot_state(slot, SlotState::new(generation, BackendState::Free));
    Ok(())
}

/// Gives back the slots that an earlier daemon died over, after those that still have their
/// listener have been registered.
///
/// # Errors
/// When a map can't be changed.
pub fn give_back_held(tables: &mut Tables) -> Result<()> {
    for slot in every_slot() {
        let slot_state = tables.slot_state(slot);
        if !slot_state.is(BackendState::Held) {
            continue;
        }
        info!("slot {slot}: giving back what the last daemon died over");
        if tables.counts(slot).established == 0 {
            give_back(tables, slot, slot_state)?;
        } else {
            tables.leave_all(slot);
            tables.set_slot_state(slot, slot_state.with(BackendState::Closed));
        }
    }
    Ok(())
}

/// Takes the listener of a slot out of the map: a socket that was shut down, and not closed, is
/// still there.
fn clear_listener(tables: &mut Tables, slot: u32) -> Result<()> {
    match tables.listeners.clear_index(&slot) {
        Ok(()) => debug!("slot {slot}: its listener was still in the map"),
        Err(MapError::SyscallError(error)) if not_there(&error.io_error) => {}
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot clear the listener of slot {slot}"));
        }
    }
    Ok(())
}

fn not_there(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL))
}
