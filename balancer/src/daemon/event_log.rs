//! The log lines about events of the kernel half.

use std::net::SocketAddr;

use balancer_common::abi::{Event, EventKind};
use tracing::{info, warn};

/// Logs an event about a service of that name.
pub fn log(event: &Event, service: &str) {
    let address = SocketAddr::new(event.address.into(), event.port);
    let Event { pid, slot, .. } = event;
    match EventKind::from_number(event.kind) {
        Some(EventKind::ListenerUp) => {
            info!("{service}: {address} listens (process {pid}): slot {slot}");
        }
        Some(EventKind::ListenerDown) => {
            info!("{service}: {address} listens no more (slot {slot})");
        }
        Some(EventKind::NoSlot) => warn!(
            "{service}: no slot is free for {address} (process {pid}): it serves without the \
             balancer (at most 256 backends a service, 1024 in all)"
        ),
        Some(EventKind::NoStorage) => warn!(
            "{service}: the kernel had no memory to register {address} (process {pid}): it serves \
             without the balancer"
        ),
        None => warn!(
            "the kernel half sent an event of unknown kind {}",
            event.kind
        ),
    }
}
