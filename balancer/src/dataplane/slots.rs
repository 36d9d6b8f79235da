//! The daemon's side of slots: quotas in, closed ones out.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::maps::MapError;
use balancer_common::abi::{BackendState, SlotPolicy, SlotState, UNLIMITED};
use tracing::{debug, info};

use super::tables::{SlotView, every_slot};
use super::writer::Writer;

/// A closed slot is given away only after so long without a connection: a last one may be on its way out.
const QUARANTINE: Duration = Duration::from_secs(1);

/// The quota and weight of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotQuota {
    /// Its slot.
    pub slot: u32,
    /// The tenant that it is meant for.
    pub generation: u32,
    /// The quota; `None`: unlimited.
    pub quota: Option<u32>,
    /// Its weight.
    pub weight: u32,
    /// Where the quota comes from.
    pub source: QuotaSource,
}

/// Where a quota comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotaSource {
    /// The service's rule, as somebody wrote it down.
    Rule,
    /// Computed by the service's rule from what is known of its clients.
    Computed,
    /// Set by hand for every backend of the service.
    Service,
    /// Set by hand for this backend.
    Backend,
}

impl QuotaSource {
    const fn flags(self) -> u32 {
        match self {
            Self::Rule => 0,
            Self::Computed => SlotPolicy::COMPUTED,
            Self::Service => SlotPolicy::SERVICE_BY_HAND,
            Self::Backend => SlotPolicy::BY_HAND,
        }
    }
}

impl Writer {
    /// All taken slots.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn slots(&self) -> Result<Vec<SlotView>> {
        self.tables.slots()
    }

    /// Gives a backend its quota and weight, in force at the next SYN.
    pub fn set_quota(&self, wanted: SlotQuota) {
        let quota = wanted.quota.unwrap_or(UNLIMITED);
        let policy = SlotPolicy::new(
            wanted.generation,
            quota,
            wanted.weight,
            wanted.source.flags(),
        );
        let present = self.tables.policy(wanted.slot);
        if (present.quota, present.weight) == (policy.quota, policy.weight) {
            return;
        }
        // The quota's word carries the generation that makes both valid: it goes last.
        self.tables
            .weight_word(wanted.slot)
            .store(policy.weight, Ordering::SeqCst);
        self.tables
            .quota_word(wanted.slot)
            .store(policy.quota, Ordering::SeqCst);
    }

    pub(super) fn close(&mut self, view: &SlotView) {
        let slot_state = view.slot_state();
        let closed = slot_state.with(BackendState::Closed).0;
        let word = self.tables.slot_state(view.slot());
        if word
            .compare_exchange(slot_state.0, closed, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
        {
            self.tables.leave(view.member.backend.service, view.slot());
        }
    }

    /// Frees the closed slots that have had no connection for a while; returns them.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn free_empty(&mut self) -> Result<Vec<SlotView>> {
        let now = Instant::now();
        let empty: Vec<SlotView> = self
            .slots()?
            .into_iter()
            .filter(|view| {
                view.slot_state().is(BackendState::Closed) && view.member.counts.established == 0
            })
            .collect();
        let slots: HashSet<u32> = empty.iter().map(SlotView::slot).collect();
        self.empty_since.retain(|slot, _| slots.contains(slot));
        let mut freed = Vec::new();
        for view in empty {
            let generation = view.slot_state().generation();
            let (seen, since) = *self
                .empty_since
                .entry(view.slot())
                .or_insert((generation, now));
            if seen != generation {
                self.empty_since.insert(view.slot(), (generation, now));
            } else if now.duration_since(since) >= QUARANTINE && self.free(&view)? {
                self.empty_since.remove(&view.slot());
                freed.push(view);
            }
        }
        Ok(freed)
    }

    /// Claims the slot first: from then on a socket that listens again takes another one.
    fn free(&mut self, view: &SlotView) -> Result<bool> {
        let slot_state = view.slot_state();
        let held = slot_state.with(BackendState::Held).0;
        let word = self.tables.slot_state(view.slot());
        if word
            .compare_exchange(slot_state.0, held, Ordering::SeqCst, Ordering::SeqCst)
            .is_err()
        {
            return Ok(false);
        }
        self.give_back(view.slot(), slot_state)?;
        Ok(true)
    }

    fn give_back(&mut self, slot: u32, slot_state: SlotState) -> Result<()> {
        self.clear_listener(slot)?;
        let free = SlotState::new(slot_state.generation().wrapping_add(1), BackendState::Free);
        self.tables.slot_state(slot).store(free.0, Ordering::SeqCst);
        Ok(())
    }

    /// Gives back the slots that an earlier daemon died over, after those that still have their listener have been registered.
    ///
    /// # Errors
    /// When a map can't be changed.
    pub fn give_back_held(&mut self) -> Result<()> {
        for slot in every_slot() {
            let slot_state = SlotState(self.tables.slot_state(slot).load(Ordering::SeqCst));
            if !slot_state.is(BackendState::Held) {
                continue;
            }
            info!("slot {slot}: giving back what the last daemon died over");
            if self.tables.counts(slot).established == 0 {
                self.give_back(slot, slot_state)?;
            } else {
                let closed = slot_state.with(BackendState::Closed).0;
                self.tables.slot_state(slot).store(closed, Ordering::SeqCst);
            }
        }
        Ok(())
    }

    /// A socket that was shut down, and not closed, is still in the map.
    fn clear_listener(&mut self, slot: u32) -> Result<()> {
        match self.tables.listeners.clear_index(&slot) {
            Ok(()) => debug!("slot {slot}: its listener was still in the map"),
            Err(MapError::SyscallError(error)) if not_there(&error.io_error) => {}
            Err(MapError::KeyNotFound | MapError::ElementNotFound) => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot clear the listener of slot {slot}"));
            }
        }
        Ok(())
    }
}

fn not_there(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL))
}
