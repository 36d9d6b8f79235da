use std::collections::BTreeSet;

use super::super::fuzzing::endpoint;
use super::*;
use crate::kubernetes::{ObjectName, Traffic};

const NODE: Client<'_> = Client {
    node: "a",
    zone: Some("z1"),
    rank: (1, 3),
    heard: Duration::ZERO,
};

fn service(name: &str) -> ObjectName {
    ObjectName {
        namespace: "sw".into(),
        name: name.into(),
    }
}

/// A pod on that node, named like it, with both addresses.
fn pod(node: &str) -> Endpoint {
    let number = u16::from(node.as_bytes()[0]);
    Endpoint {
        addresses: vec![
            [10, 0, 0, node.as_bytes()[0]].into(),
            [0xfd00, 0, 0, 0, 0, 0, 0, number].into(),
        ],
        ..endpoint(node)
    }
}

fn in_zone(node: &str, zone: &str) -> Endpoint {
    let mut pod = pod(node);
    pod.offered.for_zones = BTreeSet::from([zone.to_owned()]);
    pod
}

fn port(pods: &[Endpoint]) -> ServicePort {
    ServicePort {
        entry: "agents".into(),
        service: service("oap"),
        frontends: vec![([10, 96, 0, 7], 11800).into()],
        endpoints: pods.iter().map(|pod| (pod.clone(), 21800)).collect(),
        has_others: false,
        traffic: Traffic::default(),
    }
}

fn totals(of: &[(&str, u64)]) -> Totals {
    let total = |connections| PublishedTotal {
        connections,
        age: Duration::from_secs(2),
    };
    of.iter()
        .map(|(node, connections)| (((*node).to_owned(), 21800), total(*connections)))
        .collect()
}

/// The weights of the endpoints, by the pods' names.
fn chosen(port: &ServicePort, totals: &Totals) -> Vec<(String, u32)> {
    let groups = groups(std::slice::from_ref(port), totals, NODE);
    let endpoints = groups.iter().flat_map(|group| &group.endpoints);
    endpoints
        .map(|endpoint| (endpoint.name.clone(), endpoint.weight))
        .collect()
}

fn names(of: &[&str]) -> Vec<(String, u32)> {
    of.iter().map(|name| (format!("sw/{name}"), 1)).collect()
}

#[test]
fn a_group_has_the_pods_of_a_service_with_what_is_said_of_them() {
    let mut heavy = pod("b");
    heavy.weight = 3;
    let port = port(&[pod("a"), heavy]);
    let groups = groups(&[port], &totals(&[("b", 7)]), NODE);
    let [group] = &groups[..] else {
        panic!("{groups:?}");
    };
    assert_eq!(group.name, "agents sw/oap");
    assert_eq!(group.frontends, [([10, 96, 0, 7], 11800).into()]);
    assert_eq!((group.rank, group.heard), ((1, 3), Some(Duration::ZERO)));
    let [a, b] = &group.endpoints[..] else {
        panic!("{group:?}");
    };
    assert_eq!((a.v4, a.port), (Some([10, 0, 0, b'a'].into()), 21800));
    assert_eq!(a.v6, Some("fd00::61".parse().unwrap()));
    assert_eq!((a.weight, a.published), (1, None));
    let said = b.published.map(|total| total.connections);
    assert_eq!((b.weight, said), (3, Some(7)));
}

#[test]
fn without_a_ready_pod_those_that_end_and_serve_are_chosen_as_kube_proxy_does() {
    let with = |node: &str, ready, serving, terminating| {
        let mut pod = pod(node);
        (pod.offered.ready, pod.offered.serving) = (ready, serving);
        pod.terminating = terminating;
        pod
    };
    let unready = with("a", false, false, false);
    let ending = with("b", false, true, true);
    let ended = with("c", false, false, true);
    let published = with("e", true, false, true);
    let ready = pod("d");
    let none = Totals::new();
    let of = |pods: &[&Endpoint]| {
        let pods: Vec<Endpoint> = pods.iter().map(|pod| (*pod).clone()).collect();
        chosen(&port(&pods), &none)
    };
    assert_eq!(of(&[&unready, &ending, &ended, &ready]), names(&["d"]));
    assert_eq!(of(&[&unready, &ending, &ended]), names(&["b"]));
    assert_eq!(of(&[&unready, &ended]), names(&[]));
    assert_eq!(
        of(&[&unready, &ending, &published]),
        names(&["e"]),
        "publishNotReadyAddresses"
    );
}

#[test]
fn a_local_policy_leaves_this_nodes_pods_or_nobody() {
    let mut port = port(&[pod("a"), pod("b")]);
    port.traffic.own_node_only = true;
    assert_eq!(chosen(&port, &Totals::new()), names(&["a"]));
    port.endpoints.remove(0);
    assert_eq!(chosen(&port, &Totals::new()), names(&[]));
}

#[test]
fn services_that_want_something_else_are_left_alone_with_a_reason() {
    let changes: [fn(&mut ServicePort); 4] = [
        |port| port.traffic.left_alone = true,
        |port| port.traffic.affinity = true,
        |port| port.has_others = true,
        |port| port.frontends.clear(),
    ];
    for change in changes {
        let mut port = port(&[pod("a"), pod("b")]);
        assert_eq!(
            groups(std::slice::from_ref(&port), &Totals::new(), NODE).len(),
            1
        );
        assert_eq!(why_not_placed(&port), None);
        change(&mut port);
        assert_eq!(
            groups(std::slice::from_ref(&port), &Totals::new(), NODE),
            []
        );
        assert_eq!(why_not_placed(&port).is_some(), !port.frontends.is_empty());
    }
}

#[test]
fn services_of_the_same_pods_and_entry_share_a_group() {
    let one = port(&[pod("a"), pod("b")]);
    let mut other = one.clone();
    other.service = service("oap-too");
    other.frontends = vec![([10, 96, 0, 8], 11800).into()];
    let mut of_another_entry = other.clone();
    of_another_entry.entry = "als".into();
    let plan = groups(&[one, other, of_another_entry], &Totals::new(), NODE);
    let frontends = plan.iter().map(|group| group.frontends.len());
    assert_eq!(frontends.collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn this_zone_comes_first_while_it_has_no_more_than_a_fifth_above_its_share() {
    let port = port(&[in_zone("a", "z1"), in_zone("b", "z2"), in_zone("c", "z2")]);
    let near = |connections: &[(&str, u64)]| {
        let chosen = chosen(&port, &totals(connections));
        let weights: Vec<u32> = chosen.into_iter().map(|(_, weight)| weight).collect();
        match weights[..] {
            [1, 0, 0] => true,
            [1, 1, 1] => false,
            _ => panic!("{weights:?}"),
        }
    };
    assert!(near(&[]), "as kube-proxy does");
    assert!(near(&[("a", 0), ("b", 0), ("c", 0)]));
    assert!(near(&[("a", 1), ("b", 0), ("c", 0)]), "one is no weight");
    assert!(near(&[("a", 120), ("b", 90), ("c", 90)]));
    assert!(!near(&[("a", 123), ("b", 90), ("c", 90)]));
    assert!(!near(&[("a", 500), ("b", 0), ("c", 0)]));
    assert!(near(&[("a", 100), ("c", 200)]), "of b nobody says anything");
    assert!(near(&[("b", 0), ("c", 0)]));
}

#[test]
fn hints_count_where_all_have_them_and_one_is_for_this_node_or_its_zone() {
    let weights = |pods: &[Endpoint], client| {
        let groups = groups(&[port(pods)], &Totals::new(), client);
        let endpoints = groups[0].endpoints.iter();
        endpoints.map(|one| one.weight).collect::<Vec<_>>()
    };
    let zoned = [in_zone("a", "z1"), in_zone("b", "z2")];
    assert_eq!(weights(&zoned, NODE), [1, 0]);
    let nowhere = Client { zone: None, ..NODE };
    assert_eq!(weights(&zoned, nowhere), [1, 1]);
    let far = Client {
        zone: Some("z9"),
        ..NODE
    };
    assert_eq!(weights(&zoned, far), [1, 1]);
    assert_eq!(weights(&[in_zone("a", "z1"), pod("b")], NODE), [1, 1]);
    let mut of_node = zoned;
    for (pod, node) in of_node.iter_mut().zip(["b", "a"]) {
        pod.offered.for_nodes = BTreeSet::from([node.to_owned()]);
    }
    assert_eq!(weights(&of_node, NODE), [0, 1], "the node's come first");
    assert_eq!(weights(&of_node, nowhere), [0, 1]);
}

#[test]
fn what_a_services_settings_mean_for_its_clients_is_said() {
    type Change = fn(&mut ServicePort);
    let said = |change: Change| {
        let mut port = port(&[pod("a")]);
        change(&mut port);
        notes(&port, Some("z1"))
    };
    assert_eq!(said(|_| ()), Vec::<String>::new());
    let cases: [(Change, &str); 5] = [
        (
            |port| port.traffic.affinity = true,
            "sessionAffinity is ClientIP",
        ),
        (
            |port| port.traffic.own_node_only = true,
            "internalTrafficPolicy is Local",
        ),
        (|port| port.traffic.near = true, "this node is in zone z1"),
        (|port| port.traffic.outside = true, "node ports"),
        (|port| port.frontends.clear(), "no cluster address"),
    ];
    for (change, words) in cases {
        let said = said(change);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains(words), "{words}: {said:?}");
    }
}
