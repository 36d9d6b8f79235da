//! One look at a network namespace: its sockets, and the slots of its backends just before and just after.

use anyhow::{Context as _, Result};
use balancer_common::abi::{Counts, SlotState};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use super::super::tables::SlotView;
use super::super::writer::Writer;
use crate::sys::sock_diag::{Family, Query, Socket, State, States, tcp_sockets};

/// What a slot has counted at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Whose counts these are.
    pub generation: u32,
    /// What the kernel half has counted.
    pub counts: Counts,
    /// How many have entered ESTABLISHED, ever.
    pub entered: u64,
}

/// What a namespace holds.
#[derive(Debug)]
pub struct SocketTable {
    /// Its backends, those that listen and those that are closed.
    pub slots: Vec<SlotView>,
    /// What they had counted before the table was read, in their order.
    pub before: Vec<Reading>,
    /// What they have counted since.
    pub after: Vec<Reading>,
    /// Sockets in LISTEN.
    pub listeners: Vec<Socket>,
    /// Sockets in ESTABLISHED.
    pub connections: Vec<Socket>,
}

impl Writer {
    /// Reads the socket table of the namespace that the thread is in.
    ///
    /// # Errors
    /// When it or a map can't be read.
    pub(in crate::dataplane) fn socket_table(&self, netns: u64) -> Result<SocketTable> {
        let mut slots = self.slots()?;
        slots.retain(|view| view.member.backend.netns == netns);
        let before = slots.iter().map(|view| self.read_before(view)).collect();
        let mut connections = sockets(self.tables.connection_map())?;
        let after = slots.iter().map(|view| self.read_after(view)).collect();
        // They may be very many: none is copied.
        let listeners = connections
            .extract_if(.., |socket| socket.state == State::Listen)
            .collect();
        Ok(SocketTable {
            slots,
            before,
            after,
            listeners,
            connections,
        })
    }

    /// The kernel half raises `entered` after the count: read first before and last after, it never misses one that the counts have.
    fn read_before(&self, view: &SlotView) -> Reading {
        let entered = self.tables.entered(view.slot());
        Reading {
            entered,
            ..self.reading(view)
        }
    }

    fn read_after(&self, view: &SlotView) -> Reading {
        let reading = self.reading(view);
        Reading {
            entered: self.tables.entered(view.slot()),
            ..reading
        }
    }

    fn reading(&self, view: &SlotView) -> Reading {
        let slot_state = SlotState(self.tables.slot_state(view.slot()).load(Ordering::SeqCst));
        Reading {
            generation: slot_state.generation(),
            counts: self.tables.counts(view.slot()),
            entered: 0,
        }
    }
}

/// The listeners and established connections of the namespace that the thread is in, with what that map holds for each.
pub fn sockets(storage: BorrowedFd<'_>) -> Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for family in [Family::V4, Family::V6] {
        let mut query = Query::new(family, States::of(&[State::Listen, State::Established]));
        query.storage = Some(storage);
        sockets.extend(tcp_sockets(&query).context("cannot read the socket table (sock_diag)")?);
    }
    Ok(sockets)
}
