//! What the kernel half tells the daemon.

use super::address::Address;

/// What an [`Event`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum EventKind {
    /// A listener claimed a slot, or listens again.
    ListenerUp = 1,
    /// A listener closed or was shut down.
    ListenerDown = 2,
    /// A listener of a service found no free slot: it serves without the balancer.
    NoSlot = 3,
    /// A listener's socket storage could not be made: it serves without the balancer.
    NoStorage = 4,
    /// A look-up was refused (at most ten events a second and service).
    Refused = 5,
}

impl EventKind {
    /// The kind of its number.
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::ListenerUp,
            2 => Self::ListenerDown,
            3 => Self::NoSlot,
            4 => Self::NoStorage,
            5 => Self::Refused,
            _ => return None,
        })
    }
}

/// A record of EVENTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// [`EventKind`] as a number.
    pub kind: u16,
    /// Id of the service.
    pub service: u16,
    /// The slot, or `u32::MAX`.
    pub slot: u32,
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The listener's address, or the client's.
    pub address: Address,
    /// Its port.
    pub port: u16,
    /// [`crate::Reason`] as an index, for a refusal.
    pub reason: u16,
    /// The process that listened, 0 if not known.
    pub pid: u32,
    /// Its thread that did.
    pub tid: u32,
    /// Always 0.
    pub zero: u32,
}
