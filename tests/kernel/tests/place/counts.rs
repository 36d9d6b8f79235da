//! What is counted is what the socket table has, whatever clients do.

use std::io::{ErrorKind, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpFastOpenConnect;
use socket2::{Domain, Protocol, Socket, Type};
use testkit::fixtures::diag::{State, table};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Machine, eventually};

use super::node::{End, FIRST_PORT, FRONTEND, Node, endpoint_at, loads, open_servers};
use crate::support::at;

const SETTLES_WITHIN: Duration = Duration::from_secs(20);

#[test]
fn two_hundred_at_once_are_spread_evenly() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 4);
        let mut servers = open_servers(4);
        for round in 0..5 {
            let barrier = Barrier::new(200);
            let clients: Vec<_> = thread::scope(|scope| {
                let connect = || {
                    barrier.wait();
                    tcp::connect(at(FRONTEND)).connected()
                };
                let threads: Vec<_> = (0..200).map(|_| scope.spawn(connect)).collect();
                let joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
                joined.map(|client| client.expect("placed")).collect()
            });
            let spread = loads(&mut servers);
            let (least, most) = (spread.iter().min(), spread.iter().max());
            let apart = most.expect("four") - least.expect("four");
            assert!(apart <= 2, "round {round}: {spread:?}");
            node.agree(&spread);
            drop(clients);
            for listener in servers.iter_mut().flatten() {
                listener.accepted.clear();
            }
            node.agree(&[0; 4]);
        }
    });
}

/// What others have placed counts like what this node has, by weight.
#[test]
fn loads_of_other_nodes_and_weights_are_regarded() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 3);
        let mut servers = open_servers(3);
        node.set_others(0, 10);
        node.add_endpoint(2, endpoint_at(2), 2);
        let clients = tcp::connect_many(at(FRONTEND), 30);
        assert_eq!(clients.len(), 30);
        // 40 connections, 10 for each unit of weight.
        assert_eq!(loads(&mut servers), [0, 10, 20]);
    });
}

/// The element of an endpoint that is gone is another's: the old one's connections do not touch it.
#[test]
fn connections_of_an_endpoint_that_is_gone_do_not_touch_its_successor() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        let _servers = open_servers(1);
        let old = tcp::connect_many(at(FRONTEND), 3);
        node.agree(&[3]);
        node.set_generation(0, FIRST_PORT, 2);
        node.miscount(0, -3, 0);
        let young = tcp::connect_many(at(FRONTEND), 2);
        node.agree(&[2]);
        assert_eq!(old[0].peer_addr().expect("connected"), at(FRONTEND));
        drop(old);
        node.agree(&[2]);
        drop(young);
        node.agree(&[0]);
    });
}

/// A count that is too low never falls below 0.
#[test]
fn a_count_that_is_too_low_stays_at_0() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        let _servers = open_servers(1);
        let clients = tcp::connect_many(at(FRONTEND), 3);
        node.agree(&[3]);
        node.miscount(0, -2, 0);
        drop(clients);
        node.agree(&[0]);
        let _client = tcp::connect(at(FRONTEND)).connected();
        node.agree(&[1]);
    });
}

const ENDPOINTS: u32 = 7;
const WORKERS: u64 = 4;
const OPERATIONS: usize = 20_000;
const MPTCP: i32 = 262;

/// Endpoints 0 to 3 serve, number 4 refuses, number 5 says nothing, and number 6 can't be reached.
const LIVE: (&str, &str) = (FRONTEND, "[::ffff:10.99.0.1]:11800");
const REFUSES: (&str, &str) = ("10.99.0.1:11801", "[::ffff:10.99.0.1]:11801");
const SILENT: (&str, &str) = ("10.99.0.1:11802", "[::ffff:10.99.0.1]:11802");
const UNREACHABLE: (&str, &str) = ("10.99.0.1:11803", "[::ffff:10.99.0.1]:11803");

#[test]
fn twenty_thousand_random_operations_are_counted_as_the_socket_table_has_them() {
    Machine::with(|machine| {
        let mut node = Node::placing(machine, 4);
        machine.netns.sysctl("net.ipv4.tcp_syn_retries", "1");
        machine
            .netns
            .sysctl("net.ipv4.ip_local_port_range", "30000 60999");
        for (group, frontend, endpoint) in [(1, REFUSES, 4), (2, SILENT, 5), (3, UNREACHABLE, 6)] {
            node.add_frontend(frontend.0, group, 0);
            node.add_endpoint(endpoint, endpoint_at(endpoint), 1);
            node.know(group, Duration::from_secs(3_600));
            node.set_members(group, [endpoint]);
        }
        node.add_endpoint(6, [at("10.200.0.1:21806")], 1);
        let silent = Listen::on(&endpoint_at(5)[0]).backlog(0).open();
        let _filled = tcp::connect(silent.addr()).connected();
        let servers = open_servers(4);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let _end = End(&done);
            for listener in servers.into_iter().flatten() {
                let done = &done;
                scope.spawn(move || serve(listener, done));
            }
            let workers: Vec<_> = (1..=WORKERS)
                .map(|seed| scope.spawn(move || Worker::new(seed).work(OPERATIONS / 4)))
                .collect();
            let joined = workers.into_iter().map(thread::ScopedJoinHandle::join);
            let open: Vec<Socket> = joined.flat_map(|open| open.expect("no panic")).collect();
            assert!(!open.is_empty());
            agrees_with_table(&node);
            drop(open);
            node.agree(&[0; ENDPOINTS as usize]);
        });
        let placed: Vec<_> = (0..ENDPOINTS)
            .map(|endpoint| node.placed(endpoint))
            .collect();
        assert!(
            placed[..4]
                .iter()
                .all(|placed| placed.total > 100 && placed.failed == 0),
            "{placed:?}"
        );
        assert!(
            placed[4].failed > 100 && placed[4].failed == placed[4].total,
            "{placed:?}"
        );
        // Without a route there is no SYN.
        assert!(placed[5].total > 100 && placed[6].total == 0, "{placed:?}");
        assert!(!node.reasons(0).contains_key("fail-open-error"));
    });
}

/// Waits until the counts are those of the client sides in the socket table.
fn agrees_with_table(node: &Node<'_>) {
    eventually(SETTLES_WITHIN, || {
        let in_state = |state| {
            let remote: Vec<u16> = table(state).iter().map(|row| row.remote.port()).collect();
            move |endpoint: u32| {
                let port = FIRST_PORT + u16::try_from(endpoint).expect("few");
                remote.iter().filter(|remote| **remote == port).count() as u64
            }
        };
        let (established, sent) = (in_state(State::Established), in_state(State::SynSent));
        // The filler of the silent one's queue was not placed.
        let unplaced = |endpoint| u64::from(endpoint == 5);
        let found = |endpoint| (established(endpoint) - unplaced(endpoint), sent(endpoint));
        let found: Vec<_> = (0..ENDPOINTS).map(found).collect();
        let counted = node.counts(ENDPOINTS);
        ensure!(
            counted == found,
            "counted {counted:?}, in the socket table {found:?}"
        );
        Ok(())
    });
}

/// Ends some connections itself, and the others when the client does.
fn serve(mut listener: Listener, done: &AtomicBool) {
    let mut random = Random(u64::from(listener.addr().port()));
    while !done.load(Ordering::SeqCst) {
        listener.accept_all();
        listener
            .accepted
            .retain(|stream| stays(stream, &mut random));
        thread::sleep(Duration::from_millis(1));
    }
}

fn stays(mut stream: &TcpStream, random: &mut Random) -> bool {
    stream.set_nonblocking(true).expect("set");
    match stream.read(&mut [0; 8]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => random.below(1_000) != 0,
        _ => false,
    }
}

/// A generator of numbers that look random: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A client of many connections.
struct Worker {
    random: Random,
    seed: u64,
    open: Vec<Socket>,
}

impl Worker {
    fn new(seed: u64) -> Self {
        Self {
            random: Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            seed,
            open: Vec::new(),
        }
    }

    /// Does so much, and returns what stands.
    fn work(mut self, operations: usize) -> Vec<Socket> {
        for _ in 0..operations {
            self.operate();
            while self.open.len() > 100 || (!self.open.is_empty() && self.random.below(3) == 0) {
                self.close_one();
            }
        }
        self.open
    }

    fn close_one(&mut self) {
        let index = self.random.below(self.open.len() as u64);
        let socket = self
            .open
            .swap_remove(usize::try_from(index).expect("small"));
        if self.random.below(5) < 2 {
            socket.set_linger(Some(Duration::ZERO)).expect("set");
        }
    }

    fn operate(&mut self) {
        let is_v6 = self.random.below(3) == 0;
        let is_mptcp = self.random.below(10) == 0;
        let domain = if is_v6 { Domain::IPV6 } else { Domain::IPV4 };
        let protocol = if is_mptcp {
            Protocol::from(MPTCP)
        } else {
            Protocol::TCP
        };
        let socket = Socket::new(domain, Type::STREAM, Some(protocol)).expect("a socket");
        let to = |frontend: (&str, &str)| -> SocketAddr {
            at(if is_v6 { frontend.1 } else { frontend.0 })
        };
        let connect = |frontend| socket.connect(&to(frontend).into()).is_ok();
        // Errors are part of it: the server may have ended the connection already.
        match self.random.below(100) {
            0..62 => {
                if connect(LIVE) {
                    self.open.push(socket);
                }
            }
            62..70 => {
                socket.set_nonblocking(true).expect("set");
                connect(LIVE);
            }
            70..78 => {
                assert!(!connect(REFUSES));
                // MPTCP can't be used again after that.
                if !is_mptcp && self.random.below(3) == 0 && connect(LIVE) {
                    self.open.push(socket);
                }
            }
            78..84 => {
                socket.set_nonblocking(true).expect("set");
                connect(SILENT);
                if self.random.below(20) == 0 {
                    self.open.push(socket);
                }
            }
            84..88 => {
                assert!(!connect(UNREACHABLE));
                if !is_mptcp && self.random.below(3) == 0 && connect(LIVE) {
                    self.open.push(socket);
                }
            }
            88..91 if !is_mptcp => {
                setsockopt(&socket, TcpFastOpenConnect, &true).expect("set");
                connect(LIVE);
            }
            91..93 if !is_v6 => {
                let source = format!("127.0.1.{}:0", self.seed);
                socket.bind(&at(&source).into()).expect("bound");
                connect(LIVE);
            }
            93..96 if !is_mptcp => {
                connect(LIVE);
                let _ = rustix::net::connect_unspec(&socket);
                if self.random.below(2) == 0 && connect(LIVE) {
                    self.open.push(socket);
                }
            }
            _ => {
                let _ = socket.connect_timeout(&to(SILENT).into(), Duration::from_millis(2));
            }
        }
    }
}
