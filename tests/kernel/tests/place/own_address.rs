//! Connects to an endpoint's own address: whose are placed, and who gets the one that they mean.

use std::net::{SocketAddr, TcpStream};

use balancer_common::abi::{Excluded, Frontend};
use testkit::fixtures::Machine;
use testkit::fixtures::foreign::Connect4;
use testkit::fixtures::tcp::{self, Listen, Listener};

use super::node::{FIRST_PORT, FRONTEND, GROUP, Node, endpoint_at, loads, open_servers};

/// A node where the own addresses of so many endpoints are frontends, too, and these endpoints.
fn node(machine: &Machine, endpoints: u32) -> (Node<'_>, Vec<[Listener; 2]>) {
    let mut node = Node::placing(machine, endpoints);
    for at in (0..endpoints).flat_map(endpoint_at) {
        node.add_frontend(&at.to_string(), GROUP, Frontend::OWN_ADDRESS);
    }
    (node, open_servers(endpoints))
}

/// The endpoint's address as a client of an IPv6 socket writes it.
fn mapped(endpoint: u32) -> SocketAddr {
    let port = FIRST_PORT + u16::try_from(endpoint).expect("few");
    format!("[::ffff:127.0.0.1]:{port}").parse().expect("valid")
}

fn own_netns() -> u64 {
    balancer::sys::netns::cookie().expect("a cookie")
}

/// Whichever a client has chosen itself, it gets the one that should have it; also where that is
/// the same.
#[test]
fn clients_of_one_endpoint_are_spread_over_all_and_counted() {
    Machine::with(|machine| {
        let (node, mut servers) = node(machine, 3);
        let [v4, v6] = endpoint_at(0);
        let mut clients: Vec<TcpStream> = Vec::new();
        for to in [v4, v6, mapped(0)] {
            clients.extend(tcp::connect_many(to, 10));
        }
        assert_eq!(loads(&mut servers), [10; 3]);
        node.agree(&[10; 3]);
        assert_eq!(node.reasons(GROUP), [("placed", 30)].into());
        for client in &clients {
            let peer = client.peer_addr().expect("connected");
            let meant = [v4, v6, mapped(0)];
            assert!(
                meant.contains(&peer),
                "the client sees what it meant: {peer}"
            );
        }
        drop(clients);
        node.agree(&[0; 3]);
    });
}

/// Where the draw falls on the endpoint that the client means there is nothing to rewrite.
#[test]
fn the_only_endpoint_is_reached_at_its_own_address_and_counted() {
    Machine::with(|machine| {
        let (node, mut servers) = node(machine, 1);
        let clients = endpoint_at(0).map(|to| tcp::connect(to).connected());
        assert_eq!(loads(&mut servers), [2]);
        node.agree(&[2]);
        for (client, to) in clients.iter().zip(endpoint_at(0)) {
            assert_eq!(client.peer_addr().expect("connected"), to);
        }
        drop(clients);
        node.agree(&[0]);
    });
}

/// As the kubelet's probes and servers among themselves: each reaches the one that it means, and
/// what goes to the frontends is placed as ever.
#[test]
fn who_means_an_endpoint_reaches_it_and_is_placed_at_other_frontends() {
    Machine::with(|machine| {
        let (mut node, mut servers) = node(machine, 3);
        node.exclude(own_netns(), Excluded::OwnAddresses);
        let [v4, v6] = endpoint_at(1);
        let mut clients: Vec<TcpStream> = Vec::new();
        for to in [v4, v6, mapped(1)] {
            clients.extend(tcp::connect_many(to, 4));
        }
        assert_eq!(loads(&mut servers), [0, 12, 0]);
        node.agree(&[0; 3]);
        assert_eq!(node.reasons(GROUP), [("own-address", 12)].into());
        clients.extend(tcp::connect_many(FRONTEND.parse().expect("valid"), 6));
        node.agree(&[2; 3]);
        node.exclude(own_netns(), Excluded::Everywhere);
        clients.push(tcp::connect(v4).connected());
        assert_eq!(loads(&mut servers), [2, 15, 2]);
        let expected = [("excluded", 1), ("own-address", 12), ("placed", 6)];
        assert_eq!(node.reasons(GROUP), expected.into());
    });
}

/// One that is no endpoint any more is nobody's frontend.
#[test]
fn an_address_that_is_no_frontend_any_more_is_what_it_was() {
    Machine::with(|machine| {
        let (mut node, mut servers) = node(machine, 2);
        let [v4, _] = endpoint_at(0);
        node.remove_frontend(&v4.to_string());
        node.set_members(GROUP, [1]);
        let clients = tcp::connect_many(v4, 3);
        assert_eq!(loads(&mut servers), [3, 0]);
        assert!(node.reasons(GROUP).is_empty());
        drop(clients);
    });
}

/// The endpoint that a client means refuses: it gets another one until that is over.
#[test]
fn an_endpoint_that_refuses_is_avoided_at_its_own_address_too() {
    Machine::with(|machine| {
        let (node, mut servers) = node(machine, 3);
        let dead = servers.remove(0);
        drop(dead.map(Listener::close));
        let [v4, _] = endpoint_at(0);
        let outcomes: Vec<_> = (0..20).map(|_| tcp::connect(v4)).collect();
        let refused = outcomes.iter().filter(|one| one.is_refused()).count();
        assert!((1..=3).contains(&refused), "{refused} of 20 were refused");
        assert_eq!(node.placed(0).failed, refused as u64);
    });
}

/// A program that has chosen an endpoint itself, as other proxies do, and runs before.
#[test]
fn what_another_program_has_chosen_before_is_a_connect_to_an_own_address() {
    Machine::with(|machine| {
        machine
            .netns
            .add_address("10.99.0.1".parse().expect("valid"));
        let mut node = Node::placing(machine, 2);
        let mut servers = open_servers(2);
        let mut chosen = Listen::on("10.99.0.1:7000").open();
        let below = machine.cgroup.below();
        let _attached = Connect4::load("service_lb", 11_800, 7_000).attach(&below);
        let to = "10.99.0.1:11800".parse().expect("valid");
        let connect = || below.run(|| tcp::connect_many(to, 2));
        let first = connect();
        assert_eq!((chosen.accept_all(), loads(&mut servers)), (2, vec![0, 0]));
        node.add_frontend("10.99.0.1:7000", GROUP, Frontend::OWN_ADDRESS);
        let second = connect();
        assert_eq!((chosen.accept_all(), loads(&mut servers)), (0, vec![1, 1]));
        node.agree(&[1, 1]);
        drop((first, second));
    });
}
