//! The arithmetic: parts by weight, holding what is established, and lowering slowly.

use std::time::Duration;

use super::model::{Demand, Quota, ReadyBackend};
use crate::config::MAX_CONNECTIONS;

/// In what time a quota may go down by a tenth of itself.
const TENTH_AFTER: Duration = Duration::from_secs(60);

/// The smallest quota of which a tenth is a connection.
const SMALLEST_WITH_A_TENTH: u32 = 10;

/// A step of this many connections loses little to rounding: no need to wait for a larger one.
const STEP: u32 = 4;

/// The parts of a demand, a number for each backend.
pub(super) struct Shares {
    /// The parts by the formula alone.
    pub(super) formula: Vec<u32>,
    /// The parts raised to `min_quota`, and to what is established.
    pub(super) held: Vec<u32>,
    /// The held parts with the extra room: where the quotas should be.
    pub(super) targets: Vec<u32>,
}

impl Shares {
    /// Where the quotas of at least one backend should be.
    pub(super) fn of(demand: &Demand, backends: &[ReadyBackend]) -> Self {
        let formula = by_weight(demand.hundredths(), 100, backends, demand.placed);
        let mut held: Vec<u32> = formula
            .iter()
            .map(|part| (*part).max(demand.min_quota))
            .collect();
        // A quota below what stands ends no connection, it would only refuse everybody.
        let established = demand.established(backends);
        if sum(&held) < established {
            for (held, part) in
                held.iter_mut()
                    .zip(by_weight(established.into(), 1, backends, false))
            {
                *held = part.max(*held);
            }
        }
        Self {
            targets: with_room(demand, &held, backends),
            formula,
            held,
        }
    }
}

/// The parts with room for the starved on at least every other backend, those with the fewest
/// connections for their part: each attempt finds room with one chance in two, and the fullest are
/// left alone.
fn with_room(demand: &Demand, held: &[u32], backends: &[ReadyBackend]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..backends.len()).collect();
    order.sort_by_key(|index| i64::from(backends[*index].established) - i64::from(held[*index]));
    let mut targets = held.to_vec();
    if demand.extra == 0 {
        return targets;
    }
    for index in order.into_iter().take(backends.len().div_ceil(2)) {
        let needed = backends[index].established.saturating_add(demand.extra);
        targets[index] = held[index].max(needed.min(MAX_CONNECTIONS));
    }
    targets
}

/// Each backend's part of `amount / divisor`, rounded up; without the largest: as if that one were
/// not there. There is at least one backend.
fn by_weight(
    amount: u128,
    divisor: u128,
    backends: &[ReadyBackend],
    without_largest: bool,
) -> Vec<u32> {
    let all_0 = backends.iter().all(|backend| backend.weight == 0);
    let weight_of = |backend: &ReadyBackend| u128::from(if all_0 { 1 } else { backend.weight });
    let sum: u128 = backends.iter().map(weight_of).sum();
    let largest = backends.iter().map(weight_of).max();
    let without = largest.filter(|largest| without_largest && *largest < sum);
    let sum = sum - without.unwrap_or(0);
    let part = |backend: &ReadyBackend| {
        let weight = weight_of(backend);
        let part = amount
            .saturating_mul(weight)
            .div_ceil(divisor.saturating_mul(sum));
        u32::try_from(part).unwrap_or(u32::MAX).min(MAX_CONNECTIONS)
    };
    backends.iter().map(part).collect()
}

/// The targets, except where a previous quota is higher and may not go down so far yet.
pub(super) fn lower_slowly(
    targets: &[u32],
    backends: &[ReadyBackend],
    waited: Duration,
) -> Vec<u32> {
    let pairs = || {
        let previous = backends
            .iter()
            .map(|backend| backend.previous.and_then(Quota::limit));
        targets.iter().copied().zip(previous)
    };
    let together = pairs().all(|(target, previous)| {
        previous.is_none_or(|previous| {
            previous <= target
                || previous < SMALLEST_WITH_A_TENTH
                || may_go(previous, waited) >= STEP.min(previous / 10)
        })
    });
    let step = |(target, previous): (u32, Option<u32>)| match previous {
        Some(previous) if together || previous < SMALLEST_WITH_A_TENTH => {
            (previous - may_go(previous, waited)).max(target)
        }
        Some(previous) => previous.max(target),
        None => target,
    };
    pairs().map(step).collect()
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

pub(super) fn sum(quotas: &[u32]) -> u64 {
    quotas.iter().map(|quota| u64::from(*quota)).sum()
}
