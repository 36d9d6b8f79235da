//! The layout of the pinned maps. A change of anything here is a new [`VERSION`].
//!
//! Words that both sides or several CPUs write are `u64`s with packed fields, read and written atomically as one.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The version of this layout; names the directory of the pins.
pub const VERSION: u32 = 5;
/// Most services.
pub const MAX_SERVICES: usize = 64;
/// Most backends of all services together.
pub const MAX_SLOTS: usize = 1024;
/// Most backends of one service.
pub const MAX_MEMBERS: usize = 256;
/// Words of a service's bitmap of slots.
pub const MEMBER_WORDS: usize = MAX_SLOTS / 64;
/// Counters a service has in VERDICTS.
pub const REASON_SLOTS: usize = 16;
/// A quota that never refuses.
pub const UNLIMITED: u32 = u32::MAX;
/// The service id that names none.
pub const NO_SERVICE: u16 = u16::MAX;
/// The network namespace of a key that fits any.
pub const ANY_NETNS: u64 = 0;
/// Weight of a backend when nothing else is said.
pub const DEFAULT_WEIGHT: u32 = 1;
/// Longest name of a service, in bytes.
pub const MAX_NAME: usize = 63;

/// Coarse time for packed stamps: units of 2²⁰ ns (about 1.05 ms) of `CLOCK_MONOTONIC`; compare by wrapping difference.
#[inline(always)]
pub const fn ticks(monotonic_ns: u64) -> u32 {
    (monotonic_ns >> 20) as u32
}

/// Ticks of that many milliseconds, rounded down.
pub const fn ticks_of_ms(ms: u64) -> u32 {
    ((ms * 1_000_000) >> 20) as u32
}

/// Ticks of that many microseconds, rounded down, and all of 32 bits where they are more.
#[inline(always)]
pub const fn ticks_of_us(us: u64) -> u32 {
    let ticks = us.saturating_mul(1_000) >> 20;
    if ticks > u32::MAX as u64 {
        u32::MAX
    } else {
        ticks as u32
    }
}

/// An IP address as the maps hold it: 16 bytes, IPv4 as `::ffff:a.b.c.d`, all zero for "any".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// Any address: what a wildcard listener is bound to.
    pub const ANY: Self = Self([0; 4]);

    /// Any IPv4 address, as a packet would have it.
    pub const ANY_V4: Self = Self::from_v4_be(0);

    /// An IPv4 address given as in the packet (network byte order).
    #[inline(always)]
    pub const fn from_v4_be(address: u32) -> Self {
        Self([0, 0, 0x0000_ffff_u32.to_be(), address])
    }

    /// Whether it is the wildcard of either family.
    #[inline(always)]
    pub const fn is_any(&self) -> bool {
        self.0[0] == 0
            && self.0[1] == 0
            && (self.0[2] == 0 || self.0[2] == 0x0000_ffff_u32.to_be())
            && self.0[3] == 0
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0x0000_ffff_u32.to_be()
    }

    /// The two halves as they stand in memory, for comparing.
    #[inline(always)]
    pub const fn words(&self) -> (u64, u64) {
        (
            (self.0[1] as u64) << 32 | self.0[0] as u64,
            (self.0[3] as u64) << 32 | self.0[2] as u64,
        )
    }

    /// The upper and the lower half as numbers, for hashing.
    #[inline(always)]
    pub const fn halves(&self) -> (u64, u64) {
        (
            (self.0[0] as u64) << 32 | self.0[1] as u64,
            (self.0[2] as u64) << 32 | self.0[3] as u64,
        )
    }
}

impl Address {
    /// An address as it stands in a packet: unlike with `From`, 0.0.0.0 is an IPv4 address here, not "any".
    pub fn of_packet(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::from_v4_be(u32::from(v4).to_be()),
            IpAddr::V6(_) => address.into(),
        }
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let v6 = match address {
            IpAddr::V4(v4) if v4.is_unspecified() => Ipv6Addr::UNSPECIFIED,
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let octets = v6.octets();
        let word = |at: usize| {
            u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]])
        };
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(address.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        let v6 = Ipv6Addr::from(octets);
        v6.to_ipv4_mapped()
            .map_or(Self::V6(v6), |v4: Ipv4Addr| Self::V4(v4))
    }
}

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
    /// All of them.
    pub const ALL: [Self; 3] = [Self::LeastConnections, Self::RoundRobin, Self::SourceHash];

    /// The name in the configuration and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LeastConnections => "least-connections",
            Self::RoundRobin => "round-robin",
            Self::SourceHash => "source-hash",
        }
    }

    /// The policy of its number in a map; an unknown number is least-connections, so that no map content can panic.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::RoundRobin,
            2 => Self::SourceHash,
            _ => Self::LeastConnections,
        }
    }
}

/// Key of SERVICES and `LISTEN_RULES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct PortKey {
    /// Cookie of the network namespace, or [`ANY_NETNS`].
    pub netns: u64,
    /// The address, or [`Address::ANY`].
    pub address: Address,
    /// The port, host byte order (32 bits, so that the key has no padding).
    pub port: u32,
    /// Always 0.
    pub zero: u32,
}

impl PortKey {
    /// The key of an address and port in a namespace.
    #[inline(always)]
    pub const fn new(netns: u64, address: Address, port: u16) -> Self {
        Self {
            netns,
            address,
            port: port as u32,
            zero: 0,
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
    /// A key with this port and an exact address exists too and wins.
    pub const EXACT_ADDRESSES: u8 = 1;
    /// Nothing listens on the port itself: its backends listen elsewhere.
    pub const VIRTUAL: u8 = 2;
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
    /// The namespace is not known to be guarded: counted, not steered to until the daemon confirms it.
    pub const CANDIDATE: u16 = 2;

    /// The rule for a listener: an exact address before any, the namespace before any; `lookup` reads `LISTEN_RULES`.
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

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum BackendState {
    /// Nothing; may be claimed.
    Free = 0,
    /// Being filled by the CPU that claimed it.
    Claimed = 1,
    /// Listens. Whether the daemon has confirmed it is a matter of its flags and policy.
    Active = 2,
    /// Its listener is gone, its connections are not (or were not when last looked at).
    Closed = 3,
    /// Listens in a namespace that the daemon has not confirmed. Never stored: derived.
    Candidate = 4,
    /// Being changed by the daemon. If it dies over that, the next one finishes what it began.
    Held = 5,
}

impl BackendState {
    /// The word in JSON and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Claimed => "claimed",
            Self::Active => "active",
            Self::Closed => "closed",
            Self::Candidate => "candidate",
            Self::Held => "held",
        }
    }
}

/// Which backend: a slot, and its generation while this backend has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId {
    /// The slot.
    pub slot: u32,
    /// The generation of the slot.
    pub generation: u32,
}

impl BackendId {
    /// Packs the two into one word.
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        (self.generation as u64) << 32 | self.slot as u64
    }

    /// The two that a word packs.
    #[inline(always)]
    pub const fn unpack(word: u64) -> Self {
        Self {
            slot: word as u32,
            generation: (word >> 32) as u32,
        }
    }
}

/// The first word of a [`Backend`]: generation and state, changed by compare-and-swap alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotState(pub u64);

impl SlotState {
    /// Packs the two.
    #[inline(always)]
    pub const fn new(generation: u32, state: BackendState) -> Self {
        Self((generation as u64) << 32 | state as u64)
    }

    /// Tells the backends apart that have the slot one after the other: raised when it is freed.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether it is in that state.
    #[inline(always)]
    pub const fn is(self, state: BackendState) -> bool {
        self.0 as u32 == state as u32
    }

    /// The state, a number that no one writes being free.
    pub const fn state(self) -> BackendState {
        match self.0 as u32 {
            1 => BackendState::Claimed,
            2 => BackendState::Active,
            3 => BackendState::Closed,
            5 => BackendState::Held,
            _ => BackendState::Free,
        }
    }

    /// The same backend in another state.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, state: BackendState) -> Self {
        Self::new(self.generation(), state)
    }
}

/// Value of BACKENDS: who a slot is. Written by the kernel when it is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    /// [`SlotState`], atomic.
    pub slot_state: u64,
    /// Cookie of its network namespace.
    pub netns: u64,
    /// The address that it is bound to.
    pub address: Address,
    /// Its port, host byte order.
    pub port: u16,
    /// Its service.
    pub service: u16,
    /// Weight by its rule.
    pub weight: u32,
    /// Owner of the socket.
    pub uid: u32,
    /// Interface that it is bound to, 0 for none.
    pub device: u32,
    /// Bits of `Backend::…`.
    pub flags: u32,
    /// errno of `bpf_sock_map_update` when it is [`Backend::UNSTEERABLE`] (a positive number).
    pub map_error: u32,
    /// The process that listened (thread group id in the initial pid namespace), 0 if not known.
    pub pid: u32,
    /// Its thread that did: a thread can be in another network namespace than its process. 0 if not known.
    pub tid: u32,
}

impl Backend {
    /// An IPv6 socket.
    pub const V6: u32 = 1;
    /// An IPv6 socket that takes no IPv4.
    pub const V6_ONLY: u32 = 2;
    /// Refused by the SOCKMAP (MPTCP): counted and, on its own port, admitted, but never steered to.
    pub const UNSTEERABLE: u32 = 4;
    /// Claimed by a rule for any namespace.
    pub const CANDIDATE: u32 = 8;
    /// Registered by the daemon: it listened before, and may have connections that the kernel half does not count. The kernel half
    /// does not see it close.
    pub const ADOPTED: u32 = 16;

    /// An empty slot.
    pub const EMPTY: Self = Self {
        slot_state: 0,
        netns: 0,
        address: Address::ANY,
        port: 0,
        service: 0,
        weight: 0,
        uid: 0,
        device: 0,
        flags: 0,
        map_error: 0,
        pid: 0,
        tid: 0,
    };

    /// The stored life.
    #[inline(always)]
    pub const fn slot_state(&self) -> SlotState {
        SlotState(self.slot_state)
    }
}

/// Value of POLICY: what the daemon wants and knows of a slot. Each word is written atomically; quota and weight are valid
/// for one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SlotPolicy {
    /// quota | (generation + 1) << 32; 0 in the upper half: never written.
    pub quota: u64,
    /// weight | flags << 32.
    pub weight: u64,
    /// Connections that only the daemon can count, as `Counts::established` packs them: those that were there before their
    /// listener was registered, and those whose state changes another program has switched off. It counts them again at each
    /// check until they are gone.
    pub adopted: u64,
}

impl SlotPolicy {
    /// The quota was set by hand for this backend (a flag of the weight word).
    pub const BY_HAND: u32 = 1;
    /// The quota was set by hand for every backend of the service.
    pub const SERVICE_BY_HAND: u32 = 2;
    /// The quota was computed from what is known of the clients, and so is only as good as that.
    pub const COMPUTED: u32 = 4;

    /// Packs quota and weight for the backend with that generation.
    pub const fn new(generation: u32, quota: u32, weight: u32, flags: u32) -> Self {
        Self {
            quota: (generation.wrapping_add(1) as u64) << 32 | quota as u64,
            weight: (flags as u64) << 32 | weight as u64,
            adopted: 0,
        }
    }

    /// Whether the daemon wrote it for this backend.
    #[inline(always)]
    pub const fn is_for(&self, slot_state: SlotState) -> bool {
        (self.quota >> 32) as u32 == slot_state.generation().wrapping_add(1)
    }

    /// The quota.
    #[inline(always)]
    pub const fn quota(&self) -> u32 {
        self.quota as u32
    }

    /// The weight.
    #[inline(always)]
    pub const fn weight(&self) -> u32 {
        self.weight as u32
    }

    /// Its flags.
    #[inline(always)]
    pub const fn flags(&self) -> u32 {
        (self.weight >> 32) as u32
    }

    /// Whether somebody set the quota by hand, for this backend or for its service.
    pub const fn is_by_hand(&self) -> bool {
        self.flags() & (Self::BY_HAND | Self::SERVICE_BY_HAND) != 0
    }
}

/// Value of COUNTS: the live numbers of a slot, each word atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// established | exempt established << 32. Exact: changed on entering and on leaving ESTABLISHED alone.
    pub established: u64,
    /// SYNs sent here that have not become established | tick of the last << 32. A hint for the order of candidates.
    pub expected: u64,
    /// Tick when the accept queue was first seen full | tick when last << 32; 0: not full.
    pub full: u64,
    /// Tick until which SYN cookies are in use | [`Cookies`] << 32.
    pub cookies: u64,
    /// Tick from when on the half-open connections, which hold all the room, are a flood unless one is completed before | 1 << 32;
    /// 0: they hold it not.
    pub stalled: u64,
    /// The longest handshake of late, in microseconds | tick when it was completed << 32; 0: none yet.
    pub handshake: u64,
}

impl Counts {
    /// Nothing counted.
    pub const ZERO: Self = Self {
        established: 0,
        expected: 0,
        full: 0,
        cookies: 0,
        stalled: 0,
        handshake: 0,
    };
    /// What one exempt connection adds to the word `established`; any other adds 1.
    pub const ONE_EXEMPT: u64 = 1 << 32 | 1;

    /// These numbers together with the connections that only the daemon can count.
    #[inline(always)]
    #[must_use]
    pub const fn with_adopted(self, policy: &SlotPolicy) -> Self {
        Self {
            established: self.established.wrapping_add(policy.adopted),
            ..self
        }
    }

    /// Connections in ESTABLISHED.
    #[inline(always)]
    pub const fn established(&self) -> u32 {
        self.established as u32
    }

    /// Those of them that are exempt.
    #[inline(always)]
    pub const fn exempt(&self) -> u32 {
        (self.established >> 32) as u32
    }
}

/// Value of TOTALS: what only ever grows, apart from COUNTS, which every SYN reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Totals {
    /// Connections that have entered ESTABLISHED, of all backends that the slot has had. Raised after COUNTS. Atomic.
    pub entered: u64,
}

/// How sure it is that a listener answers with SYN cookies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Cookies {
    /// Not in use.
    Off = 0,
    /// Its SYN queue is nearly full: the next SYN may be answered with one.
    Soon = 1,
    /// In use: one was sent in the last two minutes, or `tcp_syncookies` is 2.
    InUse = 2,
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
    /// The next ticket of round-robin. Atomic.
    pub turn: u64,
    /// The sum of the weights of those that could be chosen when round-robin last added it up: it says nothing of now. Atomic.
    pub weights: u64,
    /// Tick of the last refusal event. Atomic.
    pub last_event: u64,
    /// Listeners of the service that could not be registered: while there are any, nobody is refused because the registered
    /// ones are full. The kernel half adds, the daemon corrects. Atomic.
    pub unregistered: u64,
}

/// Value of CONNECTION (socket storage): on a listener its slot; on an accepted socket what it was counted as.
///
/// Its size and the places of slot and generation are the same in every layout, so that another build can tell whose a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Connection {
    /// The slot.
    pub slot: u16,
    /// `Connection::…`: how this socket is counted.
    pub class: u16,
    /// The generation of the slot when the listener claimed it.
    pub generation: u32,
}

impl Connection {
    /// A listener, or a socket that is not in ESTABLISHED.
    pub const UNCOUNTED: u16 = 0;
    /// In ESTABLISHED, counted against the quota.
    pub const COUNTED: u16 = 1;
    /// In ESTABLISHED, exempt.
    pub const EXEMPT: u16 = 2;
    /// Taken over from another data plane: the daemon counts it.
    pub const INHERITED: u16 = 3;

    /// The backend that it names.
    #[inline(always)]
    pub const fn id(&self) -> BackendId {
        BackendId {
            slot: self.slot as u32,
            generation: self.generation,
        }
    }
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

/// Value of HEARTBEAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Heartbeat {
    /// When the daemon last lived, ns of `CLOCK_MONOTONIC` (`bpf_ktime_get_ns`). Atomic.
    pub last_ns: u64,
    /// After how many ns of silence the kernel stops refusing. Atomic.
    pub limit_ns: u64,
}

impl Heartbeat {
    /// Whether the kernel must not refuse any more.
    #[inline(always)]
    pub const fn is_stale(&self, now_ns: u64) -> bool {
        now_ns > self.last_ns && now_ns - self.last_ns > self.limit_ns
    }
}

/// Value of AUDIT: how COUNTS compares with the socket table. Written by the daemon, each word atomically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AuditTotals {
    /// Comparisons made.
    pub checks: u64,
    /// Connections by which counts were lastingly off at the last comparison, all backends together.
    pub drift: u64,
    /// Counts that were put right, ever.
    pub repairs: u64,
    /// When the last comparison ended, ns of `CLOCK_MONOTONIC`.
    pub last_ns: u64,
    /// Processor time that it took, ns.
    pub cost_ns: u64,
}

/// What an [`Event`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum EventKind {
    /// A listener claimed a slot, or listens again.
    ListenerUp = 1,
    /// A listener closed or was shut down.
    ListenerDown = 2,
    /// A listener of a service found no free slot: it serves without the balancer.
    NoSlot = 3,
    /// A listener's socket storage could not be made: it serves without the balancer.
    NoStorage = 4,
    /// A look-up was refused (at most ten events a second and service).
    Refused = 5,
}

impl EventKind {
    /// The kind of its number.
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::ListenerUp,
            2 => Self::ListenerDown,
            3 => Self::NoSlot,
            4 => Self::NoStorage,
            5 => Self::Refused,
            _ => return None,
        })
    }
}

/// A record of EVENTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// [`EventKind`] as a number.
    pub kind: u16,
    /// Id of the service.
    pub service: u16,
    /// The slot, or `u32::MAX`.
    pub slot: u32,
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The listener's address, or the client's.
    pub address: Address,
    /// Its port.
    pub port: u16,
    /// [`crate::Reason`] as an index, for a refusal.
    pub reason: u16,
    /// The process that listened, 0 if not known.
    pub pid: u32,
    /// Its thread that did.
    pub tid: u32,
    /// Always 0.
    pub zero: u32,
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
}

const _: () = {
    assert!(size_of::<PortKey>() == 32);
    assert!(size_of::<ServicePort>() == 8);
    assert!(size_of::<ListenRule>() == 8);
    assert!(size_of::<Backend>() == 64);
    assert!(size_of::<SlotPolicy>() == 24);
    assert!(size_of::<Counts>() == 48);
    assert!(size_of::<Members>() == 128);
    assert!(size_of::<ServiceState>() == 32);
    assert!(size_of::<Totals>() == 8);
    assert!(size_of::<AuditTotals>() == 40);
    assert!(size_of::<Connection>() == 8);
    assert!(size_of::<ExemptKey>() == 20);
    assert!(size_of::<Heartbeat>() == 16);
    assert!(size_of::<Event>() == 48);
    assert!(size_of::<ServiceInfo>() == 480);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for text in ["127.0.0.1", "::1", "10.1.2.3", "2001:db8::7"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(address)), address);
        }
        assert!(Address::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)).is_any());
        assert_eq!(
            Address::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            Address::ANY
        );
        let mapped = Address::from_v4_be(u32::from_ne_bytes([10, 1, 2, 3]));
        assert_eq!(mapped, Address::from("10.1.2.3".parse::<IpAddr>().unwrap()));
        assert!(mapped.is_v4());
    }

    #[test]
    fn heartbeat_goes_stale_after_its_limit() {
        let beat = Heartbeat {
            last_ns: 100,
            limit_ns: 10,
        };
        assert!(!beat.is_stale(90));
        assert!(!beat.is_stale(110));
        assert!(beat.is_stale(111));
    }
}
