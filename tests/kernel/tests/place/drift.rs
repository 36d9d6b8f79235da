//! The audit of what was placed: counts that stay wrong are put right, others left alone.

use balancer::dataplane::Paths;
use balancer::sys::netns;
use testkit::fixtures::foreign::{Action, Event, SockOps};
use testkit::fixtures::tcp::{self};
use testkit::fixtures::{Machine, Netns};

use super::node::{FRONTEND, Node, endpoint_at, open_servers};
use crate::support::at;

/// Ends a pass; returns how many counts were put right, ever.
fn pass(node: &mut Node<'_>) -> u64 {
    let writer = node.writer();
    writer.audit.begin(&writer.tables).expect("begun");
    let ended = writer
        .audit
        .end(&mut writer.tables, std::time::Duration::ZERO);
    ended.expect("compared").repairs
}

/// The kernel takes the iterator over the sockets that were placed; or it is one of those that
/// forbid it. Then nothing is compared, and `doctor` says so.
fn compares(node: &mut Node<'_>) -> bool {
    if node.writer().audit.placed.compares() {
        return true;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let trial = balancer::dataplane::trial(&Paths::new(directory.path()));
    let forbidden = trial.expect("the kernel takes the programs");
    let why = forbidden.expect("what can be loaded is made use of");
    assert!(why.contains("the kernel forbids iterators"), "{why}");
    eprintln!("nothing is compared on this kernel: {why}");
    assert_eq!([(); 6].map(|()| pass(node)), [0; 6]);
    false
}

#[test]
fn a_count_that_stays_wrong_is_put_right() {
    Machine::with(|machine| {
        let mut node = Node::placing(machine, 2);
        let _servers = open_servers(2);
        let clients = tcp::connect_many(at(FRONTEND), 6);
        node.agree(&[3, 3]);
        assert_eq!([(); 4].map(|()| pass(&mut node)), [0; 4]);
        node.miscount(0, 5, 0);
        node.miscount(1, -2, 4);
        if !compares(&mut node) {
            return;
        }
        // What is in flight may become established at any time: that comes first.
        assert_eq!([(); 6].map(|()| pass(&mut node)), [0, 0, 2, 2, 2, 3]);
        node.agree(&[3, 3]);
        assert_eq!([(); 4].map(|()| pass(&mut node)), [3; 4]);
        drop(clients);
        node.agree(&[0, 0]);
    });
}

/// Sockets are found in whatever network namespace they are.
#[test]
fn sockets_in_every_netns_are_found() {
    Machine::with(|machine| {
        let mut node = Node::placing(machine, 1);
        let other = Netns::new();
        let here = netns::cookie().expect("a cookie");
        let _servers = open_servers(1);
        let clients = tcp::connect_many(at(FRONTEND), 2);
        let (listeners, strangers) = other.run(|| {
            assert_ne!(netns::cookie().expect("a cookie"), here);
            (open_servers(1), tcp::connect_many(at(FRONTEND), 3))
        });
        node.agree(&[5]);
        assert_eq!([(); 4].map(|()| pass(&mut node)), [0; 4]);
        drop((clients, strangers, listeners));
        node.agree(&[0]);
    });
}

/// Another program switches state changes off: connections stay in flight for ever, until the
/// sockets are asked.
#[test]
fn connections_whose_events_are_lost_are_counted_all_the_same() {
    Machine::with(|machine| {
        let mut node = Node::placing(machine, 1);
        let _servers = open_servers(1);
        let deaf = SockOps::load("deaf", &[(Event::Connects, Action::Replace(0))]);
        let attached = deaf.attach(&machine.cgroup);
        let clients = tcp::connect_many(at(FRONTEND), 4);
        assert_eq!(node.counts(1), [(0, 4)]);
        if !compares(&mut node) {
            return;
        }
        assert_eq!([(); 6].map(|()| pass(&mut node)), [0, 0, 1, 1, 1, 2]);
        assert_eq!(node.counts(1), [(4, 0)]);
        drop((attached, clients));
        assert_eq!(node.counts(1), [(4, 0)]);
        assert_eq!([(); 3].map(|()| pass(&mut node)), [2, 2, 3]);
        node.agree(&[0]);
        let _client = tcp::connect(at(FRONTEND)).connected();
        node.agree(&[1]);
        assert_eq!(endpoint_at(0)[0].port(), super::node::FIRST_PORT);
    });
}
