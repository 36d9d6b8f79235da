//! What the daemon tells of this node and its cluster: to the other daemons, and to
//! `status --cluster`.

use std::collections::BTreeMap;
use std::time::Duration;

use balancer_common::abi::ticks;

use super::super::super::moves::{Departing, Departures, is_drained};
use super::group_quotas::GroupQuotas;
use super::placing::{is_placed, notes};
use super::pod_resolver::{Groups, PodResolver};
use crate::config::{Effect, Match};
use crate::dataplane::SlotView;
use crate::kubernetes::{
    BackendStatus, ClusterStatus, Endpoint, GroupId, GroupStatus, MOST_SECONDS_AGO, NodeReport,
    PlacedService, PlacingStatus, PodHealth, ReportedBackend, ReportedHealth, Restriction, SCHEMA,
    ServicePort, View,
};
use crate::quota::{SHARE_GONE_AFTER, are_too_many};
use crate::sys::clock;

/// What the other daemons should know of a node.
pub fn node_report(
    node: &str,
    slots: &[SlotView],
    resolver: &PodResolver,
    groups: &Groups,
    quotas: &GroupQuotas,
    departures: &Departures,
) -> NodeReport {
    let reported = |slot: &SlotView| {
        let departing = departures.of(slot.id());
        reported(slot, resolver.pod(slot, groups)?, departing)
    };
    let mut report = NodeReport {
        schema: SCHEMA,
        node: node.to_owned(),
        backends: slots.iter().filter_map(reported).collect(),
        ..NodeReport::default()
    };
    // What was counted together is told by those who count.
    if !report.backends.is_empty() {
        report.peaks = quotas.peaks();
        report.refused = quotas.refused_sources();
    }
    report
}

/// What the others should know of a backend; `None`: its pod has no address.
pub fn reported(
    slot: &SlotView,
    (group, endpoint): (&GroupId, &Endpoint),
    departing: Departing,
) -> Option<ReportedBackend> {
    let counts = &slot.member.counts;
    let now = ticks(clock::monotonic_ns());
    Some(ReportedBackend {
        group: group.clone(),
        pod: endpoint.pod.clone(),
        uid: endpoint.uid.clone(),
        slot: slot.slot(),
        address: endpoint.addresses.first().copied()?,
        state: slot.state().name().to_owned(),
        established: counts.established(),
        exempt: counts.exempt(),
        pending: Some(slot.expected()),
        quota: slot.limit(),
        room: slot.room(),
        health: slot.unhealthy(now).map(|(state, time)| ReportedHealth {
            state: state.name().to_owned(),
            seconds: time.as_secs().min(MOST_SECONDS_AGO),
        }),
        moving: departing.moving,
        returning: departing.returning,
        drained: is_drained(slot),
    })
}

/// What `status --cluster` shows; `own` is the report of this node, and `why_not` why it does not
/// place.
pub fn cluster_status(
    view: &View,
    own: &NodeReport,
    quotas: &GroupQuotas,
    why_not: Option<String>,
) -> ClusterStatus {
    let groups = view.groups.iter().map(|(id, endpoints)| GroupStatus {
        id: id.clone(),
        sentence: quotas.sentence(id).unwrap_or("not computed yet").to_owned(),
        starved: quotas.starved(id, view).sources,
        backends: backends(id, endpoints, view, own),
    });
    ClusterStatus {
        schema: 1,
        node: own.node.clone(),
        complete: view.complete,
        silent_seconds: view.silent_for.as_secs(),
        problems: view
            .problems
            .iter()
            .cloned()
            .chain(unfit(view, own))
            .collect(),
        groups: groups.collect(),
        placing: PlacingStatus {
            on: why_not.is_none(),
            daemons: view.daemons,
            zone: view.zone.clone(),
            services: placed_services(view, why_not.is_none()),
            why_not,
        },
    }
}

/// Why a node does not place, by its file, its mode and what the kernel has refused; `None`: it
/// does.
pub fn why_not_placing(place: bool, effect: Effect, refused: Option<&str>) -> Option<String> {
    if !place {
        return Some("`place: off`".to_owned());
    }
    match (effect, refused) {
        (Effect::Count, _) => Some("the mode is count".to_owned()),
        (_, Some(why)) => Some(why.to_owned()),
        (Effect::DryRun, None) => Some(
            "the mode is dry-run: endpoints are chosen and counted, and connects are left as they \
             are"
            .to_owned(),
        ),
        (Effect::On, None) => None,
    }
}

/// Which nodes can't be guarded, a sentence for each reason.
fn unfit(view: &View, own: &NodeReport) -> Vec<String> {
    let others = view
        .nodes
        .values()
        .filter(|received| received.is_recent() && received.node_report.node != own.node);
    let reports = others.map(|received| &*received.node_report).chain([own]);
    let mut nodes: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for report in reports {
        if let Some(why) = &report.unfit {
            nodes.entry(why).or_default().push(&report.node);
        }
    }
    let sentence = |(why, nodes): (&str, Vec<&str>)| match nodes.as_slice() {
        [node] => format!("node {node} can't be guarded: {why}"),
        _ => format!("{} can't be guarded: {why}", first_few(&nodes)),
    };
    nodes.into_iter().map(sentence).collect()
}

/// `3 nodes (a, b, c)`
fn first_few(nodes: &[&str]) -> String {
    const SHOWN: usize = 8;
    let mut shown = nodes[..nodes.len().min(SHOWN)].join(", ");
    if nodes.len() > SHOWN {
        shown += ", …";
    }
    format!("{} nodes ({shown})", nodes.len())
}

fn placed_services(view: &View, places: bool) -> Vec<PlacedService> {
    let ports = view.ports.iter();
    ports
        .map(|port| PlacedService {
            entry: port.entry.clone(),
            service: port.service.clone(),
            frontends: port.frontends.clone(),
            matching: port.matching,
            placed: places && is_placed(port),
            restrictions: restrictions(port),
            notes: notes(port, view.zone.as_deref()),
        })
        .collect()
}

fn restrictions(port: &ServicePort) -> Vec<Restriction> {
    let traffic = &port.traffic;
    let is_matched = port.matching == Match::Endpoints && !traffic.other_proxy;
    if port.frontends.is_empty() && !is_matched {
        return vec![Restriction::Headless];
    }
    let all = [
        (traffic.left_alone, Restriction::SwitchedOff),
        (traffic.affinity, Restriction::SessionAffinity),
        (port.has_others, Restriction::ForeignEndpoints),
        (traffic.own_node_only, Restriction::OwnNode),
        (
            traffic.near && !traffic.own_node_only,
            Restriction::NearFirst,
        ),
        (traffic.outside, Restriction::Outside),
    ];
    let in_force = all.into_iter().filter(|(is_so, _)| *is_so);
    in_force.map(|(_, restriction)| restriction).collect()
}

/// The pods of a group, and which of them have lost their share of a computed quota.
fn backends(
    id: &GroupId,
    endpoints: &[Endpoint],
    view: &View,
    own: &NodeReport,
) -> Vec<BackendStatus> {
    let pods = endpoints.iter();
    let pods = pods.map(|endpoint| backend_status(id, endpoint, view, own));
    let mut pods: Vec<_> = pods.collect();
    let ready = pods.iter().filter(|pod| pod.ready);
    let healths = ready.clone().filter_map(|pod| pod.health.as_ref());
    let gone = healths.filter(|health| !health.has_share).count();
    if are_too_many(gone, ready.count()) {
        let healths = pods.iter_mut().filter_map(|pod| pod.health.as_mut());
        healths.for_each(|health| health.has_share = true);
    }
    pods
}

fn pod_health(told: &ReportedHealth, seconds_ago: u64) -> PodHealth {
    let seconds = told.seconds.saturating_add(seconds_ago);
    PodHealth {
        state: told.state.clone(),
        seconds,
        has_share: Duration::from_secs(seconds) < SHARE_GONE_AFTER,
    }
}

fn backend_status(
    id: &GroupId,
    endpoint: &Endpoint,
    view: &View,
    own: &NodeReport,
) -> BackendStatus {
    // A node is believed about its own pods alone.
    let received = endpoint.node.as_ref().and_then(|node| view.nodes.get(node));
    let received = received.map(|received| (&*received.node_report, received.age.as_secs()));
    let (told, seconds_ago) = std::iter::once((own, 0))
        .chain(received)
        .find_map(|(report, seconds_ago)| Some((report.pod(id, &endpoint.uid)?, seconds_ago)))
        .unzip();
    let told: Option<ReportedBackend> = told;
    BackendStatus {
        pod: endpoint.pod.clone(),
        node: endpoint.node.clone(),
        address: endpoint.addresses.first().copied(),
        ready: endpoint.ready,
        terminating: endpoint.terminating,
        weight: endpoint.weight,
        slot: told.as_ref().map(|told| told.slot),
        state: told.as_ref().map(|told| told.state.clone()),
        established: told.as_ref().map(|told| told.established),
        exempt: told.as_ref().map(|told| told.exempt),
        pending: told.as_ref().and_then(|told| told.pending),
        quota: told.as_ref().and_then(|told| told.quota),
        room: told.as_ref().and_then(|told| told.room),
        drained: told.as_ref().map(|told| told.drained),
        moving: told.as_ref().map(|told| told.moving),
        health: told
            .and_then(|told| told.health)
            .map(|told| pod_health(&told, seconds_ago.unwrap_or(0))),
        seconds_ago,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::{ObjectName, Traffic};

    fn port(traffic: Traffic) -> ServicePort {
        ServicePort {
            entry: "agents".to_owned(),
            service: ObjectName {
                namespace: "skywalking".to_owned(),
                name: "oap".to_owned(),
            },
            frontends: vec![([10, 96, 0, 7], 11800).into()],
            matching: Match::Service,
            endpoints: Vec::new(),
            has_others: false,
            traffic,
        }
    }

    #[test]
    fn each_setting_that_matters_is_a_restriction() {
        assert_eq!(restrictions(&port(Traffic::default())), []);
        let everything = port(Traffic {
            own_node_only: false,
            affinity: true,
            left_alone: true,
            near: true,
            outside: true,
            other_proxy: false,
        });
        let everything = ServicePort {
            has_others: true,
            ..everything
        };
        assert_eq!(
            restrictions(&everything),
            [
                Restriction::SwitchedOff,
                Restriction::SessionAffinity,
                Restriction::ForeignEndpoints,
                Restriction::NearFirst,
                Restriction::Outside,
            ]
        );
        let own_node = port(Traffic {
            own_node_only: true,
            near: true,
            ..Traffic::default()
        });
        assert_eq!(restrictions(&own_node), [Restriction::OwnNode]);
        let headless = ServicePort {
            frontends: Vec::new(),
            ..everything
        };
        assert_eq!(restrictions(&headless), [Restriction::Headless]);
        let mut matched = ServicePort {
            matching: Match::Endpoints,
            traffic: Traffic::default(),
            has_others: false,
            ..headless
        };
        assert_eq!(restrictions(&matched), []);
        matched.traffic.other_proxy = true;
        assert_eq!(restrictions(&matched), [Restriction::Headless]);
    }

    #[test]
    fn why_nobody_is_placed_is_one_sentence() {
        let why = why_not_placing;
        assert_eq!(why(true, Effect::On, None), None);
        let off = why(false, Effect::On, Some("refused"));
        assert_eq!(off.as_deref(), Some("`place: off`"));
        let count = why(true, Effect::Count, None);
        assert_eq!(count.as_deref(), Some("the mode is count"));
        for effect in [Effect::On, Effect::DryRun] {
            let refused = why(true, effect, Some("refused"));
            assert_eq!(refused.as_deref(), Some("refused"));
        }
        let dry = why(true, Effect::DryRun, None);
        assert!(dry.is_some_and(|why| why.contains("dry-run")));
    }
}
