//! `explain`: the kernel program's own functions, run on a snapshot of the maps.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result};
use balancer_common::abi::{
    Address, Backend, Cookies, MEMBER_WORDS, Policy, ServicePort, UNLIMITED, ticks,
};
use balancer_common::decision::admission::{Observation, cookies_state, expected};
use balancer_common::decision::cursor::Cursor;
use balancer_common::decision::member::Member;
use balancer_common::decision::request::{Arrival, Request};
use balancer_common::decision::scan::Scan;
use balancer_common::decision::{
    Attempt, BackendAccess, Decision, DecisionState, LookupFlags, decide,
};
use balancer_common::{Reason, Verdict};

use super::super::plain::Plain;
use super::super::tables::{Tables, lookup, slot_of, text};
use crate::sys::sock_diag::{Family, Query, State, States, tcp_sockets};
use crate::sys::{clock, netns};

const SYNCOOKIES: &str = "/proc/sys/net/ipv4/tcp_syncookies";

/// Where a SYN would go, and why.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Name of the service that the destination belongs to; `None`: the port is no service's.
    pub service: Option<String>,
    /// The reason that the kernel half would count.
    pub reason: Reason,
    /// What the kernel half would tell the kernel.
    pub verdict: Verdict,
    /// The backend that would have it: slot, and the address that its listener is bound to.
    pub backend: Option<(u32, SocketAddr)>,
    /// Destination, reason and load in one sentence, for people.
    pub sentence: String,
}

pub fn explain(
    tables: &Tables,
    from: SocketAddr,
    to_address: Option<IpAddr>,
    to_port: u16,
) -> Result<Explanation> {
    let to = to_address.unwrap_or_else(|| default_destination(from));
    let Some(port) = service_of(tables, to.into(), to_port)? else {
        return Ok(not_ours(from, to_port));
    };
    let name = tables
        .named_services()?
        .into_iter()
        .find(|(id, _)| *id == port.service)
        .map_or_else(
            || format!("service {}", port.service),
            |(_, info)| text(&info.name),
        );
    let beat = tables.heartbeat();
    let now_ns = clock::monotonic_ns();
    let flags = LookupFlags {
        exempt: tables.is_exempt(port.service, from.ip())?,
        stale: beat.is_stale(now_ns),
    };
    let arrival = Arrival {
        netns: netns::cookie().context("cannot read the cookie of this network namespace")?,
        device: 0,
        from: Address::of_packet(from.ip()),
        from_port: from.port(),
        to: Address::of_packet(to),
        to_port,
    };
    let request = Request::new(&port, &arrival, tables.turn(port.service), 0, ticks(now_ns));
    let mut model = Model::take(tables, port)?;
    let mut state = DecisionState::new(request, flags);
    let decision = decide(&mut model, &mut state);
    Ok(model.describe(from, &name, decision, &state))
}

/// A SYN needs a destination of the source's family; which one matters only where backends are
/// bound to addresses.
fn default_destination(from: SocketAddr) -> IpAddr {
    if from.is_ipv4() {
        IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)
    } else {
        IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)
    }
}

fn not_ours(from: SocketAddr, port: u16) -> Explanation {
    Explanation {
        service: None,
        reason: Reason::NoBackend,
        verdict: Verdict::Pass,
        backend: None,
        sentence: format!(
            "port {port} belongs to no service: a SYN from {} is none of the balancer's business",
            from.ip()
        ),
    }
}

fn service_of(tables: &Tables, to: Address, port: u16) -> Result<Option<ServicePort>> {
    ServicePort::of_destination(
        || to,
        port,
        |key| Ok(lookup(tables.services.get(&Plain(*key), 0))?.map(|Plain(port)| port)),
    )
}

/// The maps and listening sockets of one service as they were a moment ago.
struct Model {
    words: [u64; MEMBER_WORDS],
    members: HashMap<u32, Member>,
    /// Connections that wait in the accept queue, and the backlog, by slot.
    queues: HashMap<u32, (u32, u32)>,
    /// `net.ipv4.tcp_syncookies` of this netns.
    syncookies: u8,
    unregistered: bool,
}

impl Model {
    fn take(tables: &Tables, port: ServicePort) -> Result<Self> {
        let words = tables.members(port.service);
        let mut members = HashMap::new();
        for view in tables.slots()? {
            if view.member.backend.service == port.service {
                members.insert(view.slot(), view.member);
            }
        }
        Ok(Self {
            words,
            members,
            queues: queues(tables)?,
            syncookies: syncookies(Path::new(SYNCOOKIES))?,
            unregistered: tables
                .unregistered_word(port.service)
                .load(Ordering::Acquire)
                != 0,
        })
    }

    /// What the kernel half would see of a backend's socket; `None`: it can't look at it.
    fn observe(&self, member: &Member, now: u32) -> Option<Observation> {
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
        })
    }

    fn describe(
        &self,
        from: SocketAddr,
        service: &str,
        decision: Decision,
        state: &DecisionState,
    ) -> Explanation {
        let chosen = decision.slot.and_then(|slot| self.members.get(&slot));
        let backend = chosen.map(|member| {
            let backend = &member.backend;
            (
                member.slot,
                SocketAddr::new(backend.address.into(), backend.port),
            )
        });
        let verdict = if backend.is_some() {
            Verdict::Steer
        } else {
            decision.reason.verdict()
        };
        let fate = match (verdict, backend) {
            (Verdict::Steer, Some((slot, address))) => {
                format!("would go to {address} (slot {slot})")
            }
            (Verdict::Refuse, _) => "would be refused (RST)".to_owned(),
            _ => "would be left to the kernel".to_owned(),
        };
        let why = match (chosen, decision.reason) {
            (Some(member), Reason::Exempt) => {
                format!("its source is exempt, and {}", choice(member, state))
            }
            (Some(member), Reason::Admitted | Reason::Steered) => choice(member, state),
            (None, Reason::OverQuota | Reason::OverQuotaCookie) => {
                format!("nobody has room: {}", self.loads(&state.scan.request))
            }
            (_, reason) => reason.meaning().to_owned(),
        };
        Explanation {
            service: Some(service.to_owned()),
            reason: decision.reason,
            verdict,
            backend,
            sentence: format!("a SYN from {} to {service} {fate}: {why}", from.ip()),
        }
    }

    /// How full the backends are, the first few of them.
    fn loads(&self, request: &Request) -> String {
        const SHOWN: usize = 4;
        let mut ready: Vec<&Member> = self
            .members
            .values()
            .filter(|member| member.is_ready())
            .collect();
        ready.sort_by_key(|member| member.slot);
        let mut words: Vec<String> = ready
            .iter()
            .take(SHOWN)
            .map(|member| format!("slot {}: {}", member.slot, load(member, request)))
            .collect();
        if ready.len() > SHOWN {
            words.push(format!("and {} more", ready.len() - SHOWN));
        }
        words.join(", ")
    }
}

/// What made the choice fall on that backend.
fn choice(member: &Member, state: &DecisionState) -> String {
    let scan = &state.scan;
    if scan.cookies {
        return "while SYN cookies are in use, addresses and ports choose".to_owned();
    }
    match scan.request.policy {
        Policy::LeastConnections => format!(
            "of those that may take it, it has the fewest connections for its weight ({}, weight {})",
            load(member, &scan.request),
            member.weight()
        ),
        Policy::RoundRobin => "it is its turn (round-robin)".to_owned(),
        Policy::SourceHash => "the source's address belongs to it (source-hash)".to_owned(),
    }
}

/// What a backend holds of its quota: exempt connections don't count.
fn load(member: &Member, request: &Request) -> String {
    let counts = &member.counts;
    let held = counts.established().saturating_sub(counts.exempt());
    let pending = match expected(counts.expected, request.now) {
        0 => String::new(),
        pending => format!(" + {pending} pending"),
    };
    match member.quota(request.quota) {
        UNLIMITED => format!("{held}{pending}, no quota"),
        quota => format!("{held}{pending} of {quota}"),
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
            outcome.writes.apply(&mut member.counts);
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
fn queues(tables: &Tables) -> Result<HashMap<u32, (u32, u32)>> {
    let mut queues = HashMap::new();
    for family in [Family::V4, Family::V6] {
        let mut query = Query::new(family, States::of(&[State::Listen]));
        query.storage = Some(tables.connection_map());
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
