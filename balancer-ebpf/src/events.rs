//! What the kernel half tells the daemon.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use balancer_common::Reason;
use balancer_common::abi::{Address, Backend, Event, EventKind, ticks, ticks_of_ms};

use crate::atomic;
use crate::maps::{EVENTS, SERVICE_STATE};

/// Refusal events of one service are at least so many ticks apart.
const REFUSAL_INTERVAL: u32 = ticks_of_ms(100);

/// Something happened to a listener. A full ring loses the event; the daemon also looks by itself.
#[inline(always)]
pub fn listener(kind: EventKind, slot: u32, backend: &Backend) {
    let event = Event {
        kind: kind as u16,
        service: backend.service,
        slot,
        netns: backend.netns,
        address: backend.address,
        port: backend.port,
        reason: 0,
        pid: backend.pid,
    };
    let _ = EVENTS.output::<Event>(&event, 0);
}

/// A look-up was refused.
#[inline(always)]
pub fn refused(service: u16, netns: u64, source: Address, source_port: u16, reason: Reason) {
    let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(service)) else {
        return;
    };
    let last = unsafe { (*state).last_event };
    let now = ticks(unsafe { bpf_ktime_get_ns() });
    if now.wrapping_sub(last as u32) < REFUSAL_INTERVAL
        || !unsafe { atomic::replace(&raw mut (*state).last_event, last, u64::from(now)) }
    {
        return;
    }
    let event = Event {
        kind: EventKind::Refused as u16,
        service,
        slot: u32::MAX,
        netns,
        address: source,
        port: source_port,
        reason: reason as u16,
        pid: 0,
    };
    let _ = EVENTS.output::<Event>(&event, 0);
}
