//! The maps, all pinned by name. `balancer_common::abi` says what each one is and how its values
//! are laid out.

use core::mem::MaybeUninit;

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockMap};
use balancer_common::abi::{
    AuditTotals, Backend, Connection, Counts, Disowned, Endpoint, EndpointGroup, EndpointGroupInfo,
    EndpointGroupState, EndpointInfo, ExemptKey, Frontend, FrontendKey, Health, Heartbeat,
    KeepaliveWord, ListenRule, Members, MovingSocket, Placed, PlacedSocket, PortKey, Published,
    Refusals, RefusedKey, ServiceInfo, ServicePort, ServiceState, Silence, SlotMoves, SlotPolicy,
    Totals, maps,
};
use balancer_common::decision::DecisionState;

#[map]
pub static SERVICES: HashMap<PortKey, ServicePort> =
    HashMap::pinned(maps::SERVICES.entries, maps::SERVICES.flags);
#[map]
pub static LISTEN_RULES: HashMap<PortKey, ListenRule> =
    HashMap::pinned(maps::LISTEN_RULES.entries, maps::LISTEN_RULES.flags);
#[map]
pub static BACKENDS: Array<Backend> = Array::pinned(maps::BACKENDS.entries, maps::BACKENDS.flags);
#[map]
pub static POLICY: Array<SlotPolicy> = Array::pinned(maps::POLICY.entries, maps::POLICY.flags);
#[map]
pub static COUNTS: Array<Counts> = Array::pinned(maps::COUNTS.entries, maps::COUNTS.flags);
#[map]
pub static TOTALS: Array<Totals> = Array::pinned(maps::TOTALS.entries, maps::TOTALS.flags);
#[map]
pub static HEALTH: Array<Health> = Array::pinned(maps::HEALTH.entries, maps::HEALTH.flags);
#[map]
pub static LISTENERS: SockMap = SockMap::pinned(maps::LISTENERS.entries, maps::LISTENERS.flags);
#[map]
pub static MEMBERS: Array<Members> = Array::pinned(maps::MEMBERS.entries, maps::MEMBERS.flags);
#[map]
pub static SERVICE_STATE: Array<ServiceState> =
    Array::pinned(maps::SERVICE_STATE.entries, maps::SERVICE_STATE.flags);
#[map]
pub static SERVICE_INFO: Array<ServiceInfo> =
    Array::pinned(maps::SERVICE_INFO.entries, maps::SERVICE_INFO.flags);
#[map]
pub static KEEPALIVE: Array<KeepaliveWord> =
    Array::pinned(maps::KEEPALIVE.entries, maps::KEEPALIVE.flags);
#[map]
pub static DISOWNED: Array<Disowned> = Array::pinned(maps::DISOWNED.entries, maps::DISOWNED.flags);
#[map]
pub static SILENCE: Array<Silence> = Array::pinned(maps::SILENCE.entries, maps::SILENCE.flags);
#[map]
pub static MOVES: Array<SlotMoves> = Array::pinned(maps::MOVES.entries, maps::MOVES.flags);
#[map]
pub static EXEMPT: LpmTrie<ExemptKey, u32> =
    LpmTrie::pinned(maps::EXEMPT.entries, maps::EXEMPT.flags);
#[map]
pub static VERDICTS: PerCpuArray<u64> =
    PerCpuArray::pinned(maps::VERDICTS.entries, maps::VERDICTS.flags);
#[map]
pub static REFUSED: LruHashMap<RefusedKey, Refusals> =
    LruHashMap::pinned(maps::REFUSED.entries, maps::REFUSED.flags);
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(maps::EVENTS.entries, maps::EVENTS.flags);
#[map]
pub static HEARTBEAT: Array<Heartbeat> =
    Array::pinned(maps::HEARTBEAT.entries, maps::HEARTBEAT.flags);
#[map]
pub static AUDIT: Array<AuditTotals> = Array::pinned(maps::AUDIT.entries, maps::AUDIT.flags);
#[map]
pub static FRONTENDS: HashMap<FrontendKey, Frontend> =
    HashMap::pinned(maps::FRONTENDS.entries, maps::FRONTENDS.flags);
#[map]
pub static ENDPOINT_GROUPS: Array<EndpointGroup> =
    Array::pinned(maps::ENDPOINT_GROUPS.entries, maps::ENDPOINT_GROUPS.flags);
#[map]
pub static ENDPOINT_GROUP_STATE: Array<EndpointGroupState> = Array::pinned(
    maps::ENDPOINT_GROUP_STATE.entries,
    maps::ENDPOINT_GROUP_STATE.flags,
);
#[map]
pub static ENDPOINT_MEMBERS: Array<Members> =
    Array::pinned(maps::ENDPOINT_MEMBERS.entries, maps::ENDPOINT_MEMBERS.flags);
#[map]
pub static ENDPOINT_GROUP_INFO: Array<EndpointGroupInfo> = Array::pinned(
    maps::ENDPOINT_GROUP_INFO.entries,
    maps::ENDPOINT_GROUP_INFO.flags,
);
#[map]
pub static ENDPOINT_INFO: Array<EndpointInfo> =
    Array::pinned(maps::ENDPOINT_INFO.entries, maps::ENDPOINT_INFO.flags);
#[map]
pub static ENDPOINTS: Array<Endpoint> =
    Array::pinned(maps::ENDPOINTS.entries, maps::ENDPOINTS.flags);
#[map]
pub static PLACED: Array<Placed> = Array::pinned(maps::PLACED.entries, maps::PLACED.flags);
#[map]
pub static PUBLISHED: Array<Published> =
    Array::pinned(maps::PUBLISHED.entries, maps::PUBLISHED.flags);
#[map]
pub static EXCLUDED_NETNS: HashMap<u64, u32> =
    HashMap::pinned(maps::EXCLUDED_NETNS.entries, maps::EXCLUDED_NETNS.flags);
#[map]
pub static PLACE_VERDICTS: PerCpuArray<u64> =
    PerCpuArray::pinned(maps::PLACE_VERDICTS.entries, maps::PLACE_VERDICTS.flags);

/// Look-ups that can be under way on one CPU at a time.
const SCRATCH_LEVELS: u32 = 3;

// Not pinned: scratch of one program instance. Levels are taken per CPU.
#[map]
pub static SCRATCH: PerCpuArray<MaybeUninit<DecisionState>> =
    PerCpuArray::with_max_entries(SCRATCH_LEVELS, 0);
#[map]
pub static SCRATCH_DEPTH: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// A BTF definition of a socket storage, as libbpf's `__type` and `__uint` macros make it: numbers
/// are array lengths.
#[repr(C)]
pub struct SkStorage<T: 'static, const FLAGS: usize> {
    r#type: *const [i32; 24],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
    pinning: *const [i32; 1],
}

// SAFETY: it is never read or written: only its type matters, which the loader reads as BTF.
unsafe impl<T, const FLAGS: usize> Sync for SkStorage<T, FLAGS> {}

impl<T, const FLAGS: usize> SkStorage<T, FLAGS> {
    const DEFINITION: Self = Self {
        r#type: core::ptr::null(),
        key: core::ptr::null(),
        value: core::ptr::null(),
        max_entries: core::ptr::null(),
        map_flags: core::ptr::null(),
        pinning: core::ptr::null(),
    };
}

#[unsafe(link_section = ".maps")]
#[unsafe(no_mangle)]
pub static CONNECTION: SkStorage<Connection, { maps::CONNECTION.flags as usize }> =
    SkStorage::DEFINITION;

#[unsafe(link_section = ".maps")]
#[unsafe(no_mangle)]
pub static PLACED_SOCKET: SkStorage<PlacedSocket, { maps::PLACED_SOCKET.flags as usize }> =
    SkStorage::DEFINITION;

#[unsafe(link_section = ".maps")]
#[unsafe(no_mangle)]
pub static MOVING_SOCKET: SkStorage<MovingSocket, { maps::MOVING_SOCKET.flags as usize }> =
    SkStorage::DEFINITION;
