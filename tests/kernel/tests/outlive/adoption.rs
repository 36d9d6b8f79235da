//! A daemon that comes late.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::ensure;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use testkit::fixtures::load::{Load, Settled, connect_in_turn};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Machine, diag, eventually};

use super::fixture::{agree_everywhere, assert_no_drift, audit_line};
use super::pins::Traces;
use crate::support::{accept_each, agents, at, own_port};

/// Connections that are there before the daemon.
const CLIENTS: usize = 5000;

fn addresses() -> [SocketAddr; 4] {
    [1, 2, 3, 4].map(|n| at(&format!("127.0.0.{n}:11800")))
}

#[test]
fn five_thousand_connections_are_adopted_while_more_arrive() {
    Machine::with(|machine| {
        let mut listeners = addresses().map(|address| Listen::on(&address).open());
        // Both ends of 5,000 and some more: half of what a process may have open.
        let mut clients = connect_in_turn(&addresses(), CLIENTS);
        accept_each(&mut listeners);
        let mut load = Load::on(listeners.into());
        for to in addresses() {
            load.come_and_go(to, 300);
        }
        load.arrive(addresses().into(), 400, 1000);
        let mut balancer = Balancer::prepare(machine, &own_port("least-connections", &[]));
        let started = Instant::now();
        balancer.launch();
        let took = started.elapsed();
        let mut traces = Traces::default();
        traces.note(balancer.state());
        let Settled {
            report,
            mut listeners,
            held,
        } = load.settle();
        let adopted = CLIENTS + held.len();
        println!(
            "adoption: {CLIENTS} connections, and {} that arrived, in {} ms from start to ready; {report}; {}",
            held.len(),
            took.as_millis(),
            audit_line(&balancer.status())
        );
        report.assert_no_failures();
        let counted = agree_everywhere(&balancer, &mut listeners);
        assert_eq!(counted.iter().sum::<usize>(), adopted, "each of them once");
        assert_no_drift(&balancer);
        // Adopted and others close in any order.
        clients.truncate(CLIENTS / 2);
        agree_everywhere(&balancer, &mut listeners);
        drop(held);
        agree_everywhere(&balancer, &mut listeners);
        drop(clients);
        let left = agree_everywhere(&balancer, &mut listeners);
        assert_eq!(left, [0; 4]);
        assert_no_drift(&balancer);
        balancer.must(&["unload"]);
        assert!(balancer.wait().success());
        traces.assert_gone(machine, &balancer);
    });
}

/// Every OAP has one IPv6 socket for both families.
#[test]
fn a_dual_stack_listener_is_adopted_with_both_kinds_of_connections() {
    Machine::with(|machine| {
        let mut listeners = vec![Listen::on("[::]:11800").dual_stack().open()];
        let both = [agents(), at("[::1]:11800")];
        let before = connect_in_turn(&both, 20);
        accept_each(&mut listeners);
        let mut load = Load::on(listeners);
        load.arrive(both.into(), 200, 30);
        for to in both {
            load.come_and_go(to, 200);
        }
        let rest = ["quota: {per_backend: 60}"];
        let balancer = Balancer::start(machine, &own_port("least-connections", &rest));
        balancer.wait_active(1);
        let Settled {
            report,
            mut listeners,
            held,
        } = load.settle();
        println!("dual_stack: {report}; {}", audit_line(&balancer.status()));
        report.assert_no_failures();
        assert_eq!(
            agree_everywhere(&balancer, &mut listeners),
            [20 + held.len()]
        );
        // Held to its quota, whichever kind they are.
        let more: Vec<_> = both
            .iter()
            .cycle()
            .take(80)
            .filter_map(|to| tcp::connect(*to).ok())
            .collect();
        assert_eq!(agree_everywhere(&balancer, &mut listeners), [60]);
        assert!(more.len() >= 10);
        drop((before, held, more));
        assert_eq!(agree_everywhere(&balancer, &mut listeners), [0]);
        assert_no_drift(&balancer);
    });
}

/// The warning of the log that names this address.
#[track_caller]
fn warning_about(balancer: &Balancer, address: SocketAddr) -> String {
    eventually(Duration::from_secs(5), || {
        let logs = balancer.logs();
        let named = |line: &&str| line.contains("WARN") && line.contains(&address.to_string());
        let line = logs.lines().find(named).map(str::to_owned);
        ensure!(line.is_some(), "no warning names {address}:\n{logs}");
        Ok(line.unwrap_or_default())
    })
}

/// A listener that is on its way through a Unix socket is in no process's table of files.
#[test]
fn a_listener_that_no_process_has_is_named() {
    Machine::with(|machine| {
        let (ours, theirs) = UnixDatagram::pair().expect("a pair of sockets");
        let other = at("127.0.0.2:11800");
        let mut listeners = vec![Listen::on(&other).open()];
        let hidden = Listen::on(&agents()).open();
        send(&ours, &hidden);
        drop(hidden);
        let client = tcp::connect(agents()).connected();
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 3}"]),
        );
        balancer.wait_active(1);
        let warning = warning_about(&balancer, agents());
        assert!(
            warning.contains("descriptor"),
            "without its reason: {warning}"
        );
        // It serves without the balancer, and the other one with it.
        let more = [tcp::connect_many(agents(), 6), tcp::connect_many(other, 6)];
        assert_eq!(more.iter().map(Vec::len).collect::<Vec<_>>(), [6, 3]);
        assert_eq!(agree_everywhere(&balancer, &mut listeners), [3]);
        assert_eq!(diag::accepted(11800).len(), 1 + 6 + 3);
        drop((client, more, theirs));
    });
}

fn send(socket: &UnixDatagram, listener: &Listener) {
    let files = [listener.as_fd().as_raw_fd()];
    let message = [ControlMessage::ScmRights(&files)];
    let bytes = [IoSlice::new(b"x")];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &bytes,
        &message,
        MsgFlags::empty(),
        None,
    )
    .expect("a file can be sent");
}

/// What is special about it is said, wherever its place is: in the status, or in the log where it
/// has none there.
#[test]
fn an_mptcp_listener_that_was_there_before_is_named_as_one() {
    Machine::with(|machine| {
        let mut listener = Listen::on(&agents()).mptcp().open();
        let before = tcp::connect_many(agents(), 3);
        assert_eq!(listener.accept_all(), 3);
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 5}"]),
        );
        let service = balancer.service();
        let note = service
            .backends
            .iter()
            .find(|backend| backend.address == agents())
            .and_then(|backend| backend.note.clone());
        let said = note.unwrap_or_else(|| warning_about(&balancer, agents()));
        assert!(said.contains("MPTCP"), "{said}");
        // Counted where it could be adopted.
        if service.active() == 1 {
            let more = tcp::connect_many(agents(), 8);
            assert_eq!(more.len(), 2, "held to its quota");
            assert_eq!(listener.accept_all(), 2);
            balancer.wait_until(|service| service.established() == 5);
            drop(more);
        }
        drop(before);
        balancer.wait_until(|service| service.established() == 0);
        assert_no_drift(&balancer);
    });
}
