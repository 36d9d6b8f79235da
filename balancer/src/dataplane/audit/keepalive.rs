//! Keepalive on connections that the kernel half did not see accepted for a backend: those that are
//! older than the data plane, and those that came before the daemon had confirmed their backend.
//! And how long connections have been silent.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context as _, Result};
use balancer_common::abi::{Backend, BackendState, Connection, Keepalive, Silence};
use tracing::info;

use super::super::tables::{SlotView, Tables, connection_of};
use super::connections::Connections;
use super::socket_table::SocketTable;
use crate::discover::{Owners, SocketOwner, owners};
use crate::sys::sock_diag::{Socket, Timer};
use crate::sys::socket::{self, KeepaliveOptions};

/// When the processes are looked at again for connections that had none.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// How long one pass may set options in one netns. What is left has its turn in the next one.
const BUDGET: Duration = Duration::from_millis(50);

/// What is known of connections that have no keepalive of ours, by the cookie of their netns.
#[derive(Debug, Default)]
pub struct LateKeepalive(HashMap<u64, Late>);

#[derive(Debug, Default)]
struct Late {
    /// The connections that were dealt with: each is once, so that what its server changes
    /// afterwards stays.
    done: HashSet<u64>,
    /// Who holds those that wait for their turn.
    holders: HashMap<u64, Vec<SocketOwner>>,
    /// When the processes are looked at again; `None`: they never were.
    look_at: Option<Instant>,
}

/// A connection that may lack keepalive.
struct Wanting<'a> {
    socket: &'a Socket,
    keepalive: Keepalive,
}

/// How many connections got keepalive, and how many could not be reached.
#[derive(Debug, Default)]
struct Outcome {
    set: u32,
    unreachable: u32,
}

impl LateKeepalive {
    /// A netns is gone.
    pub fn drop_netns(&mut self, netns: u64) {
        self.0.remove(&netns);
    }

    /// Turns keepalive on for connections that lack it, as far as their processes can be reached
    /// and the budget of a pass goes. Must run inside the netns.
    ///
    /// # Errors
    /// When the processes or the kernel's settings can't be read.
    pub fn turn_on(
        &mut self,
        tables: &Tables,
        table: &SocketTable,
        connections: &Connections<'_>,
        netns: u64,
    ) -> Result<()> {
        let wanting = wanting(tables, table, connections);
        if wanting.is_empty() && !self.0.contains_key(&netns) {
            return Ok(());
        }
        let late = self.0.entry(netns).or_default();
        late.forget_ended(connections);
        let outcome = late.turn_on(&wanting)?;
        if outcome.set + outcome.unreachable > 0 {
            info!(
                "keepalive: turned on for {} connections that this data plane has not seen \
                 accepted; {} stay without, no process that holds them can be reached",
                outcome.set, outcome.unreachable
            );
        }
        Ok(())
    }
}

impl Late {
    fn forget_ended(&mut self, connections: &Connections<'_>) {
        let known = |cookie: &u64| self.done.contains(cookie) || self.holders.contains_key(cookie);
        let cookies = connections.of_slots.iter().map(|(_, socket)| socket.cookie);
        let present: HashSet<u64> = cookies.filter(known).collect();
        self.done.retain(|cookie| present.contains(cookie));
        self.holders.retain(|cookie, _| present.contains(cookie));
    }

    fn turn_on(&mut self, wanting: &[Wanting<'_>]) -> Result<Outcome> {
        self.look(wanting)?;
        let mut outcome = Outcome::default();
        let until = Instant::now() + BUDGET;
        let mut defaults = None;
        for one in wanting {
            let Some(holders) = self.holders.get(&one.socket.cookie) else {
                continue;
            };
            if Instant::now() >= until {
                break;
            }
            let defaults = match &defaults {
                Some(defaults) => defaults,
                None => defaults.insert(defaults_of_netns()?),
            };
            if holders.iter().any(|owner| set(one, *owner, defaults)) {
                outcome.set += 1;
            } else {
                outcome.unreachable += 1;
            }
            self.holders.remove(&one.socket.cookie);
            self.done.insert(one.socket.cookie);
        }
        Ok(outcome)
    }

    /// Finds who holds the connections that nothing is known of; seldom, since that takes a look at
    /// every process.
    fn look(&mut self, wanting: &[Wanting<'_>]) -> Result<()> {
        let is_new = |one: &&Wanting<'_>| {
            let cookie = one.socket.cookie;
            !self.done.contains(&cookie) && !self.holders.contains_key(&cookie)
        };
        let new: Vec<_> = wanting.iter().filter(is_new).collect();
        let is_due = self.look_at.is_none_or(|at| at <= Instant::now());
        if new.is_empty() || !is_due {
            return Ok(());
        }
        self.look_at = Some(Instant::now() + RETRY_AFTER);
        let inodes = new.iter().map(|one| one.socket.inode);
        let mut found: Owners = owners(inodes).context("cannot look at the processes")?;
        for one in new {
            let holders = found.remove(&one.socket.inode).unwrap_or_default();
            self.holders.insert(one.socket.cookie, holders);
        }
        Ok(())
    }
}

/// The connections of confirmed backends that the kernel half has not turned keepalive on for, and
/// that nobody else has either.
fn wanting<'a>(
    tables: &Tables,
    table: &SocketTable,
    connections: &Connections<'a>,
) -> Vec<Wanting<'a>> {
    let views: HashMap<u32, &SlotView> =
        table.slots.iter().map(|view| (view.slot(), view)).collect();
    let wanting = |(slot, socket): &(u32, &'a Socket)| {
        let view = views.get(slot)?;
        let keepalive = tables.keepalive(view.member.backend.service)?;
        let is_wanting = socket.inode != 0
            && view.state() != BackendState::Candidate
            && may_be_unseen(view, socket)
            && lacks(socket.timer, keepalive);
        is_wanting.then_some(Wanting { socket, keepalive })
    };
    connections.of_slots.iter().filter_map(wanting).collect()
}

/// Whether the kernel half may have left keepalive alone when the connection was accepted.
fn may_be_unseen(view: &SlotView, socket: &Socket) -> bool {
    let is_counted = |connection: Connection| connection.class != Connection::INHERITED;
    let was_candidate = view.member.backend.flags & Backend::CANDIDATE != 0;
    was_candidate || !connection_of(socket).is_some_and(is_counted)
}

/// Whether no probe comes within the configured time. While another timer runs, nobody can tell.
fn lacks(timer: Timer, keepalive: Keepalive) -> bool {
    match timer {
        Timer::None => true,
        Timer::Keepalive { due_ms, .. } => due_ms > u32::from(keepalive.idle) * 1_000,
        Timer::Other => false,
    }
}

/// Sets what the server has not chosen, through one of its descriptors; says whether it could. The
/// copy is closed at once: while there is one, the server's own `close()` sends no FIN.
fn set(one: &Wanting<'_>, owner: SocketOwner, defaults: &KeepaliveOptions) -> bool {
    let Ok(file) = owner.file() else {
        return false;
    };
    socket::cookie(&file).is_ok_and(|cookie| cookie == one.socket.cookie)
        && socket::turn_keepalive_on(&file, one.keepalive, defaults).is_ok()
}

/// What holds in the netns that the thread is in where a server has chosen nothing.
fn defaults_of_netns() -> Result<KeepaliveOptions> {
    let read = |name: &str| -> Result<u32> {
        let path = format!("/proc/sys/net/ipv4/{name}");
        let number = fs::read_to_string(&path)
            .and_then(|text| text.trim().parse().map_err(io::Error::other));
        number.with_context(|| format!("cannot read {path}"))
    };
    Ok(KeepaliveOptions {
        idle: read("tcp_keepalive_time")?,
        interval: read("tcp_keepalive_intvl")?,
        probes: read("tcp_keepalive_probes")?,
        user_timeout_ms: 0,
    })
}

/// Writes down how silent the connections of each slot are.
pub fn note_silence(tables: &Tables, table: &SocketTable, connections: &Connections<'_>) {
    let services: HashMap<u32, u16> = (table.slots.iter())
        .map(|view| (view.slot(), view.member.backend.service))
        .collect();
    let mut found: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
    for (slot, socket) in &connections.of_slots {
        let (Some(service), Some(received)) = (services.get(slot), socket.received) else {
            continue;
        };
        let keepalive = tables.keepalive(*service).unwrap_or(Keepalive::DEFAULT);
        let silent_for = received.heard_ms_ago() / 1_000;
        let of_slot = found.entry(*slot).or_default();
        of_slot.0 += u32::from(silent_for > keepalive.silent_after());
        of_slot.1 = of_slot.1.max(silent_for);
    }
    for view in &table.slots {
        let (connections, longest) = found.get(&view.slot()).copied().unwrap_or_default();
        tables.set_silence(view.slot(), Silence::new(connections, longest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_timer_of_the_kernels_own_time_or_none_lacks_keepalive() {
        let keepalive = Keepalive::DEFAULT;
        let probes = |due_ms| Timer::Keepalive {
            due_ms,
            unanswered: 0,
        };
        assert!(lacks(Timer::None, keepalive));
        assert!(lacks(probes(7_200_000), keepalive));
        assert!(lacks(probes(61_000), keepalive));
        assert!(!lacks(probes(60_000), keepalive));
        assert!(!lacks(probes(15_000), keepalive));
        assert!(!lacks(Timer::Other, keepalive));
    }
}
