//! Admission: established + pending < quota, exactly.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use testkit::fixtures::tcp::{self, Listen, Outcome};
use testkit::fixtures::wire::Wire;
use testkit::fixtures::{Balancer, Machine, Service};

use crate::support::{
    agents, agree, at, connections, cpus, group, in_time, open_listeners, own_port, refusals,
    storm, virtual_port,
};

#[test]
fn quota_of_a_virtual_port_is_exact_on_each_backend() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &virtual_port("least-connections", 4, &["quota: {per_backend: 10}"]),
        );
        let mut listeners = open_listeners(4);
        let outcomes: Vec<_> = (0..60).map(|_| tcp::connect(agents())).collect();
        assert_eq!(refusals(&outcomes), 20);
        let clients = connections(outcomes);
        assert_eq!(agree(&balancer, &mut listeners), [10; 4]);
        let service = balancer.service();
        assert!(service.verdicts("over-quota") >= 20, "{service:?}");
        assert!(service.verdicts("steered") >= 40, "{service:?}");
        assert!(
            service
                .backends
                .iter()
                .all(|backend| backend.quota == Some(10)),
            "{service:?}"
        );
        drop(clients);
        assert_eq!(agree(&balancer, &mut listeners), [0; 4]);
        assert_eq!(
            connections((0..60).map(|_| tcp::connect(agents())).collect()).len(),
            40
        );
    });
}

#[test]
fn quota_of_an_own_port_is_exact() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 25}"]),
        );
        let mut listeners = vec![Listen::on("0.0.0.0:11800").open()];
        let outcomes: Vec<_> = (0..40).map(|_| tcp::connect(agents())).collect();
        assert_eq!(refusals(&outcomes), 15);
        assert_eq!(agree(&balancer, &mut listeners), [25]);
        // One leaves, one comes in.
        let mut clients = connections(outcomes);
        clients.pop();
        assert_eq!(agree(&balancer, &mut listeners), [24]);
        clients.push(tcp::connect(agents()).connected());
        assert!(tcp::connect(agents()).is_refused());
        let service = balancer.service();
        assert!(service.verdicts("admitted") >= 26, "{service:?}");
        assert!(service.verdicts("over-quota") >= 16, "{service:?}");
    });
}

#[test]
fn a_backend_over_quota_is_steered_around() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &virtual_port("source-hash", 3, &["quota: {per_backend: 10}"]),
        );
        let mut listeners = open_listeners(3);
        // One source: all of them want the same backend.
        let clients = tcp::connect_many(agents(), 25);
        assert_eq!(clients.len(), 25);
        let mut loads = agree(&balancer, &mut listeners);
        loads.sort_unstable();
        assert_eq!(loads, [5, 10, 10]);
    });
}

#[test]
fn concurrent_connects_stay_within_the_quota() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &virtual_port("least-connections", 3, &["quota: {per_backend: 50}"]),
        );
        let mut listeners = open_listeners(3);
        let outcomes = storm(8, 60, agents());
        let refused = refusals(&outcomes);
        let clients = connections(outcomes);
        let loads = agree(&balancer, &mut listeners);
        assert!(
            loads
                .iter()
                .all(|load| (50..=50 + 2 * cpus()).contains(load)),
            "{loads:?}"
        );
        assert_eq!(clients.len() + refused, 480);
    });
}

/// A check of established connections alone would let all thousand in.
#[test]
fn a_burst_of_late_acks_stays_within_the_quota() {
    in_time(|machine| {
        const QUOTA: usize = 100;
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 100}"]),
        );
        let mut listeners = vec![Listen::on(&agents()).open()];
        let sent = Instant::now();
        let opened = thread::scope(|scope| {
            let senders: Vec<_> = (0..4)
                .map(|n| {
                    scope.spawn(move || {
                        let wire = Wire::open(&machine.netns);
                        wire.half_open(n * 250..(n + 1) * 250, agents())
                    })
                })
                .collect();
            senders
                .into_iter()
                .map(|sender| sender.join().expect("sent"))
                .collect::<Vec<_>>()
        });
        let wire = Wire::open(&machine.netns);
        opened
            .iter()
            .flat_map(|(opened, _)| opened.values())
            .for_each(|answer| wire.ack(answer));
        // SYN-ACKs are sent again after a second.
        if sent.elapsed() >= Duration::from_millis(900) {
            return None;
        }
        let admitted: usize = opened.iter().map(|(opened, _)| opened.len()).sum();
        let refused: usize = opened.iter().map(|(_, refused)| refused).sum();
        assert_eq!(admitted + refused, 1000);
        assert!(
            (QUOTA..=QUOTA + 2 * cpus()).contains(&admitted),
            "{admitted} admitted"
        );
        assert_eq!(agree(&balancer, &mut listeners), [admitted]);
        Some(())
    });
}

#[test]
fn exempt_sources_are_never_refused_and_never_count_against_the_quota() {
    for yaml in [
        own_port(
            "least-connections",
            &["quota: {per_backend: 3}", "exempt: [127.0.9.0/24]"],
        ),
        virtual_port(
            "least-connections",
            1,
            &["quota: {per_backend: 3}", "exempt: [127.0.9.0/24]"],
        ),
    ] {
        Machine::with(|machine| {
            let balancer = Balancer::start(machine, &yaml);
            let mut listeners = vec![
                Listen::on(&if yaml.contains("backends") {
                    crate::support::backend(0)
                } else {
                    agents()
                })
                .open(),
            ];
            let exempt = || tcp::connect_from(at("127.0.9.7:0"), agents());
            let before: Vec<_> = (0..5).map(|_| exempt().connected()).collect();
            let mut clients = tcp::connect_many(agents(), 3);
            assert_eq!(clients.len(), 3);
            assert!(tcp::connect(agents()).is_refused());
            assert!(tcp::connect_from(at("127.0.8.7:0"), agents()).is_refused());
            let after: Vec<_> = (0..5).map(|_| exempt().connected()).collect();
            assert_eq!(agree(&balancer, &mut listeners), [13]);
            let service = balancer.service();
            assert_eq!(service.backends[0].exempt, 10);
            assert!(service.verdicts("exempt") >= 10, "{service:?}");
            drop((before, after));
            assert_eq!(agree(&balancer, &mut listeners), [3]);
            assert!(tcp::connect(agents()).is_refused());
            clients.pop();
            assert_eq!(agree(&balancer, &mut listeners), [2]);
            assert!(tcp::connect(agents()).ok().is_some());
            assert_eq!(balancer.service().backends[0].exempt, 0);
        });
    }
}

#[test]
fn a_quota_set_by_hand_is_in_force_at_the_next_syn() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &virtual_port("least-connections", 2, &["quota: {per_backend: 5}"]),
        );
        let mut listeners = open_listeners(2);
        let mut clients = tcp::connect_many(agents(), 20);
        assert_eq!(agree(&balancer, &mut listeners), [5, 5]);
        balancer.quota_set("agents", None, 8);
        clients.extend(tcp::connect_many(agents(), 20));
        assert_eq!(agree(&balancer, &mut listeners), [8, 8]);
        // For one backend alone.
        let slot = balancer.service().backend(crate::support::backend(1)).slot;
        balancer.quota_set("agents", Some(slot), 11);
        clients.extend(tcp::connect_many(agents(), 20));
        assert_eq!(agree(&balancer, &mut listeners), [8, 11]);
        // Below what is established: nobody is cut, nobody comes in.
        balancer.quota_clear("agents", Some(slot));
        balancer.quota_set("agents", None, 2);
        assert!(tcp::connect(agents()).is_refused());
        assert_eq!(agree(&balancer, &mut listeners), [8, 11]);
        drop(clients);
        assert_eq!(agree(&balancer, &mut listeners), [0, 0]);
        let _clients = tcp::connect_many(agents(), 20);
        assert_eq!(agree(&balancer, &mut listeners), [2, 2]);
        balancer.quota_clear("agents", None);
        let _more = tcp::connect_many(agents(), 20);
        assert_eq!(agree(&balancer, &mut listeners), [5, 5]);
    });
}

#[test]
fn a_quota_changed_under_load_holds() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &own_port("round-robin", &["quota: {per_backend: 20}"]),
        );
        let mut listeners = group(2);
        let stop = AtomicBool::new(false);
        let clients: Vec<_> = thread::scope(|scope| {
            let load = || {
                let mut held = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    held.extend(tcp::connect(agents()).ok());
                    thread::sleep(Duration::from_micros(500));
                }
                held
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
            // Both listeners have one quota.
            let bounds = |quota: usize| quota..=quota + 4 * cpus();
            for (set, held) in [(60, 60), (150, 150), (90, 150)] {
                balancer.quota_set("agents", None, set);
                balancer
                    .wait_until(|service| bounds(held).contains(&(service.established() as usize)));
            }
            stop.store(true, Ordering::Relaxed);
            threads
                .into_iter()
                .flat_map(|thread| thread.join().expect("no connect panics"))
                .collect()
        });
        assert_eq!(
            agree(&balancer, &mut listeners).iter().sum::<usize>(),
            clients.len()
        );
    });
}

#[test]
fn quota_zero_closes_a_backend_by_hand() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let mut listeners = open_listeners(2);
        let mut clients = tcp::connect_many(agents(), 4);
        let slot = balancer.service().backend(crate::support::backend(0)).slot;
        balancer.quota_set("agents", Some(slot), 0);
        clients.extend(tcp::connect_many(agents(), 10));
        assert_eq!(agree(&balancer, &mut listeners), [2, 12]);
        assert_eq!(balancer.service().verdicts("closed-by-hand"), 0);
        let said = balancer.must(&["quota", "clear", "agents"]);
        let clear = format!("`balancer quota clear agents --slot {slot}`");
        assert!(said.contains(&clear), "{said}");
        balancer.quota_set("agents", None, 0);
        balancer.quota_clear("agents", Some(slot));
        assert!(tcp::connect(agents()).is_refused());
        assert!(balancer.service().verdicts("closed-by-hand") > 0);
        assert_eq!(agree(&balancer, &mut listeners), [2, 12]);
        balancer.quota_clear("agents", None);
        assert!(matches!(tcp::connect(agents()), Outcome::Connected(_)));
    });
}

/// Clients × connections × headroom over the ready backends: raised at once, lowered slowly.
#[test]
fn a_computed_quota_follows_the_number_of_backends() {
    Machine::with(|machine| {
        let quota = "quota: {clients: 100, connections_per_client: 2, headroom: 20%}";
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[quota]));
        let mut listeners = open_listeners(3);
        balancer.wait_until(|service| quotas(service) == [Some(80); 3]);
        drop(listeners.pop());
        balancer.wait_until(|service| quotas(service) == [Some(120); 2]);
        listeners.extend([Listen::on(&crate::support::backend(2)).open()]);
        balancer.eventually(|service| {
            ensure!(service.active() == 3);
            for backend in &service.backends {
                let quota = backend.quota.unwrap_or(u32::MAX);
                let lowest = if backend.address == crate::support::backend(2) {
                    80
                } else {
                    108
                };
                ensure!(
                    (lowest..=120).contains(&quota),
                    "{quota} for {}",
                    backend.address
                );
            }
            Ok(())
        });
        let sentence = balancer.must(&["quota", "show", "agents"]);
        assert!(
            sentence.contains("100"),
            "the explanation names the clients: {sentence}"
        );
    });
}

/// Clients that are gone and still counted must not keep out those that are there: where no backend
/// has room, nobody has a quota.
#[test]
fn computed_quotas_open_when_all_backends_are_full() {
    Machine::with(|machine| {
        let quota = "quota: {clients: 20, headroom: 10%, min_quota: 1}";
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[quota]));
        let mut listeners = open_listeners(2);
        balancer.wait_until(|service| quotas(service) == [Some(11); 2]);
        let gone = tcp::connect_many(agents(), 20);
        let mut come = tcp::connect_many(agents(), 2);
        balancer.wait_until(|service| quotas(service) == [None; 2]);
        let sentence = balancer.must(&["quota", "show", "agents"]);
        assert!(
            sentence.contains("none of the 2 ready backends"),
            "{sentence}"
        );
        come.extend(tcp::connect_many(agents(), 18));
        assert_eq!((gone.len(), come.len()), (20, 20));
        assert_eq!(agree(&balancer, &mut listeners), [20, 20]);
        // Numbers are back when they leave room somewhere.
        drop(gone);
        balancer.wait_until(|service| quotas(service) == [Some(11); 2]);
    });
}

/// What `quota show -o json` says of a backend.
fn shown(balancer: &Balancer) -> serde_json::Value {
    let json = balancer.must(&["quota", "show", "agents", "-o", "json"]);
    serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error} in {json}"))
}

#[test]
fn quota_show_tells_the_rule_and_what_was_set_by_hand() {
    Machine::with(|machine| {
        let yaml = virtual_port("least-connections", 2, &["quota: {per_backend: 7}"]);
        let balancer = Balancer::start(machine, &yaml);
        let _listeners = open_listeners(2);
        balancer.wait_until(|service| quotas(service) == [Some(7); 2]);
        let before = shown(&balancer);
        assert_eq!(before["schema"], 1);
        let service = &before["services"][0];
        assert_eq!(service["name"], "agents");
        assert!(
            service["rule"]
                .as_str()
                .is_some_and(|rule| rule.contains('7')),
            "{service}"
        );
        assert!(
            service["sentence"]
                .as_str()
                .is_some_and(|sentence| sentence.contains('7')),
            "{service}"
        );
        assert_eq!(service["override"], serde_json::Value::Null);
        let slot = |n: usize| balancer.service().backend(crate::support::backend(n)).slot;
        balancer.quota_set("agents", None, 9);
        balancer.quota_set("agents", Some(slot(1)), 4);
        let after = shown(&balancer);
        assert_eq!(after["services"][0]["override"], 9);
        let backends = after["services"][0]["backends"]
            .as_array()
            .expect("a list")
            .clone();
        let of = |slot: u32| {
            backends
                .iter()
                .find(|found| found["slot"] == slot)
                .expect("it is shown")
                .clone()
        };
        assert_eq!(
            (of(slot(0))["quota"].clone(), of(slot(1))["quota"].clone()),
            (9.into(), 4.into())
        );
        balancer.quota_clear("agents", None);
        assert_eq!(
            quotas(&balancer.service()),
            [Some(7), Some(4)],
            "that of one backend stays"
        );
    });
}

fn quotas(service: &Service) -> Vec<Option<u32>> {
    service
        .backends
        .iter()
        .map(|backend| backend.quota)
        .collect()
}
