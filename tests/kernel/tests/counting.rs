//! Counts equal the socket table, whatever clients and servers do.

use std::collections::{BTreeMap, HashSet};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::ensure;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::wire::{Segment, Wire, flag};
use testkit::fixtures::{Balancer, Machine, diag, eventually};

use crate::support::{
    accept_each, agents, agree, at, by_address, counts, in_time, open_listeners, own_port,
    virtual_port,
};

const CASES: u32 = 10;
const EVENTS: usize = 1000;
/// Events between two comparisons.
const STRETCH: usize = 50;

/// Where clients connect to; hand-made ones only to IPv4.
const TARGETS: [&str; 3] = ["127.0.0.1:11800", "127.0.0.1:11802", "[::1]:11802"];

const SERVICES: &str = r#"
services:
  - name: agents
    port: 11800
    policy: least-connections
    backends: ["127.0.0.1:21000", "127.0.0.1:21001", "127.0.0.1:21002"]
  - name: als
    port: 11802
    policy: round-robin
    exempt: [127.0.7.0/24]
"#;

#[derive(Clone, Debug)]
enum Event {
    Open {
        to: Index,
        exempt: bool,
    },
    Close(Index),
    Reset(Index),
    /// FIN of the client: the server's side is in `CLOSE_WAIT`, which is not ESTABLISHED.
    HalfClose(Index),
    ServerClose(Index, Index),
    ServerReset(Index, Index),
    Accept(Index),
    HalfOpen {
        to: Index,
    },
    Complete(Index),
    Abort(Index),
    /// The listener closes and another one takes its address.
    Restart(Index),
    /// The listener is shut down and listens again.
    Bounce(Index),
}

fn event() -> impl Strategy<Value = Event> {
    use Event::{
        Abort, Accept, Bounce, Close, Complete, HalfClose, HalfOpen, Open, Reset, Restart,
        ServerClose, ServerReset,
    };
    let index = any::<Index>;
    prop_oneof![
        30 => (index(), any::<bool>()).prop_map(|(to, exempt)| Open { to, exempt }),
        10 => index().prop_map(Close),
        8 => index().prop_map(Reset),
        5 => index().prop_map(HalfClose),
        5 => (index(), index()).prop_map(|(listener, connection)| ServerClose(listener, connection)),
        5 => (index(), index()).prop_map(|(listener, connection)| ServerReset(listener, connection)),
        8 => index().prop_map(Accept),
        12 => index().prop_map(|to| HalfOpen { to }),
        7 => index().prop_map(Complete),
        4 => index().prop_map(Abort),
        1 => index().prop_map(Restart),
        1 => index().prop_map(Bounce),
    ]
}

/// Both services with their listeners, and all that clients and servers hold.
struct Fixture<'a> {
    balancer: Balancer<'a>,
    kinds: Vec<Listen>,
    listeners: Vec<Listener>,
    /// Connections whose listener has closed.
    retired: Vec<(SocketAddr, Vec<TcpStream>)>,
    clients: Vec<TcpStream>,
    wire: Wire,
    half_open: Vec<Segment>,
    next: u32,
}

impl<'a> Fixture<'a> {
    fn new(machine: &'a Machine) -> Self {
        let balancer = Balancer::start(machine, SERVICES);
        let kinds = vec![
            Listen::on("127.0.0.1:21000"),
            Listen::on("127.0.0.1:21001"),
            Listen::on("127.0.0.1:21002"),
            Listen::on("127.0.0.1:11802").reuse_port(),
            Listen::on("127.0.0.1:11802").reuse_port(),
            Listen::on("[::1]:11802"),
        ];
        let listeners = kinds.iter().map(Listen::open).collect();
        let wire = Wire::open(&machine.netns);
        let (retired, clients, half_open) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            balancer,
            kinds,
            listeners,
            retired,
            clients,
            wire,
            half_open,
            next: 0,
        }
    }

    fn apply(&mut self, event: &Event) {
        match *event {
            Event::Open { to, exempt } => self.open(at(TARGETS[to.index(3)]), exempt),
            Event::Close(client) => drop(take(&mut self.clients, client)),
            Event::Reset(client) => take(&mut self.clients, client)
                .into_iter()
                .for_each(tcp::reset),
            Event::HalfClose(client) => {
                if !self.clients.is_empty() {
                    // The server may have reset it meanwhile.
                    let _ = client
                        .get(&self.clients)
                        .shutdown(std::net::Shutdown::Write);
                }
            }
            Event::ServerClose(listener, connection) => {
                drop(self.take_accepted(listener, connection));
            }
            Event::ServerReset(listener, connection) => {
                self.take_accepted(listener, connection)
                    .into_iter()
                    .for_each(tcp::reset);
            }
            Event::Accept(listener) => {
                let at = listener.index(self.listeners.len());
                self.listeners[at].accept_all();
            }
            Event::HalfOpen { to } => {
                self.wire
                    .syn(Wire::client(self.next), at(TARGETS[to.index(2)]));
                self.next += 1;
            }
            Event::Complete(which) => {
                self.hear();
                let answer = take(&mut self.half_open, which);
                self.wire.ack_all(&answer);
            }
            Event::Abort(which) => {
                self.hear();
                if let Some(answer) = take(&mut self.half_open, which) {
                    self.wire.rst(&answer);
                }
            }
            Event::Restart(which) => self.restart(which.index(self.listeners.len())),
            Event::Bounce(which) => {
                let listener = which.get(&self.listeners);
                listener.shutdown();
                listener.listen_again();
            }
        }
    }

    fn open(&mut self, to: SocketAddr, exempt: bool) {
        let from = if exempt && to.is_ipv4() {
            Some(at("127.0.7.1:0"))
        } else {
            None
        };
        let outcome = tcp::attempt(from, to, tcp::PATIENCE);
        self.clients.extend(outcome.ok());
    }

    fn take_accepted(&mut self, listener: Index, connection: Index) -> Option<TcpStream> {
        let at = listener.index(self.listeners.len());
        take(&mut self.listeners[at].accepted, connection)
    }

    /// Takes note of the SYN-ACKs that came.
    fn hear(&mut self) {
        let known: HashSet<_> = self.half_open.iter().map(|answer| answer.to).collect();
        let heard = self.wire.answers(Duration::from_millis(2));
        let new = heard
            .into_iter()
            .filter(|answer| answer.flags & flag::SYN != 0 && !known.contains(&answer.to));
        self.half_open.extend(new);
    }

    fn restart(&mut self, which: usize) {
        let replacement = self.kinds[which].try_open();
        let mut closing = match replacement {
            // With SO_REUSEPORT the new one may come first, as in a rolling restart.
            Ok(replacement) => std::mem::replace(&mut self.listeners[which], replacement),
            Err(_) => self.listeners.remove(which),
        };
        closing.accept_all();
        let address = closing.addr();
        self.retired.push((address, closing.close()));
        if self.listeners.len() < self.kinds.len() {
            self.listeners.insert(which, self.kinds[which].open());
        }
    }

    /// Waits until what `status` says is what the socket table says.
    fn compare(&mut self) {
        eventually(Duration::from_secs(3), || {
            let status = self.balancer.status();
            let counted = by_address(status.services.iter().flat_map(counts));
            let real = self.socket_table();
            ensure!(
                counted == real,
                "counted {counted:?}, in the socket table {real:?}"
            );
            Ok(())
        });
    }

    fn socket_table(&mut self) -> BTreeMap<SocketAddr, Vec<usize>> {
        accept_each(&mut self.listeners);
        let mut established: Vec<_> = diag::accepted(11800);
        established.extend(diag::accepted(11802));
        let held = self
            .listeners
            .iter()
            .map(|listener| (listener.addr(), &listener.accepted));
        let retired = self
            .retired
            .iter()
            .map(|(address, accepted)| (*address, accepted));
        let real = held.chain(retired).map(|(address, accepted)| {
            let ends: HashSet<_> = accepted.iter().filter_map(ends).collect();
            let count = established
                .iter()
                .filter(|row| ends.contains(&(row.local, row.remote)))
                .count();
            (address, count)
        });
        by_address(real)
    }
}

fn ends(stream: &TcpStream) -> Option<(SocketAddr, SocketAddr)> {
    Some((stream.local_addr().ok()?, stream.peer_addr().ok()?))
}

fn take<T>(from: &mut Vec<T>, which: Index) -> Option<T> {
    if from.is_empty() {
        None
    } else {
        Some(from.swap_remove(which.index(from.len())))
    }
}

#[test]
fn counts_equal_the_socket_table_after_any_events() {
    let config = Config {
        cases: CASES,
        max_shrink_iters: 10,
        failure_persistence: None,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&prop::collection::vec(event(), EVENTS), |events| {
        Machine::with(|machine| {
            let mut fixture = Fixture::new(machine);
            for stretch in events.chunks(STRETCH) {
                for event in stretch {
                    fixture.apply(event);
                }
                fixture.compare();
            }
        });
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn connections_that_nobody_accepted_leave_with_their_listener() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let listener = open_listeners(1).remove(0);
        let clients = tcp::connect_many(agents(), 20);
        balancer.wait_until(|service| service.established() == 20);
        drop(listener);
        balancer.wait_until(|service| service.backends.is_empty());
        assert_eq!(clients.len(), 20);
        assert!(
            clients
                .iter()
                .all(|client| tcp::was_reset(client, Duration::from_secs(1)))
        );
    });
}

#[test]
fn a_client_that_has_finished_sending_is_not_counted() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 3}"]),
        );
        let mut listeners = vec![Listen::on(&agents()).open()];
        let clients = tcp::connect_many(agents(), 3);
        assert!(tcp::connect(agents()).is_refused());
        clients[0]
            .shutdown(std::net::Shutdown::Write)
            .expect("it stands");
        assert_eq!(agree(&balancer, &mut listeners), [2]);
        assert!(tcp::connect(agents()).ok().is_some());
    });
}

#[test]
fn half_open_connections_are_not_established() {
    in_time(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut listeners = vec![Listen::on(&agents()).open()];
        let wire = Wire::open(&machine.netns);
        let begun = Instant::now();
        let (opened, _) = wire.half_open(0..50, agents());
        let service = balancer.service();
        // SYN-ACKs are sent again after a second.
        if begun.elapsed() >= Duration::from_millis(900) {
            return None;
        }
        assert_eq!(
            (service.established(), service.backends[0].pending),
            (0, Some(50))
        );
        wire.ack_all(opened.values());
        assert_eq!(agree(&balancer, &mut listeners), [50]);
        assert_eq!(balancer.service().backends[0].pending, Some(0));
        for answer in opened.values() {
            wire.rst(answer);
        }
        assert_eq!(agree(&balancer, &mut listeners), [0]);
        Some(())
    });
}
