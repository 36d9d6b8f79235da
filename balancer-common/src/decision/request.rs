//! What is asked: one SYN, or what looks like one.

use crate::abi::{Address, Policy, ServicePort};
use crate::hash;

/// Where a SYN comes from and goes to.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Cookie of the netns that it arrived in.
    pub netns: u64,
    /// Index of the interface that it arrived on.
    pub device: u32,
    /// The client's address.
    pub from: Address,
    /// The client's port, host byte order.
    pub from_port: u16,
    /// The address that it was sent to.
    pub to: Address,
    /// The port that it was sent to, host byte order.
    pub to_port: u16,
}

/// What is asked: one SYN (or what looks like one) for a service.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Id of the service.
    pub service: u16,
    /// Cookie of the netns that the SYN arrived in.
    pub netns: u64,
    /// The address that it was sent to.
    pub to: Address,
    /// Index of the interface that it arrived on.
    pub device: u32,
    /// Whether the packet is IPv4, also where a dual-stack listener takes it.
    pub v4: bool,
    /// Whether the service's port is virtual.
    pub virtual_port: bool,
    /// How to choose.
    pub policy: Policy,
    /// Quota of backends that the daemon has not seen yet.
    pub quota: u32,
    /// Hash of the source address.
    pub source: u64,
    /// Hash of the four-tuple.
    pub tuple: u64,
    /// Ticket of round-robin: it tells whose turn it is. With least-connections, the slot after the
    /// one that had the SYN before: who comes first among those with as few. Source-hash doesn't
    /// read it.
    pub ticket: u64,
    /// The sum of the weights when it was last added up, for round-robin, or 0: it saves a pass
    /// where it is still that.
    pub weights: u64,
    /// Whether the backends' health is regarded.
    pub health: bool,
    /// The time, in ticks.
    pub now: u64,
}

impl Request {
    /// What a SYN for a service's port asks.
    #[inline(always)]
    pub fn new(port: &ServicePort, arrival: &Arrival, ticket: u64, weights: u64, now: u64) -> Self {
        let (high, low) = arrival.from.halves();
        let source = hash::of_source(high, low);
        let (to_high, to_low) = arrival.to.halves();
        Self {
            service: port.service,
            netns: arrival.netns,
            to: arrival.to,
            device: arrival.device,
            v4: arrival.from.is_v4(),
            virtual_port: port.flags & ServicePort::VIRTUAL != 0,
            policy: Policy::from_number(port.policy),
            quota: port.quota,
            source,
            tuple: hash::of_tuple(source, arrival.from_port, to_high ^ to_low, arrival.to_port),
            ticket,
            weights,
            health: port.flags & ServicePort::HEALTH_OFF == 0,
            now,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::abi::UNLIMITED;

    /// A SYN for the own port of a service with least connections and no quota.
    pub fn request(to: Address, device: u32) -> Request {
        let service = ServicePort {
            service: 0,
            policy: 0,
            flags: 0,
            quota: UNLIMITED,
        };
        let arrival = Arrival {
            netns: 1,
            device,
            from: Address::from_v4_be(1),
            from_port: 1,
            to,
            to_port: 11_800,
        };
        Request::new(&service, &arrival, 0, 0, 0)
    }
}
