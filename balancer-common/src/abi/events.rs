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
}

impl EventKind {
    /// The kind of its number.
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::ListenerUp,
            2 => Self::ListenerDown,
            3 => Self::NoSlot,
            4 => Self::NoStorage,
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
    /// The listener's slot; `u32::MAX` for one that got none.
    pub slot: u32,
    /// Cookie of the netns.
    pub netns: u64,
    /// The listener's address.
    pub address: Address,
    /// The port beside that address, host byte order.
    pub port: u16,
    /// Always 0.
    pub zero: u16,
    /// The process that listened (thread group id in the initial pid namespace), 0 if not known.
    pub pid: u32,
    /// The thread of that process that listened, 0 if not known.
    pub tid: u32,
    /// Always 0.
    pub zeros: u32,
}
