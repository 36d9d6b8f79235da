//! Keepalive on accepted sockets: a client that has vanished without a FIN leaves, and its place
//! is free again.

use aya_ebpf::bindings::bpf_sock_ops;
use aya_ebpf::helpers::generated::bpf_setsockopt;
use aya_ebpf::programs::SockOpsContext;
use balancer_common::abi::{BackendId, Keepalive, KeepaliveWord};

use super::account::socket;
use super::claim::is_strangers;
use crate::kernel::shared::shared;
use crate::kernel::socket::TcpSocket;
use crate::maps::{BACKENDS, KEEPALIVE};

// Levels and options: include/uapi/asm-generic/socket.h, include/uapi/linux/tcp.h.
const SOL_SOCKET: i32 = 1;
const SO_KEEPALIVE: i32 = 9;
const SOL_TCP: i32 = 6;
const TCP_KEEPIDLE: i32 = 4;
const TCP_KEEPINTVL: i32 = 5;
const TCP_KEEPCNT: i32 = 6;
const TCP_USER_TIMEOUT: i32 = 18;

/// Turns keepalive on for a connection that was just accepted, where its service asks for it and
/// its backend is no stranger's. What the server has set on its listener stays, each option for
/// itself; what it sets once it has accepted the connection comes after this.
#[inline(always)]
pub fn turn_on(ctx: &SockOpsContext, id: BackendId) {
    let Some(keepalive) = wanted(id) else {
        return;
    };
    let socket = socket(ctx);
    if socket.is_null() {
        return;
    }
    let Some(tcp) = TcpSocket::of(socket) else {
        return;
    };
    let chosen = tcp.chosen();
    // Before it is turned on, which starts the timer.
    if !chosen.idle {
        set(ctx, SOL_TCP, TCP_KEEPIDLE, u32::from(keepalive.idle));
    }
    if !chosen.interval {
        set(ctx, SOL_TCP, TCP_KEEPINTVL, u32::from(keepalive.interval));
    }
    if !chosen.probes {
        set(ctx, SOL_TCP, TCP_KEEPCNT, u32::from(keepalive.probes));
    }
    let user_timeout = keepalive.user_timeout_ms();
    if !chosen.user_timeout && user_timeout != 0 {
        set(ctx, SOL_TCP, TCP_USER_TIMEOUT, user_timeout);
    }
    set(ctx, SOL_SOCKET, SO_KEEPALIVE, 1);
}

#[inline(always)]
fn wanted(id: BackendId) -> Option<Keepalive> {
    let backend = BACKENDS.get_ptr(id.slot)?;
    if is_strangers(backend, id.slot) {
        return None;
    }
    let word = KEEPALIVE.get_ptr(u32::from(shared!(backend, service)))?;
    let packed = shared!(word, packed);
    KeepaliveWord { packed }.get()
}

/// A refusal changes nothing: the connection is as it would be without the balancer.
#[inline(always)]
fn set(ctx: &SockOpsContext, level: i32, option: i32, mut value: u32) {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: the context, and a value of the size that is given, which lives until the call
    // returns.
    unsafe {
        bpf_setsockopt(
            ops.cast(),
            level,
            option,
            (&raw mut value).cast(),
            size_of::<u32>() as i32,
        )
    };
}
