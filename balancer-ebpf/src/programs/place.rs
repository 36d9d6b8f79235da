//! cgroup_sock_addr: sends a client's `connect()` to a frontend on to the endpoint that should
//! have it, and has `getpeername()` tell the client what it connected to.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_loop, bpf_sk_lookup_tcp, bpf_sk_release,
};
use aya_ebpf::programs::SockAddrContext;
use balancer_common::abi::{
    Address, Endpoint, EndpointGroup, EndpointGroupState, Frontend, FrontendKey, MAX_ENDPOINTS,
    MEMBER_WORDS, Members, PLACE_REASON_SLOTS, Phase, Placed, PlacedSocket, ticks,
};
use balancer_common::decision::cursor::{Cursor, Step};
use balancer_common::opaque;
use balancer_common::place::avoidance::is_avoided;
use balancer_common::place::choice::{Draw, OWN_ONLY_NS, Seen, Sum};
use balancer_common::place::{PlaceReason, SIDECAR_PORTS};
use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::{read_volatile, write_volatile};

use super::placed;
use super::steer::heartbeat;
use crate::kernel::atomic;
use crate::kernel::context::context;
use crate::kernel::shared::shared;
use crate::maps::{
    ENDPOINT_GROUP_STATE, ENDPOINT_GROUPS, ENDPOINT_MEMBERS, ENDPOINTS, EXCLUDED_NETNS, FRONTENDS,
    PLACE_VERDICTS, PLACED, PUBLISHED,
};

// include/linux/net.h, include/uapi/linux/in.h.
const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;
/// `BPF_F_CURRENT_NETNS`: a signed 32-bit number, in 64 bits.
const CURRENT_NETNS: u64 = u64::MAX;

/// `connect()` of an IPv4 socket.
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) {
    let to = ctx.sock_addr;
    let address = Address::from_v4_be(context!(to, user_ip4));
    place(to, address, |there, port| write4(to, &there, port));
}

/// `connect()` of an IPv6 socket, to an IPv4 address, too.
#[inline(always)]
pub fn connect6(ctx: &SockAddrContext) {
    let to = ctx.sock_addr;
    let address = Address(context!(to, user_ip6));
    place(to, address, |there, port| write6(to, &there, port));
}

#[inline(always)]
fn write4(to: *mut bpf_sock_addr, address: &Address, port: u16) {
    // SAFETY: fields of a live context, which the verifier lets this program write.
    unsafe {
        write_volatile(&raw mut (*to).user_ip4, address.0[3]);
        write_volatile(&raw mut (*to).user_port, u32::from(port.to_be()));
    }
}

#[inline(always)]
fn write6(to: *mut bpf_sock_addr, address: &Address, port: u16) {
    let [first, second, third, fourth] = address.0;
    // SAFETY: fields of a live context, which the verifier lets this program write.
    unsafe {
        write_volatile(&raw mut (*to).user_ip6[0], first);
        write_volatile(&raw mut (*to).user_ip6[1], second);
        write_volatile(&raw mut (*to).user_ip6[2], third);
        write_volatile(&raw mut (*to).user_ip6[3], fourth);
        write_volatile(&raw mut (*to).user_port, u32::from(port.to_be()));
    }
}

#[inline(always)]
fn port_of(to: *const bpf_sock_addr) -> u16 {
    u16::from_be(context!(to, user_port) as u16)
}

#[inline(always)]
fn socket_of(to: *const bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: the context lives as long as the program runs.
    unsafe { read_volatile(&raw const (*to).__bindgen_anon_1.sk) }
}

/// Has a connect to that address, where it is a frontend's, go to another: `write` puts it into the
/// context.
#[inline(always)]
fn place(to: *mut bpf_sock_addr, address: Address, write: impl FnOnce(Address, u16)) {
    let key = FrontendKey::new(address, port_of(to));
    let Some(frontend) = FRONTENDS.get_ptr(&key) else {
        return;
    };
    let (group, flags) = (shared!(frontend, group), shared!(frontend, flags));
    // SAFETY: a helper without arguments.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    if let Some(reason) = leave_alone(to, &key.address, group, flags, now_ns) {
        return count(group, reason);
    }
    let is_v6 = u32::from(!key.address.is_v4());
    // Opaque, because the compiler knows what values there are and would leave out the check that
    // the verifier wants.
    let choice = opaque(place_choose(group, is_v6, ticks(now_ns)));
    if choice == NOBODY {
        return count(group, PlaceReason::NoEndpoint);
    }
    if flags & Frontend::DRY_RUN != 0 {
        return count(group, PlaceReason::DryRun);
    }
    let Some(endpoint) = ENDPOINTS.get_ptr(choice & (MAX_ENDPOINTS as u32 - 1)) else {
        return;
    };
    if !note(to, &key, choice, endpoint) {
        return count(group, PlaceReason::Error);
    }
    let address = if key.address.is_v4() {
        shared!(endpoint, v4 as [u64; 2])
    } else {
        shared!(endpoint, v6 as [u64; 2])
    };
    write(Address::of_words(address), shared!(endpoint, port) as u16);
    if choice & ON_AVOIDED == 0 {
        count(group, PlaceReason::Placed);
    } else {
        count(group, PlaceReason::PlacedOnAvoided);
    }
}

/// Why a connect to a frontend is left as it is whatever endpoints there are.
#[inline(always)]
fn leave_alone(
    to: *mut bpf_sock_addr,
    address: &Address,
    group: u32,
    flags: u32,
    now_ns: u64,
) -> Option<PlaceReason> {
    let protocol = context!(to, protocol);
    let is_tcp = protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
    if context!(to, type_) != SOCK_STREAM || !is_tcp {
        return Some(PlaceReason::NotTcp);
    }
    if heartbeat().is_none_or(|beat| beat.is_stale(now_ns)) {
        return Some(PlaceReason::Stale);
    }
    let Some(known) = ENDPOINT_GROUPS.get_ptr(group) else {
        return Some(PlaceReason::Unknown);
    };
    if shared!(known, known_until_ns) < now_ns {
        return Some(PlaceReason::Unknown);
    }
    // SAFETY: the context lives as long as the program runs.
    let netns = unsafe { bpf_get_netns_cookie(to.cast()) };
    if let Some(excluded) = EXCLUDED_NETNS.get_ptr(netns) {
        // SAFETY: the pointer is to a value of a map, which lives as long as the program runs.
        let excluded = unsafe { read_volatile(excluded) };
        let reason = PlaceReason::of_excluded(excluded, flags);
        if reason.is_some() {
            return reason;
        }
    }
    has_sidecar(to, address).then_some(PlaceReason::Sidecar)
}

/// Whether something captures what the network namespace sends out, to choose a destination itself.
#[inline(always)]
fn has_sidecar(to: *mut bpf_sock_addr, address: &Address) -> bool {
    if address.is_v4() {
        listens4(to, SIDECAR_PORTS[0]) || listens4(to, SIDECAR_PORTS[1])
    } else {
        listens6(to, SIDECAR_PORTS[0]) || listens6(to, SIDECAR_PORTS[1])
    }
}

/// Whether somebody listens on a port of 127.0.0.1.
#[inline(always)]
fn listens4(to: *mut bpf_sock_addr, port: u16) -> bool {
    let local = 0x7f00_0001_u32.to_be();
    // `bpf_sock_tuple.ipv4`: source, destination, and both ports.
    listens(to, &mut [local, local, destination(port)])
}

/// Whether somebody listens on a port of ::1.
#[inline(always)]
fn listens6(to: *mut bpf_sock_addr, port: u16) -> bool {
    let last = 1_u32.to_be();
    // `bpf_sock_tuple.ipv6`: source, destination, and both ports.
    listens(
        to,
        &mut [
            opaque(0),
            0,
            0,
            last,
            opaque(0),
            0,
            0,
            last,
            destination(port),
        ],
    )
}

/// The word of a socket tuple that has the source port, 0 here, and the destination port.
#[inline(always)]
fn destination(port: u16) -> u32 {
    u32::from(port).to_be()
}

#[inline(always)]
fn listens<const WORDS: usize>(to: *mut bpf_sock_addr, tuple: &mut [u32; WORDS]) -> bool {
    let size = (WORDS * size_of::<u32>()) as u32;
    // SAFETY: the context, and a tuple of the size that is given.
    let found =
        unsafe { bpf_sk_lookup_tcp(to.cast(), tuple.as_mut_ptr().cast(), size, CURRENT_NETNS, 0) };
    if found.is_null() {
        return false;
    }
    // SAFETY: the reference that the look-up took, given back once.
    unsafe { bpf_sk_release(found.cast()) };
    true
}

/// Notes at the socket where it is sent; false without memory for that: what is not noted is not
/// counted, and must not be placed.
#[inline(always)]
fn note(to: *mut bpf_sock_addr, key: &FrontendKey, choice: u32, endpoint: *const Endpoint) -> bool {
    let flags = if choice & ON_AVOIDED == 0 {
        0
    } else {
        PlacedSocket::ON_AVOIDED
    };
    let placed = PlacedSocket {
        endpoint: (choice & (MAX_ENDPOINTS as u32 - 1)) as u16,
        phase: Phase::Chosen as u8,
        flags,
        generation: shared!(endpoint, generation),
        frontend: *key,
    };
    placed::note(socket_of(to), placed)
}

#[inline(always)]
fn count(group: u32, reason: PlaceReason) {
    let index = group * PLACE_REASON_SLOTS as u32 + reason as u32;
    if let Some(counter) = PLACE_VERDICTS.get_ptr_mut(index) {
        // Atomic, because a process that connects can be preempted by another one.
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { atomic::add(counter, 1) };
    }
}

/// What [`place_choose`] says where there is no endpoint.
const NOBODY: u32 = u32::MAX;
/// Beside the endpoint: connects to all of them have failed of late.
const ON_AVOIDED: u32 = 1 << 31;

/// What the two walks over the endpoints of a group need, on the stack of the program.
struct Walk {
    group: u32,
    is_v6: u32,
    now: u64,
    level: u64,
    cursor: Cursor,
    sum: Sum,
    draw: Draw,
}

/// The endpoint of a group that the next connection should go to, with [`ON_AVOIDED`]; or
/// [`NOBODY`]. Global functions are looked at by the verifier once, by themselves, and not on every
/// path that leads to them.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn place_choose(group: u32, is_v6: u32, now: u64) -> u32 {
    let (Some(known), Some(state), Some(members)) = (
        ENDPOINT_GROUPS.get_ptr(group),
        ENDPOINT_GROUP_STATE.get_ptr_mut(group),
        ENDPOINT_MEMBERS.get_ptr(group),
    ) else {
        return NOBODY;
    };
    let level = shared!(known, level);
    let begin = || Cursor::new(|word| load(members, word));
    let mut place = MaybeUninit::<Walk>::uninit();
    let walk = place.as_mut_ptr();
    // SAFETY: a variable of this function, of which every word is written before it is read: first
    // all, because of the bytes between the fields, then each field.
    unsafe {
        clear(walk);
        (*walk).group = group;
        (*walk).is_v6 = is_v6;
        (*walk).now = now;
        (*walk).level = level;
        (*walk).cursor = begin();
        (*walk).sum = Sum::EMPTY;
        (*walk).draw = Draw::new(&Sum::EMPTY, 0, 0, 0);
        walk_over(walk, add);
    }
    // SAFETY: a variable of this function. Volatile, because the callback has written it.
    let sum = unsafe { read_volatile(&raw const (*walk).sum) };
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    let draws = unsafe { atomic::add(&raw mut (*state).draws, 1) };
    let start = shared!(known, start);
    let draw = if goes_by_own(known, state, &sum) {
        Draw::by_own(&sum, start, draws)
    } else {
        Draw::new(&sum, level, start, draws)
    };
    // SAFETY: a variable of this function.
    unsafe {
        (*walk).draw = draw;
        (*walk).cursor = begin();
        walk_over(walk, look);
    }
    // SAFETY: a variable of this function. Volatile, because the callback has written it.
    let draw = unsafe { read_volatile(&raw const (*walk).draw) };
    match draw.chosen() {
        Some(endpoint) if sum.are_all_avoided() => endpoint | ON_AVOIDED,
        Some(endpoint) => endpoint,
        None => NOBODY,
    }
}

/// Whether this node goes by its own counts alone: it has lost most of its connections just now, or
/// a little while ago.
#[inline(always)]
fn goes_by_own(known: *const EndpointGroup, state: *mut EndpointGroupState, sum: &Sum) -> bool {
    // SAFETY: a helper without arguments.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    if sum.has_lost_most(shared!(known, lost_below)) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe { write_volatile(&raw mut (*state).own_only_until_ns, now_ns + OWN_ONLY_NS) };
        return true;
    }
    shared!(state, own_only_until_ns) > now_ns
}

/// A callback of `bpf_loop`. 1 ends the loop.
type Visit = unsafe extern "C" fn(u32, *mut c_void) -> i64;

/// Walks over the endpoints.
///
/// The verifier of Linux 6.1 goes through a callback once, as if it were called once. What it knows
/// of the variable then, such as that a walk begins with no word at hand, it takes to be so for
/// ever, and leaves out the rest of the callback. So it must know of none.
///
/// # Safety
/// `walk` points to a [`Walk`] on the stack of which every byte is written.
#[inline(always)]
unsafe fn walk_over(walk: *mut Walk, visit: Visit) {
    // SAFETY: by this function's contract. The callback gets a pointer to the walk, which outlives
    // the loop.
    unsafe {
        // 0, which neither the compiler nor the verifier can tell.
        let some = bpf_ktime_get_ns();
        let zero = opaque(some) ^ opaque(some);
        // Volatile, so that the compiler leaves none out.
        each_word(walk, |word| {
            write_volatile(word, read_volatile(word) ^ zero)
        });
        bpf_loop(Cursor::STEPS, visit as *mut c_void, walk.cast(), 0)
    };
}

/// Writes zeros over a walk.
///
/// # Safety
/// `walk` points to a [`Walk`] on the stack.
#[inline(always)]
unsafe fn clear(walk: *mut Walk) {
    // SAFETY: by this function's contract. Volatile, so that the compiler leaves none out.
    each_word(walk, |word| unsafe { write_volatile(word, 0) });
}

/// Does something with a pointer to each word of a walk.
#[inline(always)]
fn each_word(walk: *mut Walk, change: impl Fn(*mut u64)) {
    let words = walk.cast::<u64>();
    let mut index = 0;
    while index < size_of::<Walk>() / size_of::<u64>() {
        change(words.wrapping_add(index));
        index += 1;
    }
}

/// The first walk's.
///
/// # Safety
/// `walk` points to a [`Walk`] that nobody else uses.
unsafe extern "C" fn add(_index: u32, walk: *mut c_void) -> i64 {
    // SAFETY: by this function's contract.
    let walk = unsafe { &mut *walk.cast::<Walk>() };
    step(walk, |walk, _, seen| walk.sum.add(walk.level, seen))
}

/// The second walk's.
///
/// # Safety
/// `walk` points to a [`Walk`] that nobody else uses.
unsafe extern "C" fn look(_index: u32, walk: *mut c_void) -> i64 {
    // SAFETY: by this function's contract.
    let walk = unsafe { &mut *walk.cast::<Walk>() };
    step(walk, |walk, endpoint, seen| walk.draw.look(endpoint, seen))
}

#[inline(always)]
fn step(walk: &mut Walk, visit: impl FnOnce(&mut Walk, u32, &Seen)) -> i64 {
    let Some(members) = ENDPOINT_MEMBERS.get_ptr(walk.group) else {
        return 1;
    };
    match walk.cursor.step(|word| load(members, word)) {
        Step::End => return 1,
        Step::Nobody => {}
        Step::Member(endpoint) => {
            if let Some(seen) = seen(endpoint, walk.is_v6, walk.now) {
                visit(walk, endpoint, &seen);
            }
        }
    }
    0
}

/// Reads a word of a group's bitmap of endpoints.
#[inline(always)]
fn load(members: *const Members, word: u32) -> u64 {
    shared!(members, words[word as usize & (MEMBER_WORDS - 1)])
}

/// An endpoint as the maps show it; `None` where it has no address of that family.
#[inline(always)]
fn seen(endpoint: u32, is_v6: u32, now: u64) -> Option<Seen> {
    let found = ENDPOINTS.get_ptr(endpoint)?;
    let placed = PLACED.get_ptr(endpoint)?;
    let published = PUBLISHED.get_ptr(endpoint)?;
    let [high, low] = if is_v6 == 0 {
        shared!(found, v4 as [u64; 2])
    } else {
        shared!(found, v6 as [u64; 2])
    };
    if high | low == 0 {
        return None;
    }
    let own =
        Placed::count(shared!(placed, established)) + Placed::count(shared!(placed, in_flight));
    Some(Seen {
        own,
        others: shared!(published, others),
        weight: shared!(found, weight),
        avoided: is_avoided(shared!(placed, avoidance), now),
    })
}

/// `getpeername()` and `accept()` of an IPv4 socket.
#[inline(always)]
pub fn peer4(ctx: &SockAddrContext) {
    let shown = ctx.sock_addr;
    let address = || Address::from_v4_be(context!(shown, user_ip4));
    if let Some(placed) = placed_socket(shown, address) {
        let frontend = &placed.frontend;
        write4(shown, &frontend.address, frontend.port as u16);
    }
}

/// `getpeername()` and `accept()` of an IPv6 socket.
#[inline(always)]
pub fn peer6(ctx: &SockAddrContext) {
    let shown = ctx.sock_addr;
    let address = || Address(context!(shown, user_ip6));
    if let Some(placed) = placed_socket(shown, address) {
        let frontend = &placed.frontend;
        write6(shown, &frontend.address, frontend.port as u16);
    }
}

/// What is noted at a socket that is connected to where it was placed.
#[inline(always)]
fn placed_socket<'a>(
    shown: *mut bpf_sock_addr,
    address: impl FnOnce() -> Address,
) -> Option<&'a PlacedSocket> {
    let placed = placed::noted(socket_of(shown))?;
    // A socket that is counted is the one that was placed. Once it is not counted any more, it may
    // have connected elsewhere.
    let is_counted = !matches!(Phase::from_number(placed.phase), Phase::Chosen);
    (is_counted || placed::is_at(placed, &address(), port_of(shown))).then_some(placed)
}
