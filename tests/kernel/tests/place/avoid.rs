//! An endpoint that connects fail on is avoided for a while.

use std::thread;
use std::time::Duration;

use anyhow::ensure;
use balancer::sys::clock;
use balancer_common::abi::{ticks, ticks_of_ms};
use balancer_common::place::avoidance::{avoided_since, avoided_until, is_avoided};
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Machine, eventually};

use super::node::{FRONTEND, GROUP, Node, endpoint_at, loads, open_servers};
use crate::support::{at, in_time, refusals};

fn avoided(node: &Node<'_>, endpoint: u32) -> bool {
    let now = ticks(clock::monotonic_ns());
    is_avoided(node.placed(endpoint).avoidance, now)
}

/// How long it is or was avoided, in ticks.
fn avoided_for(node: &Node<'_>, endpoint: u32) -> u64 {
    let word = node.placed(endpoint).avoidance;
    avoided_until(word).saturating_sub(avoided_since(word))
}

/// It always has the fewest connections.
#[test]
fn an_endpoint_that_refuses_takes_few() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 4);
        let mut servers = open_servers(3);
        let outcomes: Vec<_> = (0..200).map(|_| tcp::connect(at(FRONTEND))).collect();
        let refused = refusals(&outcomes);
        assert!((1..=5).contains(&refused), "{refused}");
        let spread = loads(&mut servers);
        assert_eq!(spread.iter().sum::<usize>(), 200 - refused, "{spread:?}");
        assert_eq!(node.placed(3).failed, refused as u64);
        assert!(spread.iter().all(|load| *load >= 60), "{spread:?}");
    });
}

/// It is known as soon as a SYN has to be sent again, while the client still waits.
#[test]
fn an_endpoint_that_says_nothing_costs_one_client_a_retry() {
    in_time(|machine| {
        let node = Node::placing(machine, 2);
        let silent = Listen::on(&endpoint_at(0)[0]).backlog(0).open();
        let _filled = tcp::connect(silent.addr()).connected();
        let _serves = Listen::on(&endpoint_at(1)[0]).open();
        // The first goes to the silent one.
        node.set_others(1, 1);
        let patience = Duration::from_millis(2_500);
        let served = thread::scope(|scope| {
            let first = scope.spawn(|| tcp::attempt(None, at(FRONTEND), patience));
            eventually(Duration::from_secs(5), || {
                ensure!(node.placed(0).failed == 1, "{:?}", node.placed(0));
                Ok(())
            });
            assert!(avoided_for(&node, 0) > 0 && avoided_for(&node, 1) == 0);
            assert_eq!(node.counts(2)[0], (0, 1), "the client waits");
            let served = tcp::connect_many(at(FRONTEND), 50).len();
            let still_avoided = avoided(&node, 0);
            assert!(first.join().expect("no panic").is_timed_out());
            still_avoided.then_some(served)
        });
        // Within the second of its avoidance.
        assert_eq!(served?, 50);
        assert_eq!(node.placed(0).failed, 1, "counted once");
        assert_eq!(node.counts(2)[0], (0, 0));
        Some(())
    });
}

/// Where all are avoided none is, and the first success ends it.
#[test]
fn a_success_ends_an_avoidance() {
    in_time(|machine| {
        let node = Node::placing(machine, 1);
        assert!(tcp::connect(at(FRONTEND)).is_refused());
        let servers = open_servers(1);
        // It is avoided for a second.
        if !avoided(&node, 0) {
            return None;
        }
        let _client = tcp::connect(at(FRONTEND)).connected();
        assert!(!avoided(&node, 0));
        let _another = tcp::connect(at(FRONTEND)).connected();
        let reasons = node.reasons(GROUP);
        reasons.get("placed-on-avoided")?;
        let expected = [("placed", 2), ("placed-on-avoided", 1)].into();
        assert_eq!(reasons, expected);
        drop(servers);
        // It failed a moment ago: twice as long now.
        assert!(tcp::connect(at(FRONTEND)).is_refused());
        assert!(avoided_for(&node, 0) > ticks_of_ms(1_500));
        Some(())
    });
}

/// A client that gives up says nothing of the endpoint.
#[test]
fn a_client_that_gives_up_is_no_failure() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        let silent = Listen::on(&endpoint_at(0)[0]).backlog(0).open();
        let _filled = tcp::connect(silent.addr()).connected();
        for _ in 0..5 {
            let patience = Duration::from_millis(20);
            assert!(tcp::attempt(None, at(FRONTEND), patience).is_timed_out());
        }
        let placed = node.placed(0);
        assert_eq!((placed.total, placed.failed, placed.avoidance), (5, 0, 0));
        node.agree(&[0]);
    });
}
