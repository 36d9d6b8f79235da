//! Services: their ports, how they choose, who listens for them and who is exempt.

use super::address::{Address, PortKey};
use super::limits::{ANY_NETNS, MAX_NAME, MEMBER_WORDS, NO_SERVICE};
use crate::opaque;

/// How a service chooses among its backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Policy {
    /// The least (established + pending) / weight.
    LeastConnections = 0,
    /// In turn, in proportion to weight.
    RoundRobin = 1,
    /// By the source address (rendezvous hashing).
    SourceHash = 2,
}

impl Policy {
    /// Every policy, in the order of its number.
    pub const ALL: [Self; 3] = [Self::LeastConnections, Self::RoundRobin, Self::SourceHash];

    /// The name in the configuration and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LeastConnections => "least-connections",
            Self::RoundRobin => "round-robin",
            Self::SourceHash => "source-hash",
        }
    }

    /// The policy of its number in a map; an unknown number is least-connections, so that no map
    /// content can panic.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::RoundRobin,
            2 => Self::SourceHash,
            _ => Self::LeastConnections,
        }
    }
}

/// Value of SERVICES: which service a port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServicePort {
    /// Id of the service, or [`NO_SERVICE`]: only more specific keys have one.
    pub service: u16,
    /// [`Policy`] as a number.
    pub policy: u8,
    /// Bits of `ServicePort::…`.
    pub flags: u8,
    /// Quota of a backend for which the daemon has not written one yet.
    pub quota: u32,
}

impl ServicePort {
    /// The service of a destination: an exact address before any; `lookup` reads SERVICES,
    /// `address` is the destination's.
    ///
    /// # Errors
    /// Whatever `lookup` returns.
    #[inline(always)]
    pub fn of_destination<E>(
        address: impl FnOnce() -> Address,
        port: u16,
        lookup: impl Fn(&PortKey) -> Result<Option<Self>, E>,
    ) -> Result<Option<Self>, E> {
        // Made anew, for the kernel half: a constant would lie in a map of its own.
        let key = PortKey::new(opaque(ANY_NETNS), Address([opaque(0); 4]), port);
        let Some(any) = lookup(&key)? else {
            return Ok(None);
        };
        if any.flags & Self::EXACT_ADDRESSES != 0
            && let Some(exact) = lookup(&PortKey::new(ANY_NETNS, address(), port))?
        {
            return Ok(Some(exact));
        }
        Ok((any.service != NO_SERVICE).then_some(any))
    }

    /// A key with this port and an exact address exists too and wins.
    pub const EXACT_ADDRESSES: u8 = 1;
    /// Nothing listens on the port itself: its backends listen elsewhere.
    pub const VIRTUAL: u8 = 2;
    /// The health of its backends is not regarded (`health: off`).
    pub const HEALTH_OFF: u8 = 4;
    /// Look-ups are counted and left to the kernel, on an own port (`mode: count`).
    pub const COUNT_ONLY: u8 = 8;
    /// Look-ups are judged, counted as they would have ended, and left to the kernel, on an own
    /// port (`mode: dry-run`).
    pub const DRY_RUN: u8 = 16;

    /// Whether look-ups are counted and left to the kernel.
    #[inline(always)]
    pub const fn counts_only(&self) -> bool {
        self.flags & (Self::COUNT_ONLY | Self::VIRTUAL) == Self::COUNT_ONLY
    }

    /// Whether look-ups are judged, and left to the kernel whatever comes out. On a virtual port
    /// nobody else listens: there a decision is always carried out.
    #[inline(always)]
    pub const fn is_dry_run(&self) -> bool {
        self.flags & (Self::DRY_RUN | Self::VIRTUAL) == Self::DRY_RUN
    }
}

/// Value of `LISTEN_RULES`: which service a new listener belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ListenRule {
    /// Id of the service.
    pub service: u16,
    /// Bits of `ListenRule::…`.
    pub flags: u16,
    /// Weight of the backend until the daemon writes another.
    pub weight: u32,
}

impl ListenRule {
    /// Only for listeners that are bound to no address.
    pub const WILDCARD_ONLY: u16 = 1;
    /// The netns is not known to be guarded: a listener is counted, not steered to until the daemon
    /// confirms it.
    pub const CANDIDATE: u16 = 2;

    /// The rule for a listener: an exact address before any, the netns before any; `lookup`
    /// reads `LISTEN_RULES`.
    #[inline(always)]
    pub fn most_specific(
        netns: u64,
        address: Address,
        port: u16,
        lookup: impl Fn(PortKey) -> Option<Self>,
    ) -> Option<Self> {
        let wildcard = address.is_any();
        let claims = |netns, address| {
            lookup(PortKey::new(netns, address, port))
                .filter(|rule| wildcard || rule.flags & Self::WILDCARD_ONLY == 0)
        };
        if !wildcard {
            if let Some(rule) = claims(netns, address) {
                return Some(rule);
            }
            if let Some(rule) = claims(ANY_NETNS, address) {
                return Some(rule);
            }
        }
        if let Some(rule) = claims(netns, Address::ANY) {
            return Some(rule);
        }
        claims(ANY_NETNS, Address::ANY)
    }
}

/// Value of MEMBERS: the slots of a service that listen, a bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Members {
    /// Slot s is bit s % 64 of word s / 64. Atomic.
    pub words: [u64; MEMBER_WORDS],
}

/// Value of `SERVICE_STATE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceState {
    /// The next ticket of round-robin; with least-connections, the slot after the one that the last
    /// SYN went to. Atomic.
    pub turn: u64,
    /// The sum of the weights of those that could be chosen when round-robin last added it up: it
    /// says nothing of now. Atomic.
    pub weights: u64,
    /// Listeners of the service that could not be registered: while there are any, nobody is
    /// refused because the registered ones are full. The kernel half adds, the daemon
    /// corrects. Atomic.
    pub unregistered: u64,
    /// How often a listener of a netns that is not known to be guarded got no slot, because there
    /// were too many of its kind. The kernel half adds. Atomic.
    pub turned_away: u64,
    /// The slot of the backend that last ended a connection soon after it had sent little (20 bits)
    /// | tick of that << 20; 0: none has. Written by the kernel half. Atomic.
    pub spoke: u64,
}

/// Value of `SERVICE_INFO`: what only user space reads, so that `status` works without a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceInfo {
    /// UTF-8, zero-padded; empty: no such service.
    pub name: [u8; MAX_NAME + 1],
    /// The quota rule in words, UTF-8, zero-padded.
    pub rule: [u8; 128],
    /// Why the quotas are as they are, UTF-8, zero-padded.
    pub sentence: [u8; 256],
    /// The address that clients connect to, or any.
    pub address: Address,
    /// Quota set by hand for every backend, valid if `by_hand` is 1.
    pub quota_by_hand: u32,
    /// 1: `quota_by_hand` is in force.
    pub by_hand: u32,
    /// The port that clients connect to.
    pub port: u16,
    /// [`Policy`] as a number.
    pub policy: u8,
    /// Bits of [`ServicePort`].
    pub flags: u8,
    /// Quota of a backend that the daemon has not seen yet.
    pub quota: u32,
    /// Established connections through the virtual port that are counted on no backend: they are
    /// older than the data plane, and nothing tells whose they are.
    pub unattributed: u32,
}

/// Key of EXEMPT behind the prefix length (32 bits of service, then the bits of the address).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct ExemptKey {
    /// Id of the service, in network byte order.
    pub service: u32,
    /// The source address.
    pub address: Address,
}

impl ExemptKey {
    /// Bits of the service in the prefix.
    pub const SERVICE_BITS: u32 = 32;
    /// Bits of a whole key.
    pub const BITS: u32 = Self::SERVICE_BITS + 128;
    /// Bits that a v4-mapped address has before the IPv4 part.
    pub const V4_BITS: u32 = 96;

    /// The key of a source for a service.
    #[inline(always)]
    pub const fn new(service: u16, address: Address) -> Self {
        Self {
            service: (service as u32).to_be(),
            address,
        }
    }
}

/// Key of REFUSED: who was refused where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct RefusedKey {
    /// Cookie of the netns.
    pub netns: u64,
    /// The source address.
    pub source: Address,
    /// Id of the service.
    pub service: u32,
    /// Always 0.
    pub zero: u32,
}

/// Value of REFUSED: the refusals since the daemon took them last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Refusals {
    /// How many. Atomic.
    pub count: u64,
    /// Tick of the first.
    pub first: u64,
    /// Tick of the last. Atomic.
    pub last: u64,
    /// [`crate::Reason`] of the last as an index. Atomic.
    pub reason: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::convert::Infallible;

    fn port(service: u16, flags: u8) -> ServicePort {
        ServicePort {
            service,
            policy: 0,
            flags,
            quota: 7,
        }
    }

    #[test]
    fn an_exact_address_comes_before_any() {
        let (here, there) = (Address::from_v4_be(1), Address::from_v4_be(2));
        let service_of = |any: Option<ServicePort>, address: Address| {
            let lookup = |key: &PortKey| {
                let found = match key.address {
                    Address::ANY => any,
                    address if address == here => Some(port(2, 0)),
                    _ => None,
                };
                Ok::<_, Infallible>(found.filter(|_| (key.netns, key.port) == (ANY_NETNS, 80)))
            };
            let Ok(found) = ServicePort::of_destination(|| address, 80, lookup);
            found.map(|port| port.service)
        };
        let exact = ServicePort::EXACT_ADDRESSES;
        for (any, address, expected) in [
            (Some(port(1, exact)), here, Some(2)),
            (Some(port(1, exact)), there, Some(1)),
            (Some(port(NO_SERVICE, exact)), here, Some(2)),
            (Some(port(NO_SERVICE, exact)), there, None),
            // Without the flag nobody looks for it.
            (Some(port(1, 0)), here, Some(1)),
            (None, here, None),
        ] {
            assert_eq!(service_of(any, address), expected, "{any:?} {address:?}");
        }
    }
}
