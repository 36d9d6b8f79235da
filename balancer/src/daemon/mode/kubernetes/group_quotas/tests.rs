//! Quotas of a group by what daemons of other nodes report.

use std::sync::Arc;

use balancer_common::abi::{Backend, BackendState, Counts, Health, SlotPolicy, SlotState};
use balancer_common::decision::member::Member;
use proptest::prelude::*;

use super::super::super::super::moves::Departing;
use super::super::fuzzing::{endpoint, entry, group};
use super::super::report::reported;
use super::*;
use crate::config::ClusterService;
use crate::kubernetes::{
    Endpoint, NodeReport, ObjectName, ReceivedReport, ReportedBackend, ReportedHealth,
};
use crate::quota::Quota;

const HOLD_FOR: Duration = Duration::from_secs(300);

/// A cluster with one pod on each of three nodes, seen from a node without any.
struct Seen {
    entry: ClusterService,
    id: GroupId,
    view: View,
    quotas: GroupQuotas,
}

impl Seen {
    fn new() -> Self {
        let id = group();
        let mut view = View {
            complete: true,
            ..View::default()
        };
        let endpoints = ["b", "c", "d"].map(endpoint_on).to_vec();
        view.groups.insert(id.clone(), endpoints);
        Self {
            entry: entry(),
            id,
            view,
            quotas: GroupQuotas::new(),
        }
    }

    /// What the daemon of this node says of these pods, by the node that each is on.
    fn reports(&mut self, node: &str, pods: &[(&str, u32, Option<u32>)]) -> &mut NodeReport {
        let group = &self.id;
        let backend = |&(of, established, room): &(&str, u32, Option<u32>)| ReportedBackend {
            group: group.clone(),
            pod: endpoint_on(of).pod,
            uid: endpoint_on(of).uid,
            slot: 0,
            address: endpoint_on(of).addresses[0],
            state: "active".into(),
            established,
            exempt: 0,
            pending: Some(0),
            quota: None,
            room,
            health: None,
            moving: 0,
            returning: 0,
            drained: false,
        };
        let node_report = NodeReport {
            schema: 1,
            node: node.into(),
            backends: pods.iter().map(backend).collect(),
            ..NodeReport::default()
        };
        let age = Duration::ZERO;
        let node_report = Arc::new(node_report);
        let received = ReceivedReport { age, node_report };
        self.view.nodes.insert(node.into(), received);
        Arc::make_mut(&mut self.view.nodes.get_mut(node).unwrap().node_report)
    }

    fn peak(&self, connections: u64, seconds_ago: u64) -> Peak {
        Peak {
            group: self.id.clone(),
            connections,
            seconds_ago,
        }
    }

    fn compute(&mut self) -> Outcome {
        let group = Group::new(
            &self.id,
            &self.entry,
            &self.view,
            Vec::new(),
            &Departures::default(),
        );
        self.quotas.compute(&group, &self.view, false, HOLD_FOR)
    }

    #[track_caller]
    fn gives(&mut self, quota: u32) {
        let outcome = self.compute();
        assert_eq!(outcome.quotas[0], Quota::Limited(quota), "{outcome:?}");
    }
}

fn endpoint_on(node: &str) -> Endpoint {
    let number = node.bytes().next().unwrap();
    Endpoint {
        pod: ObjectName {
            namespace: "sw".into(),
            name: format!("oap-{node}"),
        },
        uid: format!("uid-{node}"),
        addresses: vec![[10, 0, 0, number].into()],
        ..endpoint(node)
    }
}

#[test]
fn ages_without_end_are_no_panic() {
    let mut seen = Seen::new();
    let peak = seen.peak(90, u64::MAX);
    let refused = RefusedSource {
        group: seen.id.clone(),
        source: [10, 9, 0, 1].into(),
        first_seconds_ago: u64::MAX,
        last_seconds_ago: u64::MAX,
        longest_pause_seconds: u64::MAX,
        before_seconds_ago: Some(u64::MAX),
    };
    let report = seen.reports("b", &[("b", 30, None)]);
    report.peaks.push(peak);
    report.refused.push(refused);
    seen.view.nodes.get_mut("b").unwrap().age = Duration::from_secs(1);
    seen.reports("c", &[("c", 30, None)]);
    seen.reports("d", &[("d", 30, None)]);
    seen.gives(30);
}

#[test]
fn a_peak_is_believed_up_to_four_times_what_the_others_count_and_goes_with_who_says_it() {
    let mut seen = Seen::new();
    for node in ["b", "c", "d"] {
        seen.reports(node, &[(node, 1500, None)]);
    }
    seen.gives(1500);
    let honest = seen.peak(6000, 60);
    seen.reports("c", &[("c", 1500, None)]).peaks.push(honest);
    seen.gives(2000);
    let lie = seen.peak(u64::MAX, 0);
    seen.reports("d", &[("d", 1500, None)]).peaks.push(lie);
    seen.gives(4000);
    assert_eq!(
        seen.quotas.peaks()[0].connections,
        4500,
        "none is passed on"
    );
    seen.reports("d", &[("d", 1500, None)]);
    seen.gives(2000);
    let long_ago = seen.peak(6000, 601);
    seen.reports("c", &[("c", 1500, None)]).peaks.push(long_ago);
    seen.gives(1500);
    let of_no_pod = seen.peak(6000, 0);
    seen.reports("x", &[]).peaks.push(of_no_pod);
    seen.gives(1500);
}

/// Its connections need room there until they have moved.
#[test]
fn what_a_drained_pod_had_is_shared_among_the_others() {
    let mut seen = Seen::new();
    for node in ["b", "c", "d"] {
        seen.reports(node, &[(node, 30, None)]);
    }
    seen.gives(30);
    seen.reports("d", &[("d", 30, None)]).backends[0].drained = true;
    let outcome = seen.compute();
    assert_eq!(outcome.quotas, [Quota::Limited(45); 2], "{outcome:?}");
}

/// The pod of a node that is gone may be there for a while, and its report as well.
#[test]
fn a_report_that_nobody_renews_counts_for_nothing() {
    let mut seen = Seen::new();
    for node in ["b", "c", "d"] {
        seen.reports(node, &[(node, 1500, None)]);
    }
    let gone = Endpoint {
        ready: false,
        ..endpoint_on("e")
    };
    seen.view.groups.get_mut(&seen.id).unwrap().push(gone);
    let peak = seen.peak(100_000, 0);
    seen.reports("e", &[("e", 30_000, None)]).peaks.push(peak);
    let mut at_age = |age| {
        seen.view.nodes.get_mut("e").unwrap().age = Duration::from_secs(age);
        seen.quotas = GroupQuotas::new();
        seen.compute().quotas[0]
    };
    assert_eq!(at_age(0), Quota::Limited(7500), "believed up to four times");
    assert_eq!(at_age(60), Quota::Limited(1500));
}

#[test]
fn a_pod_that_is_told_not_to_serve_loses_its_share_after_a_while() {
    let mut seen = Seen::new();
    for node in ["b", "c"] {
        seen.reports(node, &[(node, 30, None)]);
    }
    let mut with = |seconds, age| {
        let report = seen.reports("d", &[("d", 30, None)]);
        report.backends[0].health = Some(ReportedHealth {
            state: "hung".into(),
            seconds,
        });
        seen.view.nodes.get_mut("d").unwrap().age = Duration::from_secs(age);
        seen.quotas = GroupQuotas::new();
        let outcome = seen.compute();
        outcome
            .quotas
            .iter()
            .map(|quota| quota.limit())
            .collect::<Vec<_>>()
    };
    assert_eq!(with(4, 5), [Some(30); 3]);
    assert_eq!(with(4, 6), [Some(45), Some(45), Some(30)]);
    assert_eq!(
        with(4, 60),
        [None; 3],
        "its report is too old to say anything"
    );
    assert_eq!(with(u64::MAX, 1), [Some(45), Some(45), Some(30)]);
}

#[test]
fn several_listeners_of_a_pod_serve_as_long_as_one_does() {
    let health = |seconds| ReportedHealth {
        state: "stalled".into(),
        seconds,
    };
    let mut seen = Seen::new();
    let id = seen.id.clone();
    let report = seen.reports("b", &[("b", 3, Some(1)), ("b", 4, Some(0))]);
    report.backends[0].health = Some(health(60));
    let told = report.pod(&id, "uid-b").unwrap();
    assert_eq!(
        (told.established, told.room, told.health),
        (7, Some(1), None)
    );
    report.backends[1].health = Some(health(20));
    let told = report.pod(&id, "uid-b").unwrap();
    assert_eq!(told.health, Some(health(20)));
}

#[test]
fn a_node_is_believed_only_about_its_own_pods() {
    let mut seen = Seen::new();
    for node in ["b", "c"] {
        seen.reports(node, &[(node, 30, Some(0))]);
    }
    seen.reports(
        "d",
        &[("d", 30, Some(0)), ("b", 30, Some(5)), ("c", 9000, None)],
    );
    let outcome = seen.compute();
    assert!(
        outcome
            .sentence
            .contains("none of the 3 ready backends has room"),
        "{outcome:?}"
    );
    seen.reports(
        "x",
        &[("b", 30, Some(5)), ("c", 30, Some(5)), ("d", 30, Some(5))],
    );
    let outcome = seen.compute();
    assert!(
        outcome
            .sentence
            .contains("none of the 3 ready backends has room"),
        "{outcome:?}"
    );
}

#[test]
fn counts_of_another_node_are_believed_up_to_four_times_what_the_others_count() {
    let mut seen = Seen::new();
    seen.reports("b", &[("b", 300, None)]);
    seen.reports("c", &[("c", 300, None)]);
    seen.reports("d", &[("d", 3000, None)]);
    // 300 + 300 + 4 × 600.
    seen.gives(1000);
}

/// A listener with so many connections.
fn listener(slot: u32, established: u32, state: BackendState) -> SlotView {
    let mut counts = Counts::ZERO;
    counts.established = established.into();
    SlotView {
        member: Member {
            slot,
            backend: Backend {
                slot_state: SlotState::new(0, state).0,
                ..Backend::EMPTY
            },
            policy: SlotPolicy::new(0, 50, 1, 0),
            counts,
            health: Health::UNKNOWN,
        },
        regards_health: true,
    }
}

proptest! {
    /// A pod is one backend to every node, however often it listens.
    #[test]
    fn every_node_counts_the_same_pods(
        pods in proptest::collection::vec(proptest::collection::vec((0..100_u32, any::<bool>()), 1..5), 3),
    ) {
        let mut seen = Seen::new();
        let nodes = ["b", "c", "d"];
        let slots: Vec<Vec<SlotView>> = pods
            .iter()
            .map(|pod| {
                let state = |ended| if ended { BackendState::Closed } else { BackendState::Active };
                let slots = (0..).zip(pod);
                slots.map(|(slot, (held, ended))| listener(slot, *held, state(*ended))).collect()
            })
            .collect();
        for (node, slots) in nodes.iter().zip(&slots) {
            let of = (&seen.id.clone(), &endpoint_on(node));
            let backends = slots.iter().filter_map(|slot| reported(slot, of, Departing::default())).collect();
            seen.reports(node, &[]).backends = backends;
        }
        let counted: Vec<_> = nodes
            .iter()
            .zip(&slots)
            .map(|(node, slots)| {
                let endpoint = endpoint_on(node);
                let listening = slots.iter().filter(|slot| slot.slot_state().is(BackendState::Active));
                let own = listening.map(|slot| (slot, &endpoint)).collect();
                let group = Group::new(&seen.id, &seen.entry, &seen.view, own, &Departures::default());
                let ready = group.ready_backends();
                let pods = ready.iter();
                let pods = pods.map(|pod| (pod.weight, pod.established, pod.full));
                let mut counted: Vec<_> = pods.collect();
                counted.sort_unstable();
                (counted, group.load().map(|load| load.estimated))
            })
            .collect();
        prop_assert!(counted.windows(2).all(|two| two[0] == two[1]), "{:?}", counted);
    }
}
