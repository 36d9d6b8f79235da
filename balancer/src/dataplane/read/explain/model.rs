//! One service as it was a moment ago, in the place of maps and sockets.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result};
use balancer_common::abi::{Backend, Cookies, MEMBER_WORDS};
use balancer_common::decision::admission::{Observation, cookies_state, expected};
use balancer_common::decision::cursor::Cursor;
use balancer_common::decision::member::Member;
use balancer_common::decision::scan::Scan;
use balancer_common::decision::{Attempt, BackendAccess, DecisionState};

use crate::dataplane::tables::{Tables, slot_of};
use crate::discover::OpenNetns;
use crate::sys::netns;
use crate::sys::sock_diag::{Family, Query, State, States, tcp_sockets};

const SYNCOOKIES: &str = "/proc/sys/net/ipv4/tcp_syncookies";

/// The maps and listening sockets of one service as they were a moment ago.
pub struct Model {
    words: [u64; MEMBER_WORDS],
    members: HashMap<u32, Member>,
    /// Connections that wait in the accept queue, and the backlog, by slot.
    queues: HashMap<u32, (u32, u32)>,
    /// `Totals::entered` by slot, read before the queues.
    entered: HashMap<u32, u64>,
    /// `net.ipv4.tcp_syncookies` of the netns.
    syncookies: u8,
    unregistered: bool,
}

impl Model {
    /// The service with that id, of whose members some are in `slots`, as a SYN in that netns
    /// finds it.
    pub fn take(tables: &Tables, service: u16, slots: &[Member], at: &OpenNetns) -> Result<Self> {
        let members = slots
            .iter()
            .filter(|member| member.backend.service == service);
        let storage = tables.connection_map();
        let members: HashMap<u32, Member> = members.map(|member| (member.slot, *member)).collect();
        let entered = (members.keys())
            .map(|slot| (*slot, tables.entered(*slot)))
            .collect();
        let (queues, syncookies) = netns::inside(&at.file, || {
            (queues(storage), syncookies(Path::new(SYNCOOKIES)))
        })
        .with_context(|| {
            format!(
                "cannot enter the network namespace {} (needs CAP_SYS_ADMIN)",
                at.cookie
            )
        })?;
        Ok(Self {
            words: tables.members(service),
            members,
            entered,
            queues: queues?,
            syncookies: syncookies?,
            unregistered: tables.unregistered_word(service).load(Ordering::Acquire) != 0,
        })
    }

    /// What the kernel half would see of a backend's socket; `None`: it can't look at it.
    fn observe(&self, member: &Member, now: u64) -> Option<Observation> {
        if member.backend.flags & Backend::UNSTEERABLE != 0 {
            return None;
        }
        let (queue, backlog) = self
            .queues
            .get(&member.slot)
            .copied()
            .unwrap_or((0, u32::MAX));
        let pending = expected(member.counts.expected, now);
        let in_use = cookies_state(member.counts.cookies, now) == Cookies::InUse;
        Some(Observation {
            half_open: pending,
            young: pending,
            fast_open: 0,
            queue,
            backlog,
            syncookies: self.syncookies,
            overflow_age: if in_use { 0 } else { u32::MAX },
            entered: self.entered.get(&member.slot).copied().unwrap_or(0),
        })
    }
}

impl BackendAccess for Model {
    fn begin(&mut self, scan: &mut Scan) {
        scan.cursor = Cursor::new(|word| self.words[word as usize]);
    }

    fn walk(&mut self, scan: &mut Scan) {
        scan.walk(
            |word| self.words[word as usize],
            |slot| self.members.get(&slot),
        );
    }

    fn attempt(&mut self, slot: u32, state: &DecisionState) -> Attempt {
        let Some(member) = self.members.get(&slot).copied() else {
            return Attempt::Gone;
        };
        let seen = self.observe(&member, state.scan.request.now);
        let outcome = state.judge(seen.as_ref(), &member);
        // No SYN is sent: what is expected of the one that would have it stays as it is.
        if outcome.attempt != Attempt::Assigned
            && let Some(member) = self.members.get_mut(&slot)
        {
            outcome.writes.apply(member);
        }
        outcome.attempt
    }

    fn remember_weights(&mut self, _service: u16, _weights: u64) {}

    fn has_unregistered(&self, _service: u16) -> bool {
        self.unregistered
    }
}

/// What the kernel half reads of `net.ipv4.tcp_syncookies`. Without `CONFIG_SYN_COOKIES` there is
/// no such file, and the kernel's word stays 1 (`tcp_sk_init`, `net/ipv4/tcp_ipv4.c`).
fn syncookies(file: &Path) -> Result<u8> {
    let value = match std::fs::read_to_string(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(1),
        value => value.with_context(|| format!("cannot read {}", file.display()))?,
    };
    let value = value.trim().parse();
    value.with_context(|| format!("{} is no number", file.display()))
}

/// The accept queues of the listeners of this netns, by the slot that their storage names.
fn queues(storage: BorrowedFd<'_>) -> Result<HashMap<u32, (u32, u32)>> {
    let mut queues = HashMap::new();
    for family in [Family::V4, Family::V6] {
        let mut query = Query::new(family, States::of(&[State::Listen]));
        query.storage = Some(storage);
        let sockets =
            tcp_sockets(&query).context("cannot list the listening sockets (sock_diag)")?;
        queues.extend(sockets.iter().filter_map(|socket| {
            Some((slot_of(socket)?, (socket.receive_queue, socket.send_queue)))
        }));
    }
    Ok(queues)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_cookies_is_explained_too() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("tcp_syncookies");
        assert_eq!(syncookies(&file).ok(), Some(1), "there is no such file");
        for (text, value) in [("0\n", Some(0)), ("2\n", Some(2)), ("no", None)] {
            std::fs::write(&file, text).expect("written");
            assert_eq!(syncookies(&file).ok(), value, "{text:?}");
        }
        assert!(syncookies(directory.path()).is_err());
    }
}
