//! The pinned maps, opened and typed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use aya::maps::lpm_trie::Key;
use aya::maps::{
    Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuValues, RingBuf, SkStorage,
    SockMap,
};
use balancer_common::Reason;
use balancer_common::abi::maps::{self, MapShape};
use balancer_common::abi::{
    Address, AuditTotals, Backend, BackendId, BackendState, Connection, Counts, Disowned,
    ExemptKey, Health, HealthState, Heartbeat, Keepalive, KeepaliveWord, ListenRule, MAX_SERVICES,
    MAX_SLOTS, MEMBER_WORDS, PortKey, REASON_SLOTS, ServiceInfo, ServicePort, ServiceState,
    Silence, SlotMoves, SlotPolicy, SlotState, Totals, UNLIMITED, ticks,
};
use balancer_common::decision::admission;
use balancer_common::decision::health::QueueLook;
use balancer_common::decision::member::Member;

use bytes::Buf as _;

use super::place_tables::PlaceTables;
use super::plain::Plain;
use crate::sys::shared::SharedArray;
use crate::sys::sock_diag::Socket;
use crate::sys::{bpf, clock};

/// Which word of a map's value a field is.
macro_rules! word {
    ($value:ident . $field:ident) => {
        std::mem::offset_of!($value, $field) / size_of::<u64>()
    };
}

/// Reads a value of a shared array, word by word.
macro_rules! read {
    ($array:expr, $index:expr, $value:ident { $($field:ident),* }) => {
        $value { $($field: $array.word($index, word!($value.$field)).load(Ordering::Acquire)),* }
    };
}

/// Writes a value to a shared array word by word, in this order.
macro_rules! write {
    ($array:expr, $index:expr, $from:expr, $value:ident { $($field:ident),* }) => {
        $($array.word($index, word!($value.$field)).store($from.$field, Ordering::Release);)*
    };
}

pub(super) use {read, word, write};

/// Compares every map that is pinned in a directory with the shape that this build expects.
///
/// # Errors
/// Names the map that is missing or different.
pub fn check_maps(directory: &Path) -> Result<()> {
    for (name, expected) in maps::PINNED {
        let path = directory.join(name);
        let map = bpf::obj_get(&path).with_context(|| {
            format!(
                "cannot open the pinned map {} (missing, or no pin): `balancer unload` clears the \
                 rest, with its counters",
                path.display()
            )
        })?;
        let strange = |found: String| {
            format!(
                "the pinned map {} was made by something else (it is {found}, this build needs \
                 {expected:?}): `balancer unload` removes it, with its counters",
                path.display()
            )
        };
        if bpf::Object::of(&map)? != Some(bpf::Object::Map) {
            bail!(strange("no map".to_owned()));
        }
        let found = bpf::map_info(&map);
        let found = found.with_context(|| format!("cannot query {}", path.display()))?;
        let found = MapShape {
            kind: found.kind,
            key: found.key_size,
            value: found.value_size,
            entries: found.max_entries,
            flags: found.flags,
        };
        if found != *expected {
            bail!(strange(format!("{found:?}")));
        }
    }
    Ok(())
}

/// All maps of one data plane.
pub struct Tables {
    pub services: HashMap<MapData, Plain<PortKey>, Plain<ServicePort>>,
    pub rules: HashMap<MapData, Plain<PortKey>, Plain<ListenRule>>,
    pub info: Array<MapData, Plain<ServiceInfo>>,
    pub exempt: LpmTrie<MapData, Plain<ExemptKey>, u32>,
    pub listeners: SockMap<MapData>,
    connections: MapData,
    /// The refused sources.
    pub refused: MapData,
    backends: Array<MapData, Plain<Backend>>,
    verdicts: PerCpuArray<MapData, u64>,
    states: SharedArray,
    policies: SharedArray,
    counts: SharedArray,
    totals: SharedArray,
    health: SharedArray,
    members: SharedArray,
    service_states: SharedArray,
    keepalive: SharedArray,
    silence: SharedArray,
    moves: SharedArray,
    disowned: SharedArray,
    heartbeat: Arc<SharedArray>,
    audit_totals: SharedArray,
    /// The maps of placing.
    pub place: PlaceTables,
}

/// The heartbeat's place in the maps, for any thread.
pub struct Pulse(Arc<SharedArray>);

impl Pulse {
    /// The daemon lives, and the kernel may believe so for that long.
    pub fn beat(&self, limit: Duration) {
        let beat = Heartbeat {
            last_ns: clock::monotonic_ns(),
            limit_ns: u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX),
        };
        write!(self.0, 0, beat, Heartbeat { limit_ns, last_ns });
    }
}

/// One slot that is not free.
#[derive(Clone, Copy, Debug)]
pub struct SlotView {
    /// The backend, its policy and its counts, as the decision sees them.
    pub member: Member,
    /// Whether its service regards the health of backends.
    pub regards_health: bool,
}

impl SlotView {
    /// The slot: its index in every map by slot.
    pub const fn slot(&self) -> u32 {
        self.member.slot
    }

    /// The id of the backend: its slot and the slot's generation.
    pub const fn id(&self) -> BackendId {
        self.member.id()
    }

    /// The generation and the stored state of the slot.
    pub const fn slot_state(&self) -> SlotState {
        self.member.backend.slot_state()
    }

    /// The state that `status` shows, which may be derived from the stored one.
    pub fn state(&self) -> BackendState {
        self.member.state()
    }

    /// What messages call it: its address and port, and the slot.
    pub fn name(&self) -> String {
        let backend = &self.member.backend;
        let address = SocketAddr::new(backend.address.into(), backend.port);
        format!("{address} (slot {})", self.slot())
    }

    /// Connections in ESTABLISHED that count against the quota.
    pub fn counted(&self) -> u32 {
        let counts = &self.member.counts;
        counts.established().saturating_sub(counts.exempt())
    }

    /// The quota that the daemon has written for the backend; `None`: unlimited, or none yet.
    pub fn limit(&self) -> Option<u32> {
        Some(self.member.quota(UNLIMITED)).filter(|quota| *quota != UNLIMITED)
    }

    /// Its state of health, and since when it is in it, at a tick; `None`: it serves, or its health
    /// is not regarded.
    pub fn unhealthy(&self, now: u64) -> Option<(HealthState, Duration)> {
        if !self.regards_health || !self.slot_state().is(BackendState::Active) {
            return None;
        }
        let health = &self.member.health;
        let since = health.since(now)?;
        Some((health.state(now), span_of(now.saturating_sub(since))))
    }

    /// How many more connections the backend takes; `None`: as many as come.
    pub fn room(&self) -> Option<u32> {
        self.limit().map(|limit| limit.saturating_sub(self.used()))
    }

    /// Connections that count against the quota, with those that are about to be established.
    pub fn used(&self) -> u32 {
        self.counted().saturating_add(self.expected())
    }

    /// SYNs sent to it in the last 1.1 s that have not become established.
    pub fn expected(&self) -> u32 {
        admission::expected(self.member.counts.expected, ticks(clock::monotonic_ns()))
    }
}

/// A time in ticks.
pub const fn span_of(ticks: u64) -> Duration {
    Duration::from_nanos(ticks << 20)
}

/// A pinned map, to be typed.
pub fn pinned(directory: &Path, name: &str) -> Result<MapData> {
    let path = directory.join(name);
    MapData::from_pin(&path)
        .with_context(|| format!("cannot open the pinned map {}", path.display()))
}

/// Maps a pinned array into memory.
/// A pinned map of a kind.
pub fn typed<T>(directory: &Path, name: &str, kind: fn(MapData) -> Map) -> Result<T>
where
    T: TryFrom<Map, Error = MapError>,
{
    T::try_from(kind(pinned(directory, name)?))
        .with_context(|| format!("the pinned map {name} is another kind of map"))
}

/// A counter, all CPUs together.
pub fn sum_of_cpus(counters: &PerCpuArray<MapData, u64>, index: u32) -> Result<u64> {
    let values = counters.get(&index, 0);
    let values = values.context("cannot read the verdict counters")?;
    Ok(values.iter().sum())
}

/// Sets counters to zero on every CPU.
pub fn zero_on_cpus(
    counters: &mut PerCpuArray<MapData, u64>,
    indexes: impl Iterator<Item = u32>,
) -> Result<()> {
    let cpus = aya::util::nr_cpus()
        .map_err(|(file, error)| anyhow!(error).context(format!("cannot read {file}")))?;
    for index in indexes {
        let zeros = PerCpuValues::try_from(vec![0_u64; cpus])?;
        counters.set(index, zeros, 0)?;
    }
    Ok(())
}

pub fn shared(directory: &Path, name: &str, shape: MapShape) -> Result<SharedArray> {
    let map = pinned(directory, name)?;
    SharedArray::open(map.fd(), shape.value as usize, shape.entries)
        .with_context(|| format!("cannot map {} into memory", directory.join(name).display()))
}

/// `BPF_NOEXIST`: never takes a listener from the kernel half, which may register it at this very
/// moment.
pub const ONLY_NEW: u64 = 1;
/// `BPF_EXIST`: in place of what an earlier registration has left.
pub const ONLY_OLD: u64 = 2;

/// What a look-up in a map found.
pub fn lookup<T>(found: Result<T, MapError>) -> Result<Option<T>> {
    match found {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).context("cannot read a map"),
    }
}

/// A number of slots or counters, as a map has it for an index.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the limits are constants far below 4 Gi"
)]
const fn u32_of(count: usize) -> u32 {
    count as u32
}

/// The numbers of all slots.
pub fn every_slot() -> impl Iterator<Item = u32> {
    0..u32_of(MAX_SLOTS)
}

/// The ids of all services.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a constant far below 65,536"
)]
pub fn every_service() -> impl Iterator<Item = u16> {
    0..MAX_SERVICES as u16
}

/// A zero-padded text of a map.
pub fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next();
    String::from_utf8_lossy(text.unwrap_or_default()).into_owned()
}

/// A text for a map, zero-padded, and cut at a character where it is too long.
pub fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
    bytes
}

/// What the storage of a listed socket holds.
pub fn connection_of(socket: &Socket) -> Option<Connection> {
    let mut bytes = socket.storage.as_deref()?;
    (bytes.len() >= size_of::<Connection>()).then(|| Connection {
        slot: bytes.get_u16_ne(),
        class: bytes.get_u16_ne() & Connection::CLASS,
        generation: bytes.get_u32_ne(),
    })
}

/// The backend that the storage of a listed socket names.
pub fn backend_of(socket: &Socket) -> Option<BackendId> {
    connection_of(socket).map(|connection| connection.id())
}

/// The slot that the storage of a listed socket names.
pub fn slot_of(socket: &Socket) -> Option<u32> {
    connection_of(socket).map(|connection| u32::from(connection.slot))
}

impl Tables {
    /// Opens the pins of a directory.
    pub fn open(directory: &Path) -> Result<Self> {
        let map = |name: &str| pinned(directory, name);
        Ok(Self {
            services: typed(directory, "SERVICES", Map::HashMap)?,
            rules: typed(directory, "LISTEN_RULES", Map::HashMap)?,
            info: typed(directory, "SERVICE_INFO", Map::Array)?,
            exempt: typed(directory, "EXEMPT", Map::LpmTrie)?,
            listeners: typed(directory, "LISTENERS", Map::SockMap)?,
            connections: map("CONNECTION")?,
            refused: map("REFUSED")?,
            backends: typed(directory, "BACKENDS", Map::Array)?,
            verdicts: typed(directory, "VERDICTS", Map::PerCpuArray)?,
            states: shared(directory, "BACKENDS", maps::BACKENDS)?,
            policies: shared(directory, "POLICY", maps::POLICY)?,
            counts: shared(directory, "COUNTS", maps::COUNTS)?,
            totals: shared(directory, "TOTALS", maps::TOTALS)?,
            health: shared(directory, "HEALTH", maps::HEALTH)?,
            members: shared(directory, "MEMBERS", maps::MEMBERS)?,
            service_states: shared(directory, "SERVICE_STATE", maps::SERVICE_STATE)?,
            keepalive: shared(directory, "KEEPALIVE", maps::KEEPALIVE)?,
            silence: shared(directory, "SILENCE", maps::SILENCE)?,
            moves: shared(directory, "MOVES", maps::MOVES)?,
            disowned: shared(directory, "DISOWNED", maps::DISOWNED)?,
            heartbeat: Arc::new(shared(directory, "HEARTBEAT", maps::HEARTBEAT)?),
            audit_totals: shared(directory, "AUDIT", maps::AUDIT)?,
            place: PlaceTables::open(directory)?,
        })
    }

    /// The map of CONNECTION, to ask `sock_diag` for its values.
    pub fn connection_map(&self) -> BorrowedFd<'_> {
        self.connections.fd().as_fd()
    }

    /// Writes a socket's storage; `flags` are of `bpf_map_update_elem`.
    pub fn set_connection(
        &self,
        socket: &OwnedFd,
        connection: Connection,
        flags: u64,
    ) -> Result<()> {
        let copy = self.connection_map().try_clone_to_owned();
        let copy = copy.context("cannot copy a descriptor")?;
        let map = MapData::from_fd(copy).context("cannot query the map CONNECTION")?;
        let mut storage: SkStorage<MapData, Plain<Connection>> =
            SkStorage::try_from(Map::SkStorage(map))?;
        storage
            .insert(&socket.as_raw_fd(), Plain(connection), flags)
            .context(
                "its socket storage can't be set (the kernel half has just registered it, or \
                 memory is short)",
            )
    }

    /// What user space knows of a service.
    pub fn service(&self, id: u16) -> Result<ServiceInfo> {
        let info = self.info.get(&u32::from(id), 0);
        Ok(info.context("cannot read the services")?.0)
    }

    /// The services that are configured, with their ids.
    pub fn named_services(&self) -> Result<Vec<(u16, ServiceInfo)>> {
        let mut named = Vec::new();
        for id in every_service() {
            let info = self.service(id)?;
            if info.name[0] != 0 && info.port != 0 {
                named.push((id, info));
            }
        }
        Ok(named)
    }

    /// Whether a source is exempt for a service.
    pub fn is_exempt(&self, service: u16, source: IpAddr) -> Result<bool> {
        let key = Key::new(
            ExemptKey::BITS,
            Plain(ExemptKey::new(service, Address::of_packet(source))),
        );
        Ok(lookup(self.exempt.get(&key, 0))?.is_some())
    }

    /// The events of the kernel half.
    pub fn events(directory: &Path) -> Result<RingBuf<MapData>> {
        Ok(RingBuf::try_from(Map::RingBuf(pinned(
            directory, "EVENTS",
        )?))?)
    }

    fn state_word(&self, slot: u32) -> &AtomicU64 {
        self.states.word(slot, word!(Backend.slot_state))
    }

    /// Generation and state of a slot.
    pub fn slot_state(&self, slot: u32) -> SlotState {
        SlotState(self.state_word(slot).load(Ordering::SeqCst))
    }

    /// Gives a slot another state, or generation and state.
    pub fn set_slot_state(&self, slot: u32, state: SlotState) {
        self.state_word(slot).store(state.0, Ordering::SeqCst);
    }

    /// Gives a slot another state where it still has the one given; says whether it had.
    pub fn change_state(&self, slot: u32, from: SlotState, to: BackendState) -> bool {
        self.state_word(slot)
            .compare_exchange(from.0, from.with(to).0, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// The quota word of a slot.
    pub fn quota_word(&self, slot: u32) -> &AtomicU64 {
        self.policies.word(slot, word!(SlotPolicy.quota))
    }

    /// The weight word of a slot.
    pub fn weight_word(&self, slot: u32) -> &AtomicU64 {
        self.policies.word(slot, word!(SlotPolicy.weight))
    }

    /// The word of a slot about the server that it is a listener of.
    pub fn server_word(&self, slot: u32) -> &AtomicU64 {
        self.policies.word(slot, word!(SlotPolicy.server))
    }

    fn adopted_word(&self, slot: u32) -> &AtomicU64 {
        self.policies.word(slot, word!(SlotPolicy.adopted))
    }

    /// Says how many connections of a slot the daemon counts, as `Counts::established` packs it.
    pub fn set_adopted(&self, slot: u32, count: u64) {
        let word = self.adopted_word(slot);
        if word.load(Ordering::Acquire) != count {
            word.store(count, Ordering::SeqCst);
        }
    }

    /// When a client of a service that has vanished is given up; `None`: the server sees to that.
    pub fn keepalive(&self, service: u16) -> Option<Keepalive> {
        let packed = self.keepalive_word(service).load(Ordering::Acquire);
        KeepaliveWord { packed }.get()
    }

    /// Says when a client of a service that has vanished is given up, for connections that are
    /// accepted from now on.
    pub fn set_keepalive(&self, service: u16, keepalive: Option<Keepalive>) {
        let KeepaliveWord { packed } = KeepaliveWord::new(keepalive);
        self.keepalive_word(service)
            .store(packed, Ordering::Release);
    }

    fn keepalive_word(&self, service: u16) -> &AtomicU64 {
        self.keepalive
            .word(u32::from(service), word!(KeepaliveWord.packed))
    }

    /// Whether a backend was found to belong to nobody, now or before it was confirmed.
    pub fn is_disowned(&self, view: &SlotView) -> bool {
        let disowned = read!(self.disowned, view.slot(), Disowned { generation });
        disowned.is_for(view.slot_state())
    }

    /// Says that a backend belongs to nobody: its connections get no storage from now on.
    pub fn disown(&self, view: &SlotView) {
        let disowned = Disowned::new(view.slot_state());
        write!(
            self.disowned,
            view.slot(),
            disowned,
            Disowned { generation }
        );
    }

    /// How silent the connections of a slot were when the socket table was last read.
    pub fn silence(&self, slot: u32) -> Silence {
        read!(self.silence, slot, Silence { packed })
    }

    /// Says how silent the connections of a slot are.
    pub fn set_silence(&self, slot: u32, silence: Silence) {
        write!(self.silence, slot, silence, Silence { packed });
    }

    /// What has become of connections of a backend that were moved.
    pub fn moves(&self, backend: BackendId) -> SlotMoves {
        let moves = read!(
            self.moves,
            backend.slot,
            SlotMoves {
                generation,
                left,
                others
            }
        );
        if moves.generation == u64::from(backend.generation) {
            moves
        } else {
            let generation = backend.generation.into();
            SlotMoves {
                generation,
                ..SlotMoves::default()
            }
        }
    }

    /// Says what has become of them. Only the daemon writes these words.
    pub fn set_moves(&self, slot: u32, moves: SlotMoves) {
        write!(
            self.moves,
            slot,
            moves,
            SlotMoves {
                generation,
                left,
                others
            }
        );
    }

    /// The kernel half's count of a slot, as `Counts::established` packs it.
    pub fn established_word(&self, slot: u32) -> &AtomicU64 {
        self.counts.word(slot, word!(Counts.established))
    }

    /// Connections of a slot that have entered ESTABLISHED, ever.
    pub fn entered(&self, slot: u32) -> u64 {
        self.totals
            .word(slot, word!(Totals.entered))
            .load(Ordering::SeqCst)
    }

    /// Listeners of a service that could not be registered.
    pub fn unregistered_word(&self, service: u16) -> &AtomicU64 {
        self.service_states
            .word(u32::from(service), word!(ServiceState.unregistered))
    }

    /// How often listeners of any service got no slot because there were too many of their kind,
    /// since the map was made.
    pub fn turned_away(&self) -> u64 {
        let word = word!(ServiceState.turned_away);
        every_service()
            .map(|id| self.service_states.word(u32::from(id), word))
            .fold(0, |sum, word| {
                sum.wrapping_add(word.load(Ordering::Acquire))
            })
    }

    /// How COUNTS compared with the socket table last.
    pub fn audit_totals(&self) -> AuditTotals {
        read!(
            self.audit_totals,
            0,
            AuditTotals {
                checks,
                drift,
                repairs,
                last_ns,
                cost_ns
            }
        )
    }

    /// Says how COUNTS compares with the socket table.
    pub fn set_audit_totals(&self, totals: AuditTotals) {
        write!(
            self.audit_totals,
            0,
            totals,
            AuditTotals {
                checks,
                drift,
                repairs,
                last_ns,
                cost_ns
            }
        );
    }

    /// Fills a slot that this process has claimed.
    pub fn write_backend(&mut self, slot: u32, backend: Backend) -> Result<()> {
        for hint in 1..size_of::<Counts>() / size_of::<u64>() {
            self.counts.word(slot, hint).store(0, Ordering::SeqCst);
        }
        for word in 0..size_of::<Health>() / size_of::<u64>() {
            self.health.word(slot, word).store(0, Ordering::SeqCst);
        }
        self.backends
            .set(slot, Plain(backend), 0)
            .with_context(|| format!("cannot write slot {slot}"))
    }

    /// The word of a service's bitmap that has the bit of a slot, and the bit.
    fn member_bit(&self, service: u16, slot: u32) -> (&AtomicU64, u64) {
        let word = (slot / 64) as usize;
        let word = self.members.word(u32::from(service), word);
        (word, 1 << (slot % 64))
    }

    /// Adds a slot to a service's bitmap.
    pub fn join(&self, service: u16, slot: u32) {
        let (word, bit) = self.member_bit(service, slot);
        word.fetch_or(bit, Ordering::SeqCst);
    }

    /// Takes a slot out of a service's bitmap.
    pub fn leave(&self, service: u16, slot: u32) {
        let (word, bit) = self.member_bit(service, slot);
        word.fetch_and(!bit, Ordering::SeqCst);
    }

    /// Takes a slot out of every service's bitmap.
    pub fn leave_all(&self, slot: u32) {
        for service in every_service() {
            let (word, bit) = self.member_bit(service, slot);
            if word.load(Ordering::Acquire) & bit != 0 {
                word.fetch_and(!bit, Ordering::SeqCst);
            }
        }
    }

    /// The policy of a slot.
    pub fn policy(&self, slot: u32) -> SlotPolicy {
        read!(
            self.policies,
            slot,
            SlotPolicy {
                quota,
                weight,
                adopted,
                server
            }
        )
    }

    /// What the kernel half has counted of a slot.
    pub fn counts(&self, slot: u32) -> Counts {
        read!(
            self.counts,
            slot,
            Counts {
                established,
                expected,
                full,
                cookies,
                flood,
                handshake
            }
        )
    }

    /// What is seen of a slot's health.
    pub fn health(&self, slot: u32) -> Health {
        read!(
            self.health,
            slot,
            Health {
                queue,
                stalled,
                failures,
                failing,
                failing_since,
                hung,
                hung_since,
                zero
            }
        )
    }

    /// Writes down what a look at a slot's accept queue has found, unless the kernel half has
    /// looked since `before` was read.
    pub fn set_queue_look(&self, slot: u32, before: &Health, look: QueueLook) {
        let queue = self.health.word(slot, word!(Health.queue));
        let mine =
            queue.compare_exchange(before.queue, look.queue, Ordering::SeqCst, Ordering::SeqCst);
        if mine.is_ok() {
            let stalled = self.health.word(slot, word!(Health.stalled));
            stalled.store(look.stalled, Ordering::SeqCst);
        }
    }

    /// Says until when a slot counts as hung, and since when it is.
    pub fn set_hung(&self, slot: u32, until: u64, since: u64) {
        let words = [
            (word!(Health.hung_since), since),
            (word!(Health.hung), until),
        ];
        for (word, value) in words {
            let word = self.health.word(slot, word);
            if word.load(Ordering::Acquire) != value {
                word.store(value, Ordering::SeqCst);
            }
        }
    }

    /// The bitmap of a service's slots.
    pub fn members(&self, service: u16) -> [u64; MEMBER_WORDS] {
        std::array::from_fn(|word| {
            self.members
                .word(u32::from(service), word)
                .load(Ordering::Acquire)
        })
    }

    /// The next ticket of round-robin.
    pub fn turn(&self, service: u16) -> u64 {
        self.service_states
            .word(u32::from(service), word!(ServiceState.turn))
            .load(Ordering::Acquire)
    }

    /// When the daemon last lived, and for how long the kernel believes it.
    pub fn heartbeat(&self) -> Heartbeat {
        read!(self.heartbeat, 0, Heartbeat { last_ns, limit_ns })
    }

    /// What gives the heartbeat.
    pub fn pulse(&self) -> Pulse {
        Pulse(Arc::clone(&self.heartbeat))
    }

    /// A slot, if it is taken.
    fn slot(&self, slot: u32) -> Result<Option<Member>> {
        let slot_state = self.slot_state(slot);
        if !matches!(
            slot_state.state(),
            BackendState::Active | BackendState::Closed
        ) {
            return Ok(None);
        }
        let backend = self
            .backends
            .get(&slot, 0)
            .with_context(|| format!("cannot read slot {slot}"))?
            .0;
        let policy = self.policy(slot);
        let counts = self.counts(slot).with_adopted(&policy);
        let member = Member {
            slot,
            backend,
            policy,
            counts,
            health: self.health(slot),
        };
        Ok(Some(member))
    }

    /// All taken slots, in order.
    pub fn slots(&self) -> Result<Vec<SlotView>> {
        let mut regards: BTreeMap<u16, bool> = BTreeMap::new();
        let mut slots = Vec::new();
        for slot in every_slot() {
            let Some(member) = self.slot(slot)? else {
                continue;
            };
            let service = member.backend.service;
            let regards_health = match regards.get(&service) {
                Some(regards) => *regards,
                None => self.regards_health(service)?,
            };
            regards.insert(service, regards_health);
            slots.push(SlotView {
                member,
                regards_health,
            });
        }
        Ok(slots)
    }

    fn regards_health(&self, service: u16) -> Result<bool> {
        let is_one = usize::from(service) < MAX_SERVICES;
        Ok(is_one && self.service(service)?.flags & ServicePort::HEALTH_OFF == 0)
    }

    /// How often each reason was given for a service, all CPUs together.
    pub fn verdicts(&self, service: u16) -> Result<Vec<(Reason, u64)>> {
        let first = u32::from(service) * u32_of(REASON_SLOTS);
        let count = |reason: &Reason| -> Result<(Reason, u64)> {
            let index = first + u32::try_from(reason.index())?;
            Ok((*reason, sum_of_cpus(&self.verdicts, index)?))
        };
        Reason::ALL.iter().map(count).collect()
    }

    /// Sets a service's verdict counters and tickets to zero, for a new service with a used id.
    pub fn forget_service(&mut self, service: u16) -> Result<()> {
        let first = u32::from(service) * u32_of(REASON_SLOTS);
        zero_on_cpus(&mut self.verdicts, first..first + u32_of(REASON_SLOTS))?;
        self.service_states
            .word(u32::from(service), word!(ServiceState.turn))
            .store(0, Ordering::Release);
        self.unregistered_word(service).store(0, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_a_character() {
        let bytes: [u8; 4] = padded("aäöü");
        assert_eq!(text(&bytes), "aä");
        let bytes: [u8; 8] = padded("abc");
        assert_eq!(text(&bytes), "abc");
    }
}
