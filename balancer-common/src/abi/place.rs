//! Placing: where a client's `connect()` goes.

use super::address::Address;
use super::limits::{MAX_ENDPOINT_GROUPS, MAX_ENDPOINTS};

/// Key of FRONTENDS: an address and port that clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FrontendKey {
    /// The address.
    pub address: Address,
    /// The port, host byte order (32 bits, so that the key has no padding).
    pub port: u32,
}

impl FrontendKey {
    /// The key of an address and port.
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> Self {
        Self {
            address,
            port: port as u32,
        }
    }
}

/// Value of FRONTENDS: which endpoints a frontend leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Frontend {
    /// Index of the endpoint group.
    pub group: u32,
    /// Bits of `Frontend::…`.
    pub flags: u32,
}

impl Frontend {
    /// Choose and count, but leave the destination as it is (`mode: dry-run`).
    pub const DRY_RUN: u32 = 1;
    /// It is the own address of an endpoint, which some mean: see [`Excluded`].
    pub const OWN_ADDRESS: u32 = 2;
}

/// Value of `EXCLUDED_NETNS`, as a number: which connects of a netns are left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Excluded {
    /// All of them.
    Everywhere = 1,
    /// Those to endpoints' own addresses ([`Frontend::OWN_ADDRESS`]): it means that very endpoint.
    OwnAddresses = 2,
}

impl Excluded {
    /// What a value says; every other number leaves all connects alone.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        if number == Self::OwnAddresses as u32 {
            Self::OwnAddresses
        } else {
            Self::Everywhere
        }
    }
}

/// Value of `ENDPOINT_GROUPS`: how to choose among the endpoints of a group. Written by the daemon,
/// each word atomically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointGroup {
    /// The load, in units of [`EndpointGroup::LOAD_ONE`], up to which endpoints should be filled by
    /// the connections still to come. 0: nothing is known of what other nodes have placed.
    pub level: u64,
    /// Where this node's draws begin: its rank among the nodes, as a fraction of 2³².
    pub start: u64,
    /// Until when the knowledge of the cluster holds, ns of `CLOCK_MONOTONIC`. Later the
    /// destination is left as it is.
    pub known_until_ns: u64,
    /// With fewer connections on all endpoints this node has lost most of those it had, as others
    /// will have, and goes by its own counts alone. 0: never.
    pub lost_below: u64,
}

impl EndpointGroup {
    /// The load of one connection on an endpoint of weight 1.
    pub const LOAD_ONE: u64 = 1 << 16;
}

/// Value of `ENDPOINT_GROUP_STATE`. Written by the kernel half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointGroupState {
    /// Draws ever. Atomic.
    pub draws: u64,
    /// Until when the node goes by its own counts alone, ns of `CLOCK_MONOTONIC`.
    pub own_only_until_ns: u64,
}

/// Value of ENDPOINTS: a place that a connection may be sent to. Written by the daemon while no
/// group has the endpoint, except for `weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Endpoint {
    /// Its IPv4 address as `::ffff:a.b.c.d`, or [`Address::ANY`] where it has none.
    pub v4: Address,
    /// Its IPv6 address, or [`Address::ANY`] where it has none.
    pub v6: Address,
    /// Its port, host byte order.
    pub port: u32,
    /// Rises when the element is given to another endpoint.
    pub generation: u32,
    /// Its share of connections beside the others'; 0 gets none. Atomic.
    pub weight: u64,
}

/// Value of PLACED: what this node has placed on an endpoint. Written by the kernel half; the
/// daemon puts `established` right atomically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Placed {
    /// Placed connections in ESTABLISHED. Atomic.
    pub established: u64,
    /// Placed connections in `SYN_SENT`. Atomic.
    pub in_flight: u64,
    /// Connections that were ever placed: their SYN was sent. Atomic.
    pub total: u64,
    /// Of these, those that failed before they were established, or whose SYN had to be sent again.
    /// Atomic.
    pub failed: u64,
    /// Why it is avoided and until when: `place::avoidance` has the layout. 0: it is not. Atomic.
    pub avoidance: u64,
}

impl Placed {
    /// `established` or `in_flight` as they were read. A count that another CPU has taken below 0
    /// is about to be put back to 0.
    #[inline(always)]
    pub const fn count(word: u64) -> u64 {
        word & ((word >> 63).wrapping_sub(1))
    }
}

/// Value of PUBLISHED: connections that an endpoint has and this node has not placed. Written by
/// the daemon alone, atomically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Published {
    /// How many, as far as is known.
    pub others: u64,
    /// Connections that it was last said to have, those of every client. Only user space reads it.
    pub connections: u64,
    /// When that was counted, ns of `CLOCK_MONOTONIC`; 0: nobody says. Only user space reads it.
    pub counted_ns: u64,
}

/// Value of `ENDPOINT_GROUP_INFO`: what only user space reads, so that `status` works without a
/// daemon, and the next daemon knows the group again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointGroupInfo {
    /// UTF-8, zero-padded; empty: no such group.
    pub name: [u8; 192],
    /// This node's rank among those that place, from 0.
    pub rank: u32,
    /// How many nodes place.
    pub nodes: u32,
}

/// Value of `ENDPOINT_INFO`: what only user space reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointInfo {
    /// UTF-8, zero-padded.
    pub name: [u8; 128],
    /// The group that it is of, or was last; one of them where there are several.
    pub group: u32,
}

/// Value of `PLACED_SOCKET`, the storage of a client's socket that was placed. Written by the
/// kernel half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PlacedSocket {
    /// The endpoint.
    pub endpoint: u16,
    /// [`Phase`] as a number.
    pub phase: u8,
    /// Bits of `PlacedSocket::…`.
    pub flags: u8,
    /// The endpoint's generation.
    pub generation: u32,
    /// What the client connected to.
    pub frontend: FrontendKey,
}

impl PlacedSocket {
    /// The balancer asked for `BPF_SOCK_OPS_RTO_CB` on the socket.
    pub const WATCHES_RTO: u8 = 1;
    /// The SYN had to be sent again: the failure is counted already.
    pub const SENT_AGAIN: u8 = 2;
    /// The endpoint was avoided already when it was chosen, because all of them were.
    pub const ON_AVOIDED: u8 = 4;
}

/// What the iterator over the sockets in `PLACED_SOCKET` tells of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PlacedRecord {
    /// [`PlacedSocket::endpoint`].
    pub endpoint: u16,
    /// [`Phase`] as a number.
    pub phase: u8,
    /// State of the socket, `TCP_…` of `include/net/tcp_states.h`.
    pub state: u8,
    /// [`PlacedSocket::generation`].
    pub generation: u32,
}

/// How far a placed connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Chosen; no SYN yet, or over: counted nowhere.
    Chosen = 0,
    /// Counted in [`Placed::in_flight`].
    InFlight = 1,
    /// Counted in [`Placed::established`].
    Established = 2,
}

impl Phase {
    /// The phase of its number; an unknown number is counted nowhere.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::InFlight,
            2 => Self::Established,
            _ => Self::Chosen,
        }
    }
}

const _: () = {
    assert!(MAX_ENDPOINTS <= 1 << 16, "PlacedSocket::endpoint");
    assert!(MAX_ENDPOINT_GROUPS <= 1 << 16);
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Frontend>() == 8);
    assert!(size_of::<EndpointGroup>() == 32);
    assert!(size_of::<EndpointGroupState>() == 16);
    assert!(size_of::<Endpoint>() == 48);
    assert!(size_of::<Placed>() == 40);
    assert!(size_of::<Published>() == 24);
    assert!(size_of::<EndpointGroupInfo>() == 200);
    assert!(size_of::<EndpointInfo>() == 132);
    assert!(size_of::<PlacedSocket>() == 28);
    assert!(size_of::<PlacedRecord>() == 8);
};
