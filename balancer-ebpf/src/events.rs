//! What the kernel half tells the daemon.

use balancer_common::Reason;
use balancer_common::abi::{Backend, Event, EventKind, ticks_of_ms};
use balancer_common::decision::request::Arrival;

use crate::kernel::atomic;
use crate::kernel::shared::shared;
use crate::maps::{EVENTS, SERVICE_STATE};

/// Refusal events of one service are at least so many ticks apart.
const REFUSAL_INTERVAL: u64 = ticks_of_ms(100);

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
        reason: 0,
        pid: shared!(backend, pid),
        tid: shared!(backend, tid),
        zero: 0,
    };
    u32::from(EVENTS.output::<Event>(&event, 0).is_ok())
}

/// A look-up was refused.
#[inline(always)]
pub fn refused(service: u16, arrival: &Arrival, reason: Reason, now: u64) {
    let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(service)) else {
        return;
    };
    let last = shared!(state, last_event);
    // SAFETY: the pointer is to an element of a map, which lives as long as the program.
    if now < last + REFUSAL_INTERVAL
        || !unsafe { atomic::replace(&raw mut (*state).last_event, last, now) }
    {
        return;
    }
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(
        &(),
        "refused: service {}, reason {}, client port {}",
        service,
        reason as u16,
        arrival.from_port
    );
    let event = Event {
        kind: EventKind::Refused as u16,
        service,
        slot: u32::MAX,
        netns: arrival.netns,
        address: arrival.from,
        port: arrival.from_port,
        reason: reason as u16,
        pid: 0,
        tid: 0,
        zero: 0,
    };
    let _ = EVENTS.output::<Event>(&event, 0);
}
