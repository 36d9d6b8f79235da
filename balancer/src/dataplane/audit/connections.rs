//! Whose each connection of a netns is, and whether the kernel half counts it or the daemon.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use balancer_common::abi::{Address, Backend, BackendState, Connection, Counts};

use super::super::tables::{SlotView, Tables, connection_of};
use super::handover::Handover;
use super::socket_table::SocketTable;
use crate::discover::{SocketOwner, owners};
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
}

impl<'a> Connections<'a> {
    /// Sorts the connections of a netns; `leaving` is what the last pass has found.
    pub fn sort(table: &'a SocketTable, handover: &Handover, leaving: &HashMap<u64, u64>) -> Self {
        let generations: HashMap<u32, u32> = table
            .slots
            .iter()
            .map(|view| (view.slot(), view.slot_state().generation()))
            .collect();
        let is_current = |connection: &Connection| {
            generations.get(&u32::from(connection.slot)) == Some(&connection.generation)
        };
        let mut sorted = Self::default();
        for socket in &table.connections {
            let connection = connection_of(socket).filter(is_current);
            let inherited = || handover.connection(socket).filter(is_current);
            match connection.or_else(inherited) {
                Some(connection) => sorted.add(socket, connection, leaving),
                None => sorted.unclaimed.push(socket),
            }
        }
        sorted
    }

    fn add(&mut self, socket: &'a Socket, connection: Connection, leaving: &HashMap<u64, u64>) {
        let slot = u32::from(connection.slot);
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
    /// any.
    ///
    /// # Errors
    /// When a map or the processes can't be read.
    pub fn recount(&self, tables: &Tables, slots: &[SlotView]) -> Result<bool> {
        let adopted: Vec<&SlotView> = slots
            .iter()
            .filter(|view| view.member.backend.flags & Backend::ADOPTED != 0)
            .collect();
        let mut counts = by_owner(tables, &adopted, &self.unclaimed)?;
        let services: HashMap<u32, u16> = slots
            .iter()
            .map(|view| (view.slot(), view.member.backend.service))
            .collect();
        for (slot, socket) in &self.uncounted {
            if let Some(service) = services.get(slot) {
                *counts.entry(*slot).or_insert(0) += weight(tables, *service, socket)?;
            }
        }
        for view in slots {
            let count = counts.get(&view.slot()).copied().unwrap_or(0);
            tables.set_adopted(view.slot(), count);
        }
        Ok(!(adopted.is_empty() && self.uncounted.is_empty()))
    }
}

/// What a connection adds to a count, as `Counts::established` packs it.
fn weight(tables: &Tables, service: u16, socket: &Socket) -> Result<u64> {
    let exempt = tables.is_exempt(service, socket.remote.ip())?;
    Ok(if exempt { Counts::ONE_EXEMPT } else { 1 })
}

/// The counts of adopted slots: a connection belongs to one by its own address, and among listeners
/// of one address by its process.
fn by_owner(
    tables: &Tables,
    adopted: &[&SlotView],
    connections: &[&Socket],
) -> Result<BTreeMap<u32, u64>> {
    let mut counts = BTreeMap::new();
    let mut processes = None;
    for socket in connections {
        let fitting = fitting(adopted, socket.local);
        let Some(first) = fitting.first() else {
            continue;
        };
        let mut view = *first;
        if fitting.len() > 1 {
            let processes = match &processes {
                Some(known) => known,
                None => processes.insert(owners(connections.iter().map(|socket| socket.inode))?),
            };
            let owners = processes.get(&socket.inode).map_or(&[][..], Vec::as_slice);
            let owned = fitting.iter().find(|view| is_owned(view, owners));
            view = owned.unwrap_or(first);
        }
        *counts.entry(view.slot()).or_insert(0) +=
            weight(tables, view.member.backend.service, socket)?;
    }
    Ok(counts)
}

fn is_owned(view: &SlotView, owners: &[SocketOwner]) -> bool {
    let pid = view.member.backend.pid;
    owners.iter().any(|owner| owner.pid == pid)
}

/// The adopted listeners that a connection with that local address can have come from: those of the
/// exact address, else those of the wildcard.
fn fitting<'a>(adopted: &[&'a SlotView], local: SocketAddr) -> Vec<&'a SlotView> {
    let local_address = bound_to(local.ip());
    let of = |fits: &dyn Fn(Address) -> bool| -> Vec<&'a SlotView> {
        let fits = |view: &&'a SlotView| {
            let backend = &view.member.backend;
            backend.port == local.port() && fits(backend.address)
        };
        adopted.iter().copied().filter(fits).collect()
    };
    let mut fitting = of(&|address| address == local_address);
    if fitting.is_empty() {
        fitting = of(&|address| address.is_any());
    }
    // A slot that a daemon died over registering has the address of the one that its listener has
    // got since.
    fitting.sort_by_key(|view| !view.slot_state().is(BackendState::Active));
    fitting
}

/// An address as the maps hold it: mapped IPv4 of a dual-stack socket is IPv4.
pub fn bound_to(address: IpAddr) -> Address {
    Address::from(address.to_canonical())
}
