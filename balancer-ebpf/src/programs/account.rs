//! sock_ops: registers the listeners of services and counts their established connections, and has
//! those of clients counted that were placed.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_ops};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_sk_storage_delete, bpf_sk_storage_get, bpf_sock_map_update,
};
use aya_ebpf::programs::SockOpsContext;
use balancer_common::abi::{
    Address, Backend, BackendId, BackendState, Breaker, Connection, Counts, Disowned, EventKind,
    Health, ListenRule, MAX_CONNECTIONS_OF_CANDIDATE, MEMBER_WORDS, SlotState, ticks,
};
use balancer_common::decision::admission::{is_expected, is_held, pack_handshake};
use balancer_common::decision::health::{
    Ending, FAILS_WITHIN, Failed, after_failure, is_alone, pack_entered, pack_open, pack_spoke,
};

use super::claim::{NONE, claim, is_policy_needed, is_strangers};
use super::steer::is_exempt;
use super::{keepalive, placed};
use crate::events;
use crate::kernel::atomic;
use crate::kernel::context::context;
use crate::kernel::shared::shared;
use crate::kernel::socket::{TcpSocket, current_task};
use crate::maps::{
    BACKENDS, CONNECTION, COUNTS, DISOWNED, HEALTH, LISTEN_RULES, LISTENERS, MEMBERS,
    SERVICE_STATE, TOTALS,
};

// Operations and states: include/uapi/linux/bpf.h, include/net/tcp_states.h.
const CONNECTS: u32 = 3;
const PASSIVE_ESTABLISHED: u32 = 5;
const RETRANSMITS: u32 = 8;
const STATE_CHANGED: u32 = 10;
const LISTENED: u32 = 11;
pub const STATE_CB: u32 = 1 << 2;
pub const ESTABLISHED: u32 = 1;
const LISTEN: u32 = 10;
const AF_INET: u32 = 2;
/// `BPF_SK_STORAGE_GET_F_CREATE`.
pub const CREATE: u64 = 1;

#[inline(always)]
pub fn run(ctx: &SockOpsContext) {
    match ctx.op() {
        STATE_CHANGED => state_changed(ctx),
        PASSIVE_ESTABLISHED => accepted(ctx),
        LISTENED => listened(ctx),
        CONNECTS => placed::connecting(ctx),
        RETRANSMITS => placed::sent_again(ctx),
        _ => {}
    }
}

/// A child of a listener of ours: ask for its state changes, next to what other programs ask for.
/// One that won't be counted takes no memory for it.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let Some(connection) = storage(ctx) else {
        return;
    };
    if account_is_counted(connection.id().pack()) != 0 {
        watch_states(ctx);
        keepalive::turn_on(ctx, connection.id());
        return;
    }
    let socket = socket(ctx);
    if !socket.is_null() {
        let map = (&raw const CONNECTION).cast_mut().cast();
        // SAFETY: a map and a live socket, which has a storage.
        unsafe { bpf_sk_storage_delete(map, socket.cast()) };
    }
}

/// Whether one more connection of a packed [`BackendId`] is counted: the slot is still its own, and
/// it is not a stranger with very many, or one that the daemon has given up. Global like
/// [`account_rule`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account_is_counted(id: u64) -> u32 {
    let id = BackendId::unpack(id);
    let (Some(backend), Some(counts)) = (BACKENDS.get_ptr(id.slot), COUNTS.get_ptr(id.slot)) else {
        return 0;
    };
    let state = slot_state(backend);
    let is_counted = state.generation() == id.generation
        && (!is_strangers(backend, id.slot)
            || ((shared!(counts, established) as u32) < MAX_CONNECTIONS_OF_CANDIDATE
                && !is_disowned(id.slot, state)));
    u32::from(is_counted)
}

/// Whether the daemon has found that the backend of a slot belongs to nobody.
#[inline(always)]
fn is_disowned(slot: u32, state: SlotState) -> bool {
    let Some(disowned) = DISOWNED.get_ptr(slot) else {
        return false;
    };
    let generation = shared!(disowned, generation);
    Disowned { generation }.is_for(state)
}

#[inline(always)]
fn watch_states(ctx: &SockOpsContext) {
    let _ = ctx.set_cb_flags((ctx.cb_flags() | STATE_CB) as i32);
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    let (old, new) = (ctx.arg(0), ctx.arg(1));
    // A client's. Should it have listened before: that is over.
    if placed::state_changed(ctx, old, new) {
        return;
    }
    let Some(connection) = storage(ctx) else {
        return;
    };
    if old == LISTEN {
        closed(connection);
    } else if new == ESTABLISHED {
        entered(ctx, connection);
    } else if old == ESTABLISHED {
        left(ctx, connection, new);
    }
}

/// What a counted connection adds to the word of its slot.
#[inline(always)]
fn share(class: u16) -> u64 {
    if class == Connection::EXEMPT {
        Counts::ONE_EXEMPT
    } else {
        1
    }
}

#[inline(always)]
fn entered(ctx: &SockOpsContext, connection: &mut Connection) {
    let slot = u32::from(connection.slot);
    let (Some(backend), Some(counts)) = (BACKENDS.get_ptr(slot), COUNTS.get_ptr_mut(slot)) else {
        return;
    };
    if slot_state(backend).generation() != connection.generation {
        return;
    }
    let class = class_of(shared!(backend, service), &remote(ctx));
    let now = now();
    connection.enter(class, now);
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { atomic::add(&raw mut (*counts).established, share(class)) };
    // Its listener has closed meanwhile, and the slot was given away: see `account_free`.
    if slot_state(backend).generation() != connection.generation {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::add(&raw mut (*counts).established, share(class).wrapping_neg()) };
        connection.class = Connection::UNCOUNTED;
        return;
    }
    // After the count: who reads it before the count is read never misses an entry that the count
    // has.
    if let Some(totals) = TOTALS.get_ptr_mut(slot) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::add(&raw mut (*totals).entered, 1) };
    }
    proves(slot, now);
    // It is no longer expected. Counted first, so that it is never missing from both.
    if is_expected(shared!(counts, expected)) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::add(&raw mut (*counts).expected, u64::MAX) };
    }
    // Exempt ones are let in whatever the room: they say nothing of those that hold it.
    if class == Connection::COUNTED {
        completed(ctx, counts, now);
    }
}

/// A connection was established: where a trial was awaited, it is the one.
#[inline(always)]
fn proves(slot: u32, now: u64) {
    let Some(health) = HEALTH.get_ptr_mut(slot) else {
        return;
    };
    let word = shared!(health, failing);
    if let Some(proving) = pack_entered(word, now) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::replace(&raw mut (*health).failing, word, proving) };
    }
}

/// How a connection from there counts. A function of its own: the key would crowd the caller's
/// stack.
#[inline(never)]
fn class_of(service: u16, source: &Address) -> u16 {
    if is_exempt(service, source) {
        Connection::EXEMPT
    } else {
        Connection::COUNTED
    }
}

/// A handshake was completed: those under way are no flood, and this is how long one takes.
#[inline(always)]
fn completed(ctx: &SockOpsContext, counts: *mut Counts, now: u64) {
    let flood = shared!(counts, flood);
    if is_held(flood, now) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::replace(&raw mut (*counts).flood, flood, 0) };
    }
    // Eighths of a microsecond; 0 where the SYN-ACK was sent again or was a cookie, and nothing was
    // measured.
    let ops: *const bpf_sock_ops = ctx.ops;
    let eighths = context!(ops, srtt_us);
    let word = shared!(counts, handshake);
    if eighths != 0
        && let Some(word) = pack_handshake(word, eighths >> 3, now)
    {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::store(&raw mut (*counts).handshake, word) };
    }
}

#[inline(always)]
fn left(ctx: &SockOpsContext, connection: &mut Connection, state: u32) {
    let slot = u32::from(connection.slot);
    let (Some(backend), Some(counts)) = (BACKENDS.get_ptr(slot), COUNTS.get_ptr_mut(slot)) else {
        return;
    };
    let class = connection.class();
    let counted = class == Connection::COUNTED || class == Connection::EXEMPT;
    if !counted || slot_state(backend).generation() != connection.generation {
        return;
    }
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { atomic::add(&raw mut (*counts).established, share(class).wrapping_neg()) };
    let age = connection.age(now());
    connection.class = Connection::UNCOUNTED;
    if has_failed(ctx, shared!(backend, service), slot, state, age) {
        account_failed(slot);
    }
}

/// Whether a connection of a slot that left ESTABLISHED to a state says that its server fails.
#[inline(always)]
fn has_failed(ctx: &SockOpsContext, service: u16, slot: u32, state: u32, age: u64) -> bool {
    let socket = socket(ctx);
    if age >= FAILS_WITHIN || socket.is_null() {
        return false;
    }
    let Some(tcp) = TcpSocket::of(socket) else {
        return false;
    };
    let ops: *const bpf_sock_ops = ctx.ops;
    let unacked = context!(ops, snd_nxt).wrapping_sub(context!(ops, snd_una));
    let (error, shutdown) = tcp.end();
    let ending = Ending {
        state,
        error,
        shutdown,
        sent: context!(ops, bytes_acked) + u64::from(unacked),
        received: context!(ops, bytes_received),
        age,
    };
    ending.is_failure() && (!ending.has_spoken() || spoke_alone(service, slot))
}

/// Notes that a backend failed though it had sent something; whether no other of its service does.
#[inline(always)]
fn spoke_alone(service: u16, slot: u32) -> bool {
    let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(service)) else {
        return false;
    };
    let (word, now) = (shared!(state, spoke), now());
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { atomic::store(&raw mut (*state).spoke, pack_spoke(slot, now)) };
    is_alone(word, slot, now)
}

/// The time, in ticks.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    ticks(unsafe { bpf_ktime_get_ns() })
}

/// Counts a failed connection of a slot, and opens its breaker where they are several; says whether
/// it did. One that another CPU is faster than is not counted: others will fail. Global like
/// [`account_rule`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account_failed(slot: u32) -> u32 {
    let (Some(health), Some(totals)) = (HEALTH.get_ptr_mut(slot), TOTALS.get_ptr(slot)) else {
        return 0;
    };
    let now = now();
    let seen = Health {
        failures: shared!(health, failures),
        failing: shared!(health, failing),
        ..Health::UNKNOWN
    };
    match after_failure(&seen, shared!(totals, entered), now) {
        Failed::Late => 0,
        Failed::Counts(word) => {
            // SAFETY: the pointer is to an element of a map, which lives as long as the program.
            unsafe { atomic::replace(&raw mut (*health).failures, seen.failures, word) };
            0
        }
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        Failed::Opens => u32::from(unsafe { open(health, &seen, now) }),
    }
}

/// Opens the breaker; false if another CPU was faster.
///
/// # Safety
/// `health` points to an element of HEALTH.
#[inline(always)]
unsafe fn open(health: *mut Health, seen: &Health, now: u64) -> bool {
    // SAFETY: by this function's contract. Other CPUs change the words atomically, too.
    unsafe {
        if matches!(seen.breaker(), Breaker::Closed) {
            atomic::store(&raw mut (*health).failing_since, now);
        }
        atomic::store(&raw mut (*health).failures, 0);
        let word = pack_open(seen.failing, now);
        atomic::replace(&raw mut (*health).failing, seen.failing, word)
    }
}

#[inline(always)]
fn closed(connection: &Connection) {
    let slot = u32::from(connection.slot);
    let Some(backend) = BACKENDS.get_ptr_mut(slot) else {
        return;
    };
    let state = slot_state(backend);
    if state.generation() != connection.generation
        || !state.is(BackendState::Active)
        || !change_state(backend, state, BackendState::Closed)
    {
        return;
    }
    change_membership(shared!(backend, service), slot, false);
    events::listener(EventKind::ListenerDown, slot, backend);
    account_free(slot, state.with(BackendState::Closed).0);
}

/// Frees a closed slot that nobody needs any more. The daemon frees it where it has a connection,
/// where it may have one that only the daemon counts, and where the daemon has confirmed it. After
/// the bit of its service is gone: the next backend may set it again. Its half-open connections end
/// with the listener. One that completes at this very moment is seen here, or sees the other
/// generation: the generation changes before this looks at the count, and whoever enters looks at
/// the generation after it has counted. Global like [`account_rule`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account_free(slot: u32, closed: u64) -> u32 {
    let closed = SlotState(closed);
    let (Some(backend), Some(counts)) = (BACKENDS.get_ptr_mut(slot), COUNTS.get_ptr(slot)) else {
        return 0;
    };
    let flags = shared!(backend, flags) & (Backend::CANDIDATE | Backend::ADOPTED);
    if flags != Backend::CANDIDATE || is_policy_needed(slot, closed) {
        return 0;
    }
    let next = SlotState::new(closed.generation().wrapping_add(1), BackendState::Claimed);
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    if !unsafe { atomic::replace(&raw mut (*backend).slot_state, closed.0, next.0) } {
        return 0;
    }
    let is_empty = shared!(counts, established) == 0;
    let state = if is_empty {
        next.with(BackendState::Free)
    } else {
        closed
    };
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { atomic::store(&raw mut (*backend).slot_state, state.0) };
    u32::from(is_empty)
}

/// Generation and state of a slot.
#[inline(always)]
pub fn slot_state(backend: *const Backend) -> SlotState {
    SlotState(shared!(backend, slot_state))
}

/// Gives a slot another state where it still has the one given; says whether it had.
#[inline(always)]
pub fn change_state(backend: *mut Backend, from: SlotState, to: BackendState) -> bool {
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { atomic::replace(&raw mut (*backend).slot_state, from.0, from.with(to).0) }
}

#[inline(always)]
fn change_membership(service: u16, slot: u32, member: bool) {
    let Some(members) = MEMBERS.get_ptr_mut(u32::from(service)) else {
        return;
    };
    let bit = 1u64 << (slot & 63);
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    let word = unsafe { &raw mut (*members).words[(slot / 64) as usize & (MEMBER_WORDS - 1)] };
    if member {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::or(word, bit) };
    } else {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::and(word, !bit) };
    }
}

#[inline(always)]
fn listened(ctx: &SockOpsContext) {
    // SAFETY: the context lives as long as the program runs.
    let netns = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    let address = local(ctx);
    let port = ctx.local_port() as u16;
    let Some(rule) = rule_of(netns, address, port) else {
        return;
    };
    if let Some(connection) = storage(ctx)
        && listens_again(ctx, connection, rule.service)
    {
        return;
    }
    let backend = backend_of(ctx, netns, address, port, &rule);
    match claim(netns, &rule) {
        Some(id) => register(ctx, id, backend),
        None => unregistered(EventKind::NoSlot, &backend),
    }
}

/// A listener serves without the balancer: until the daemon has mended that, nobody is refused for
/// its service. A candidate may be anybody's: the daemon finds out whether it counts, and no event
/// tells of it, because there may be any number of them.
#[inline(always)]
fn unregistered(kind: EventKind, backend: &Backend) {
    let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(backend.service)) else {
        return;
    };
    if backend.flags & Backend::CANDIDATE != 0 {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::add(&raw mut (*state).turned_away, 1) };
        return;
    }
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { atomic::add(&raw mut (*state).unregistered, 1) };
    events::listener(kind, u32::MAX, backend);
}

/// The rule for a listener: the more specific one wins.
#[inline(always)]
fn rule_of(netns: u64, address: Address, port: u16) -> Option<ListenRule> {
    let packed = account_rule(netns, &address, u32::from(port));
    (packed != NONE).then_some(ListenRule {
        service: packed as u16,
        flags: (packed >> 16) as u16,
        weight: (packed >> 32) as u32,
    })
}

/// A packed rule, or [`NONE`]. Global functions are looked at by the verifier once, by themselves,
/// and not on every path that leads to them.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account_rule(netns: u64, address: *const Address, port: u32) -> u64 {
    // SAFETY: for an argument of a global function the verifier takes null or a pointer to the
    // whole structure. Nobody else has it meanwhile.
    let Some(address) = (unsafe { address.as_ref() }) else {
        return NONE;
    };
    let read = |key| {
        let rule = LISTEN_RULES.get_ptr(key)?;
        Some(ListenRule {
            service: shared!(rule, service),
            flags: shared!(rule, flags),
            weight: shared!(rule, weight),
        })
    };
    match ListenRule::most_specific(netns, *address, port as u16, read) {
        Some(rule) => {
            u64::from(rule.weight) << 32 | u64::from(rule.flags) << 16 | u64::from(rule.service)
        }
        None => NONE,
    }
}

/// Publishes a socket that was shut down and listens again: its slot is still its own, with the
/// connections that it has. The end of an adopted listener went unseen: its slot is active still.
/// False where the slot is another's.
#[inline(always)]
fn listens_again(ctx: &SockOpsContext, connection: &Connection, service: u16) -> bool {
    let slot = u32::from(connection.slot);
    let Some(backend) = BACKENDS.get_ptr_mut(slot) else {
        return false;
    };
    let state = slot_state(backend);
    if state.generation() != connection.generation
        || !(state.is(BackendState::Closed) || state.is(BackendState::Active))
        || shared!(backend, service) != service
        || !change_state(backend, state, BackendState::Claimed)
    {
        return false;
    }
    publish(ctx, connection.id(), backend);
    true
}

#[inline(always)]
fn backend_of(
    ctx: &SockOpsContext,
    netns: u64,
    address: Address,
    port: u16,
    rule: &ListenRule,
) -> Backend {
    let (pid, tid) = current_task();
    let mut backend = Backend {
        netns,
        address,
        port,
        service: rule.service,
        weight: rule.weight,
        pid,
        tid,
        ..Backend::EMPTY
    };
    if rule.flags & ListenRule::CANDIDATE != 0 {
        backend.flags |= Backend::CANDIDATE;
    }
    if ctx.family() != AF_INET {
        backend.flags |= Backend::V6;
    }
    let socket: *mut bpf_sock = socket(ctx);
    if !socket.is_null() {
        backend.device = context!(socket, bound_dev_if);
        if let Some(tcp) = TcpSocket::of(socket) {
            backend.uid = tcp.uid();
            backend.cgroup = tcp.cgroup();
            if backend.flags & Backend::V6 != 0 && tcp.is_v6_only() {
                backend.flags |= Backend::V6_ONLY;
            }
        }
    }
    backend
}

#[inline(always)]
fn register(ctx: &SockOpsContext, id: BackendId, mut backend: Backend) {
    let Some(place) = BACKENDS.get_ptr_mut(id.slot) else {
        return;
    };
    let mut value = Connection {
        slot: id.slot as u16,
        class: Connection::UNCOUNTED,
        generation: id.generation,
    };
    let socket = socket(ctx);
    let stored = if socket.is_null() {
        core::ptr::null_mut()
    } else {
        // SAFETY: a map, a live socket, and no value or one of its size.
        unsafe {
            bpf_sk_storage_get(
                (&raw const CONNECTION).cast_mut().cast(),
                socket.cast(),
                (&raw mut value).cast(),
                CREATE,
            )
        }
        .cast::<Connection>()
    };
    if stored.is_null() {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe {
            atomic::store(
                &raw mut (*place).slot_state,
                SlotState::new(id.generation, BackendState::Free).0,
            )
        };
        unregistered(EventKind::NoStorage, &backend);
        return;
    }
    // A socket whose old slot was given away has a storage already, with the old value.
    // SAFETY: it is the socket's own storage, which lives as long as the socket.
    unsafe { *stored = value };
    backend.slot_state = SlotState::new(id.generation, BackendState::Claimed).0;
    // SAFETY: this CPU has claimed the slot: nobody else writes its element. Who reads it meanwhile
    // looks at its state first, and any bytes are a value.
    unsafe { *place = backend };
    if let Some(counts) = COUNTS.get_ptr_mut(id.slot) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe {
            atomic::store(&raw mut (*counts).expected, 0);
            atomic::store(&raw mut (*counts).full, 0);
            atomic::store(&raw mut (*counts).cookies, 0);
            atomic::store(&raw mut (*counts).flood, 0);
            atomic::store(&raw mut (*counts).handshake, 0);
        }
    }
    forget_health(id.slot);
    publish(ctx, id, place);
}

/// A new backend has the slot: nothing was seen of its health.
#[inline(always)]
fn forget_health(slot: u32) {
    let Some(health) = HEALTH.get_ptr_mut(slot) else {
        return;
    };
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe {
        atomic::store(&raw mut (*health).queue, 0);
        atomic::store(&raw mut (*health).stalled, 0);
        atomic::store(&raw mut (*health).failures, 0);
        atomic::store(&raw mut (*health).failing, 0);
        atomic::store(&raw mut (*health).hung, 0);
    }
}

/// Makes a claimed slot one that SYNs may go to.
#[inline(always)]
fn publish(ctx: &SockOpsContext, id: BackendId, place: *mut Backend) {
    let mut key = id.slot;
    // SAFETY: the context, a map and a key of its size, on the stack.
    let error = unsafe {
        bpf_sock_map_update(
            ctx.ops,
            (&raw const LISTENERS).cast_mut().cast(),
            (&raw mut key).cast(),
            0,
        )
    };
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe {
        if error == 0 {
            (*place).flags &= !Backend::UNSTEERABLE;
        } else {
            (*place).flags |= Backend::UNSTEERABLE;
        }
        (*place).map_error = error.wrapping_neg() as u32;
        atomic::store(
            &raw mut (*place).slot_state,
            SlotState::new(id.generation, BackendState::Active).0,
        );
    }
    watch_states(ctx);
    change_membership(shared!(place, service), id.slot, true);
    events::listener(EventKind::ListenerUp, id.slot, place);
}

/// The socket that the program runs for; null where the kernel has only a request for one.
#[inline(always)]
pub fn socket(ctx: &SockOpsContext) -> *mut bpf_sock {
    // SAFETY: the context lives as long as the program runs.
    unsafe { (*ctx.ops).__bindgen_anon_2.sk }
}

/// The storage of the socket, inherited from its listener.
#[inline(always)]
fn storage<'a>(ctx: &SockOpsContext) -> Option<&'a mut Connection> {
    let socket = socket(ctx);
    if socket.is_null() {
        return None;
    }
    let map = (&raw const CONNECTION).cast_mut().cast();
    // SAFETY: a map, a live socket, and no value or one of its size.
    let value = unsafe { bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), 0) };
    // SAFETY: null, or the socket's own storage, which lives as long as the socket.
    unsafe { value.cast::<Connection>().as_mut() }
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> Address {
    let ops: *const bpf_sock_ops = ctx.ops;
    let address = either(ctx, context!(ops, local_ip4), context!(ops, local_ip6));
    if address.is_any() {
        Address::ANY
    } else {
        address
    }
}

/// The other end's address.
#[inline(always)]
pub fn remote(ctx: &SockOpsContext) -> Address {
    let ops: *const bpf_sock_ops = ctx.ops;
    either(ctx, context!(ops, remote_ip4), context!(ops, remote_ip6))
}

#[inline(always)]
fn either(ctx: &SockOpsContext, v4: u32, v6: [u32; 4]) -> Address {
    if ctx.family() == AF_INET {
        Address::from_v4_be(v4)
    } else {
        Address(v6)
    }
}
