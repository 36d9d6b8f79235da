//! Every reason is reached, and counted under its name.

use std::collections::BTreeSet;
use std::time::Duration;

use balancer_common::Reason;
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::wire::Wire;
use testkit::fixtures::{Balancer, Machine, Service, Signal};

use crate::support::{agents, agree, at, backend, open_listeners, own_port, virtual_port};

#[test]
fn status_lists_every_reason() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let listed: BTreeSet<_> = balancer.service().verdicts.into_keys().collect();
        let all: BTreeSet<_> = Reason::ALL
            .iter()
            .map(|reason| reason.name().to_owned())
            .collect();
        assert_eq!(listed, all);
    });
}

/// The reasons with a counter above 0.
fn reached(service: &Service) -> BTreeSet<&str> {
    service
        .verdicts
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(reason, _)| reason.as_str())
        .collect()
}

#[test]
fn nothing_is_counted_for_other_ports() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let _other = Listen::on("127.0.0.1:11801").open();
        let _clients = tcp::connect_many(at("127.0.0.1:11801"), 10);
        assert_eq!(reached(&balancer.service()), BTreeSet::new());
    });
}

#[test]
fn without_a_backend_the_kernel_decides() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        assert!(tcp::connect(agents()).is_refused());
        assert_eq!(reached(&balancer.service()), BTreeSet::from(["no-backend"]));
        // A listener on the virtual port itself is hidden only while there are backends.
        let mut hidden = Listen::on(&agents()).open();
        let _client = tcp::connect(agents()).connected();
        assert_eq!(hidden.accept_all(), 1);
        let mut listeners = open_listeners(1);
        let _steered = tcp::connect(agents()).connected();
        assert_eq!(agree(&balancer, &mut listeners), [1]);
        assert_eq!(hidden.accept_all(), 0);
    });
}

#[test]
fn each_ordinary_reason_is_counted_for_what_it_says() {
    Machine::with(|machine| {
        let rest = ["quota: {per_backend: 1}", "exempt: [127.0.9.0/24]"];
        let own = Balancer::start(machine, &own_port("least-connections", &rest));
        let _listener = Listen::on(&agents()).open();
        let _client = tcp::connect(agents()).connected();
        assert_eq!(reached(&own.service()), BTreeSet::from(["admitted"]));
        assert!(tcp::connect(agents()).is_refused());
        assert_eq!(
            reached(&own.service()),
            BTreeSet::from(["admitted", "over-quota"])
        );
        let _exempt = tcp::connect_from(at("127.0.9.1:0"), agents()).connected();
        assert_eq!(
            reached(&own.service()),
            BTreeSet::from(["admitted", "exempt", "over-quota"])
        );
        own.quota_set("agents", None, 0);
        assert!(tcp::connect(agents()).is_refused());
        assert_eq!(
            reached(&own.service()),
            BTreeSet::from(["admitted", "closed-by-hand", "exempt", "over-quota"])
        );
    });
}

/// The daemon is gone and the backend hangs: no refusal either, the client tries again.
#[test]
fn a_stale_daemon_refuses_nobody_for_a_full_queue() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &[]);
        let mut balancer = Balancer::start(machine, &format!("{yaml}fail_open_after: 1s\n"));
        let _listener = Listen::on(&agents()).backlog(1).open();
        let _clients = tcp::connect_many(agents(), 2);
        balancer.stop(Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(1200));
        let patience = Duration::from_millis(150);
        for _ in 0..15 {
            assert!(tcp::attempt(None, agents(), patience).is_timed_out());
        }
        let service = balancer.service();
        assert_eq!(service.verdicts("accept-queue-full"), 0);
        assert!(service.verdicts("fail-open-stale") > 0, "{service:?}");
    });
}

/// Stray segments run the program too: they must not be taken for connections.
#[test]
fn stray_segments_change_no_count() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &virtual_port("least-connections", 2, &["quota: {per_backend: 5}"]),
        );
        let mut listeners = open_listeners(2);
        let wire = Wire::open(&machine.netns);
        let (opened, _) = wire.half_open(0..1, agents());
        let answer = *opened.values().next().expect("it was answered");
        wire.rst(&answer);
        for n in 100..200 {
            let mut stray = answer;
            stray.to = Wire::client(n);
            wire.ack(&stray);
            wire.rst(&stray);
        }
        let clients = tcp::connect_many(agents(), 20);
        assert_eq!(clients.len(), 10);
        assert_eq!(agree(&balancer, &mut listeners), [5, 5]);
    });
}

/// A closed listener is never assigned to, also when it was only shut down and is still known.
#[test]
fn a_listener_that_was_shut_down_takes_nothing() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let mut listeners = open_listeners(2);
        balancer.wait_active(2);
        listeners[0].shutdown();
        let clients = tcp::connect_many(agents(), 10);
        assert_eq!(clients.len(), 10);
        assert_eq!(agree(&balancer, &mut listeners), [0, 10]);
        listeners[0].listen_again();
        let more = tcp::connect_many(agents(), 10);
        assert_eq!(agree(&balancer, &mut listeners), [10, 10]);
        balancer.wait_until(|service| service.backend(backend(0)).established == 10);
        drop(more);
    });
}
