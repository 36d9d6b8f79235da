//! The quotas of the ready backends of one service, on one host or in a whole cluster.

use std::time::Duration;

use super::model::{Amount, Demand, Outcome, Quota, ReadyBackend, are_too_many, established};
use super::sentence::{Connections, Spread, sentence};
use super::share::{Shares, lower_slowly};
use crate::config::{ClusterInput, ClusterQuota, QuotaRule};

/// How long the API server may be silent before what it said last counts as old. A watch that
/// breaks is up again within seconds.
const OLD_AFTER: Duration = Duration::from_secs(15);

/// How many connections there are to make room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Total {
    /// The number of connections.
    pub connections: u64,
    /// How the number comes about: `observed`, or a sum as `180 pods × 1 + 11 pods × 3`, which may
    /// be cut behind a ` + `.
    pub words: String,
}

/// What is known of a backend group besides its ready backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// How many connections there are to make room for; `None`: not known. Not looked at where the
    /// rule itself says it.
    pub total: Option<Total>,
    /// The connections established on backends that are not ready: their clients need room on those
    /// that are.
    pub established_elsewhere: u64,
    /// Whether the clients' nodes place their connections.
    pub placed: bool,
    /// How many sources have been [refused for long](super::starved::ROOM_AFTER), wherever they
    /// went.
    pub refused_for_long: u32,
    /// How many ready backends no daemon has reported yet, where their connections are needed.
    pub unreported: usize,
    /// How long the API server has not been heard of.
    pub silent_for: Duration,
    /// For how long quotas hold while it is silent.
    pub hold_for: Duration,
}

/// The quotas of the backends of one service that are ready.
///
/// A computed quota is `ceil(clients × connections_per_client × (1 + headroom) / ready backends)`,
/// in proportion to weight, at least `min_quota`, and never so low that the sum is less than what
/// is established now. With no clients known, or with one ready backend, it is unlimited. It is
/// raised at once and lowered by at most 10 % a minute. A fixed quota is taken as it is.
///
/// Computed quotas are unlimited also while every ready backend is full, for then a refused client
/// has nowhere to go. Nobody is full without a quota, so what was opened stays open until the
/// numbers that would be in force instead leave room somewhere.
///
/// A backend that has been unhealthy for [`SHARE_GONE_AFTER`] takes nobody more: its share goes to
/// the others, with room for its clients. Where more than half are unhealthy, all are treated
/// alike: then it is more likely that something else is wrong.
///
/// `waited` is how long the `previous` quotas have been waiting to go down. It is not the time
/// since the last call: quotas are whole numbers, and a tenth a minute may take many seconds to
/// make one connection. The caller restarts that clock whenever an outcome differs from the one
/// before, and at every outcome that is not [`lowering`](Outcome::lowering).
///
/// Quotas that go down do so together, in steps of a few connections or of a tenth, whichever is
/// less (those below 10 on their own, by one), so that they stay in proportion and no restart of
/// the clock starves one.
pub fn compute(rule: &QuotaRule, backends: &[ReadyBackend], waited: Duration) -> Outcome {
    let unlimited = |why| Outcome::equal(Quota::Unlimited, backends, why);
    match *rule {
        QuotaRule::Unlimited => unlimited("no quota is set: steering only"),
        QuotaRule::Fixed(limit) => fixed(limit, backends),
        QuotaRule::Computed {
            clients: None | Some(0),
            ..
        } => unlimited("unlimited: how many clients there are is not known (set `clients`)"),
        QuotaRule::Computed {
            clients: Some(clients),
            connections_per_client: each,
            headroom_percent,
            min_quota,
        } => {
            let demand = Demand {
                amount: Amount::Clients { clients, each },
                headroom_percent,
                min_quota,
                elsewhere: 0,
                placed: false,
                extra: 0,
                unhealthy: 0,
            };
            share_out(&demand, backends, |demand, sharing| {
                match too_few(demand, sharing).or_else(|| nobody_has_room(demand, sharing)) {
                    Some(why) => Outcome::equal(Quota::Unlimited, sharing, why),
                    None => lowered_slowly(demand, sharing, waited),
                }
            })
        }
    }
}

/// The quotas of the backends of one group that are ready, on whatever node.
///
/// They come about as [`compute`] does it, whose words on `waited` apply, and with the same numbers
/// on every node: `ceil(total × (1 + headroom) / ready backends)` in proportion to weight, at least
/// `min_quota`, and never so low that the sum is less than what is established now, on backends
/// that are not ready too. Where clients are placed, evenness is not for quotas to see to: they
/// only stop what goes wrong. One fewer is divided by, so that the clients of a backend that ends
/// find room at the others before anybody has computed anew. Each has room for one more for every
/// source that has been refused for long. A backend of another node has no `previous`: what comes
/// out for it is where its quota should be, and of no further use here.
///
/// As before until the connections of all ready backends are known.
///
/// Unlimited while nothing is known, with one ready backend, and once the API server has been
/// silent for longer than `hold_for`. Before that, while it is silent, quotas are raised but not
/// lowered, for nobody knows who is there.
///
/// Unlimited also while every ready backend is full, as [`compute`] says it, which also says what
/// becomes of unhealthy ones.
pub fn compute_cluster(
    rule: &ClusterQuota,
    known: &Known,
    ready: &[ReadyBackend],
    waited: Duration,
) -> Outcome {
    let unlimited = |why| Outcome::equal(Quota::Unlimited, ready, why);
    let (input, headroom_percent, min_quota) = match rule {
        ClusterQuota::Unlimited => return unlimited("no quota is set: counting only".to_owned()),
        ClusterQuota::Fixed(limit) => return fixed(*limit, ready),
        ClusterQuota::Shared {
            input,
            headroom_percent,
            min_quota,
        } => (input, *headroom_percent, *min_quota),
    };
    if known.unreported > 0 {
        return as_before(known.unreported, ready);
    }
    let total = known.total.as_ref();
    let words = total.map_or_else(String::new, |total| one_line(&total.words));
    let amount = match *input {
        ClusterInput::Clients {
            clients,
            connections_per_client: each,
        } => Amount::Clients { clients, each },
        ClusterInput::Pods(_) | ClusterInput::Observed { .. } => Amount::Connections {
            connections: total.map_or(0, |total| total.connections),
            words: &words,
        },
    };
    let demand = Demand {
        amount,
        headroom_percent,
        min_quota,
        elsewhere: known.established_elsewhere,
        placed: known.placed,
        extra: known.refused_for_long,
        unhealthy: 0,
    };
    share_out(&demand, ready, |demand, sharing| {
        match why_open(input, known, demand, sharing) {
            Some(why) => Outcome::equal(Quota::Unlimited, sharing, why),
            None if known.silent_for > OLD_AFTER => held(known, demand, sharing),
            None => lowered_slowly(demand, sharing, waited),
        }
    })
}

/// Computes the quotas of those that have a share; the others keep what they hold.
fn share_out(
    demand: &Demand,
    ready: &[ReadyBackend],
    compute: impl FnOnce(&Demand, &[ReadyBackend]) -> Outcome,
) -> Outcome {
    let unhealthy = ready.iter().filter(|backend| backend.is_unhealthy());
    let (unhealthy, theirs) = unhealthy.fold((0, 0), |(count, sum), backend| {
        (count + 1, sum + u64::from(backend.established))
    });
    if unhealthy == 0 || are_too_many(unhealthy, ready.len()) {
        return compute(demand, ready);
    }
    let sharing = ready.iter().filter(|backend| !backend.is_unhealthy());
    let sharing: Vec<ReadyBackend> = sharing.copied().collect();
    let demand = Demand {
        elsewhere: demand.elsewhere.saturating_add(theirs),
        unhealthy,
        ..*demand
    };
    let outcome = compute(&demand, &sharing);
    let mut shares = outcome.quotas.iter();
    let quota = |backend: &ReadyBackend| {
        if backend.is_unhealthy() {
            backend.without_share()
        } else {
            shares.next().copied().unwrap_or(Quota::Unlimited)
        }
    };
    Outcome {
        quotas: ready.iter().map(quota).collect(),
        ..outcome
    }
}

fn fixed(limit: u32, backends: &[ReadyBackend]) -> Outcome {
    let sentence = format!("fixed: {limit} for each backend");
    Outcome::equal(Quota::Limited(limit), backends, sentence)
}

/// Why so few backends have no quota, if so.
fn too_few(demand: &Demand, backends: &[ReadyBackend]) -> Option<String> {
    let ready = match demand.unhealthy {
        0 => "ready",
        _ => "ready and healthy",
    };
    match backends.len() {
        0 => Some(format!("no backend is {ready}: nothing to share out")),
        1 => Some(format!(
            "unlimited: one backend is {ready}, a refused client would have nowhere else to go"
        )),
        _ => None,
    }
}

/// The parts of the demand, except where a previous quota may not go down so far yet.
fn lowered_slowly(demand: &Demand, backends: &[ReadyBackend], waited: Duration) -> Outcome {
    let shares = Shares::of(demand, backends);
    let quotas = lower_slowly(&shares.targets, backends, waited);
    let lowering = quotas != shares.targets;
    let end = if lowering {
        format!(
            "; lowered by at most 10 % a minute: {} now",
            Spread(&quotas)
        )
    } else {
        String::new()
    };
    Outcome {
        sentence: sentence("", demand, backends, &shares, &end),
        quotas: quotas.into_iter().map(Quota::Limited).collect(),
        lowering,
    }
}

/// Quotas stay, where there are any, until all daemons have reported what there is to share out.
fn as_before(unreported: usize, ready: &[ReadyBackend]) -> Outcome {
    let previous = |backend: &ReadyBackend| backend.previous.unwrap_or(Quota::Unlimited);
    Outcome {
        quotas: ready.iter().map(previous).collect(),
        sentence: format!(
            "as before: the daemons of {unreported} of {} ready pods have not told yet",
            ready.len()
        ),
        lowering: false,
    }
}

/// Why nobody has a quota, if so.
fn why_open(
    input: &ClusterInput,
    known: &Known,
    demand: &Demand,
    ready: &[ReadyBackend],
) -> Option<String> {
    if let Some(why) = too_few(demand, ready) {
        return Some(why);
    }
    if known.silent_for > known.hold_for {
        return Some(format!(
            "unlimited: the API server has not been heard of for {}, longer than hold_for ({})",
            time(known.silent_for),
            time(known.hold_for)
        ));
    }
    if demand.amount.connections() == 0 {
        let nothing = match input {
            ClusterInput::Clients { .. } => "how many clients there are is not known",
            ClusterInput::Pods(_) => "no pod that `pods` selects is known",
            ClusterInput::Observed { .. } => "no connection has been observed",
        };
        return Some(format!("unlimited: {nothing}"));
    }
    nobody_has_room(demand, ready)
}

/// Why everybody is open because everybody would be full, if so.
fn nobody_has_room(demand: &Demand, ready: &[ReadyBackend]) -> Option<String> {
    let all_full = ready.iter().all(|backend| backend.full);
    (all_full || still_full(demand, ready)).then(|| {
        format!(
            "unlimited: {} established and none of the {} ready backends has room for another",
            Connections(established(ready)),
            ready.len()
        )
    })
}

/// Whether somebody here was opened, and would be full again, as everybody else, with a quota.
fn still_full(demand: &Demand, ready: &[ReadyBackend]) -> bool {
    let opened = |backend: &ReadyBackend| backend.previous == Some(Quota::Unlimited);
    let targets = || Shares::of(demand, ready).targets;
    ready.iter().any(opened)
        && (ready.iter().zip(targets())).all(|(backend, target)| backend.established >= target)
}

/// Quotas while the API server is silent: those that were, unless a higher one is due.
fn held(known: &Known, demand: &Demand, ready: &[ReadyBackend]) -> Outcome {
    let shares = Shares::of(demand, ready);
    let hold = |(backend, target): (&ReadyBackend, &u32)| match backend.previous {
        Some(Quota::Unlimited) => Quota::Unlimited,
        Some(Quota::Limited(previous)) => Quota::Limited(previous.max(*target)),
        None => Quota::Limited(*target),
    };
    let quotas: Vec<Quota> = ready.iter().zip(&shares.targets).map(hold).collect();
    let silence = time(known.silent_for);
    let start = format!("held: the API server has not been heard of for {silence}; ");
    let end = kept(&quotas, &shares.targets);
    Outcome {
        sentence: sentence(&start, demand, ready, &shares, &end),
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
    let parts = [
        (seconds / 3600, "h"),
        (seconds / 60 % 60, "m"),
        (seconds % 60, "s"),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(number, _)| *number > 0)
        .map(|(number, unit)| format!("{number}{unit}"))
        .collect();
    if parts.is_empty() {
        "0s".to_owned()
    } else {
        parts.join(" ")
    }
}
