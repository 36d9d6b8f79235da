//! Which quota holds for a backend.

use balancer_common::abi::{ServiceInfo, SlotPolicy, SlotState};

use super::model::Quota;
use crate::config::{ClusterQuota, QuotaRule};

/// Where a quota comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotaSource {
    /// The service's rule, as somebody wrote it down.
    Rule,
    /// Computed by the service's rule from what is known of its clients.
    Computed,
    /// Set by hand for every backend of the service.
    Service,
    /// Set by hand for this backend.
    Backend,
    /// None for this backend: it is drained by hand.
    Drained,
}

impl QuotaSource {
    /// The flags of a slot's policy.
    pub const fn flags(self) -> u32 {
        match self {
            Self::Rule => 0,
            Self::Computed => SlotPolicy::COMPUTED,
            Self::Service => SlotPolicy::SERVICE_BY_HAND,
            Self::Backend => SlotPolicy::BY_HAND,
            Self::Drained => SlotPolicy::BY_HAND | SlotPolicy::DRAINED,
        }
    }

    const fn from_flags(flags: u32) -> Self {
        if flags & SlotPolicy::DRAINED != 0 {
            Self::Drained
        } else if flags & SlotPolicy::BY_HAND != 0 {
            Self::Backend
        } else if flags & SlotPolicy::SERVICE_BY_HAND != 0 {
            Self::Service
        } else if flags & SlotPolicy::COMPUTED != 0 {
            Self::Computed
        } else {
            Self::Rule
        }
    }

    /// Whether somebody set it for this backend alone.
    pub const fn is_own(self) -> bool {
        matches!(self, Self::Backend | Self::Drained)
    }

    /// Whether somebody set the quota by hand.
    pub const fn is_by_hand(self) -> bool {
        matches!(self, Self::Service | Self::Backend | Self::Drained)
    }
}

/// A quota, and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// The quota that holds.
    pub quota: Quota,
    /// Where the quota comes from.
    pub source: QuotaSource,
}

/// The quota that holds: set by hand for the backend, else by hand for its service, else what the
/// rule gives.
pub fn in_force(backend: Option<InForce>, service: Option<Quota>, rule: InForce) -> InForce {
    let by_hand = |source| move |quota| InForce { quota, source };
    backend
        .or_else(|| service.map(by_hand(QuotaSource::Service)))
        .unwrap_or(rule)
}

/// The quota that the daemon has written for the backend in a slot; `None`: none yet.
pub fn written(policy: &SlotPolicy, slot_state: SlotState) -> Option<InForce> {
    policy.is_for(slot_state).then(|| InForce {
        quota: Quota::from_map(policy.quota()),
        source: QuotaSource::from_flags(policy.flags()),
    })
}

/// The quota that the daemon has written for the server of the backend in a slot; `None`: none yet.
pub fn written_for_server(policy: &SlotPolicy, slot_state: SlotState) -> Option<InForce> {
    written(policy, slot_state).map(|part| InForce {
        quota: Quota::from_map(policy.server_quota()),
        ..part
    })
}

/// The quota that was set by hand for every backend of a service.
pub fn by_hand(service: &ServiceInfo) -> Option<Quota> {
    (service.by_hand == 1).then(|| Quota::from_map(service.quota_by_hand))
}

/// The quota of a service's backends for which the daemon has written none.
pub fn of_service(service: &ServiceInfo) -> InForce {
    let rule = InForce {
        quota: Quota::from_map(service.quota),
        source: QuotaSource::Rule,
    };
    in_force(None, by_hand(service), rule)
}

impl QuotaRule {
    /// The quota of a backend for which nothing has been computed.
    pub const fn uncomputed(&self) -> Quota {
        match self {
            Self::Fixed(limit) => Quota::Limited(*limit),
            Self::Unlimited | Self::Computed { .. } => Quota::Unlimited,
        }
    }
}

impl ClusterQuota {
    /// The quota of a backend for which nothing has been computed.
    pub const fn uncomputed(&self) -> Quota {
        match self {
            Self::Fixed(limit) => Quota::Limited(*limit),
            Self::Unlimited | Self::Shared { .. } => Quota::Unlimited,
        }
    }
}
