//! What is asked, and what is answered.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use balancer_common::abi::{BackendState, HealthState};
use balancer_common::decision::member::Member;
use balancer_common::{Reason, Verdict};

use super::super::snapshot::listen_address;

/// The SYN that is asked about.
#[derive(Clone, Copy, Debug)]
pub struct Syn {
    /// The client. Its port matters only while a backend uses SYN cookies.
    pub from: SocketAddr,
    /// The address that it is sent to, of the client's family; `None`: which one does not matter.
    pub to_address: Option<IpAddr>,
    /// The port that it is sent to.
    pub to_port: u16,
}

impl Syn {
    /// A SYN needs a destination of the source's family; which one matters only where services or
    /// backends have addresses of their own.
    pub fn destination(&self) -> IpAddr {
        self.to_address.unwrap_or(match self.from {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        })
    }
}

/// What there is to say of a SYN.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Where it would go.
    One(Explanation),
    /// That depends on the netns that it arrives in, and none was named.
    Several(SeveralNetns),
}

/// Where a SYN would go, and why.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Cookie of the netns that this is true in.
    pub netns: u64,
    /// Name of the service that the destination belongs to; `None`: it is no service's.
    pub service: Option<String>,
    /// The reason that the kernel half would count; `None`: it does not judge such a SYN.
    pub reason: Option<Reason>,
    /// What the kernel half would tell the kernel.
    pub verdict: Verdict,
    /// The backend that would have it.
    pub backend: Option<ListeningBackend>,
    /// Backends of the service in this netns that can't have it, whatever their load.
    pub unsuited: Vec<Unsuited>,
    /// Those of the others that are avoided because they don't serve.
    pub avoided: Vec<Avoided>,
    /// Destination, reason and load in one sentence, for people.
    pub sentence: String,
}

impl Explanation {
    /// Of a SYN in that netns that the balancer has no say in.
    pub fn not_judged(netns: u64, service: Option<String>, sentence: String) -> Self {
        Self {
            netns,
            service,
            reason: None,
            verdict: Verdict::Pass,
            backend: None,
            unsuited: Vec::new(),
            avoided: Vec::new(),
            sentence,
        }
    }
}

/// The netns that a service has listeners in; the one that the question came from is none of them.
#[derive(Clone, Debug)]
pub struct SeveralNetns {
    /// Name of the service.
    pub service: String,
    /// Cookies, and the backends that listen there.
    pub netns: Vec<(u64, Vec<ListeningBackend>)>,
}

/// A backend that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListeningBackend {
    /// The backend's slot.
    pub slot: u32,
    /// The address and port that its listener is bound to.
    pub address: SocketAddr,
    /// The state that `status` shows.
    pub state: BackendState,
}

impl ListeningBackend {
    /// What a slot holds.
    pub fn of(member: &Member) -> Self {
        let backend = &member.backend;
        Self {
            slot: member.slot,
            address: SocketAddr::new(listen_address(backend), backend.port),
            state: member.state(),
        }
    }
}

/// A backend that can't have a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsuited {
    /// The backend.
    pub backend: ListeningBackend,
    /// Why, as what follows "it".
    pub why: &'static str,
}

/// A backend that gets a SYN only where no other can have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avoided {
    /// The backend.
    pub backend: ListeningBackend,
    /// Its state of health.
    pub state: HealthState,
    /// For how long it has been in that state.
    pub age: Duration,
}
