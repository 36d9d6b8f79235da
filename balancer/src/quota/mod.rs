//! Quotas: from a rule and what is known of the backends to a number for each, and the sentence that explains it. Pure.

mod cluster;
mod sentence;
mod share;
pub mod starved;
pub mod window;

use std::time::Duration;

pub use self::cluster::{Known, Total, compute_cluster};
use self::{sentence::What, share::Demand};
use crate::config::QuotaRule;

/// The most established connections that a backend should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// As many as come.
    Unlimited,
    /// No new connection once this many are established or pending; 0 takes none.
    Limited(u32),
}

impl Quota {
    /// The number, where there is one.
    pub fn limit(self) -> Option<u32> {
        match self {
            Self::Unlimited => None,
            Self::Limited(limit) => Some(limit),
        }
    }
}

/// What a quota depends on, of one backend that is ready to take connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Its share relative to the others. Backends whose weights are all 0 share equally.
    pub weight: u32,
    /// The connections established now that count against the quota.
    pub established: u32,
    /// The quota computed for it so far; `None` when it has just become ready.
    pub previous: Option<Quota>,
}

/// The quotas of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// One for each backend, in their order.
    pub quotas: Vec<Quota>,
    /// How they come about, for an operator: one line, at most 255 bytes.
    pub sentence: String,
    /// Whether a quota is still above what it should be, because it goes down slowly.
    pub lowering: bool,
}

const NONE_READY: &str = "no backend is ready: nothing to share out";
const ONE_READY: &str =
    "unlimited: one backend is ready, a refused client would have nowhere else to go";

/// The quotas of the backends of one service that are ready.
///
/// A computed quota is `ceil(clients × connections_per_client × (1 + headroom) / ready backends)`,
/// in proportion to weight, at least `min_quota`, and never so low that the sum is less than what is
/// established now. With no clients known, or with one ready backend, it is unlimited. It is raised
/// at once and lowered by at most 10 % a minute. A fixed quota is taken as it is.
///
/// `since_previous` is how long the `previous` quotas have been waiting to go down. It is not the time
/// since the last call: quotas are whole numbers, and a tenth a minute may take many seconds to make
/// one connection. The caller restarts that clock whenever an outcome differs from the one before,
/// and at every outcome that is not [`lowering`](Outcome::lowering).
///
/// Quotas that go down do so together, in steps of a few connections or of a tenth, whichever is less
/// (those below 10 on their own, by one), so that they stay in proportion and no restart of
/// the clock starves one.
pub fn compute(rule: &QuotaRule, backends: &[Ready], since_previous: Duration) -> Outcome {
    match *rule {
        QuotaRule::Unlimited => all(Quota::Unlimited, backends, "no quota is set: steering only"),
        QuotaRule::Fixed(limit) => all(
            Quota::Limited(limit),
            backends,
            format!("fixed: {limit} for each backend"),
        ),
        QuotaRule::Computed {
            clients: None | Some(0),
            ..
        } => all(
            Quota::Unlimited,
            backends,
            "unlimited: how many clients there are is not known (set `clients`)",
        ),
        QuotaRule::Computed { .. } if backends.is_empty() => {
            all(Quota::Unlimited, backends, NONE_READY)
        }
        QuotaRule::Computed { .. } if backends.len() == 1 => {
            all(Quota::Unlimited, backends, ONE_READY)
        }
        QuotaRule::Computed {
            clients: Some(clients),
            connections_per_client,
            headroom_percent,
            min_quota,
        } => Demand {
            what: What::Clients {
                clients,
                each: connections_per_client,
            },
            headroom_percent,
            min_quota,
            elsewhere: 0,
            more: 0,
        }
        .share(backends, since_previous),
    }
}

fn all(quota: Quota, backends: &[Ready], sentence: impl Into<String>) -> Outcome {
    Outcome {
        quotas: vec![quota; backends.len()],
        sentence: sentence.into(),
        lowering: false,
    }
}

#[cfg(test)]
mod tests;
