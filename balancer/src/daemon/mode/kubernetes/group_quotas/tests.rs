//! Quotas of a group by what daemons of other nodes report.

use super::super::fuzzing::{entry, group};
use super::*;
use crate::config::ClusterService;
use crate::kubernetes::{Endpoint, NodeReport, ObjectName, ReceivedReport, ReportedBackend};
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
        };
        let node_report = NodeReport {
            schema: 1,
            node: node.into(),
            backends: pods.iter().map(backend).collect(),
            ..NodeReport::default()
        };
        let age = Duration::ZERO;
        let received = ReceivedReport { age, node_report };
        self.view.nodes.insert(node.into(), received);
        &mut self.view.nodes.get_mut(node).unwrap().node_report
    }

    fn peak(&self, connections: u64, seconds_ago: u64) -> Peak {
        Peak {
            group: self.id.clone(),
            connections,
            seconds_ago,
        }
    }

    fn compute(&mut self) -> Outcome {
        let group = Group::new(&self.id, &self.entry, &self.view, Vec::new());
        self.quotas.compute(&group, &self.view, HOLD_FOR)
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
        node: Some(node.into()),
        ready: true,
        terminating: false,
        weight: 1,
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
