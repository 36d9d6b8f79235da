//! What quotas are computed from, and what comes out.

use std::{fmt, time::Duration};

use balancer_common::abi::UNLIMITED;

/// The most established connections that a backend should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// As many as come.
    Unlimited,
    /// No new connection once this many are established or pending; 0 takes none.
    Limited(u32),
}

impl Quota {
    /// The quota that a map holds as a number.
    pub const fn from_map(number: u32) -> Self {
        match number {
            UNLIMITED => Self::Unlimited,
            limit => Self::Limited(limit),
        }
    }

    /// The number that a map holds.
    pub const fn to_map(self) -> u32 {
        match self {
            Self::Unlimited => UNLIMITED,
            Self::Limited(limit) => limit,
        }
    }

    /// The number of connections; `None`: unlimited.
    pub fn limit(self) -> Option<u32> {
        match self {
            Self::Unlimited => None,
            Self::Limited(limit) => Some(limit),
        }
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => f.write_str("unlimited"),
            Self::Limited(limit) => write!(f, "{limit}"),
        }
    }
}

/// What the quota of a backend that is ready to take connections depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadyBackend {
    /// The backend's part relative to the others. Backends whose weights are all 0 get equal parts.
    pub weight: u32,
    /// The connections established now that count against the quota.
    pub established: u32,
    /// The quota computed for the backend so far; `None` when it has just become ready.
    pub previous: Option<Quota>,
    /// Whether it takes no connection more under the quota in force; false where that is not known.
    pub full: bool,
    /// For how long clients have been kept from it because it does not serve; `None`: it serves.
    pub unhealthy_for: Option<Duration>,
    /// Whether it fails, and a connection may try whether it still does.
    pub wants_trial: bool,
}

/// A backend that has been unhealthy for this long gives its share to the others. A pause of its
/// garbage collection looks the same, and is over before.
pub const SHARE_GONE_AFTER: Duration = Duration::from_secs(10);

/// Whether unhealthy backends are treated as the others, because so many of all ready ones are:
/// then it is more likely that something else is wrong.
pub const fn are_too_many(unhealthy: usize, ready: usize) -> bool {
    2 * unhealthy > ready
}

impl ReadyBackend {
    /// The quota without a share: what it holds, and room for a trial. Not 0, which would close it
    /// even where the daemon is dead.
    pub(super) fn without_share(&self) -> Quota {
        let held = self.established.saturating_add(self.wants_trial.into());
        Quota::Limited(held.max(1))
    }

    /// Whether it has been unhealthy for so long that it has no share.
    pub(super) fn is_unhealthy(&self) -> bool {
        self.unhealthy_for
            .is_some_and(|time| time >= SHARE_GONE_AFTER)
    }
}

/// The quotas of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// A quota for each backend, in their order.
    pub quotas: Vec<Quota>,
    /// How the quotas come about, for an operator: one line, at most 255 bytes.
    pub sentence: String,
    /// Whether a quota is still above what it should be, because it goes down slowly.
    pub lowering: bool,
}

impl Outcome {
    /// One quota for all backends.
    pub(super) fn equal(
        quota: Quota,
        backends: &[ReadyBackend],
        sentence: impl Into<String>,
    ) -> Self {
        Self {
            quotas: vec![quota; backends.len()],
            sentence: sentence.into(),
            lowering: false,
        }
    }
}

/// How many connections there are to make room for.
#[derive(Clone, Copy)]
pub(super) enum Amount<'a> {
    /// So many clients, each with so many connections.
    Clients { clients: u32, each: u32 },
    /// So many connections, and in words how that comes about.
    Connections { connections: u64, words: &'a str },
}

impl Amount<'_> {
    pub(super) fn connections(&self) -> u64 {
        match *self {
            Self::Clients { clients, each } => u64::from(clients) * u64::from(each),
            Self::Connections { connections, .. } => connections,
        }
    }
}

/// What the clients of one service, or of one backend group, need.
pub(super) struct Demand<'a> {
    pub(super) amount: Amount<'a>,
    pub(super) headroom_percent: u32,
    pub(super) min_quota: u32,
    /// The connections established on backends that are not ready: they need room on those that
    /// are.
    pub(super) elsewhere: u64,
    /// Whether the others are to have room for the clients of one backend, the largest.
    pub(super) placed: bool,
    /// Room on every backend beyond its part, for clients that are sent to a full one again and
    /// again.
    pub(super) extra: u32,
    /// How many ready backends have no share because they are unhealthy.
    pub(super) unhealthy: usize,
}

impl Demand<'_> {
    /// The connections to make room for, in hundredths of one.
    pub(super) fn hundredths(&self) -> u128 {
        u128::from(self.amount.connections())
            .saturating_mul(100 + u128::from(self.headroom_percent))
    }

    /// The connections established now, on ready backends and on others.
    pub(super) fn established(&self, backends: &[ReadyBackend]) -> u64 {
        established(backends).saturating_add(self.elsewhere)
    }
}

pub(super) fn established(backends: &[ReadyBackend]) -> u64 {
    backends
        .iter()
        .map(|backend| u64::from(backend.established))
        .sum()
}
