//! The maps, all pinned by name. Their values are laid out in `balancer_common::abi`.

use core::mem::MaybeUninit;

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, SockMap};
use balancer_common::abi::{
    AuditTotals, Backend, Connection, Counts, ExemptKey, Heartbeat, ListenRule, MAX_SERVICES,
    MAX_SLOTS, Members, PortKey, REASON_SLOTS, ServiceInfo, ServicePort, ServiceState, SlotPolicy,
    Totals,
};
use balancer_common::decision::DecisionState;

const SLOTS: u32 = MAX_SLOTS as u32;
const SERVICE_IDS: u32 = MAX_SERVICES as u32;
/// `BPF_F_MMAPABLE`.
const MMAPABLE: u32 = 1 << 10;
/// `BPF_F_NO_PREALLOC`, which LPM tries demand.
const NO_PREALLOC: u32 = 1;
const EVENT_BYTES: u32 = 256 * 1024;

#[map]
pub static SERVICES: HashMap<PortKey, ServicePort> = HashMap::pinned(4096, 0);
#[map]
pub static LISTEN_RULES: HashMap<PortKey, ListenRule> = HashMap::pinned(8192, 0);
#[map]
pub static BACKENDS: Array<Backend> = Array::pinned(SLOTS, MMAPABLE);
#[map]
pub static POLICY: Array<SlotPolicy> = Array::pinned(SLOTS, MMAPABLE);
#[map]
pub static COUNTS: Array<Counts> = Array::pinned(SLOTS, MMAPABLE);
#[map]
pub static TOTALS: Array<Totals> = Array::pinned(SLOTS, MMAPABLE);
#[map]
pub static LISTENERS: SockMap = SockMap::pinned(SLOTS, 0);
#[map]
pub static MEMBERS: Array<Members> = Array::pinned(SERVICE_IDS, MMAPABLE);
#[map]
pub static SERVICE_STATE: Array<ServiceState> = Array::pinned(SERVICE_IDS, MMAPABLE);
#[map]
pub static SERVICE_INFO: Array<ServiceInfo> = Array::pinned(SERVICE_IDS, 0);
#[map]
pub static EXEMPT: LpmTrie<ExemptKey, u32> = LpmTrie::pinned(16384, NO_PREALLOC);
#[map]
pub static VERDICTS: PerCpuArray<u64> = PerCpuArray::pinned(SERVICE_IDS * REASON_SLOTS as u32, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(EVENT_BYTES, 0);
#[map]
pub static HEARTBEAT: Array<Heartbeat> = Array::pinned(1, MMAPABLE);
#[map]
pub static AUDIT: Array<AuditTotals> = Array::pinned(1, MMAPABLE);

/// Look-ups that can be under way on one CPU at a time.
const SCRATCH_LEVELS: u32 = 3;

// Not pinned: scratch of one program instance. Levels are taken per CPU.
#[map]
pub static SCRATCH: PerCpuArray<MaybeUninit<DecisionState>> =
    PerCpuArray::with_max_entries(SCRATCH_LEVELS, 0);
#[map]
pub static SCRATCH_DEPTH: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// A BTF definition of a socket storage, as libbpf's `__type` and `__uint` macros make it: numbers are array lengths.
#[repr(C)]
pub struct SkStorage<T: 'static, const FLAGS: usize> {
    r#type: *const [i32; 24],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
    pinning: *const [i32; 1],
}

unsafe impl<T, const FLAGS: usize> Sync for SkStorage<T, FLAGS> {}

/// `BPF_F_NO_PREALLOC | BPF_F_CLONE`: accepted sockets inherit their listener's value.
const CLONED: usize = 1 | 512;

#[unsafe(link_section = ".maps")]
#[unsafe(no_mangle)]
pub static CONNECTION: SkStorage<Connection, CLONED> = SkStorage {
    r#type: core::ptr::null(),
    key: core::ptr::null(),
    value: core::ptr::null(),
    max_entries: core::ptr::null(),
    map_flags: core::ptr::null(),
    pinning: core::ptr::null(),
};
