//! sock_ops: registers the listeners of services and counts their established connections.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_ops};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_loop, bpf_sk_storage_get, bpf_sock_map_update,
};
use aya_ebpf::programs::SockOpsContext;
use balancer_common::abi::{
    Address, Backend, BackendId, BackendState, Connection, Counts, EventKind, ListenRule,
    MAX_MEMBERS, MAX_SLOTS, MEMBER_WORDS, SlotState, ticks,
};
use balancer_common::decision::admission::{is_expected, is_held, pack_handshake};
use core::ffi::c_void;
use core::ptr::read_volatile;

use super::steer::is_exempt;
use crate::events;
use crate::kernel::atomic;
use crate::kernel::context::context;
use crate::kernel::shared::shared;
use crate::kernel::socket::{TcpSocket, current_task};
use crate::maps::{
    BACKENDS, CONNECTION, COUNTS, LISTEN_RULES, LISTENERS, MEMBERS, SERVICE_STATE, TOTALS,
};

// Operations and states: include/uapi/linux/bpf.h, include/net/tcp_states.h.
const PASSIVE_ESTABLISHED: u32 = 5;
const STATE_CHANGED: u32 = 10;
const LISTENED: u32 = 11;
const STATE_CB: u32 = 1 << 2;
const ESTABLISHED: u32 = 1;
const LISTEN: u32 = 10;
const AF_INET: u32 = 2;
/// `BPF_SK_STORAGE_GET_F_CREATE`.
const CREATE: u64 = 1;
/// Compare-and-swaps that may be lost to other CPUs before a listener is given up.
const CLAIMS: u32 = 4;

#[inline(always)]
pub fn run(ctx: &SockOpsContext) {
    match ctx.op() {
        STATE_CHANGED => state_changed(ctx),
        PASSIVE_ESTABLISHED => accepted(ctx),
        LISTENED => listened(ctx),
        _ => {}
    }
}

/// A child of a listener of ours: ask for its state changes, next to what other programs ask for.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    if storage(ctx).is_some() {
        watch_states(ctx);
    }
}

#[inline(always)]
fn watch_states(ctx: &SockOpsContext) {
    let _ = ctx.set_cb_flags((ctx.cb_flags() | STATE_CB) as i32);
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    let (old, new) = (ctx.arg(0), ctx.arg(1));
    let Some(connection) = storage(ctx) else {
        return;
    };
    if old == LISTEN {
        closed(connection);
    } else if new == ESTABLISHED {
        entered(ctx, connection);
    } else if old == ESTABLISHED {
        left(connection);
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
    connection.class = class;
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { atomic::add(&raw mut (*counts).established, share(class)) };
    // After the count: who reads it before the count is read never misses an entry that the count
    // has.
    if let Some(totals) = TOTALS.get_ptr_mut(slot) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::add(&raw mut (*totals).entered, 1) };
    }
    // It is no longer expected. Counted first, so that it is never missing from both.
    if is_expected(shared!(counts, expected)) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::add(&raw mut (*counts).expected, u64::MAX) };
    }
    // Exempt ones are let in whatever the room: they say nothing of those that hold it.
    if class == Connection::COUNTED {
        completed(ctx, counts);
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
fn completed(ctx: &SockOpsContext, counts: *mut Counts) {
    let stalled = shared!(counts, stalled);
    // SAFETY: a helper without arguments.
    let now = ticks(unsafe { bpf_ktime_get_ns() });
    if is_held(stalled, now) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::replace(&raw mut (*counts).stalled, stalled, 0) };
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
fn left(connection: &mut Connection) {
    let slot = u32::from(connection.slot);
    let (Some(backend), Some(counts)) = (BACKENDS.get_ptr(slot), COUNTS.get_ptr_mut(slot)) else {
        return;
    };
    let counted = connection.class == Connection::COUNTED || connection.class == Connection::EXEMPT;
    if !counted || slot_state(backend).generation() != connection.generation {
        return;
    }
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe {
        atomic::add(
            &raw mut (*counts).established,
            share(connection.class).wrapping_neg(),
        )
    };
    connection.class = Connection::UNCOUNTED;
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
}

/// Generation and state of a slot.
#[inline(always)]
fn slot_state(backend: *const Backend) -> SlotState {
    SlotState(shared!(backend, slot_state))
}

/// Gives a slot another state where it still has the one given; says whether it had.
#[inline(always)]
fn change_state(backend: *mut Backend, from: SlotState, to: BackendState) -> bool {
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
    match claim(rule.service) {
        Some(id) => register(ctx, id, backend),
        None => unregistered(EventKind::NoSlot, &backend),
    }
}

/// A listener serves without the balancer: until the daemon has mended that, nobody is refused for
/// its service.
#[inline(always)]
fn unregistered(kind: EventKind, backend: &Backend) {
    if let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(backend.service)) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::add(&raw mut (*state).unregistered, 1) };
    }
    events::listener(kind, u32::MAX, backend);
}

/// No rule, no slot.
const NONE: u64 = u64::MAX;

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
            if backend.flags & Backend::V6 != 0 && tcp.is_v6_only() {
                backend.flags |= Backend::V6_ONLY;
            }
        }
    }
    backend
}

/// Claims the first free slot.
#[inline(always)]
fn claim(service: u16) -> Option<BackendId> {
    let packed = account_claim(u32::from(service));
    (packed != NONE).then_some(BackendId::unpack(packed))
}

/// A packed [`BackendId`], or [`NONE`]. Global like [`account_rule`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account_claim(service: u32) -> u64 {
    if is_crowded(service as u16) {
        return NONE;
    }
    for _ in 0..CLAIMS {
        let mut found = NONE;
        let visit = search_free as unsafe extern "C" fn(u32, *mut c_void) -> i64;
        // SAFETY: the callback gets a pointer to `found`, which outlives the loop.
        unsafe {
            bpf_loop(
                MAX_SLOTS as u32,
                visit as *mut c_void,
                (&raw mut found).cast(),
                0,
            )
        };
        // SAFETY: a variable of this function. Volatile, because the callback has written it.
        let slot = unsafe { read_volatile(&raw const found) };
        let Some(place) = BACKENDS.get_ptr_mut(slot as u32) else {
            return NONE;
        };
        let state = slot_state(place);
        if state.is(BackendState::Free) && change_state(place, state, BackendState::Claimed) {
            let id = BackendId {
                slot: slot as u32,
                generation: state.generation(),
            };
            return id.pack();
        }
    }
    NONE
}

/// Whether a service has all the backends that it may have.
#[inline(always)]
fn is_crowded(service: u16) -> bool {
    let Some(members) = MEMBERS.get_ptr(u32::from(service)) else {
        return true;
    };
    let mut count = 0;
    let mut word = 0;
    while word < MEMBER_WORDS {
        count += shared!(members, words[word]).count_ones();
        word += 1;
    }
    count >= MAX_MEMBERS as u32
}

/// The callback of `bpf_loop` over all slots; 1 ends the loop.
///
/// # Safety
/// `found` points to a word that nobody else uses.
unsafe extern "C" fn search_free(slot: u32, found: *mut c_void) -> i64 {
    let Some(backend) = BACKENDS.get_ptr(slot) else {
        return 1;
    };
    if !slot_state(backend).is(BackendState::Free) {
        return 0;
    }
    // SAFETY: by this function's contract.
    unsafe { *found.cast::<u64>() = u64::from(slot) };
    1
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
            atomic::store(&raw mut (*counts).stalled, 0);
            atomic::store(&raw mut (*counts).handshake, 0);
        }
    }
    publish(ctx, id, place);
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
fn socket(ctx: &SockOpsContext) -> *mut bpf_sock {
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

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Address {
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
