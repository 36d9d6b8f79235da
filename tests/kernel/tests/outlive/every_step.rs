//! A start that is killed just before each single change that it makes.

use std::net::{SocketAddr, TcpStream};

use testkit::fixtures::load::connect_in_turn;
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Machine, Signal, long};

use super::fixture::{agree_everywhere, assert_no_drift, random};
use super::pins::{Traces, attached, versions};
use super::upgrade::make_another_abi;
use crate::support::{accept_each, agents, at, own_port};

/// More changes than any start makes.
const MOST: usize = 400;
const QUOTA: usize = 8;

fn addresses() -> [SocketAddr; 2] {
    [agents(), at("127.0.0.2:11800")]
}

/// Kills a start before its first change, then one before its second one and so on, until one gets
/// ready; before each of them `prepare` is called without a daemon. After each the next start must
/// make good what is left. Where tests are shortened only one of the changes is tried; `about` is
/// how many there are.
#[track_caller]
fn killed_before_every_change(test: &str, about: usize, prepare: impl Fn(&mut Balancer) + Sync) {
    Machine::with(|machine| {
        let mut listeners = addresses().map(|address| Listen::on(&address).open());
        let clients = connect_in_turn(&addresses(), 10);
        accept_each(&mut listeners);
        let rest = [format!("quota: {{per_backend: {QUOTA}}}")];
        let yaml = own_port("least-connections", &[&rest[0]]);
        let mut balancer = Balancer::start(machine, &yaml);
        let mut traces = Traces::default();
        let mut killed = 0;
        for change in chosen(about) {
            balancer.stop(Signal::SIGTERM);
            prepare(&mut balancer);
            let done = !balancer.kill_before(change);
            balancer.launch();
            traces.note(balancer.state());
            if done {
                println!("{test}: a start makes fewer than {change} changes");
            } else {
                println!("{test}: killed before change {change}");
                killed += 1;
            }
            assert_whole(machine, &balancer, &mut listeners, change);
            if done {
                break;
            }
        }
        println!("{test}: killed before each of {killed} changes");
        drop(clients);
        assert_eq!(agree_everywhere(&balancer, &mut listeners), [0; 2]);
        assert_no_drift(&balancer);
        balancer.must(&["unload"]);
        assert!(balancer.wait().success());
        traces.assert_gone(machine, &balancer);
    });
}

/// All, or one of `about` so many.
fn chosen(about: usize) -> Vec<usize> {
    if long() {
        (1..=MOST).collect()
    } else {
        vec![1 + random(about)]
    }
}

/// Both listeners are there once, with their connections, and hold to their quota.
#[track_caller]
fn assert_whole(machine: &Machine, balancer: &Balancer, listeners: &mut [Listener], change: usize) {
    let logs = balancer.logs();
    assert_eq!(attached(machine), (1, 1), "before change {change}: {logs}");
    assert_eq!(
        versions(balancer.state()).len(),
        1,
        "before change {change}: {logs}"
    );
    let counted = agree_everywhere(balancer, listeners);
    assert_eq!(counted, [5; 2], "before change {change}: {logs}");
    let service = balancer.service();
    let backends = (service.backends.len(), service.active());
    assert_eq!(
        backends,
        (2, 2),
        "before change {change}: {service:?}\n{logs}"
    );
    for address in addresses() {
        let more: Vec<TcpStream> = tcp::connect_many(address, QUOTA);
        assert_eq!(
            more.len(),
            QUOTA - 5,
            "before change {change}: {address}\n{logs}"
        );
    }
    assert_eq!(agree_everywhere(balancer, listeners), [5; 2]);
}

#[test]
fn from_nothing() {
    killed_before_every_change("from_nothing", 60, |balancer| {
        balancer.must(&["unload"]);
    });
}

#[test]
fn over_a_data_plane_that_is_there() {
    killed_before_every_change("over_a_data_plane_that_is_there", 12, |_| {});
}

#[test]
fn over_a_data_plane_of_another_abi() {
    killed_before_every_change("over_a_data_plane_of_another_abi", 60, |balancer| {
        make_another_abi(balancer.state());
    });
}
