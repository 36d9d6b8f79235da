//! What is asked: one SYN, or what looks like one.

use crate::abi::{Address, Policy, ServicePort};
use crate::hash;

/// Where a SYN comes from and goes to.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The namespace it arrived in (cookie).
    pub netns: u64,
    /// The interface it arrived on.
    pub device: u32,
    /// The client's address.
    pub from: Address,
    /// Its port.
    pub from_port: u16,
    /// The address it was sent to.
    pub to: Address,
    /// Its port.
    pub to_port: u16,
}

/// What is asked: one SYN (or what looks like one) for a service.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The service.
    pub service: u16,
    /// The namespace it arrived in (cookie).
    pub netns: u64,
    /// The address it was sent to.
    pub to: Address,
    /// The interface it arrived on.
    pub device: u32,
    /// Whether it is IPv4.
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
    /// Ticket of round-robin.
    pub ticket: u64,
    /// The sum of the weights when it was last added up, for round-robin, or 0: it saves a pass
    /// where it is still that.
    pub weights: u64,
    /// The time, in ticks.
    pub now: u32,
}

impl Request {
    /// What a SYN for a service's port asks.
    #[inline(always)]
    pub fn new(port: &ServicePort, arrival: &Arrival, ticket: u64, weights: u64, now: u32) -> Self {
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
            now,
        }
    }
}
