//! Connections that a closing listener hands on to another one of its `SO_REUSEPORT` group (`net.ipv4.tcp_migrate_req`, `inet_csk_listen_stop`,
//! `net/ipv4/inet_connection_sock.c`): the kernel half has counted them on the one that closed, and nothing tells it of the change.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{BackendState, Connection, Counts};
use tracing::info;

use super::super::tables::{SlotView, connection_of};
use super::super::writer::Writer;
use super::adopt::{ONLY_OLD, fitting};
use super::socket_table::SocketTable;
use crate::discover::{SocketOwner, owners};
use crate::sys::sock_diag::Socket;
use crate::sys::socket;

/// How often the connections of a closed listener are looked at: finding their owners takes a look at every process.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// What is known of the connections that the closed listeners of a namespace have left.
#[derive(Debug, Default)]
pub struct Migrated {
    /// Those that were seen waiting to be accepted when their listener was gone already, by their cookie: without migration they would have
    /// been reset.
    waiting: HashSet<u64>,
    /// When the connections of a closed slot (with its generation) are looked at again.
    look_at: HashMap<(u32, u32), Instant>,
}

/// A connection that a closed slot still counts.
struct Leftover<'a> {
    socket: &'a Socket,
    connection: Connection,
    of: &'a SlotView,
}

impl Migrated {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.look_at.is_empty()
    }

    fn note_waiting(&mut self, leftovers: &[Leftover<'_>]) {
        let there: HashSet<u64> = leftovers.iter().map(|left| left.socket.cookie).collect();
        self.waiting.retain(|cookie| there.contains(cookie));
        let waiting = leftovers.iter().filter(|left| left.socket.inode == 0);
        self.waiting.extend(waiting.map(|left| left.socket.cookie));
    }

    /// Whether it is time to look at the connections of one of the closed slots.
    fn due(&mut self, leftovers: &[Leftover<'_>]) -> bool {
        let now = Instant::now();
        let tenants: HashSet<(u32, u32)> = leftovers
            .iter()
            .map(|left| (left.of.slot(), left.of.slot_state().generation()))
            .collect();
        let look_at = &mut self.look_at;
        look_at.retain(|tenant, _| tenants.contains(tenant));
        let due = tenants
            .iter()
            .any(|tenant| look_at.get(tenant).is_none_or(|next| *next <= now));
        if due {
            look_at.extend(tenants.into_iter().map(|tenant| (tenant, now + LOOK_EVERY)));
        }
        due
    }

    /// The slot of the only listener that can have it now: one of the same service and address, of a process that has the connection. A
    /// process that had the closed listener too may have accepted it there, unless it was seen waiting after that.
    fn new_home<'a>(
        &self,
        left: &Leftover<'_>,
        owners: &[SocketOwner],
        listening: &[&'a SlotView],
    ) -> Option<&'a SlotView> {
        let closed = &left.of.member.backend;
        let waited = self.waiting.contains(&left.socket.cookie);
        let of_closed = |owner: &SocketOwner| owner.pid == closed.pid;
        if !waited && owners.iter().any(of_closed) {
            return None;
        }
        let same = |view: &&&SlotView| {
            let backend = &view.member.backend;
            backend.service == closed.service
                && backend.port == closed.port
                && owners.iter().any(|owner| owner.pid == backend.pid)
        };
        let candidates: Vec<&SlotView> = listening.iter().filter(same).copied().collect();
        let virtual_port = left.socket.local.port() != closed.port;
        let candidates = if virtual_port {
            candidates
        } else {
            fitting(&candidates, left.socket.local)
        };
        match candidates.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }
}

impl Writer {
    /// Counts connections where they are served: those that were handed on go to the slot of the listener that has them now. Which
    /// one that is can be told once they are accepted, by their process. Says whether any was moved.
    ///
    /// # Errors
    /// When the processes can't be listed.
    pub(in crate::dataplane) fn follow_migrated(
        &mut self,
        netns: u64,
        socket_table: &SocketTable,
    ) -> Result<bool> {
        let mut known = self.migrated.remove(&netns).unwrap_or_default();
        let moved = self.move_accepted(socket_table, &mut known);
        if !known.is_empty() {
            self.migrated.insert(netns, known);
        }
        moved
    }

    fn move_accepted(&self, socket_table: &SocketTable, known: &mut Migrated) -> Result<bool> {
        let leftovers = leftovers(socket_table);
        known.note_waiting(&leftovers);
        let due = known.due(&leftovers);
        let accepted: Vec<&Leftover<'_>> = leftovers
            .iter()
            .filter(|left| left.socket.inode != 0)
            .filter(|left| due || known.waiting.contains(&left.socket.cookie))
            .collect();
        if accepted.is_empty() {
            return Ok(false);
        }
        let listening: Vec<&SlotView> = socket_table
            .slots
            .iter()
            .filter(|view| view.slot_state().is(BackendState::Active))
            .collect();
        let processes = owners(accepted.iter().map(|left| left.socket.inode))?;
        let mut moved = 0;
        for left in accepted {
            let owners = processes.get(&left.socket.inode).map(Vec::as_slice);
            let owners = owners.unwrap_or_default();
            if let Some(to) = known.new_home(left, owners, &listening)
                && self.move_over(left, owners, to)
            {
                known.waiting.remove(&left.socket.cookie);
                moved += 1;
            }
        }
        if moved > 0 {
            info!(
                "{moved} connections were handed on by a closing listener to another: counted there now"
            );
        }
        Ok(moved > 0)
    }

    /// From then on the daemon counts it. Should it end in this very moment, the comparison puts the closed slot's count right.
    fn move_over(&self, left: &Leftover<'_>, owners: &[SocketOwner], to: &SlotView) -> bool {
        let Ok(slot) = u16::try_from(to.slot()) else {
            return false;
        };
        let value = Connection {
            slot,
            class: Connection::INHERITED,
            generation: to.slot_state().generation(),
        };
        let Some(file) = Self::file_of(left.socket, owners) else {
            return false;
        };
        if self.set_storage(value, &file, ONLY_OLD).is_err() {
            return false;
        }
        let share = match left.connection.class {
            Connection::COUNTED => 1,
            Connection::EXEMPT => Counts::ONE_EXEMPT,
            _ => 0,
        };
        if socket::is_established(&file).unwrap_or(false) {
            self.tables
                .established_word(left.of.slot())
                .fetch_sub(share, Ordering::SeqCst);
        }
        true
    }
}

/// The connections of a census that closed slots count.
fn leftovers(socket_table: &SocketTable) -> Vec<Leftover<'_>> {
    let closed: HashMap<(u32, u32), &SlotView> = socket_table
        .slots
        .iter()
        .filter(|view| view.slot_state().is(BackendState::Closed))
        .map(|view| ((view.slot(), view.slot_state().generation()), view))
        .collect();
    if closed.is_empty() {
        return Vec::new();
    }
    let leftover = |socket| {
        let connection = connection_of(socket)?;
        let tenant = (u32::from(connection.slot), connection.generation);
        Some(Leftover {
            socket,
            connection,
            of: closed.get(&tenant)?,
        })
    };
    socket_table
        .connections
        .iter()
        .filter_map(leftover)
        .collect()
}
