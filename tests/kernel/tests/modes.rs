//! `mode: count` and `mode: dry-run` change nothing for clients and servers.

use std::time::Duration;

use anyhow::ensure;
use socket2::SockRef;
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Machine, Service, Signal, eventually};

use crate::support::{
    accept_each, agents, agree, group, loads, open_listeners, own_port, virtual_port,
};

const QUOTA: usize = 4;
const CLIENTS: usize = 20;

fn yaml(mode: &str) -> String {
    let service = own_port("least-connections", &["quota: {per_backend: 4}"]);
    format!("{service}mode: {mode}\n")
}

/// What `status` prints, on one line.
fn status(balancer: &Balancer) -> String {
    let status = balancer.must(&["status"]);
    status.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn look_ups(service: &Service) -> u64 {
    service.verdicts.values().sum()
}

/// Opens [`CLIENTS`] connections to one listener, which are all let in and counted.
#[track_caller]
fn lets_everybody_in(balancer: &Balancer) -> Service {
    let mut listeners = [Listen::on(&agents()).open()];
    balancer.wait_active(1);
    let clients = tcp::connect_many(agents(), CLIENTS);
    assert_eq!(clients.len(), CLIENTS);
    accept_each(&mut listeners);
    assert_eq!(agree(balancer, &mut listeners), [CLIENTS]);
    balancer.service()
}

#[test]
fn count_refuses_nobody_and_has_no_quota() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &yaml("count"));
        let service = lets_everybody_in(&balancer);
        assert_eq!(service.verdicts("count-only"), CLIENTS as u64);
        assert_eq!(look_ups(&service), CLIENTS as u64);
        assert_eq!(service.backends[0].quota, None);
        let status = status(&balancer);
        assert!(status.contains("Mode: count: connections are"), "{status}");
    });
}

#[test]
fn a_dry_run_counts_whom_it_would_refuse_and_lets_them_in() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &yaml("dry-run"));
        let service = lets_everybody_in(&balancer);
        assert_eq!(service.verdicts("admitted"), QUOTA as u64);
        assert_eq!(service.verdicts("over-quota"), (CLIENTS - QUOTA) as u64);
        assert_eq!(service.backends[0].quota, Some(4));
        let status = status(&balancer);
        assert!(
            status.contains("Mode: dry-run: nothing is changed"),
            "{status}"
        );
        let metrics = balancer.must(&["metrics"]);
        assert!(
            !metrics.contains("verdict=\"refuse\",reason=\"over-quota\""),
            "{metrics}"
        );
    });
}

/// What `steer` would have assigned is taken back: the kernel hashes over the group, as without it.
#[test]
fn a_dry_run_does_not_choose_within_a_group() {
    Machine::with(|machine| {
        let spread = |listeners: &mut [Listener]| {
            let clients = tcp::connect_many(agents(), 120);
            assert_eq!(clients.len(), 120);
            accept_each(listeners);
            loads(listeners)
        };
        let balancer = Balancer::start(
            machine,
            &yaml("on").replace("per_backend: 4", "per_backend: 400"),
        );
        let mut listeners = group(4);
        balancer.wait_active(4);
        assert_eq!(spread(&mut listeners), [30; 4]);
        drop(listeners);
        balancer.configure(&yaml("dry-run").replace("per_backend: 4", "per_backend: 400"));
        balancer.reload();
        balancer.wait_for_log(" reloaded /", 0);
        let mut listeners = group(4);
        balancer.wait_until(|service| service.active() == 4);
        // By hash, four times 30 is one chance in a thousand and more; twice, in a million.
        let even = (0..2).all(|_| {
            let loads = spread(&mut listeners);
            loads.iter().max() == loads.iter().min()
        });
        assert!(!even, "somebody has spread them");
    });
}

#[test]
fn modes_follow_a_reload_in_both_directions() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &yaml("dry-run"));
        let mut listener = Listen::on(&agents()).open();
        balancer.wait_active(1);
        let first = tcp::connect_many(agents(), CLIENTS);
        assert_eq!(first.len(), CLIENTS);
        listener.accept_all();
        for (already, (mode, let_in)) in [("on", 0), ("count", 3), ("on", 0), ("dry-run", 3)]
            .into_iter()
            .enumerate()
        {
            balancer.configure(&yaml(mode));
            balancer.reload();
            balancer.wait_for_log(" reloaded /", already);
            assert_eq!(tcp::connect_many(agents(), 3).len(), let_in, "mode {mode}");
        }
    });
}

#[test]
fn sockets_keep_their_options_unless_the_mode_is_on() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &yaml("dry-run"));
        for (mode, keepalive) in [("count", false), ("dry-run", false), ("on", true)] {
            balancer.configure(&yaml(mode));
            balancer.stop(Signal::SIGTERM);
            balancer.launch();
            let mut listener = Listen::on(&agents()).open();
            balancer.wait_active(1);
            let _client = tcp::connect(agents()).connected();
            eventually(Duration::from_secs(3), || {
                ensure!(listener.accept_all() == 1, "not there yet");
                Ok(())
            });
            let accepted = listener.close();
            let found = SockRef::from(&accepted[0]).keepalive();
            let found = found.expect("SO_KEEPALIVE");
            assert_eq!(found, keepalive, "mode {mode}");
        }
    });
}

/// Nobody but the backends serves a virtual port.
#[test]
fn a_virtual_port_is_steered_in_every_mode() {
    Machine::with(|machine| {
        let file = virtual_port("least-connections", 2, &["quota: {per_backend: 4}"]);
        let balancer = Balancer::start(machine, &format!("{file}mode: dry-run\n"));
        let mut listeners = open_listeners(2);
        balancer.wait_active(2);
        let clients = tcp::connect_many(agents(), CLIENTS);
        assert_eq!(clients.len(), CLIENTS);
        accept_each(&mut listeners);
        assert_eq!(agree(&balancer, &mut listeners), [CLIENTS / 2; 2]);
        assert_eq!(balancer.service().verdicts("steered"), CLIENTS as u64);
    });
}
