use std::collections::BTreeSet;

use super::super::fuzzing::endpoint;
use super::*;
use crate::kubernetes::{ObjectName, Traffic};

const NODE: Client<'_> = Client {
    node: "a",
    zone: Some("z1"),
    rank: (1, 3),
    heard: Duration::ZERO,
    unknown_peers: &BTreeSet::new(),
    drained: &BTreeSet::new(),
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
        matching: Match::Service,
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
fn nobody_is_placed_on_a_drained_pod_where_another_one_is() {
    let port = port(&[pod("a"), pod("b"), pod("c")]);
    let drained_at = |target: u16, drained: &[&str]| {
        let drained = drained.iter();
        let drained = drained.map(|uid| ((*uid).to_owned(), target)).collect();
        let client = Client {
            drained: &drained,
            ..NODE
        };
        let groups = groups(std::slice::from_ref(&port), &Totals::new(), client);
        let endpoints = groups.iter().flat_map(|group| &group.endpoints);
        endpoints.map(|one| one.name.clone()).collect::<Vec<_>>()
    };
    let without = |drained: &[&str]| drained_at(21800, drained);
    assert_eq!(without(&["b"]), ["sw/a", "sw/c"]);
    assert_eq!(drained_at(12800, &["b"]), ["sw/a", "sw/b", "sw/c"]);
    assert_eq!(without(&["a", "b", "c"]), ["sw/a", "sw/b", "sw/c"]);
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
        |port| port.traffic.other_proxy = true,
    ];
    let plan = |port: &ServicePort| groups(std::slice::from_ref(port), &Totals::new(), NODE);
    for matching in Match::ALL {
        for change in changes {
            let mut port = port(&[pod("a"), pod("b")]);
            port.matching = matching;
            assert_eq!(plan(&port).len(), 1);
            assert_eq!(notes(&port, None), [""; 0]);
            change(&mut port);
            assert_eq!(plan(&port), []);
            assert!(!is_placed(&port));
            assert_eq!(notes(&port, None).len(), 1);
        }
    }
}

/// A headless Service by what is matched.
fn headless(matching: Match) -> ServicePort {
    ServicePort {
        frontends: Vec::new(),
        matching,
        ..port(&[pod("a"), pod("b")])
    }
}

#[test]
fn a_headless_service_is_placed_where_its_pods_are_matched() {
    let none = headless(Match::Service);
    assert!(!is_placed(&none));
    assert_eq!(groups(&[none], &Totals::new(), NODE), []);
    let matched = headless(Match::Endpoints);
    assert!(is_placed(&matched));
    let plan = groups(&[matched], &Totals::new(), NODE);
    let [group] = &plan[..] else {
        panic!("{plan:?}");
    };
    assert_eq!(group.frontends, []);
    let own: Vec<String> = group
        .own_addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    let expected = [
        "10.0.0.97:21800",
        "[fd00::61]:21800",
        "10.0.0.98:21800",
        "[fd00::62]:21800",
    ];
    assert_eq!(own, expected, "with the target port");
}

#[test]
fn who_connects_to_a_drained_pod_is_placed_on_another_one() {
    let drained = [("b".to_owned(), 21800)].into();
    let client = Client {
        drained: &drained,
        ..NODE
    };
    let plan = groups(&[headless(Match::Endpoints)], &Totals::new(), client);
    assert_eq!(plan[0].endpoints.len(), 1);
    assert_eq!(plan[0].own_addresses.len(), 4);
}

#[test]
fn own_addresses_are_those_of_endpoints_and_nobody_elses() {
    let own = |change: fn(&mut Endpoint)| {
        let mut changed = pod("b");
        change(&mut changed);
        let port = ServicePort {
            matching: Match::Endpoints,
            ..port(&[pod("a"), changed])
        };
        let plan = groups(&[port], &Totals::new(), NODE);
        let ports = plan[0].own_addresses.iter().map(SocketAddr::ip);
        let v4 = ports.filter(IpAddr::is_ipv4);
        (v4.count(), plan[0].endpoints.len())
    };
    assert_eq!(own(|_| ()), (2, 2));
    assert_eq!(own(|pod| pod.offered.ready = false), (1, 1), "not ready");
    assert_eq!(own(|pod| pod.host_network = true), (1, 2), "the node's");
    assert_eq!(own(|pod| pod.confirmed = false), (1, 2), "a slice alone");
}

#[test]
fn a_pod_of_several_services_leads_to_the_first_of_them() {
    let mut first = headless(Match::Endpoints);
    first.service = service("first");
    let mut second = ServicePort {
        matching: Match::Endpoints,
        ..port(&[pod("a"), pod("b"), pod("c")])
    };
    let own = |ports: &[ServicePort]| {
        let plan = groups(ports, &Totals::new(), NODE);
        let of_group = plan.iter().map(|group| {
            let v4 = group.own_addresses.iter().filter(|at| at.is_ipv4());
            let last = v4.map(|at| at.ip().to_string()).collect::<Vec<_>>();
            (group.frontends.len(), last.join(" "))
        });
        of_group.collect::<Vec<_>>()
    };
    let expected = [(0, "10.0.0.97 10.0.0.98".into()), (1, "10.0.0.99".into())];
    assert_eq!(own(&[first.clone(), second.clone()]), expected);
    second.endpoints.pop();
    let expected = [(1, "10.0.0.97 10.0.0.98".into())];
    assert_eq!(
        own(&[first, second]),
        expected,
        "of the same pods: one group"
    );
}

#[test]
fn a_service_with_a_peer_that_is_not_known_keeps_its_frontends_alone() {
    let mut unready = pod("b");
    unready.offered.ready = false;
    let with_unknown = ServicePort {
        matching: Match::Endpoints,
        ..port(&[pod("a"), unready])
    };
    let other = ServicePort {
        matching: Match::Endpoints,
        service: service("other"),
        ..port(&[pod("c")])
    };
    let unknown = BTreeSet::from([service("b")]);
    let client = Client {
        unknown_peers: &unknown,
        ..NODE
    };
    let plan = groups(&[with_unknown, other], &Totals::new(), client);
    let of = |group: &GroupPlan| (group.frontends.len(), group.own_addresses.len());
    assert_eq!(plan.iter().map(of).collect::<Vec<_>>(), [(1, 0), (1, 2)]);
}

#[test]
fn peers_are_this_nodes_pods_of_services_whose_pods_are_matched() {
    let mut unready = pod("a");
    unready.offered.ready = false;
    let matched = ServicePort {
        matching: Match::Endpoints,
        ..port(&[unready, pod("b")])
    };
    let not_matched = port(&[pod("a")]);
    assert_eq!(peers(std::slice::from_ref(&not_matched), "a"), None);
    let found = peers(&[not_matched, matched], "a").expect("one is matched");
    let names: Vec<String> = found.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["sw/a"], "it may be about to connect");
    assert_eq!(found[&service("a")].1.len(), 2);
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
    let cases: [(Change, &str); 7] = [
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
        (
            |port| {
                port.frontends.clear();
                port.traffic.other_proxy = true;
            },
            "to another proxy",
        ),
        (
            |port| {
                port.matching = Match::Endpoints;
                port.endpoints[0].0.host_network = true;
            },
            "the address of sw/a are left as they are",
        ),
    ];
    for (change, words) in cases {
        let said = said(change);
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains(words), "{words}: {said:?}");
    }
}
