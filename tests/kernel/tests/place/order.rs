//! Beside other programs at `connect()`.

use balancer::dataplane::Placing;
use testkit::fixtures::foreign::Connect4;
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Cgroup, Machine};

use super::node::{FRONTEND, GROUP, Node, open_servers};
use crate::support::at;

/// What a rewrite of others leads to: 10.99.0.1 as an address of this machine's.
fn elsewhere(machine: &Machine) -> tcp::Listener {
    machine
        .netns
        .add_address("10.99.0.1".parse().expect("an address"));
    Listen::on("10.99.0.1:7000").open()
}

fn foreign() -> Connect4 {
    Connect4::load("service_lb", 11_800, 7_000)
}

fn connect_in(cgroup: &Cgroup) -> std::net::TcpStream {
    cgroup.run(|| tcp::connect(at(FRONTEND)).connected())
}

/// Kernels that know an order have it run first, whoever was there before.
#[test]
fn it_decides_before_others_at_its_cgroup_whoever_came_first() {
    Machine::with(|machine| {
        let mut elsewhere = elsewhere(machine);
        let other = foreign();
        let before = other.attach(&machine.cgroup);
        let node = Node::placing(machine, 1);
        let mut servers = open_servers(1);
        let client = connect_in(&machine.cgroup);
        assert_eq!((servers[0][0].accept_all(), elsewhere.accept_all()), (1, 0));
        drop(before);
        let _after = other.attach(&machine.cgroup);
        let another = connect_in(&machine.cgroup);
        assert_eq!((servers[0][0].accept_all(), elsewhere.accept_all()), (1, 0));
        node.agree(&[2]);
        drop((client, another));
        node.agree(&[0]);
    });
}

/// A cgroup's own programs run before those above it: theirs is the first word.
#[test]
fn one_in_a_cgroup_below_decides_for_it() {
    Machine::with(|machine| {
        let mut elsewhere = elsewhere(machine);
        let node = Node::placing(machine, 1);
        let mut servers = open_servers(1);
        let below = machine.cgroup.below();
        let attached = foreign().attach(&below);
        let client = connect_in(&below);
        assert_eq!((servers[0][0].accept_all(), elsewhere.accept_all()), (0, 1));
        let beside = connect_in(&machine.cgroup);
        assert_eq!((servers[0][0].accept_all(), elsewhere.accept_all()), (1, 0));
        node.agree(&[1]);
        assert_eq!(node.reasons(GROUP), [("placed", 1)].into());
        drop((attached, client, beside));
    });
}

/// Others that allow none beside them are no reason to do without the rest.
#[test]
fn where_another_allows_none_beside_it_only_placing_is_off() {
    Machine::with(|machine| {
        let mut elsewhere = elsewhere(machine);
        let other = foreign();
        let alone = other.attach_alone(&machine.cgroup);
        let mut node = Node::counting(machine);
        node.add_frontend(FRONTEND, GROUP, 0);
        node.add_endpoint(0, super::node::endpoint_at(0), 1);
        node.set_members(GROUP, [0]);
        for _ in 0..2 {
            let Placing::Refused(why) = node.set_placing(true) else {
                panic!("it was attached");
            };
            for words in ["EPERM", "Cilium", "balancer doctor", "--cgroup"] {
                assert!(why.contains(words), "{why}");
            }
        }
        let left = std::fs::read_dir(node.paths().current()).expect("listed");
        let left = left.map(|entry| entry.expect("an entry").file_name());
        let left: Vec<_> = left
            .filter(|name| name.to_string_lossy().starts_with("link_place"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        let client = connect_in(&machine.cgroup);
        assert_eq!(elsewhere.accept_all(), 1);
        drop((client, alone));
        assert_eq!(node.set_placing(true), Placing::On);
        let _servers = open_servers(1);
        let _client = connect_in(&machine.cgroup);
        node.agree(&[1]);
    });
}
