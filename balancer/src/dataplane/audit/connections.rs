//! Whose each connection of a netns is, and whether the kernel half counts it or the daemon.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use balancer_common::abi::{BackendState, Connection, Counts};

use super::super::tables::{SlotView, Tables, connection_of};
use super::attribution::{Doubt, Doubts, adopted, fitting};
use super::inherited::Inherited;
use super::socket_table::SocketTable;
use super::unattributed::Unattributed;
use crate::sys::sock_diag::Socket;

/// The connections of a netns, sorted.
#[derive(Debug, Default)]
pub struct Connections<'a> {
    /// The connections that the kernel half has counted, by slot: all, and the exempt ones of them.
    pub counted: BTreeMap<u32, (u32, u32)>,
    /// The connections that name a slot, with its number, but are not counted there by the kernel
    /// half.
    uncounted: Vec<(u32, &'a Socket)>,
    /// How many uncounted connections have just turned out to stay so, by slot.
    pub unseen: BTreeMap<u32, u64>,
    /// For how many passes in a row connections were uncounted that may be on their way out, by
    /// their cookie.
    pub leaving: HashMap<u64, u64>,
    /// The connections that name no slot.
    unclaimed: Vec<&'a Socket>,
    /// Every connection of a slot, with its number. One that several share is with the first.
    pub of_slots: Vec<(u32, &'a Socket)>,
}

impl<'a> Connections<'a> {
    /// Sorts the connections of a netns; `leaving` is what the last pass has found.
    pub fn sort(
        tables: &Tables,
        table: &'a SocketTable,
        inherited: &Inherited,
        leaving: &HashMap<u64, u64>,
    ) -> Self {
        let generations: HashMap<u32, u32> = table
            .slots
            .iter()
            .map(|view| (view.slot(), view.slot_state().generation()))
            .collect();
        let is_current = |connection: &Connection| {
            generations.get(&u32::from(connection.slot)) == Some(&connection.generation)
        };
        let adopted = adopted(tables, &table.slots);
        let mut sorted = Self::default();
        for socket in &table.connections {
            let connection = connection_of(socket).filter(is_current);
            let unwritten = || inherited.connection(socket).filter(is_current);
            if let Some(connection) = connection.or_else(unwritten) {
                sorted.add(socket, connection, leaving);
            } else {
                let fitting = fitting(&adopted, socket.local);
                let first = fitting.first().map(|view| (view.slot(), socket));
                sorted.of_slots.extend(first);
                sorted.unclaimed.push(socket);
            }
        }
        sorted
    }

    fn add(&mut self, socket: &'a Socket, connection: Connection, leaving: &HashMap<u64, u64>) {
        let slot = u32::from(connection.slot);
        self.of_slots.push((slot, socket));
        match connection.class {
            Connection::INHERITED => self.uncounted.push((slot, socket)),
            // On its way out, unless it stays so: then another program has switched its state
            // changes off.
            Connection::UNCOUNTED => {
                let passes = leaving.get(&socket.cookie).copied().unwrap_or(0);
                if passes > 0 {
                    self.uncounted.push((slot, socket));
                }
                if passes == 1 {
                    *self.unseen.entry(slot).or_default() += 1;
                }
                self.leaving.insert(socket.cookie, passes + 1);
            }
            class => {
                let counted = self.counted.entry(slot).or_default();
                counted.0 += 1;
                counted.1 += u32::from(class == Connection::EXEMPT);
            }
        }
    }

    /// Counts again the connections that the kernel half can't follow; says whether there may be
    /// any. Those that are nobody's are added to `unattributed`, by service.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn recount(
        &self,
        tables: &Tables,
        slots: &[SlotView],
        doubts: Option<&Doubts>,
        unattributed: &mut BTreeMap<u16, Unattributed>,
    ) -> Result<bool> {
        let adopted = adopted(tables, slots);
        let mut counts = Shares::default();
        for socket in &self.unclaimed {
            let doubt = doubts.and_then(|doubts| doubts.of(socket));
            let fitting = fitting(&adopted, socket.local);
            if let Some(first) = fitting.first() {
                let weight = weight(tables, first.member.backend.service, socket)?;
                counts.add(sharing(&fitting, doubt), weight);
            } else if let Some(doubt) = doubt
                && let Some(service) = doubt.service
            {
                let of_service = unattributed.entry(service).or_default();
                of_service.add(doubt.why, doubt.pid);
            }
        }
        let services: HashMap<u32, u16> = slots
            .iter()
            .map(|view| (view.slot(), view.member.backend.service))
            .collect();
        for (slot, socket) in &self.uncounted {
            if let Some(service) = services.get(slot) {
                counts.add(vec![*slot], weight(tables, *service, socket)?);
            }
        }
        let counts = counts.by_slot();
        for view in slots {
            let count = counts.get(&view.slot()).copied().unwrap_or(0);
            tables.set_adopted(view.slot(), count);
        }
        Ok(!(adopted.is_empty() && self.uncounted.is_empty() && unattributed.is_empty()))
    }
}

/// What a connection adds to a count, as `Counts::established` packs it.
fn weight(tables: &Tables, service: u16, socket: &Socket) -> Result<u64> {
    let exempt = tables.is_exempt(service, socket.remote.ip())?;
    Ok(if exempt { Counts::ONE_EXEMPT } else { 1 })
}

/// The slots, of those that a connection's address fits, that share it: those of its processes, if
/// they are known, and those that listen, if any does.
fn sharing(fitting: &[&SlotView], doubt: Option<&Doubt>) -> Vec<u32> {
    let slots_that = |is_so: &dyn Fn(&SlotView) -> bool| -> Vec<u32> {
        let so = fitting.iter().filter(|view| is_so(view));
        so.map(|view| view.slot()).collect()
    };
    let held = |view: &SlotView| doubt.is_some_and(|doubt| doubt.slots.contains(&view.slot()));
    let listens = |view: &SlotView| view.slot_state().is(BackendState::Active);
    let any = [
        slots_that(&|view| held(view) && listens(view)),
        slots_that(&listens),
        slots_that(&|_| true),
    ];
    let first = any.into_iter().find(|slots| !slots.is_empty());
    first.unwrap_or_default()
}

/// Counts, as `Counts::established` packs them, by the slots that share them.
#[derive(Debug, Default)]
struct Shares(BTreeMap<Vec<u32>, u64>);

impl Shares {
    fn add(&mut self, slots: Vec<u32>, count: u64) {
        *self.0.entry(slots).or_insert(0) += count;
    }

    /// The count of each slot. What several share is dealt out evenly, so that the sums are right
    /// and stay even while connections end.
    fn by_slot(&self) -> BTreeMap<u32, u64> {
        let mut counts = BTreeMap::new();
        for (slots, count) in &self.0 {
            let parts = slots.len() as u64;
            let part = |count: u64, at: u64| count / parts + u64::from(at < count % parts);
            for (slot, at) in slots.iter().zip(0..) {
                let (all, exempt) = (count & u64::from(u32::MAX), count >> 32);
                *counts.entry(*slot).or_insert(0) += part(all, at) | part(exempt, at) << 32;
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Sums hold, no slot has more than one more than another, and none more exempt
        /// connections than connections.
        #[test]
        fn what_several_share_is_dealt_out_evenly(
            slots in 1..9_u32,
            counted in 0..1_000_u64,
            exempt in 0..1_000_u64,
        ) {
            let mut shares = Shares::default();
            shares.add((0..slots).collect(), counted + exempt * Counts::ONE_EXEMPT);
            let counts = shares.by_slot();
            let all: Vec<u64> = counts.values().map(|count| count & 0xffff_ffff).collect();
            let of_exempt: Vec<u64> = counts.values().map(|count| count >> 32).collect();
            prop_assert_eq!(all.iter().sum::<u64>(), counted + exempt);
            prop_assert_eq!(of_exempt.iter().sum::<u64>(), exempt);
            for parts in [&all, &of_exempt] {
                prop_assert_eq!(parts.len(), slots as usize);
                prop_assert!(parts.iter().max().unwrap() - parts.iter().min().unwrap() <= 1);
            }
            prop_assert!(all.iter().zip(&of_exempt).all(|(all, exempt)| exempt <= all));
        }
    }

    #[test]
    fn shares_of_one_slot_add_up() {
        let mut shares = Shares::default();
        shares.add(vec![3], 5);
        shares.add(vec![3, 4], 5);
        shares.add(vec![3, 4], Counts::ONE_EXEMPT);
        let expected = [(3, 8 | 1 << 32), (4, 3)];
        assert_eq!(shares.by_slot(), BTreeMap::from(expected));
    }
}
