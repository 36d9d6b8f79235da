//! The arithmetic of shares: by weight, holding what is established, and lowering slowly.

use std::time::Duration;

use super::{
    Outcome, Quota, Ready,
    sentence::{Explained, What},
};
use crate::config::MAX_CONNECTIONS;

/// In what time a quota may go down by a tenth of itself.
const TENTH_AFTER: Duration = Duration::from_secs(60);

/// The smallest quota of which a tenth is a connection.
const SMALLEST_WITH_A_TENTH: u32 = 10;

/// A step of this many connections loses little to rounding, so there is no need to wait for a larger one.
const STEP: u32 = 4;

/// What the clients of one service, or of one group of a cluster, need.
pub(super) struct Demand<'a> {
    pub(super) what: What<'a>,
    pub(super) headroom_percent: u32,
    pub(super) min_quota: u32,
    /// What is established on backends that are not ready: it needs room on those that are.
    pub(super) elsewhere: u64,
    /// Room that each backend has on top of its share, for clients that are sent to a full one again and again.
    pub(super) more: u32,
}

/// The parts of a demand, a number for each backend.
pub(super) struct Shares {
    /// By the formula alone.
    pub(super) formula: Vec<u32>,
    /// With `min_quota` and what is established.
    pub(super) held: Vec<u32>,
    /// With the room on top: where the quotas should be.
    pub(super) targets: Vec<u32>,
}

impl Demand<'_> {
    /// Shares the demand among at least one backend.
    pub(super) fn share(&self, backends: &[Ready], since_previous: Duration) -> Outcome {
        let shares = self.shares(backends);
        let quotas = lower_slowly(&shares.targets, backends, since_previous);
        let explained = Explained {
            demand: self,
            backends,
            shares: &shares,
            quotas: &quotas,
        };
        Outcome {
            sentence: explained.sentence(),
            lowering: quotas != shares.targets,
            quotas: quotas.into_iter().map(Quota::Limited).collect(),
        }
    }

    /// Where the quotas of at least one backend should be.
    pub(super) fn shares(&self, backends: &[Ready]) -> Shares {
        let formula = by_weight(self.hundredths(), 100, backends);
        let least = formula
            .iter()
            .map(|share| (*share).max(self.min_quota))
            .collect();
        let held = hold(least, self.established(backends), backends);
        let more = |target: u32| target.saturating_add(self.more).min(MAX_CONNECTIONS);
        Shares {
            targets: held.iter().copied().map(more).collect(),
            formula,
            held,
        }
    }

    /// The connections to make room for, in hundredths of one.
    fn hundredths(&self) -> u128 {
        u128::from(self.what.connections()).saturating_mul(100 + u128::from(self.headroom_percent))
    }

    /// What is established now, wherever it is.
    pub(super) fn established(&self, backends: &[Ready]) -> u64 {
        established(backends).saturating_add(self.elsewhere)
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
fn hold(targets: Vec<u32>, established: u64, backends: &[Ready]) -> Vec<u32> {
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

pub(super) fn established(backends: &[Ready]) -> u64 {
    backends
        .iter()
        .map(|ready| u64::from(ready.established))
        .sum()
}
