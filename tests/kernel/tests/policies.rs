//! Who gets the next connection.

use std::collections::HashMap;
use std::net::TcpStream;

use testkit::fixtures::tcp::{self, Listen, Listener, Outcome};
use testkit::fixtures::{Balancer, Machine};

use crate::support::{
    agents, agree, backend, connections, cpus, group, landing, open_listeners, own_port, source,
    storm, virtual_port, virtual_port_of,
};

fn spread(loads: &[usize]) -> usize {
    loads.iter().max().unwrap_or(&0) - loads.iter().min().unwrap_or(&0)
}

#[test]
fn least_connections_evens_out() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let mut listeners = open_listeners(3);
        let mut clients = tcp::connect_many(agents(), 152);
        assert_eq!(clients.len(), 152);
        assert!(spread(&agree(&balancer, &mut listeners)) <= 1);
        // A newcomer gets all until it has caught up.
        drop(listeners.remove(0));
        listeners.insert(0, Listen::on(&backend(0)).open());
        balancer.wait_active(3);
        clients.extend(tcp::connect_many(agents(), 40));
        assert_eq!(agree(&balancer, &mut listeners)[0], 40);
        clients.extend(tcp::connect_many(agents(), 41));
        assert!(spread(&agree(&balancer, &mut listeners)) <= 1);
    });
}

#[test]
fn least_connections_evens_out_with_concurrent_clients() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 5, &[]));
        let mut listeners = open_listeners(5);
        let clients = connections(storm(8, 100, agents()));
        assert_eq!(clients.len(), 800);
        let loads = agree(&balancer, &mut listeners);
        // Two CPUs that see the same counts at the same moment may choose the same backend.
        assert!(spread(&loads) < cpus() + 1, "{loads:?}");
    });
}

/// As many backends as one service may have.
const MANY: usize = 256;

#[test]
fn least_connections_is_exact_among_as_many_as_there_may_be() {
    Machine::with(|machine| {
        let quota = "quota: {per_backend: 2}";
        let balancer = Balancer::start(machine, &virtual_port("least-connections", MANY, &[quota]));
        let mut listeners = open_listeners(MANY);
        balancer.wait_active(MANY);
        let mut clients = tcp::connect_many(agents(), MANY);
        assert_eq!(agree(&balancer, &mut listeners), [1; MANY]);
        clients.extend(tcp::connect_many(agents(), MANY));
        assert_eq!(clients.len(), 2 * MANY);
        assert_eq!(agree(&balancer, &mut listeners), [2; MANY]);
        assert!(matches!(tcp::connect(agents()), Outcome::Refused));
    });
}

#[test]
fn round_robin_is_exact_among_many() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("round-robin", MANY, &[]));
        let mut listeners = open_listeners(MANY);
        balancer.wait_active(MANY);
        let clients = tcp::connect_many(agents(), 3 * MANY);
        assert_eq!(clients.len(), 3 * MANY);
        assert_eq!(agree(&balancer, &mut listeners), [3; MANY]);
    });
}

#[test]
fn least_connections_minds_weights() {
    Machine::with(|machine| {
        let backends =
            r#"{address: "127.0.0.1:21000", weight: 3}, "127.0.0.1:21001", "127.0.0.1:21002""#;
        let balancer = Balancer::start(
            machine,
            &virtual_port_of("least-connections", backends, &[]),
        );
        let mut listeners = open_listeners(3);
        let clients = tcp::connect_many(agents(), 100);
        assert_eq!(clients.len(), 100);
        assert_eq!(agree(&balancer, &mut listeners), [60, 20, 20]);
        assert_eq!(balancer.service().backend(backend(0)).weight, 3);
    });
}

#[test]
fn round_robin_is_exact() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("round-robin", 3, &[]));
        let mut listeners = open_listeners(3);
        let mut clients = tcp::connect_many(agents(), 60);
        assert_eq!(agree(&balancer, &mut listeners), [20; 3]);
        // In turn, whoever is the least loaded.
        let first = listeners[0].peers();
        assert_eq!(first.len(), 20);
        let address = |client: &TcpStream| client.local_addr().expect("it has an address");
        clients.retain(|client| !first.contains(&address(client)));
        clients.extend(tcp::connect_many(agents(), 60));
        assert_eq!(agree(&balancer, &mut listeners), [20, 40, 40]);
    });
}

#[test]
fn round_robin_is_exact_with_concurrent_clients() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("round-robin", &[]));
        let mut listeners = group(4);
        let clients = connections(storm(8, 100, agents()));
        assert_eq!(clients.len(), 800);
        assert_eq!(agree(&balancer, &mut listeners), [200; 4]);
    });
}

#[test]
fn round_robin_minds_weights_also_with_concurrent_clients() {
    Machine::with(|machine| {
        let backends = r#"{address: "127.0.0.1:21000", weight: 5}, {address: "127.0.0.1:21001", weight: 2}, "127.0.0.1:21002""#;
        let balancer = Balancer::start(machine, &virtual_port_of("round-robin", backends, &[]));
        let mut listeners = open_listeners(3);
        let clients = connections(storm(8, 80, agents()));
        assert_eq!(clients.len(), 640);
        assert_eq!(agree(&balancer, &mut listeners), [400, 160, 80]);
    });
}

/// Connects once from each source; returns the connections and who took each.
fn connect_from_each(sources: usize, listeners: &mut [Listener]) -> (Vec<TcpStream>, Vec<usize>) {
    let connected = (0..sources).map(|n| {
        let client = tcp::connect_from(source(n), agents()).connected();
        (client, landing(listeners))
    });
    connected.unzip()
}

#[test]
fn source_hash_is_stable_and_a_change_moves_only_what_it_must() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("source-hash", 4, &[]));
        let mut listeners = open_listeners(4);
        let (_clients, before) = connect_from_each(400, &mut listeners);
        let shares = shares(&before);
        assert!(
            (0..4).all(|n| (60..=140).contains(&shares[&n])),
            "{shares:?}"
        );
        // By address: every port of it goes the same way.
        let (_again, same) = connect_from_each(400, &mut listeners);
        assert_eq!(before, same);
        // One leaves: only its sources move.
        drop(listeners.pop());
        let (_less, moved) = connect_from_each(400, &mut listeners);
        for (before, moved) in before.iter().zip(&moved) {
            assert!(before == moved || *before == 3, "from {before} to {moved}");
        }
        // It comes back to its old place: all is as it was.
        balancer.wait_until(|service| service.backends.len() == 3);
        listeners.push(Listen::on(&backend(3)).open());
        balancer.wait_active(4);
        let (_back, back) = connect_from_each(400, &mut listeners);
        assert_eq!(before, back);
    });
}

fn shares(landings: &[usize]) -> HashMap<usize, usize> {
    let mut shares = HashMap::new();
    for landing in landings {
        *shares.entry(*landing).or_default() += 1;
    }
    shares
}

#[test]
fn source_hash_minds_weights() {
    Machine::with(|machine| {
        let backends = r#"{address: "127.0.0.1:21000", weight: 3}, "127.0.0.1:21001""#;
        let _balancer = Balancer::start(machine, &virtual_port_of("source-hash", backends, &[]));
        let mut listeners = open_listeners(2);
        let (_clients, landings) = connect_from_each(800, &mut listeners);
        let first = shares(&landings)[&0];
        // 600 expected, standard deviation 12.
        assert!(
            (540..=660).contains(&first),
            "{first} of 800 with 3/4 of the weight"
        );
    });
}

#[test]
fn each_policy_reaches_every_one_of_256_backends() {
    for policy in ["least-connections", "round-robin", "source-hash"] {
        Machine::with(|machine| {
            let balancer = Balancer::start(machine, &virtual_port(policy, 256, &[]));
            let mut listeners = open_listeners(256);
            balancer.wait_active(256);
            let clients: Vec<_> = (0..512)
                .map(|n| tcp::connect_from(source(n), agents()).connected())
                .collect();
            let loads = agree(&balancer, &mut listeners);
            assert_eq!(loads.iter().sum::<usize>(), clients.len());
            let reached = loads.iter().filter(|load| **load > 0).count();
            match policy {
                "round-robin" => assert_eq!(loads, vec![2; 256]),
                // 221 expected: 256 × (1 - e^-2).
                "source-hash" => assert!(reached > 200, "{reached} of 256 reached"),
                _ => {
                    assert!(reached > 250, "{reached} of 256 reached");
                    assert!(loads.iter().all(|load| *load <= 5), "{loads:?}");
                }
            }
        });
    }
}
