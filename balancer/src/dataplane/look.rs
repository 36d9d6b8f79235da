//! What the sockets of a netns tell of its backends' health: the accept queues of those that get
//! no SYNs any more, at which the kernel half would look, and bytes that nobody reads.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use anyhow::{Context as _, Result};
use balancer_common::abi::{Backend, BackendId, BackendState, ServicePort, ticks, ticks_of_ms};
use balancer_common::decision::health::look_at_queue;

use super::audit::{adopted, fitting};
use super::tables::{SlotView, Tables, backend_of};
use crate::health::{ReadWatch, Reading};
use crate::sys::clock;
use crate::sys::sock_diag::{Family, Query, Socket, State, States, tcp_sockets};

/// What the looks have seen of each backend's connections so far.
#[derive(Debug, Default)]
pub struct HealthLooks(HashMap<BackendId, ReadWatch>);

/// How far a look goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// At accept queues alone.
    Queues,
    /// At connections as well; the next such look is at most so far off.
    Connections(Duration),
}

impl HealthLooks {
    /// Looks at the backends of one netns. Must run inside that netns.
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn look(&mut self, tables: &Tables, netns: u64, depth: Depth) -> Result<()> {
        let mut slots = regarded(tables)?;
        slots.retain(|view| view.member.backend.netns == netns);
        // Before the queues, as `look_at_queue` wants it.
        let entered: HashMap<BackendId, u64> = slots
            .iter()
            .map(|view| (view.id(), tables.entered(view.slot())))
            .collect();
        let sockets = sockets(tables, &slots, depth)?;
        let now = ticks(clock::monotonic_ns());
        let listeners = sockets.iter().filter(|one| one.state == State::Listen);
        for (id, socket) in listeners.filter_map(|one| Some((backend_of(one)?, one))) {
            if let Some(entered) = entered.get(&id) {
                let before = tables.health(id.slot);
                let look = look_at_queue(before.queue, *entered, socket.receive_queue, now);
                tables.set_queue_look(id.slot, &before, look);
            }
        }
        if let Depth::Connections(next) = depth {
            self.look_at_connections(tables, &slots, &sockets, next);
        }
        Ok(())
    }

    fn look_at_connections(
        &mut self,
        tables: &Tables,
        slots: &[SlotView],
        sockets: &[Socket],
        next: Duration,
    ) {
        let now = ticks(clock::monotonic_ns());
        let mut readings: HashMap<BackendId, Vec<Reading>> = HashMap::new();
        let adopted = adopted(tables, slots);
        for socket in sockets.iter().filter(|one| one.state == State::Established) {
            let id = backend_of(socket).or_else(|| match fitting(&adopted, socket.local)[..] {
                [only] => Some(only.id()),
                _ => None,
            });
            if let (Some(id), Some(reading)) = (id, reading(socket)) {
                readings.entry(id).or_default().push(reading);
            }
        }
        let lasts = ticks_of_ms(u64::try_from(next.as_millis()).unwrap_or(u64::MAX / 1_000_000));
        for view in slots {
            let of_backend = readings.remove(&view.id()).unwrap_or_default();
            let watch = self.0.entry(view.id()).or_default();
            match watch.look(now, of_backend.into_iter()) {
                // One look may fail.
                Some(since) => tables.set_hung(view.slot(), now + 2 * lasts, since),
                None => tables.set_hung(view.slot(), 0, 0),
            }
        }
    }

    /// Forgets backends that are gone, or whose health is not regarded any more.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn tidy(&mut self, tables: &Tables) -> Result<()> {
        let regarded = regarded(tables)?;
        let ids: HashSet<BackendId> = regarded.iter().map(SlotView::id).collect();
        self.0.retain(|id, _| ids.contains(id));
        Ok(())
    }
}

/// The network namespaces that have backends whose health is regarded.
///
/// # Errors
/// When a map can't be read.
pub fn worth_a_look(tables: &Tables) -> Result<HashSet<u64>> {
    let regarded = regarded(tables)?;
    Ok(regarded
        .iter()
        .map(|view| view.member.backend.netns)
        .collect())
}

/// The backends that listen and whose health is regarded.
fn regarded(tables: &Tables) -> Result<Vec<SlotView>> {
    let mut slots = tables.slots()?;
    slots.retain(|view| view.slot_state().is(BackendState::Active) && view.regards_health);
    Ok(slots)
}

/// The listeners of backends, and where asked for their connections with what they have received.
fn sockets(tables: &Tables, slots: &[SlotView], depth: Depth) -> Result<Vec<Socket>> {
    let mut ports: BTreeSet<u16> = slots.iter().map(|view| view.member.backend.port).collect();
    for service in slots.iter().map(|view| view.member.backend.service) {
        let info = tables.service(service)?;
        if info.flags & ServicePort::VIRTUAL != 0 {
            ports.insert(info.port);
        }
    }
    let ports: Vec<u16> = ports.into_iter().collect();
    let (states, info) = match depth {
        Depth::Queues => (States::of(&[State::Listen]), false),
        Depth::Connections(_) => (States::of(&[State::Listen, State::Established]), true),
    };
    let mut sockets = Vec::new();
    // A connection is of the family of its listener.
    for (family, is_v6) in [(Family::V4, false), (Family::V6, true)] {
        let mut backends = slots.iter().map(|view| &view.member.backend);
        if !backends.any(|backend| (backend.flags & Backend::V6 != 0) == is_v6) {
            continue;
        }
        let query = Query {
            ports: &ports,
            storage: Some(tables.connection_map()),
            info,
            ..Query::new(family, states)
        };
        sockets.extend(tcp_sockets(&query).context("cannot read the socket table (sock_diag)")?);
    }
    Ok(sockets)
}

/// The established connections of backends of one netns, with what they have received. Must run
/// inside it.
///
/// # Errors
/// When the socket table or a map can't be read.
pub fn connections(tables: &Tables, slots: &[SlotView]) -> Result<Vec<(BackendId, Socket)>> {
    let sockets = sockets(tables, slots, Depth::Connections(Duration::ZERO))?;
    let adopted = adopted(tables, slots);
    let established = sockets
        .into_iter()
        .filter(|one| one.state == State::Established);
    let of_backend = established.filter_map(|socket| {
        let id = backend_of(&socket).or_else(|| match fitting(&adopted, socket.local)[..] {
            [only] => Some(only.id()),
            _ => None,
        })?;
        Some((id, socket))
    });
    Ok(of_backend.collect())
}

fn reading(socket: &Socket) -> Option<Reading> {
    let received = socket.received?;
    Some(Reading {
        cookie: socket.cookie,
        received: received.bytes,
        unread: socket.receive_queue,
        ms_ago: received.ms_ago,
    })
}
