//! What places outlives who has loaded it.

use std::io::{ErrorKind, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use balancer::dataplane::{Paths, Placing};
use testkit::fixtures::tcp::{self, Listener};
use testkit::fixtures::{Balancer, Machine, Signal, eventually};

use super::node::{End, FRONTEND, Node, endpoint_at, loads, open_servers};
use crate::outlive::pins::versions;
use crate::outlive::upgrade::make_another_abi;
use crate::support::at;

/// Clients that come and go while something is done; returns how many connects there were. One that
/// is not rewritten fails: nobody is at the frontend.
fn connecting_meanwhile(
    servers: &mut [[Listener; 2]],
    to: SocketAddr,
    work: impl FnOnce(),
) -> usize {
    let (done, connects) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let _end = End(&done);
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                for listener in servers.iter_mut().flatten() {
                    listener.accept_all();
                    listener.accepted.retain(stands);
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    // Not one is lost, but a SYN on a busy machine may be sent twice.
                    let outcome = tcp::attempt(None, to, Duration::from_secs(10));
                    tcp::reset(outcome.connected());
                    connects.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        work();
    });
    connects.into_inner()
}

/// As at an upgrade: each time the programs are replaced under their links.
#[test]
fn no_connect_is_missed_while_the_programs_are_replaced() {
    Machine::with(|machine| {
        let mut node = Node::placing(machine, 4);
        let mut servers = open_servers(4);
        let standing = tcp::connect_many(at(FRONTEND), 8);
        let connects = connecting_meanwhile(&mut servers, at(FRONTEND), || {
            for _ in 0..5 {
                node.begin_anew();
                assert_eq!(node.set_placing(true), Placing::On);
            }
        });
        assert!(connects > 100, "{connects}");
        assert_eq!(loads(&mut servers), [2; 4]);
        node.agree(&[2; 4]);
        drop(standing);
        node.agree(&[0; 4]);
    });
}

/// A build with another layout of the maps: the old programs place until the new ones do. What
/// stands is not counted by these.
#[test]
fn no_connect_is_missed_while_another_layout_takes_over() {
    Machine::with(|machine| {
        let mut balancer = Balancer::prepare(machine, &configuration([1, 1]));
        let mut servers = open_servers(2);
        balancer.launch();
        let standing = connected(10);
        let connects = connecting_meanwhile(&mut servers, at(LOCAL), || {
            for _ in 0..3 {
                balancer.stop(Signal::SIGTERM);
                let current = make_another_abi(balancer.state());
                balancer.launch();
                assert_eq!(versions(balancer.state()), [current]);
            }
        });
        assert!(connects > 100, "{connects}");
        assert_eq!(loads(&mut servers), [5, 5]);
        let since = connected(10);
        assert_eq!(loads(&mut servers), [10, 10]);
        let counts = |expected: u64| {
            eventually(Duration::from_secs(5), || {
                let group = &balancer.status().placing[0];
                let endpoints = group.endpoints.iter();
                let counted: Vec<_> = endpoints
                    .map(|one| (one.established, one.in_flight))
                    .collect();
                ensure!(counted == [(expected, 0); 2], "{counted:?}");
                Ok(())
            });
        };
        counts(5);
        drop(standing);
        counts(5);
        drop(since);
        counts(0);
    });
}

/// Whether the client has not ended it.
fn stands(mut stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).expect("set");
    let read = stream.read(&mut [0]);
    read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// Without anybody: as after `kill -9`.
#[test]
fn it_goes_on_alone_and_the_next_one_may_switch_it_off() {
    Machine::with(|machine| {
        let mut node = Node::placing(machine, 2);
        let _servers = open_servers(2);
        let first = tcp::connect_many(at(FRONTEND), 2);
        node.begin_anew();
        let second = tcp::connect_many(at(FRONTEND), 2);
        node.agree(&[2, 2]);
        drop(first);
        node.agree(&[1, 1]);
        assert_eq!(node.set_placing(false), Placing::Off);
        assert!(TcpStream::connect(FRONTEND).is_err());
        drop(second);
        node.agree(&[0, 0]);
    });
}

/// A frontend at which nobody listens, for endpoints on loopback addresses.
const LOCAL: &str = "127.0.99.1:11800";

/// A configuration that places connects to that frontend.
fn configuration(weights: [u32; 2]) -> String {
    let endpoints = [0, 1].map(|endpoint| {
        let [v4, _] = endpoint_at(endpoint);
        format!(
            "{{address: \"{v4}\", weight: {}}}",
            weights[endpoint as usize]
        )
    });
    let endpoints = endpoints.join(", ");
    format!(
        "services: [{{name: agents, connect: {{to: [\"{LOCAL}\"], endpoints: [{endpoints}]}}}}]"
    )
}

fn connected(number: usize) -> Vec<TcpStream> {
    let clients = tcp::connect_many(at(LOCAL), number);
    assert_eq!(clients.len(), number);
    clients
}

#[test]
fn a_killed_daemon_is_not_missed_and_the_next_one_goes_on() {
    Machine::with(|machine| {
        let mut balancer = Balancer::prepare(machine, &configuration([1, 1]));
        let mut servers = open_servers(2);
        balancer.launch();
        let first = connected(10);
        balancer.stop(Signal::SIGKILL);
        let second = connected(10);
        assert_eq!(loads(&mut servers), [10, 10]);
        balancer.launch();
        assert!(balancer.logs().contains("adopted the data plane"));
        let third = connected(10);
        assert_eq!(loads(&mut servers), [15, 15], "what stands is counted on");
        drop((first, second, third));
        balancer.configure(&configuration([1, 3]));
        balancer.reload();
        eventually(Duration::from_secs(5), || {
            let _clients = connected(40);
            let loads = loads(&mut servers);
            ensure!(loads == [10, 30], "{loads:?}");
            Ok(())
        });
    });
}

/// Nobody is placed any more once nobody asks for it, and nothing is left attached.
#[test]
fn a_reload_without_frontends_detaches_what_places() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &configuration([1, 1]));
        let _servers = open_servers(2);
        let links = || {
            let pins = std::fs::read_dir(Paths::new(balancer.state()).current()).expect("listed");
            let names = pins.map(|pin| pin.expect("a pin").file_name());
            names
                .filter(|name| name.to_string_lossy().starts_with("link_place_"))
                .count()
        };
        let client = connected(1);
        assert_eq!(links(), 4);
        balancer.configure("services: [{name: agents, port: 11800}]");
        balancer.reload();
        eventually(Duration::from_secs(3), || {
            ensure!(links() == 0);
            Ok(())
        });
        assert!(TcpStream::connect(LOCAL).is_err());
        drop(client);
        balancer.configure(&configuration([1, 1]));
        balancer.reload();
        eventually(Duration::from_secs(3), || {
            ensure!(links() == 4);
            Ok(())
        });
        connected(1);
    });
}
