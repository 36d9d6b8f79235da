//! Quotas of a group of backends that are spread over the nodes of a cluster.

use std::time::Duration;

use super::{
    NONE_READY, ONE_READY, Outcome, Quota, Ready, all,
    sentence::{Connections, Explained, Spread, What},
    share::{Demand, established},
};
use crate::config::{ClusterInput, ClusterQuota};

/// How long the API server may be silent before what it said last counts as old. A watch that breaks is up again within seconds.
const OLD_AFTER: Duration = Duration::from_secs(15);

/// How many connections there are to make room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Total {
    /// The number.
    pub connections: u64,
    /// How that comes about: `observed`, or a sum as `180 pods × 1 + 11 pods × 3`, which may be cut behind a ` + `.
    pub words: String,
}

/// What is known of a group besides its ready backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// How many connections there are to make room for; `None`: not known. Not looked at where the rule itself says it.
    pub total: Option<Total>,
    /// What is established on backends that are not ready: their clients need room on those that are.
    pub established_elsewhere: u64,
    /// How many sources have been [refused for long](super::starved::ROOM_AFTER), wherever they went.
    pub refused_for_long: u32,
    /// No ready backend of the whole cluster would take another connection under the quotas in force.
    pub all_full: bool,
    /// How long the API server has not been heard of.
    pub silent_for: Duration,
    /// For how long quotas hold while it is silent.
    pub hold_for: Duration,
}

/// The quotas of the backends of one group that are ready, on whatever node.
///
/// Shared out as [`compute`](super::compute) does it, whose words on `since_previous` apply, and with the same numbers on every node:
/// `ceil(total × (1 + headroom) / ready backends)` in proportion to weight, at least `min_quota`, and never so low that the sum is less than what
/// is established now, on backends that are not ready too. Each has room for one more for every source that has been refused for long. Raised at once and lowered by at most 10 % a minute. A backend of another node has no
/// `previous`: what comes out for it is where its quota should be, and of no further use here.
///
/// Unlimited while nothing is known, with one ready backend, and once the API server has been silent for longer than `hold_for`. Before that,
/// while it is silent, quotas are raised but not lowered, for nobody knows who is there.
///
/// Unlimited also while every ready backend is full, for then a refused client has nowhere to go. Nobody is full without a quota, so what was
/// opened stays open until the numbers that would be in force instead leave room somewhere.
pub fn compute_cluster(
    rule: &ClusterQuota,
    known: &Known,
    ready: &[Ready],
    since_previous: Duration,
) -> Outcome {
    match rule {
        ClusterQuota::Unlimited => all(Quota::Unlimited, ready, "no quota is set: counting only"),
        ClusterQuota::Fixed(limit) => all(
            Quota::Limited(*limit),
            ready,
            format!("fixed: {limit} for each backend"),
        ),
        ClusterQuota::Shared {
            input,
            headroom_percent,
            min_quota,
        } => {
            let words = known.total.as_ref().map(|total| one_line(&total.words));
            let what = match (input, &known.total) {
                (
                    ClusterInput::Clients {
                        clients,
                        connections_per_client,
                    },
                    _,
                ) => What::Clients {
                    clients: *clients,
                    each: *connections_per_client,
                },
                (_, total) => What::Connections {
                    connections: total.as_ref().map_or(0, |total| total.connections),
                    words: words.as_deref().unwrap_or_default(),
                },
            };
            let demand = Demand {
                what,
                headroom_percent: *headroom_percent,
                min_quota: *min_quota,
                elsewhere: known.established_elsewhere,
                more: known.refused_for_long,
            };
            if let Some(why) = why_open(input, known, &demand, ready) {
                return all(Quota::Unlimited, ready, why);
            }
            if known.silent_for > OLD_AFTER {
                return held(known, &demand, ready);
            }
            demand.share(ready, since_previous)
        }
    }
}

/// Why nobody has a quota, if so.
fn why_open(
    input: &ClusterInput,
    known: &Known,
    demand: &Demand,
    ready: &[Ready],
) -> Option<String> {
    match ready.len() {
        0 => return Some(NONE_READY.to_owned()),
        1 => return Some(ONE_READY.to_owned()),
        _ => {}
    }
    if known.silent_for > known.hold_for {
        return Some(format!(
            "unlimited: the API server has not been heard of for {}, longer than hold_for ({})",
            time(known.silent_for),
            time(known.hold_for)
        ));
    }
    if demand.what.connections() == 0 {
        let nothing = match input {
            ClusterInput::Clients { .. } => "how many clients there are is not known",
            ClusterInput::Pods(_) => "no pod that `pods` selects is known",
            ClusterInput::Observed { .. } => "no connection has been observed",
        };
        return Some(format!("unlimited: {nothing}"));
    }
    if known.all_full || still_full(demand, ready) {
        return Some(format!(
            "unlimited: {} established and none of the {} ready backends has room for another",
            Connections(established(ready)),
            ready.len()
        ));
    }
    None
}

/// Whether somebody here was opened, and would be full again, as everybody else, with a quota.
fn still_full(demand: &Demand, ready: &[Ready]) -> bool {
    let opened = |backend: &Ready| backend.previous == Some(Quota::Unlimited);
    ready.iter().any(opened)
        && ready
            .iter()
            .zip(demand.shares(ready).targets)
            .all(|(backend, target)| backend.established >= target)
}

/// Quotas while the API server is silent: those that were, unless a higher one is due.
fn held(known: &Known, demand: &Demand, ready: &[Ready]) -> Outcome {
    let shares = demand.shares(ready);
    let quotas: Vec<Quota> = ready
        .iter()
        .zip(&shares.targets)
        .map(|(backend, target)| match backend.previous {
            Some(Quota::Unlimited) => Quota::Unlimited,
            Some(Quota::Limited(previous)) => Quota::Limited(previous.max(*target)),
            None => Quota::Limited(*target),
        })
        .collect();
    let explained = Explained {
        demand,
        backends: ready,
        shares: &shares,
        quotas: &shares.targets,
    };
    let start = format!(
        "held: the API server has not been heard of for {}; ",
        time(known.silent_for)
    );
    Outcome {
        sentence: explained.between(&start, &kept(&quotas, &shares.targets)),
        quotas,
        lowering: false,
    }
}

/// Which quotas there are in the end, where they are not the targets.
fn kept(quotas: &[Quota], targets: &[u32]) -> String {
    let limits: Vec<u32> = quotas.iter().filter_map(|quota| quota.limit()).collect();
    match (limits.is_empty(), limits.len() < quotas.len()) {
        (true, _) => "; unlimited as before".to_owned(),
        (_, true) => format!("; not lowered: {} or unlimited as before", Spread(&limits)),
        _ if limits != targets => format!("; not lowered: {} now", Spread(&limits)),
        _ => String::new(),
    }
}

fn one_line(words: &str) -> String {
    words.replace(char::is_control, " ")
}

/// A time in whole seconds, as an operator would write it: `5m 10s`.
fn time(time: Duration) -> String {
    let seconds = time.as_secs();
    let parts: Vec<String> = [
        (seconds / 3600, "h"),
        (seconds / 60 % 60, "m"),
        (seconds % 60, "s"),
    ]
    .into_iter()
    .filter(|(number, _)| *number > 0)
    .map(|(number, unit)| format!("{number}{unit}"))
    .collect();
    if parts.is_empty() {
        return "0s".to_owned();
    }
    parts.join(" ")
}
