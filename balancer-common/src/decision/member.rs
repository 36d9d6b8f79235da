//! A backend as the decision sees it.

use crate::abi::{
    Address, Backend, BackendId, BackendState, Counts, DEFAULT_WEIGHT, Health, SlotPolicy,
};
use crate::decision::admission::used;
use crate::decision::request::Request;

/// One backend as the maps show it.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// The backend's slot: its index in every map by slot.
    pub slot: u32,
    /// The element of BACKENDS: what listens, and where.
    pub backend: Backend,
    /// The element of POLICY: quota and weight, valid for one generation.
    pub policy: SlotPolicy,
    /// The element of COUNTS, with the connections that only the daemon counts.
    pub counts: Counts,
    /// The element of HEALTH.
    pub health: Health,
}

impl Member {
    /// Slot and generation, which name the backend.
    pub const fn id(&self) -> BackendId {
        BackendId {
            slot: self.slot,
            generation: self.backend.slot_state().generation(),
        }
    }

    /// The backend's quota: what the daemon has written for this generation, else `default`.
    #[inline(always)]
    pub const fn quota(&self, default: u32) -> u32 {
        if self.policy.is_for(self.backend.slot_state()) {
            self.policy.quota()
        } else {
            default
        }
    }

    /// 1 where somebody closed it by hand, else 0. `quota` is its [`Self::quota`]: that of a
    /// backend for which the daemon has written none is 0 by hand alone. Without a branch, after
    /// which the verifier would follow both ways through all that comes.
    #[inline(always)]
    pub(super) const fn is_closed(&self, quota: u32) -> u64 {
        const { assert!(SlotPolicy::CLOSED == 1 << CLOSED_BIT) };
        let generation = self.backend.slot_state().generation().wrapping_add(1);
        let is_unwritten = differ(self.policy.quota >> 32, generation as u64);
        let is_closed = (self.policy.flags() >> CLOSED_BIT) as u64;
        (differ(quota as u64, 0) ^ 1) & (is_unwritten | is_closed)
    }

    /// Established connections that count against the quota.
    #[inline(always)]
    pub(super) const fn used(&self) -> u64 {
        used(self.counts.established(), self.counts.exempt(), 0)
    }

    /// The backend's weight, at least 1.
    #[inline(always)]
    pub const fn weight(&self) -> u32 {
        let weight = if self.policy.is_for(self.backend.slot_state()) {
            self.policy.weight()
        } else {
            self.backend.weight
        };
        if weight == 0 { DEFAULT_WEIGHT } else { weight }
    }

    /// Whether SYNs may go to it: it listens, and is no stranger's.
    #[inline(always)]
    pub fn is_ready(&self) -> bool {
        let state = self.backend.slot_state();
        state.is(BackendState::Active)
            && !Backend::is_strangers(self.backend.flags, || self.policy.is_for(state))
    }

    /// Whether it is given a SYN of that netns that can't be judged: quotas don't count then, but
    /// where somebody closed it by hand. `default` is the quota as for [`Self::quota`].
    #[inline(always)]
    pub fn takes_unjudged(&self, netns: u64, default: u32) -> bool {
        self.is_ready()
            && self.is_steerable()
            && self.backend.netns == netns
            && self.is_closed(self.quota(default)) == 0
    }

    /// The state as it is shown.
    pub fn state(&self) -> BackendState {
        match self.backend.slot_state().state() {
            BackendState::Active if !self.is_ready() => BackendState::Candidate,
            state => state,
        }
    }

    #[inline(always)]
    pub(super) const fn is_steerable(&self) -> bool {
        self.backend.flags & Backend::UNSTEERABLE == 0
    }

    /// How well its socket fits the destination, as the kernel would score it on an own port
    /// (`compute_score`, `net/ipv4/inet_hashtables.c`): an exact address before the wildcard, a
    /// bound device before none. `None`: not at all.
    #[inline(always)]
    pub(super) fn fit(&self, request: &Request) -> Option<u32> {
        if self.backend.netns != request.netns || !fits_family(self.backend.flags, request.v4) {
            return None;
        }
        if request.virtual_port {
            return Some(0);
        }
        let (high, low) = self.backend.address.words();
        let (to_high, to_low) = request.to.words();
        let device = u64::from(self.backend.device);
        let exact = differ(high, 0) | differ(low, 0) & differ(low, Address::ANY_V4.words().1);
        let bound = differ(device, 0);
        let elsewhere = exact & (differ(high, to_high) | differ(low, to_low))
            | bound & differ(device, request.device.into());
        (elsewhere == 0).then_some((exact * 2 + bound) as u32)
    }
}

const CLOSED_BIT: u32 = SlotPolicy::CLOSED.trailing_zeros();

/// 1 where the two are not the same, else 0; without a branch.
#[inline(always)]
const fn differ(one: u64, other: u64) -> u64 {
    let bits = one ^ other;
    (bits | bits.wrapping_neg()) >> 63
}

/// Whether a listener can take a packet of that family (`inet_csk` sockets: `bpf_sk_assign` says
/// EAFNOSUPPORT otherwise).
#[inline(always)]
pub const fn fits_family(flags: u32, packet_is_v4: bool) -> bool {
    if packet_is_v4 {
        flags & Backend::V6_ONLY == 0
    } else {
        flags & Backend::V6 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{SlotState, UNLIMITED};
    use crate::decision::request::tests::request;
    use proptest::prelude::*;

    fn member(address: Address, device: u32) -> Member {
        Member {
            slot: 0,
            backend: Backend {
                slot_state: SlotState::new(1, BackendState::Active).0,
                netns: 1,
                address,
                device,
                ..Backend::EMPTY
            },
            policy: SlotPolicy::new(1, UNLIMITED, 1, 0),
            counts: Counts::ZERO,
            health: Health::UNKNOWN,
        }
    }

    /// Few of each word, so that two are often the same.
    fn any_address() -> impl Strategy<Value = Address> {
        let mapped = 0x0000_ffff_u32.to_be();
        let word = || prop_oneof![Just(0), Just(mapped), Just(7)];
        [word(), word(), word(), word()].prop_map(Address)
    }

    proptest! {
        #[test]
        fn a_socket_fits_as_the_kernel_would_score_it(
            bound in any_address(), to in any_address(), device in 0..3_u32, arrived in 0..3_u32,
        ) {
            let fit = member(bound, device).fit(&request(to, arrived));
            let exact = !bound.is_any();
            let expected = if exact && bound != to || device != 0 && device != arrived {
                None
            } else {
                Some(u32::from(exact) * 2 + u32::from(device != 0))
            };
            prop_assert_eq!(fit, expected);
        }
    }
}
