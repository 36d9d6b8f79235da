//! Quotas: from a rule and what is known of the backends to a number for each, and the sentence that explains it. Pure.

use std::{fmt, time::Duration};

use crate::config::{MAX_CONNECTIONS, QuotaRule};

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

/// In what time a quota may go down by a tenth of itself.
const TENTH_AFTER: Duration = Duration::from_secs(60);

/// The smallest quota of which a tenth is a connection.
const SMALLEST_WITH_A_TENTH: u32 = 10;

/// A step of this many connections loses little to rounding, so there is no need to wait for a larger one.
const STEP: u32 = 4;

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
        QuotaRule::Computed { .. } if backends.is_empty() => all(
            Quota::Unlimited,
            backends,
            "no backend is ready: nothing to share out",
        ),
        QuotaRule::Computed { .. } if backends.len() == 1 => all(
            Quota::Unlimited,
            backends,
            "unlimited: one backend is ready, a refused client would have nowhere else to go",
        ),
        QuotaRule::Computed {
            clients: Some(clients),
            connections_per_client,
            headroom_percent,
            min_quota,
        } => Demand {
            clients,
            connections_per_client,
            headroom_percent,
            min_quota,
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

/// What the clients of one service need.
struct Demand {
    clients: u32,
    connections_per_client: u32,
    headroom_percent: u32,
    min_quota: u32,
}

impl Demand {
    /// Shares the demand among at least one backend.
    fn share(&self, backends: &[Ready], since_previous: Duration) -> Outcome {
        let shares = by_weight(self.hundredths(), 100, backends);
        let least: Vec<u32> = shares
            .iter()
            .map(|share| (*share).max(self.min_quota))
            .collect();
        let targets = hold(least, backends);
        let quotas = lower_slowly(&targets, backends, since_previous);
        let explained = Explained {
            demand: self,
            backends,
            shares: &shares,
            targets: &targets,
            quotas: &quotas,
        };
        Outcome {
            sentence: explained.to_string(),
            lowering: quotas != targets,
            quotas: quotas.into_iter().map(Quota::Limited).collect(),
        }
    }

    /// The connections to make room for, in hundredths of one.
    fn hundredths(&self) -> u128 {
        let connections = u128::from(self.clients) * u128::from(self.connections_per_client);
        connections.saturating_mul(100 + u128::from(self.headroom_percent))
    }
}

/// Each backend's part of `amount / divisor`, rounded up. There is at least one backend.
fn by_weight(amount: u128, divisor: u128, backends: &[Ready]) -> Vec<u32> {
    let sum: u128 = backends.iter().map(|ready| u128::from(ready.weight)).sum();
    let part = |weight: u128, sum: u128| {
        let part = amount
            .saturating_mul(weight)
            .div_ceil(divisor.saturating_mul(sum));
        u32::try_from(part).unwrap_or(u32::MAX).min(MAX_CONNECTIONS)
    };
    let weighted = |ready: &Ready| match sum {
        0 => part(1, backends.len() as u128),
        sum => part(ready.weight.into(), sum),
    };
    backends.iter().map(weighted).collect()
}

/// Raises targets whose sum is less than what is established now: a quota below what stands sheds
/// nobody, it would only refuse everybody.
fn hold(targets: Vec<u32>, backends: &[Ready]) -> Vec<u32> {
    let established = established(backends);
    if sum(&targets) >= established {
        return targets;
    }
    let held = by_weight(established.into(), 1, backends);
    targets
        .into_iter()
        .zip(held)
        .map(|(target, held)| target.max(held))
        .collect()
}

/// The targets, except where a previous quota is higher and may not go down so far yet.
fn lower_slowly(targets: &[u32], backends: &[Ready], since_previous: Duration) -> Vec<u32> {
    let previous = |ready: &Ready| ready.previous.and_then(Quota::limit);
    let together = targets.iter().zip(backends).all(|(target, ready)| {
        previous(ready).is_none_or(|previous| {
            previous <= *target
                || previous < SMALLEST_WITH_A_TENTH
                || may_go(previous, since_previous) >= STEP.min(previous / 10)
        })
    });
    let step = |(target, ready): (&u32, &Ready)| match previous(ready) {
        Some(previous) if previous > *target => {
            let moves = together || previous < SMALLEST_WITH_A_TENTH;
            let lowered = if moves {
                previous - may_go(previous, since_previous)
            } else {
                previous
            };
            lowered.max(*target)
        }
        _ => *target,
    };
    targets.iter().zip(backends).map(step).collect()
}

/// By how much a quota that has waited this long may go down: a tenth a minute, and no more than a
/// minute's worth (where that is less than a connection: one) however long it has waited.
fn may_go(quota: u32, waited: Duration) -> u32 {
    let accrued =
        u128::from(quota).saturating_mul(waited.as_millis()) / (10 * TENTH_AFTER.as_millis());
    u32::try_from(accrued)
        .unwrap_or(u32::MAX)
        .min((quota / 10).max(1))
        .min(quota)
}

fn sum(quotas: &[u32]) -> u64 {
    quotas.iter().map(|quota| u64::from(*quota)).sum()
}

fn established(backends: &[Ready]) -> u64 {
    backends
        .iter()
        .map(|ready| u64::from(ready.established))
        .sum()
}

/// The sentence about computed quotas: the formula with its numbers, then what moved the result.
struct Explained<'a> {
    demand: &'a Demand,
    backends: &'a [Ready],
    /// By the formula alone.
    shares: &'a [u32],
    /// With `min_quota` and what is established.
    targets: &'a [u32],
    /// With slow lowering.
    quotas: &'a [u32],
}

impl Explained<'_> {
    fn formula(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Demand {
            clients,
            connections_per_client,
            headroom_percent,
            ..
        } = self.demand;
        write!(f, "ceil({clients} clients × {connections_per_client}")?;
        if *headroom_percent > 0 {
            write!(f, " × {}", Factor(*headroom_percent))?;
        }
        let ready = self.backends.len();
        let weight = self.backends[0].weight;
        if self.backends.iter().all(|backend| backend.weight == weight) {
            write!(f, " / {ready} ready)")
        } else {
            let sum: u64 = self
                .backends
                .iter()
                .map(|backend| u64::from(backend.weight))
                .sum();
            write!(f, " × weight / {sum}, {ready} ready)")
        }
    }
}

impl fmt::Display for Explained<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.formula(f)?;
        write!(f, " = {}", Spread(self.shares))?;
        let min_quota = self.demand.min_quota;
        if self.shares.iter().any(|share| *share < min_quota) {
            write!(f, "; at least min_quota {min_quota}")?;
        }
        let unheld: u64 = self
            .shares
            .iter()
            .map(|share| u64::from((*share).max(min_quota)))
            .sum();
        let established = established(self.backends);
        if unheld < established {
            let held = Spread(self.targets);
            write!(f, "; held at {held} because {established} are established")?;
        }
        if self.quotas != self.targets {
            write!(
                f,
                "; lowered by at most 10 % a minute: {} now",
                Spread(self.quotas)
            )?;
        }
        Ok(())
    }
}

/// 1 + this many percent, as short as it is exact.
struct Factor(u32);

impl fmt::Display for Factor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hundredths = 100 + u64::from(self.0);
        let (whole, rest) = (hundredths / 100, hundredths % 100);
        match (rest, rest % 10) {
            (0, _) => write!(f, "{whole}"),
            (_, 0) => write!(f, "{whole}.{}", rest / 10),
            _ => write!(f, "{whole}.{rest:02}"),
        }
    }
}

/// Numbers that are mostly the same: the one, or the smallest and the largest.
struct Spread<'a>(&'a [u32]);

impl fmt::Display for Spread<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let least = self.0.iter().min().copied().unwrap_or_default();
        let most = self.0.iter().max().copied().unwrap_or_default();
        if least == most {
            write!(f, "{least}")
        } else {
            write!(f, "{least} to {most}")
        }
    }
}

#[cfg(test)]
mod tests;
