//! Which quota holds for a backend.

use super::Quota;
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
}

/// A quota, and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// The quota.
    pub quota: Quota,
    /// Where it comes from.
    pub source: QuotaSource,
}

/// The quota that holds: set by hand for the backend, else by hand for its service, else what the
/// rule gives.
pub fn in_force(backend: Option<Quota>, service: Option<Quota>, rule: InForce) -> InForce {
    let by_hand = |source| move |quota| InForce { quota, source };
    backend
        .map(by_hand(QuotaSource::Backend))
        .or_else(|| service.map(by_hand(QuotaSource::Service)))
        .unwrap_or(rule)
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
