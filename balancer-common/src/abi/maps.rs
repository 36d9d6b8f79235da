//! The pinned maps: what each one is, for the kernel half that makes them and for who opens them.

use super::address::PortKey;
use super::backend::{Backend, Connection, SlotPolicy};
use super::counts::{Counts, Totals};
use super::daemon::{AuditTotals, Heartbeat};
use super::disowned::Disowned;
use super::health::Health;
use super::keepalive::{KeepaliveWord, Silence};
use super::limits::{
    MAX_ENDPOINT_GROUPS, MAX_ENDPOINTS, MAX_EXCLUDED_NETNS, MAX_FRONTENDS, MAX_REFUSED_SOURCES,
    MAX_SERVICES, MAX_SLOTS, PLACE_REASON_SLOTS, REASON_SLOTS,
};
use super::moving::{MovingSocket, SlotMoves};
use super::place::{
    Endpoint, EndpointGroup, EndpointGroupInfo, EndpointGroupState, EndpointInfo, Frontend,
    FrontendKey, Placed, PlacedSocket, Published,
};
use super::service::{
    ExemptKey, ListenRule, Members, Refusals, RefusedKey, ServiceInfo, ServicePort, ServiceState,
};

/// What bpf(2) says of a map that is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapShape {
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value.
    pub value: u32,
    /// Most entries; the bytes of a ring buffer.
    pub entries: u32,
    /// `BPF_F_…`.
    pub flags: u32,
}

// `enum bpf_map_type` and map flags: include/uapi/linux/bpf.h.
const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PER_CPU_ARRAY: u32 = 6;
const LRU_HASH: u32 = 9;
const LPM_TRIE: u32 = 11;
const SOCK_MAP: u32 = 15;
const SK_STORAGE: u32 = 24;
const RING_BUFFER: u32 = 27;
/// LPM tries and socket storages demand it.
const NO_PREALLOC: u32 = 1;
/// Accepted sockets inherit their listener's storage.
const CLONE: u32 = 1 << 9;
const MMAPABLE: u32 = 1 << 10;

/// Bytes of an index, a file descriptor, or the length of a prefix.
const WORD: usize = size_of::<u32>();

impl MapShape {
    const fn new(kind: u32, key: usize, value: usize, entries: usize) -> Self {
        Self {
            kind,
            key: key as u32,
            value: value as u32,
            entries: entries as u32,
            flags: 0,
        }
    }

    const fn hash<K, V>(entries: usize) -> Self {
        Self::new(HASH, size_of::<K>(), size_of::<V>(), entries)
    }

    /// A hash that forgets what was not used for longest when it is full.
    const fn lru_hash<K, V>(entries: usize) -> Self {
        Self::new(LRU_HASH, size_of::<K>(), size_of::<V>(), entries)
    }

    const fn array<V>(entries: usize) -> Self {
        Self::new(ARRAY, WORD, size_of::<V>(), entries)
    }

    /// An array that user space maps into its memory.
    const fn shared<V>(entries: usize) -> Self {
        Self::array::<V>(entries).with(MMAPABLE)
    }

    const fn with(self, flags: u32) -> Self {
        Self { flags, ..self }
    }
}

macro_rules! pinned {
    ($($(#[$doc:meta])* $name:ident = $shape:expr;)*) => {
        $($(#[$doc])* pub const $name: MapShape = $shape;)*

        /// Every pinned map by the name of its pin.
        pub const PINNED: &[(&str, MapShape)] = &[$((stringify!($name), $name)),*];
    };
}

pinned! {
    /// [`PortKey`] to [`ServicePort`]. Written by the daemon.
    SERVICES = MapShape::hash::<PortKey, ServicePort>(4_096);
    /// [`PortKey`] to [`ListenRule`]. Written by the daemon.
    LISTEN_RULES = MapShape::hash::<PortKey, ListenRule>(8_192);
    /// A [`Backend`] for each slot. Claimed by the kernel half, or by the daemon that adopts.
    BACKENDS = MapShape::shared::<Backend>(MAX_SLOTS);
    /// A [`SlotPolicy`] for each slot. Written by the daemon.
    POLICY = MapShape::shared::<SlotPolicy>(MAX_SLOTS);
    /// [`Counts`] for each slot. Written by the kernel half, put right by the daemon.
    COUNTS = MapShape::shared::<Counts>(MAX_SLOTS);
    /// [`Totals`] for each slot. Written by the kernel half.
    TOTALS = MapShape::shared::<Totals>(MAX_SLOTS);
    /// [`Health`] for each slot. Written by the kernel half, and some words by the daemon.
    HEALTH = MapShape::shared::<Health>(MAX_SLOTS);
    /// The listening socket of each slot. Written by the kernel half, or by the daemon that adopts.
    LISTENERS = MapShape::new(SOCK_MAP, WORD, WORD, MAX_SLOTS);
    /// [`Members`] for each service. Written by the kernel half and by the daemon.
    MEMBERS = MapShape::shared::<Members>(MAX_SERVICES);
    /// A [`ServiceState`] for each service. Written by the kernel half, put right by the daemon.
    SERVICE_STATE = MapShape::shared::<ServiceState>(MAX_SERVICES);
    /// A [`ServiceInfo`] for each service. Written by the daemon.
    SERVICE_INFO = MapShape::array::<ServiceInfo>(MAX_SERVICES);
    /// A [`KeepaliveWord`] for each service. Written by the daemon.
    KEEPALIVE = MapShape::shared::<KeepaliveWord>(MAX_SERVICES);
    /// A [`Disowned`] for each slot. Written by the daemon.
    DISOWNED = MapShape::shared::<Disowned>(MAX_SLOTS);
    /// A [`Silence`] for each slot. Written by the daemon.
    SILENCE = MapShape::shared::<Silence>(MAX_SLOTS);
    /// [`SlotMoves`] for each slot. Written by the daemon.
    MOVES = MapShape::shared::<SlotMoves>(MAX_SLOTS);
    /// [`ExemptKey`] behind the length of its prefix. Written by the daemon.
    EXEMPT = MapShape::new(LPM_TRIE, WORD + size_of::<ExemptKey>(), WORD, 16_384).with(NO_PREALLOC);
    /// A counter for each reason of each service. Written by the kernel half.
    VERDICTS = MapShape::new(PER_CPU_ARRAY, WORD, size_of::<u64>(), MAX_SERVICES * REASON_SLOTS);
    /// [`RefusedKey`] to [`Refusals`]. Written by the kernel half, taken out by the daemon. Room
    /// for the sources of a second or two: where there are more, some are not seen.
    REFUSED = MapShape::lru_hash::<RefusedKey, Refusals>(MAX_REFUSED_SOURCES);
    /// Records of type [`Event`](super::Event). Written by the kernel half.
    EVENTS = MapShape::new(RING_BUFFER, 0, 0, 256 * 1_024);
    /// The [`Heartbeat`]. Written by the daemon.
    HEARTBEAT = MapShape::shared::<Heartbeat>(1);
    /// The [`AuditTotals`]. Written by the daemon.
    AUDIT = MapShape::shared::<AuditTotals>(1);
    /// A [`Connection`] in the storage of each socket. Written by the kernel half, or by the daemon
    /// that adopts.
    CONNECTION = MapShape::new(SK_STORAGE, WORD, size_of::<Connection>(), 0).with(NO_PREALLOC | CLONE);
    /// [`FrontendKey`] to [`Frontend`]. Written by the daemon.
    FRONTENDS = MapShape::hash::<FrontendKey, Frontend>(MAX_FRONTENDS);
    /// An [`EndpointGroup`] for each group. Written by the daemon.
    ENDPOINT_GROUPS = MapShape::shared::<EndpointGroup>(MAX_ENDPOINT_GROUPS);
    /// An [`EndpointGroupState`] for each group. Written by the kernel half.
    ENDPOINT_GROUP_STATE = MapShape::shared::<EndpointGroupState>(MAX_ENDPOINT_GROUPS);
    /// For each group the endpoints that may be chosen, a bit each. Written by the daemon.
    ENDPOINT_MEMBERS = MapShape::shared::<Members>(MAX_ENDPOINT_GROUPS);
    /// The [`Endpoint`]s. Written by the daemon.
    ENDPOINTS = MapShape::shared::<Endpoint>(MAX_ENDPOINTS);
    /// An [`EndpointGroupInfo`] for each group. Written by the daemon.
    ENDPOINT_GROUP_INFO = MapShape::array::<EndpointGroupInfo>(MAX_ENDPOINT_GROUPS);
    /// An [`EndpointInfo`] for each endpoint. Written by the daemon.
    ENDPOINT_INFO = MapShape::array::<EndpointInfo>(MAX_ENDPOINTS);
    /// A [`Placed`] for each endpoint. Written by the kernel half, put right by the daemon.
    PLACED = MapShape::shared::<Placed>(MAX_ENDPOINTS);
    /// A [`Published`] for each endpoint. Written by the daemon.
    PUBLISHED = MapShape::shared::<Published>(MAX_ENDPOINTS);
    /// Cookies of netns to which of their connects are left alone: [`Excluded`](super::Excluded).
    /// Written by the daemon.
    EXCLUDED_NETNS = MapShape::hash::<u64, u32>(MAX_EXCLUDED_NETNS);
    /// A counter for each reason of placing of each group. Written by the kernel half.
    PLACE_VERDICTS = MapShape::new(PER_CPU_ARRAY, WORD, size_of::<u64>(), MAX_ENDPOINT_GROUPS * PLACE_REASON_SLOTS);
    /// A [`PlacedSocket`] in the storage of each socket that was placed. Written by the kernel
    /// half.
    PLACED_SOCKET = MapShape::new(SK_STORAGE, WORD, size_of::<PlacedSocket>(), 0).with(NO_PREALLOC);
    /// A [`MovingSocket`] in the storage of each connection that is or was being moved. Written by
    /// the daemon, and by the kernel half while it looks at the connection's messages.
    MOVING_SOCKET = MapShape::new(SK_STORAGE, WORD, size_of::<MovingSocket>(), 0).with(NO_PREALLOC);
}
