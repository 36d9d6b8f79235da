//! Whose connects are left alone, and why.

use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use balancer::dataplane::Placing;
use balancer_common::abi::{Excluded, Frontend};
use testkit::fixtures::Machine;
use testkit::fixtures::tcp::{self, Listen, Listener};

use super::node::{FRONTEND, FRONTEND_V6, GROUP, Node, endpoint_at, open_servers};
use crate::support::at;

/// A frontend at which somebody listens: who is left alone gets there.
const BESIDE: &str = "127.0.0.50:11800";
const BESIDE_V6: &str = "[::1]:11800";

/// A node with an endpoint that listens, and frontends that do.
fn node(machine: &Machine) -> (Node<'_>, Vec<[Listener; 2]>, [Listener; 2]) {
    let mut node = Node::placing(machine, 1);
    for at in [BESIDE, BESIDE_V6] {
        node.add_frontend(at, GROUP, 0);
    }
    let beside = [BESIDE, BESIDE_V6].map(|at| Listen::on(at).open());
    (node, open_servers(1), beside)
}

/// Where a connection stands: at the endpoint, or at the frontend itself.
#[track_caller]
fn is_placed(servers: &mut [[Listener; 2]], to: &str) -> bool {
    for listener in servers.iter_mut().flatten() {
        listener.accept_all();
    }
    let client = tcp::connect(at(to)).connected();
    let placed: usize = servers[0].iter_mut().map(Listener::accept_all).sum();
    drop(client);
    placed == 1
}

#[test]
fn other_addresses_and_ports_are_none_of_its_business() {
    Machine::with(|machine| {
        let (node, mut servers, _beside) = node(machine);
        let _other = ["127.0.0.50:11801", "127.0.0.51:11800"].map(|at| Listen::on(at).open());
        assert!(!is_placed(&mut servers, "127.0.0.50:11801"));
        assert!(!is_placed(&mut servers, "127.0.0.51:11800"));
        assert!(node.reasons(GROUP).is_empty());
        assert!(is_placed(&mut servers, BESIDE));
        assert!(is_placed(&mut servers, BESIDE_V6));
        assert_eq!(node.reasons(GROUP), [("placed", 2)].into());
    });
}

#[test]
fn a_daemon_that_is_gone_or_knows_nothing_fresh_places_nobody() {
    Machine::with(|machine| {
        let (node, mut servers, _beside) = node(machine);
        node.beat(Duration::from_millis(50));
        thread::sleep(Duration::from_millis(60));
        assert!(!is_placed(&mut servers, BESIDE));
        assert_eq!(node.reasons(GROUP), [("fail-open-stale", 1)].into());
        node.beat(Duration::from_secs(60));
        assert!(is_placed(&mut servers, BESIDE));
        node.know(GROUP, Duration::from_millis(50));
        thread::sleep(Duration::from_millis(60));
        assert!(!is_placed(&mut servers, BESIDE));
        assert_eq!(node.reasons(GROUP)["fail-open-unknown"], 1);
        node.know(GROUP, Duration::from_secs(60));
        assert!(is_placed(&mut servers, BESIDE));
    });
}

#[test]
fn an_excluded_netns_is_left_alone() {
    Machine::with(|machine| {
        let (mut node, mut servers, _beside) = node(machine);
        let own = balancer::sys::netns::cookie().expect("a cookie");
        node.exclude(own + 1, Excluded::Everywhere);
        assert!(is_placed(&mut servers, BESIDE));
        node.exclude(own, Excluded::Everywhere);
        assert!(!is_placed(&mut servers, BESIDE));
        assert_eq!(node.reasons(GROUP)["excluded"], 1);
    });
}

#[test]
fn a_netns_with_a_sidecar_is_left_alone_while_it_listens() {
    Machine::with(|machine| {
        let (node, mut servers, _beside) = node(machine);
        let mut expected = 0;
        for (sidecar, frontend) in [
            ("127.0.0.1:15001", BESIDE),
            ("0.0.0.0:15001", BESIDE),
            ("127.0.0.1:4140", BESIDE),
            ("[::1]:15001", BESIDE_V6),
            ("[::]:4140", BESIDE_V6),
        ] {
            let listener = Listen::on(sidecar).open();
            expected += 1;
            assert!(!is_placed(&mut servers, frontend), "{sidecar}");
            assert_eq!(node.reasons(GROUP)["sidecar"], expected, "{sidecar}");
            drop(listener);
            assert!(is_placed(&mut servers, frontend), "{sidecar} is gone");
        }
        // Others that listen there are none: only loopback is captured to.
        let _other = Listen::on("127.0.0.9:15001").open();
        assert!(is_placed(&mut servers, BESIDE));
    });
}

#[test]
fn endpoints_of_the_other_family_or_without_weight_are_none() {
    Machine::with(|machine| {
        let (node, mut servers, _beside) = node(machine);
        let [v4, v6] = endpoint_at(0);
        node.add_endpoint(0, [v4], 1);
        assert!(is_placed(&mut servers, BESIDE));
        assert!(!is_placed(&mut servers, BESIDE_V6));
        node.add_endpoint(0, [v6], 1);
        assert!(!is_placed(&mut servers, BESIDE));
        assert!(is_placed(&mut servers, BESIDE_V6));
        node.add_endpoint(0, [v4, v6], 0);
        assert!(!is_placed(&mut servers, BESIDE));
        node.add_endpoint(0, [v4, v6], 1);
        node.set_members(GROUP, []);
        assert!(!is_placed(&mut servers, BESIDE));
        let expected = [("placed", 2), ("no-endpoint", 4)].into();
        assert_eq!(node.reasons(GROUP), expected);
    });
}

#[test]
fn a_dry_run_chooses_and_changes_nothing() {
    Machine::with(|machine| {
        let (mut node, mut servers, _beside) = node(machine);
        node.add_frontend(BESIDE, GROUP, Frontend::DRY_RUN);
        assert!(!is_placed(&mut servers, BESIDE));
        assert_eq!(node.reasons(GROUP), [("dry-run", 1)].into());
        assert_eq!((node.placed(0).total, node.counts(1)), (0, vec![(0, 0)]));
        let client = TcpStream::connect(BESIDE).expect("connected");
        assert_eq!(client.peer_addr().expect("connected"), at(BESIDE));
    });
}

/// Detached it costs nobody anything, and what stands stays counted until it ends.
#[test]
fn placing_is_switched_off_and_on_while_it_is_in_use() {
    Machine::with(|machine| {
        let (mut node, mut servers, _beside) = node(machine);
        let client = tcp::connect(at(FRONTEND)).connected();
        node.agree(&[1]);
        assert_eq!(node.set_placing(false), Placing::Off);
        assert!(!is_placed(&mut servers, BESIDE));
        assert_eq!(client.peer_addr().expect("connected"), endpoint_at(0)[0]);
        node.agree(&[1]);
        drop(client);
        node.agree(&[0]);
        assert_eq!(node.set_placing(true), Placing::On);
        assert!(is_placed(&mut servers, BESIDE));
        assert!(is_placed(&mut servers, FRONTEND_V6));
    });
}

#[test]
fn groups_have_endpoints_and_reasons_of_their_own() {
    Machine::with(|machine| {
        let (mut node, mut servers, _beside) = node(machine);
        node.add_frontend(BESIDE, 63, 0);
        assert!(!is_placed(&mut servers, BESIDE));
        node.know(63, Duration::from_secs(60));
        assert!(!is_placed(&mut servers, BESIDE));
        node.add_endpoint(1_023, endpoint_at(0), 1);
        node.set_members(63, [1_023]);
        assert!(is_placed(&mut servers, BESIDE));
        let expected = [("fail-open-unknown", 1), ("no-endpoint", 1), ("placed", 1)].into();
        assert_eq!(node.reasons(63), expected);
        assert!(node.reasons(GROUP).is_empty());
        assert_eq!(node.placed(1_023).total, 1);
    });
}
