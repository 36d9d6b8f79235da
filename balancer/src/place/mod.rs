//! Placing, as numbers: which frontends lead to which endpoints, and what is known of these. Pure:
//! `daemon` gathers it, `dataplane` writes it to the maps.

mod knowledge;
mod level;
mod others;
#[cfg(test)]
#[expect(
    clippy::cast_precision_loss,
    reason = "the numbers of a simulation are small"
)]
#[expect(
    clippy::print_stdout,
    reason = "a test prints the tables of the documentation"
)]
mod simulation;

pub use knowledge::{GroupKnowledge, GroupMemory};

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use balancer_common::abi::Excluded;

use crate::config::Effect;

/// For so long after the cluster was heard of its endpoints are believed. Then destinations are
/// left as they are: whoever carries them on without the balancer may know better.
pub const BELIEVED_FOR: Duration = Duration::from_secs(60);

/// What this node should place where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlacePlan {
    /// The endpoint groups, by name.
    pub groups: Vec<GroupPlan>,
    /// Cookies of netns, and which of their connects are left alone.
    pub excluded_netns: BTreeMap<u64, Excluded>,
    /// Connects are counted as they would be placed, and left alone.
    pub dry_run: bool,
}

impl PlacePlan {
    /// What a mode leaves of it.
    #[must_use]
    pub fn within(self, effect: Effect) -> Self {
        match effect {
            Effect::Count => Self::default(),
            Effect::DryRun => Self {
                dry_run: true,
                ..self
            },
            Effect::On => self,
        }
    }
}

/// An endpoint group, and the frontends that lead to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPlan {
    /// Its name in `status`: the service's, in a cluster with the Kubernetes Service's.
    pub name: String,
    /// What clients connect to.
    pub frontends: Vec<SocketAddr>,
    /// Own addresses of endpoints, where connects to these are placed as well.
    pub own_addresses: Vec<SocketAddr>,
    /// What may be chosen.
    pub endpoints: Vec<EndpointPlan>,
    /// This node among those that place: its rank, from 0, and how many they are.
    pub rank: (u32, u32),
    /// How long ago the cluster was heard of; `None`: it needs no hearing (no cluster).
    pub heard: Option<Duration>,
}

impl GroupPlan {
    /// How many nodes there are where nodes know nothing of each other: the rank is drawn by lot.
    pub const BY_LOT: u32 = u32::MAX;

    /// Whether anything leads to it.
    pub const fn has_frontends(&self) -> bool {
        !self.frontends.is_empty() || !self.own_addresses.is_empty()
    }
}

/// One endpoint of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPlan {
    /// Its name in `status`: the pod's with its namespace, or the address.
    pub name: String,
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// Its port.
    pub port: u16,
    /// The node that it runs on, whose daemon counts it; `None`: that is not known.
    pub node: Option<String>,
    /// Its share beside the others'; 0: no new ones.
    pub weight: u32,
    /// What it was last said to have; `None`: nobody says.
    pub published: Option<PublishedTotal>,
}

/// Connections of an endpoint, as its node said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedTotal {
    /// Established connections, those of every client.
    pub connections: u64,
    /// How long ago that was counted.
    pub age: Duration,
}
