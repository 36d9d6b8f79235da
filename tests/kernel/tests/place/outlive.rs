//! What places outlives who has loaded it.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use balancer::dataplane::Placing;
use testkit::fixtures::Machine;
use testkit::fixtures::tcp;

use super::node::{End, FRONTEND, Node, loads, open_servers};
use crate::support::at;

/// As at an upgrade: each time the programs are replaced under their links. A connect that is not
/// rewritten fails, because no route leads to the frontend.
#[test]
fn no_connect_is_missed_while_the_programs_are_replaced() {
    Machine::with(|machine| {
        let mut node = Node::placing(machine, 4);
        let mut servers = open_servers(4);
        let standing = tcp::connect_many(at(FRONTEND), 8);
        let (done, connects) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            let _end = End(&done);
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    for listener in servers.iter_mut().flatten() {
                        listener.accept_all();
                        listener.accepted.retain(|stream| stands(stream));
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            });
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(Ordering::SeqCst) {
                        tcp::reset(tcp::connect(at(FRONTEND)).connected());
                        connects.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..5 {
                node.begin_anew();
                assert_eq!(node.set_placing(true), Placing::On);
            }
        });
        assert!(connects.load(Ordering::SeqCst) > 100, "{connects:?}");
        assert_eq!(loads(&mut servers), [2; 4]);
        node.agree(&[2; 4]);
        drop(standing);
        node.agree(&[0; 4]);
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
