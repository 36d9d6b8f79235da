//! What the kernel half tells the daemon.

use balancer_common::Reason;
use balancer_common::abi::{Backend, Event, EventKind, Refusals, RefusedKey};
use balancer_common::decision::request::Arrival;

use crate::kernel::atomic;
use crate::kernel::shared::shared;
use crate::maps::{EVENTS, REFUSED};

/// `BPF_NOEXIST`: include/uapi/linux/bpf.h.
const ONLY_NEW: u64 = 1;

/// Something happened to a listener. A full ring loses the event; the daemon also looks by itself.
#[inline(always)]
pub fn listener(kind: EventKind, slot: u32, backend: *const Backend) {
    account_event(kind as u32, slot, backend);
}

/// Global, so that the verifier looks at it by itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn account_event(kind: u32, slot: u32, backend: *const Backend) -> u32 {
    // For an argument of a global function the verifier takes null or a pointer to the whole
    // structure: on the stack, or an element of a map, which another CPU may claim meanwhile.
    if backend.is_null() {
        return 0;
    }
    let (service, port) = (shared!(backend, service), shared!(backend, port));
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(
        &(),
        "listener event {}: service {}, port {}, slot {}",
        kind,
        service,
        port,
        slot
    );
    let event = Event {
        kind: kind as u16,
        service,
        slot,
        netns: shared!(backend, netns),
        address: shared!(backend, address),
        port,
        zero: 0,
        pid: shared!(backend, pid),
        tid: shared!(backend, tid),
        zeros: 0,
    };
    u32::from(EVENTS.output::<Event>(&event, 0).is_ok())
}

/// A look-up was refused. Where two CPUs refuse a source for the first time at once, one of them is
/// not counted.
#[inline(always)]
pub fn refused(service: u16, arrival: &Arrival, reason: Reason, now: u64) {
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(
        &(),
        "refused: service {}, reason {}, client port {}",
        service,
        reason as u16,
        arrival.from_port
    );
    let key = RefusedKey {
        netns: arrival.netns,
        source: arrival.from,
        service: u32::from(service),
        zero: 0,
    };
    let reason = reason as u64;
    if let Some(known) = REFUSED.get_ptr_mut(&key) {
        // SAFETY: the pointer is to an element of a map, which lives as long as the program.
        unsafe {
            atomic::add(&raw mut (*known).count, 1);
            atomic::store(&raw mut (*known).last, now);
            atomic::store(&raw mut (*known).reason, reason);
        }
        return;
    }
    let first = Refusals {
        count: 1,
        first: now,
        last: now,
        reason,
    };
    let _ = REFUSED.insert(&key, &first, ONLY_NEW);
}
