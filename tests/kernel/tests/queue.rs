//! Backends that do not accept.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use testkit::fixtures::diag::{self, State};
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Machine, eventually, patiently};

use crate::support::{agents, agree, backend, in_time, own_port, virtual_port};

#[test]
fn a_full_accept_queue_is_steered_around() {
    for policy in ["least-connections", "round-robin", "source-hash"] {
        Machine::with(|machine| {
            let balancer = Balancer::start(machine, &virtual_port(policy, 2, &[]));
            let mut listeners = vec![
                Listen::on(&backend(0)).backlog(2).open(),
                Listen::on(&backend(1)).open(),
            ];
            // A hung backend never accepts: three fill its queue.
            let clients: Vec<_> = (0..40)
                .map(|n| tcp::connect_from(crate::support::source(n), agents()).connected())
                .collect();
            assert_eq!(clients.len(), 40);
            let service = balancer.service();
            assert_eq!(service.backend(backend(0)).established, 3, "{policy}");
            assert_eq!(service.backend(backend(1)).established, 37, "{policy}");
            assert_eq!(service.verdicts("accept-queue-full"), 0);
            agree(&balancer, &mut listeners);
        });
    }
}

/// Full for a moment: the kernel drops the SYN, the client's second one gets in.
#[test]
fn a_momentarily_full_queue_costs_a_second_and_no_refusal() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut listener = Listen::on(&agents()).backlog(1).open();
        let _clients = tcp::connect_many(agents(), 2);
        let started = Instant::now();
        let outcome = thread::scope(|scope| {
            let late = scope.spawn(|| tcp::attempt(None, agents(), Duration::from_secs(4)));
            eventually(Duration::from_secs(5), || {
                ensure!(!diag::table(State::SynSent).is_empty(), "no SYN yet");
                Ok(())
            });
            assert_eq!(listener.accept_all(), 2);
            late.join().expect("no panic")
        });
        let _third = outcome.connected();
        assert!(
            started.elapsed() > Duration::from_millis(900),
            "{:?}",
            started.elapsed()
        );
        let service = balancer.service();
        assert!(service.verdicts("accept-queue-grace") > 0, "{service:?}");
        assert_eq!(service.verdicts("accept-queue-full"), 0);
    });
}

#[test]
fn a_queue_full_for_longer_than_the_grace_is_refused() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let mut listener = Listen::on(&backend(0)).backlog(1).open();
        let _clients = tcp::connect_many(agents(), 2);
        let started = Instant::now();
        let patience = Duration::from_millis(100);
        let waited = loop {
            if tcp::attempt(None, agents(), patience).is_refused() {
                break started.elapsed();
            }
            let limit = patiently(Duration::from_secs(5));
            assert!(started.elapsed() < limit, "never refused");
        };
        assert!(
            waited > Duration::from_millis(900),
            "refused after {waited:?}"
        );
        assert!(
            waited < patiently(Duration::from_millis(1600)),
            "refused only after {waited:?}"
        );
        assert!(balancer.service().verdicts("accept-queue-full") > 0);
        // It accepts again: in at once.
        assert_eq!(listener.accept_all(), 2);
        tcp::connect(agents()).connected();
    });
}

/// A client that is alone sends its SYN again after a second and some milliseconds.
#[test]
fn a_full_queue_is_remembered_for_longer_than_a_syn_is_waited_for() {
    in_time(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let _listener = Listen::on(&backend(0)).backlog(1).open();
        let _clients = tcp::connect_many(agents(), 2);
        let started = Instant::now();
        let outcome = tcp::attempt(None, agents(), Duration::from_secs(6));
        let waited = started.elapsed();
        // It was forgotten meanwhile.
        if waited >= Duration::from_millis(1_400) {
            return None;
        }
        assert!(outcome.is_refused(), "{outcome:?} after {waited:?}");
        let service = balancer.service();
        assert_eq!(service.verdicts("accept-queue-grace"), 1, "{service:?}");
        assert_eq!(service.verdicts("accept-queue-full"), 1, "{service:?}");
        Some(())
    });
}

/// `listen(0)` holds one connection: its queue is full with more than 0, not with 0.
#[test]
fn a_backlog_of_zero_is_not_always_full() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let mut listener = Listen::on(&backend(0)).backlog(0).open();
        for _ in 0..10 {
            tcp::connect(agents()).connected();
            assert_eq!(listener.accept_all(), 1);
        }
        assert_eq!(balancer.service().verdicts("accept-queue-grace"), 0);
    });
}
