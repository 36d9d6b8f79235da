//! A node that loses most of its connections at once.

use std::thread;
use std::time::Duration;

use balancer_common::place::choice::OWN_ONLY_NS;
use testkit::fixtures::{Machine, tcp};

use super::node::{FRONTEND, GROUP, Node, loads, open_servers};
use crate::support::at;

#[test]
fn who_has_lost_most_goes_by_its_own_counts_until_others_are_known_again() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 4);
        let mut servers = open_servers(4);
        for endpoint in 0..4 {
            node.set_others(endpoint, 100 * u64::from(endpoint));
        }
        let before = tcp::connect_many(at(FRONTEND), 40);
        let by_others = loads(&mut servers);
        assert!(
            by_others[0] > by_others[1] && by_others[3] == 0,
            "{by_others:?}"
        );
        node.set_lost_below(GROUP, 10);
        drop(before);
        node.agree(&[0; 4]);
        let mut clients = tcp::connect_many(at(FRONTEND), 40);
        // Also those that came when it had more than few again.
        assert_eq!(loads(&mut servers), [10; 4]);
        node.agree(&[10; 4]);
        thread::sleep(Duration::from_nanos(OWN_ONLY_NS) + Duration::from_millis(100));
        clients.extend(tcp::connect_many(at(FRONTEND), 40));
        assert_eq!(node.placed(3).established, 10, "the most loaded one");
    });
}
