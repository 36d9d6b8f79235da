//! The socket table of one netns, and the slots of its backends just before and just after it was
//! read.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use anyhow::{Context as _, Result};
use balancer_common::abi::{Address, Counts};

use super::super::tables::{SlotView, Tables};
use crate::sys::sock_diag::{Family, Query, Socket, State, States, tcp_sockets};

/// What a slot has counted at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// The generation of the slot: whose counts these are.
    pub generation: u32,
    /// The counts of the kernel half at this moment.
    pub counts: Counts,
    /// How many connections have entered ESTABLISHED in this slot since the map was made.
    pub entered: u64,
}

/// The sockets of a netns, and what its backends had counted.
#[derive(Debug)]
pub struct SocketTable {
    /// The backends of the netns, those that listen and those that are closed.
    pub slots: Vec<SlotView>,
    /// What the backends had counted before the table was read, in the order of `slots`.
    pub before: Vec<Reading>,
    /// What the backends had counted after the table was read, in the order of `slots`.
    pub after: Vec<Reading>,
    /// Sockets in LISTEN.
    pub listeners: Vec<Socket>,
    /// Sockets in ESTABLISHED.
    pub connections: Vec<Socket>,
}

/// How much of a socket table is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Listeners and established connections.
    All,
    /// Listeners on these ports, a bounded number of them.
    Listeners(Vec<u16>),
}

impl SocketTable {
    /// Reads the socket table of the netns that the thread is in.
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn read(tables: &Tables, netns: u64, reach: &Reach) -> Result<Self> {
        let mut slots = tables.slots()?;
        slots.retain(|view| view.member.backend.netns == netns);
        let before = slots.iter().map(|view| read_before(tables, view.slot()));
        let before = before.collect();
        let mut connections = match reach {
            Reach::All => sockets(tables.connection_map())?,
            Reach::Listeners(ports) => listeners(tables.connection_map(), ports)?,
        };
        let after = slots.iter().map(|view| read_after(tables, view.slot()));
        let after = after.collect();
        // They may be very many: none is copied.
        let listeners = connections
            .extract_if(.., |socket| socket.state == State::Listen)
            .collect();
        Ok(Self {
            slots,
            before,
            after,
            listeners,
            connections,
        })
    }
}

/// The kernel half raises `entered` after the count: read first before and last after, it never
/// misses one that the counts have.
fn read_before(tables: &Tables, slot: u32) -> Reading {
    let entered = tables.entered(slot);
    Reading {
        generation: tables.slot_state(slot).generation(),
        counts: tables.counts(slot),
        entered,
    }
}

fn read_after(tables: &Tables, slot: u32) -> Reading {
    Reading {
        generation: tables.slot_state(slot).generation(),
        counts: tables.counts(slot),
        entered: tables.entered(slot),
    }
}

/// The most listeners of one family that are read where strangers may have made them: many more
/// than may have slots.
const MOST_LISTENERS: usize = 4_096;

/// Listeners on these ports of the netns that the thread is in.
fn listeners(storage: BorrowedFd<'_>, ports: &[u16]) -> Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for family in [Family::V4, Family::V6] {
        let query = Query {
            storage: Some(storage),
            ports,
            most: MOST_LISTENERS,
            ..Query::new(family, States::of(&[State::Listen]))
        };
        sockets.extend(tcp_sockets(&query).context("cannot read the socket table (sock_diag)")?);
    }
    Ok(sockets)
}

/// The listeners and established connections of the netns that the thread is in, with what that map
/// holds for each.
pub fn sockets(storage: BorrowedFd<'_>) -> Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for family in [Family::V4, Family::V6] {
        let mut query = Query::new(family, States::of(&[State::Listen, State::Established]));
        query.storage = Some(storage);
        query.info = true;
        sockets.extend(tcp_sockets(&query).context("cannot read the socket table (sock_diag)")?);
    }
    Ok(sockets)
}

/// An address as the maps hold it: mapped IPv4 of a dual-stack socket is IPv4.
pub fn bound_to(address: IpAddr) -> Address {
    Address::from(address.to_canonical())
}
