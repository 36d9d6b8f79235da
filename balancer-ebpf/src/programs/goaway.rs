//! Telling a client of plain HTTP/2 to move: a GOAWAY before a message of its server. The daemon
//! puts a connection into a map of sockets for a moment; no other one runs this.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_msg_pull_data, bpf_sk_storage_get};
use aya_ebpf::programs::SkMsgContext;
use balancer_common::abi::MovingSocket;
use balancer_common::http2::{GOAWAY, HEADER, Header};

use crate::maps::MOVING_SOCKET;

/// So many messages of whole frames in a row are believed. A frame in two messages, header and
/// payload, never makes two, however much its payload looks like frames.
const BELIEVED: u32 = 2;
/// A message with more frames is not believed to be whole.
const MOST_FRAMES: u32 = 64;
/// No message is so long (`MAX_SKB_FRAGS` pages at most, net/core/skmsg.c).
const LONGEST: u32 = 1 << 24;

/// Looks at a message that a server is about to send, and puts a GOAWAY before it where that was
/// asked for and both ends of the message are between frames.
#[inline(always)]
pub fn run(ctx: &SkMsgContext) {
    let Some(note) = note(ctx) else {
        return;
    };
    let (whole, rest) = frames(ctx, note.rest);
    note.messages += 1;
    note.rest = rest;
    if !whole {
        note.streak = 0;
        return;
    }
    note.whole += 1;
    note.streak += 1;
    let believed = note.streak >= BELIEVED;
    if believed && note.tell != 0 && note.told == 0 && put_before(ctx) {
        note.told = 1;
    }
}

/// What is noted at the socket; this program has it alone, for it runs under the socket's lock
/// (`tcp_bpf_sendmsg`, net/ipv4/tcp_bpf.c).
#[inline(always)]
fn note(ctx: &SkMsgContext) -> Option<&mut MovingSocket> {
    let map = (&raw const MOVING_SOCKET).cast_mut().cast();
    // SAFETY: the field of a live context.
    let socket = unsafe { (&raw const (*ctx.msg).__bindgen_anon_3.sk).read_volatile() };
    if socket.is_null() {
        return None;
    }
    // SAFETY: a socket that lives as long as the program runs; nothing is made without a value.
    let value = unsafe { bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), 0) };
    // SAFETY: the value of that map, or null. It lives as long as the program runs.
    unsafe { value.cast::<MovingSocket>().as_mut() }
}

/// Whether a message is whole frames, `rest` bytes of an earlier frame being before them; and how
/// many bytes of its last frame are still to come.
#[inline(always)]
fn frames(ctx: &SkMsgContext, rest: u32) -> (bool, u32) {
    let size = ctx.size();
    let mut at = rest;
    for frame in 0..MOST_FRAMES {
        if at >= size {
            return (rest == 0 && at == size, at - size);
        }
        let Some(header) = header(ctx, at, size) else {
            return (false, 0);
        };
        if !header.is_servers(frame == 0) {
            return (false, 0);
        }
        at += header.frame_bytes();
    }
    (false, 0)
}

/// The header of a frame at `at` bytes in the message. Its bytes alone are made readable, so that
/// nothing is copied but a header in several pieces.
#[inline(always)]
fn header(ctx: &SkMsgContext, at: u32, size: u32) -> Option<Header> {
    let end = at + HEADER as u32;
    if end > size || at > LONGEST {
        return None;
    }
    // SAFETY: the context, and a part of its message.
    if unsafe { bpf_msg_pull_data(ctx.as_ptr().cast(), at, end, 0) } != 0 {
        return None;
    }
    let (begin, end) = (ctx.data(), ctx.data_end());
    if begin + HEADER > end {
        return None;
    }
    // SAFETY: so many bytes are readable there, as was just asked.
    Some(Header(unsafe { *(begin as *const [u8; HEADER]) }))
}

/// Puts a GOAWAY before a message; false: the message is as it was.
#[inline(always)]
fn put_before(ctx: &SkMsgContext) -> bool {
    let length = GOAWAY.len() as u32;
    if ctx.push_data(0, length, 0).is_err() {
        return false;
    }
    // SAFETY: the context, and the bytes that were just added.
    let readable = unsafe { bpf_msg_pull_data(ctx.as_ptr().cast(), 0, length, 0) } == 0;
    let (begin, end) = (ctx.data(), ctx.data_end());
    if !readable || begin + GOAWAY.len() > end {
        let _ = ctx.pop_data(0, length, 0);
        return false;
    }
    let room = begin as *mut u8;
    for (at, byte) in GOAWAY.into_iter().enumerate() {
        // SAFETY: so many bytes are there and belong to the message alone.
        unsafe { room.add(at).write_volatile(byte) };
    }
    true
}
