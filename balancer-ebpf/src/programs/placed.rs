//! The client's side of sock_ops: counts the connections that were placed, and learns from those
//! that fail.

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get};
use aya_ebpf::programs::SockOpsContext;
use balancer_common::abi::{Address, Endpoint, Phase, Placed, PlacedSocket, ticks};
use balancer_common::place::avoidance::{after_failure, after_success};

use super::account::{CREATE, ESTABLISHED, STATE_CB, remote, socket};
use crate::kernel::atomic;
use crate::kernel::shared::shared;
use crate::kernel::socket::TcpSocket;
use crate::maps::{ENDPOINTS, PLACED, PLACED_SOCKET};

// States and flags: include/net/tcp_states.h, include/uapi/linux/bpf.h.
const SYN_RECV: u32 = 3;
const CLOSE: u32 = 7;
const RTO_CB: u32 = 1;

// include/uapi/asm-generic/errno.h.
const ENETUNREACH: u32 = 101;
const ETIMEDOUT: u32 = 110;
const ECONNREFUSED: u32 = 111;
const EHOSTUNREACH: u32 = 113;

fn map() -> *mut core::ffi::c_void {
    (&raw const PLACED_SOCKET).cast_mut().cast()
}

/// What is noted at a socket that was placed.
#[inline(always)]
pub fn noted<'a>(socket: *mut bpf_sock) -> Option<&'a mut PlacedSocket> {
    if socket.is_null() {
        return None;
    }
    // SAFETY: a map, a live socket, and no value.
    let value = unsafe { bpf_sk_storage_get(map(), socket.cast(), core::ptr::null_mut(), 0) };
    // SAFETY: null, or the socket's own storage, which lives as long as the socket. The kernel
    // holds the socket's lock while it runs this program.
    unsafe { value.cast::<PlacedSocket>().as_mut() }
}

/// Notes at a socket that is about to connect where it goes; false without memory for it. What was
/// counted of its last connection is over: only a socket in state CLOSE connects
/// (`__inet_stream_connect`, net/ipv4/af_inet.c).
#[inline(always)]
pub fn note(socket: *mut bpf_sock, mut placed: PlacedSocket) -> bool {
    if socket.is_null() {
        return false;
    }
    // SAFETY: a map, a live socket, and a value of the map's size.
    let value =
        unsafe { bpf_sk_storage_get(map(), socket.cast(), (&raw mut placed).cast(), CREATE) };
    // SAFETY: null, or the socket's own storage, which lives as long as the socket. The kernel
    // holds the socket's lock while it runs this program.
    let Some(value) = (unsafe { value.cast::<PlacedSocket>().as_mut() }) else {
        return false;
    };
    release(value);
    *value = placed;
    true
}

/// A socket is about to send its SYN: count it where it was placed there.
#[inline(always)]
pub fn connecting(ctx: &SockOpsContext) {
    let Some(noted) = noted(socket(ctx)) else {
        return;
    };
    let port = u32::from_be(ctx.remote_port()) as u16;
    // An earlier connect() came to nothing before its SYN, and this one goes elsewhere.
    if !is_at(noted, &remote(ctx), port) {
        return forget(ctx);
    }
    let Some(placed) = PLACED.get_ptr_mut(u32::from(noted.endpoint)) else {
        return;
    };
    let flags = ctx.cb_flags();
    if ctx
        .set_cb_flags((flags | STATE_CB | RTO_CB) as i32)
        .is_err()
    {
        return;
    }
    release(noted);
    if flags & RTO_CB == 0 {
        noted.flags |= PlacedSocket::WATCHES_RTO;
    }
    noted.phase = Phase::InFlight as u8;
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe {
        atomic::add(&raw mut (*placed).in_flight, 1);
        atomic::add(&raw mut (*placed).total, 1);
    }
}

/// A socket has changed its state; says whether it was a placed one that is counted.
#[inline(always)]
pub fn state_changed(ctx: &SockOpsContext, old: u32, new: u32) -> bool {
    let Some(noted) = noted(socket(ctx)) else {
        return false;
    };
    let is_counted = match Phase::from_number(noted.phase) {
        Phase::Chosen => false,
        Phase::InFlight => {
            in_flight_changed(ctx, noted, new);
            true
        }
        Phase::Established => {
            if old == ESTABLISHED {
                release(noted);
            }
            true
        }
    };
    if new == CLOSE {
        forget(ctx);
    }
    is_counted
}

#[inline(always)]
fn in_flight_changed(ctx: &SockOpsContext, noted: &mut PlacedSocket, new: u32) {
    match new {
        ESTABLISHED => established(ctx, noted),
        // Both ends sent a SYN at once.
        SYN_RECV => {}
        _ => {
            release(noted);
            if noted.flags & PlacedSocket::SENT_AGAIN == 0 && has_failed(ctx) {
                failed(noted);
            }
        }
    }
}

#[inline(always)]
fn established(ctx: &SockOpsContext, noted: &mut PlacedSocket) {
    if noted.flags & PlacedSocket::WATCHES_RTO != 0 {
        noted.flags &= !PlacedSocket::WATCHES_RTO;
        let _ = ctx.set_cb_flags((ctx.cb_flags() & !RTO_CB) as i32);
    }
    let Some(placed) = own(noted) else {
        return;
    };
    // Counted first, so that it is never missing from both.
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { atomic::add(&raw mut (*placed).established, 1) };
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe { take(&raw mut (*placed).in_flight) };
    noted.phase = Phase::Established as u8;
    if noted.flags & PlacedSocket::ON_AVOIDED != 0 {
        let word = shared!(placed, avoidance);
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe {
            atomic::replace(
                &raw mut (*placed).avoidance,
                word,
                after_success(word, now()),
            )
        };
    }
}

/// Whether a SYN came to nothing, and not because the client gave up.
#[inline(always)]
fn has_failed(ctx: &SockOpsContext) -> bool {
    let socket = socket(ctx);
    if socket.is_null() {
        return false;
    }
    let Some(tcp) = TcpSocket::of(socket) else {
        return false;
    };
    let (error, _) = tcp.end();
    matches!(error, ECONNREFUSED | ETIMEDOUT | EHOSTUNREACH | ENETUNREACH)
}

/// A retransmission timer went off. Of a SYN it says that the endpoint may be gone, long before the
/// client gives up.
#[inline(always)]
pub fn sent_again(ctx: &SockOpsContext) {
    let Some(noted) = noted(socket(ctx)) else {
        return;
    };
    let is_news = matches!(Phase::from_number(noted.phase), Phase::InFlight)
        && noted.flags & PlacedSocket::SENT_AGAIN == 0;
    if is_news {
        noted.flags |= PlacedSocket::SENT_AGAIN;
        failed(noted);
    }
}

/// Counts a failure, and has the endpoint avoided. Where another CPU is faster, it has failed
/// there, too.
#[inline(always)]
fn failed(noted: &PlacedSocket) {
    let Some(placed) = own(noted) else {
        return;
    };
    let word = shared!(placed, avoidance);
    let next = after_failure(word, now());
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe {
        atomic::add(&raw mut (*placed).failed, 1);
        if next != word {
            atomic::replace(&raw mut (*placed).avoidance, word, next);
        }
    }
}

/// Takes a socket out of the count that it is in.
#[inline(always)]
fn release(noted: &mut PlacedSocket) {
    let phase = Phase::from_number(noted.phase);
    if matches!(phase, Phase::Chosen) {
        return;
    }
    noted.phase = Phase::Chosen as u8;
    let Some(placed) = own(noted) else {
        return;
    };
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    unsafe {
        if matches!(phase, Phase::InFlight) {
            take(&raw mut (*placed).in_flight);
        } else {
            take(&raw mut (*placed).established);
        }
    }
}

/// Takes one away, and puts it back where there was none.
///
/// # Safety
/// `count` points into a live element of a map.
#[inline(always)]
unsafe fn take(count: *mut u64) {
    // SAFETY: by this function's contract.
    unsafe {
        if atomic::add(count, u64::MAX) == 0 {
            atomic::add(count, 1);
        }
    }
}

/// The counts that a socket is in; `None`: its endpoint's element is another's.
#[inline(always)]
fn own(noted: &PlacedSocket) -> Option<*mut Placed> {
    let endpoint = endpoint(noted)?;
    if shared!(endpoint, generation) != noted.generation {
        return None;
    }
    PLACED.get_ptr_mut(u32::from(noted.endpoint))
}

#[inline(always)]
fn endpoint(noted: &PlacedSocket) -> Option<*const Endpoint> {
    ENDPOINTS.get_ptr(u32::from(noted.endpoint))
}

/// Whether a socket's endpoint is still its own and has this address.
#[inline(always)]
pub fn is_at(noted: &PlacedSocket, address: &Address, port: u16) -> bool {
    let Some(endpoint) = endpoint(noted) else {
        return false;
    };
    let there = [address.words().0, address.words().1];
    let is_there =
        shared!(endpoint, v4 as [u64; 2]) == there || shared!(endpoint, v6 as [u64; 2]) == there;
    is_there
        && shared!(endpoint, port) == u32::from(port)
        && shared!(endpoint, generation) == noted.generation
}

/// What was noted at a socket holds no more.
#[inline(always)]
fn forget(ctx: &SockOpsContext) {
    let socket = socket(ctx);
    if !socket.is_null() {
        // SAFETY: a map and a live socket.
        unsafe { bpf_sk_storage_delete(map(), socket.cast()) };
    }
}

/// The time, in ticks.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    ticks(unsafe { bpf_ktime_get_ns() })
}
