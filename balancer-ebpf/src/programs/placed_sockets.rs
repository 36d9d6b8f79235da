//! A BPF iterator over the sockets that were placed, whatever netns they are in: for each a record
//! that the daemon reads.

use aya_ebpf::helpers::generated::bpf_seq_write;
use balancer_common::abi::{PlacedRecord, PlacedSocket};

use crate::kernel::offsets::field;

/// The context of `bpf_iter_bpf_sk_storage_map` (net/core/bpf_sk_storage.c).
#[repr(C)]
pub struct Context {
    meta: *const Meta,
    map: *const u8,
    socket: *const u8,
    value: *const PlacedSocket,
}

/// `struct bpf_iter_meta` (include/linux/bpf.h).
#[repr(C)]
struct Meta {
    seq: *mut aya_ebpf::bindings::seq_file,
    session: u64,
    number: u64,
}

/// Writes one socket's record. The kernel calls it once more at the end, without a socket.
#[inline(always)]
pub fn run(ctx: *const Context) {
    // SAFETY: the context lives as long as the program runs; the verifier knows the types of what
    // it points to. Volatile, so that each is read as one word.
    let (meta, socket, value) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx).meta),
            core::ptr::read_volatile(&raw const (*ctx).socket),
            core::ptr::read_volatile(&raw const (*ctx).value),
        )
    };
    if socket.is_null() || value.is_null() {
        return;
    }
    // SAFETY: the storage of a socket, which lives until the program ends. Any bytes are a value.
    let placed = unsafe { core::ptr::read_volatile(value) };
    let mut record = PlacedRecord {
        endpoint: placed.endpoint,
        phase: placed.phase,
        state: field!(socket, AT_STATE as u8),
        generation: placed.generation,
    };
    // SAFETY: the file that the kernel collects the records in, and a record of the size given.
    unsafe {
        let seq = core::ptr::read_volatile(&raw const (*meta).seq);
        bpf_seq_write(
            seq,
            (&raw mut record).cast(),
            size_of::<PlacedRecord>() as u32,
        );
    }
}
