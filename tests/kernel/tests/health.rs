//! Servers that don't serve are steered around, and those that do are not.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::ensure;
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Machine, Server, Signal, eventually};

use crate::failures::clients::{Client, Clients};
use crate::failures::server::{self, Act};
use crate::support::{agents, backend, in_time, open_listeners, source, virtual_port};

/// Shorter than a client's second SYN, longer than a local answer takes.
const PATIENCE: Duration = Duration::from_millis(700);

/// What a [`Fickle`] server does with a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Conduct {
    /// Greets, and holds it until the client closes it.
    Serve,
    /// Closes it at once.
    Close,
    /// Reads a request, greets and closes it: it gives up when it has said hello.
    GiveUp,
    /// Reads a request, answers at length and closes, as HTTP/1.0 has it.
    Answer,
}

/// A server in a thread, which does to each connection what it is told then.
struct Fickle {
    conduct: Arc<AtomicU8>,
    accepted: Arc<AtomicUsize>,
    /// How often it has looked whether there are any.
    rounds: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Fickle {
    fn on(address: SocketAddr, conduct: Conduct) -> Self {
        let mut listener = Listen::on(&address).open();
        let mut server = Self {
            conduct: Arc::new(AtomicU8::new(conduct as u8)),
            accepted: Arc::default(),
            rounds: Arc::default(),
            ends: Arc::default(),
            thread: None,
        };
        let (conduct, accepted) = (Arc::clone(&server.conduct), Arc::clone(&server.accepted));
        let (rounds, ends) = (Arc::clone(&server.rounds), Arc::clone(&server.ends));
        let serve = move || {
            let mut held = Vec::new();
            while !ends.load(Ordering::Relaxed) {
                accepted.fetch_add(listener.accept_all(), Ordering::Relaxed);
                attend(&mut listener, &mut held, conduct.load(Ordering::Relaxed));
                rounds.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        };
        server.thread = Some(thread::spawn(serve));
        server
    }

    fn does(&self, conduct: Conduct) {
        self.conduct.store(conduct as u8, Ordering::Relaxed);
    }

    /// Connections that it was given so far.
    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    /// How often it has looked for connections so far.
    fn rounds(&self) -> usize {
        self.rounds.load(Ordering::Relaxed)
    }
}

impl Drop for Fickle {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(ended.is_none_or(|end| end.is_ok()) || thread::panicking());
    }
}

/// Does to each connection what the server is told.
fn attend(listener: &mut Listener, held: &mut Vec<TcpStream>, conduct: u8) {
    for mut connection in listener.accepted.drain(..) {
        if conduct == Conduct::Serve as u8 {
            let _ = connection.write_all(b"!");
            held.push(connection);
        } else if conduct != Conduct::Close as u8 {
            let _ = connection.set_nonblocking(false);
            let _ = connection.set_read_timeout(Some(PATIENCE));
            let length = if conduct == Conduct::Answer as u8 {
                200
            } else {
                5
            };
            if connection.read(&mut [0; 64]).is_ok_and(|length| length > 0) {
                let _ = connection.write_all(&b"."[..].repeat(length));
            }
        }
    }
    held.retain(|mut connection| {
        let _ = connection.set_nonblocking(true);
        match connection.read(&mut [0; 64]) {
            Ok(length) => length > 0,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    });
}

/// Three servers behind a virtual port, of which the first does something else.
fn one_of_three(policy: &str, first: Conduct, test: impl Fn(&Balancer, &[Fickle]) + Sync) {
    Machine::with(|machine| {
        let (balancer, servers) = three(machine, policy, first);
        test(&balancer, &servers);
    });
}

fn three<'m>(machine: &'m Machine, policy: &str, first: Conduct) -> (Balancer<'m>, Vec<Fickle>) {
    let balancer = Balancer::start(machine, &virtual_port(policy, 3, &[]));
    let others = (1..3).map(|n| Fickle::on(backend(n), Conduct::Serve));
    let mut servers = vec![Fickle::on(backend(0), first)];
    servers.extend(others);
    balancer.wait_active(3);
    (balancer, servers)
}

fn all_do(servers: &[Fickle], conduct: Conduct) {
    for server in servers {
        server.does(conduct);
    }
}

/// A connection that was greeted; `None`: it was closed, or nothing came.
fn served() -> Option<TcpStream> {
    let mut connection = tcp::connect(agents()).ok()?;
    connection.set_read_timeout(Some(PATIENCE)).ok()?;
    connection.read_exact(&mut [0]).ok()?;
    Some(connection)
}

/// How many connections each server was given since.
fn given(servers: &[Fickle], work: impl FnOnce()) -> Vec<usize> {
    let before: Vec<_> = servers.iter().map(Fickle::accepted).collect();
    work();
    // What has just come is accepted in the next round but one at the latest.
    let rounds: Vec<_> = servers.iter().map(Fickle::rounds).collect();
    eventually(Duration::from_secs(5), || {
        let mut seen = servers.iter().zip(&rounds);
        ensure!(seen.all(|(server, before)| server.rounds() >= before + 2));
        Ok(())
    });
    let now = servers.iter().map(Fickle::accepted);
    now.zip(before).map(|(now, before)| now - before).collect()
}

#[test]
fn beside_a_server_that_closes_at_once_clients_are_served_within_three_tries() {
    for policy in ["least-connections", "round-robin"] {
        one_of_three(policy, Conduct::Close, |_, _| {
            let client = || {
                for attempt in 1..=20 {
                    if let Some(connection) = served() {
                        return Some((attempt, connection));
                    }
                    thread::sleep(Duration::from_millis(100));
                }
                None
            };
            let clients: Vec<_> = thread::scope(|scope| {
                let clients: Vec<_> = (0..60).map(|_| scope.spawn(client)).collect();
                let clients = clients.into_iter();
                clients
                    .map(|client| client.join().expect("no panic"))
                    .collect()
            });
            let mut tries: Vec<_> = clients.iter().flatten().map(|(tries, _)| *tries).collect();
            tries.sort_unstable();
            let soon = tries.iter().filter(|tries| **tries <= 3).count();
            assert!(soon >= 57 && tries.len() == 60, "{policy}: {tries:?}");
        });
    }
}

#[test]
fn clients_of_a_stopped_server_are_soon_served_by_the_others() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let mut servers: Vec<_> = (0..3).map(|n| server::Server::start(backend(n))).collect();
        balancer.wait_active(3);
        let client = |number| Client {
            from: source(number),
            to: vec![agents()],
        };
        let clients = Clients::start((0..300).map(client).collect());
        let all_served = |within| {
            eventually(within, || {
                let served = clients.served();
                ensure!(served == 300, "{served} of 300 served");
                Ok(())
            });
        };
        all_served(Duration::from_secs(15));
        servers[0].suffer(Act::Signal(Signal::SIGSTOP));
        thread::sleep(Duration::from_secs(1));
        all_served(Duration::from_secs(9));
        assert_eq!(balancer.service().verdicts("avoided-backend"), 0);
    });
}

#[test]
fn connections_one_after_the_other_go_round() {
    Machine::with(|machine| {
        let _balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let mut listeners = open_listeners(3);
        for _ in 0..300 {
            drop(tcp::connect(agents()).connected());
        }
        let each: Vec<_> = listeners.iter_mut().map(Listener::accept_all).collect();
        assert!(
            each.iter().all(|number| number.abs_diff(100) <= 20),
            "{each:?}"
        );
    });
}

/// A server of HTTP/2 sends its settings before it fails.
#[test]
fn one_that_greets_and_fails_is_avoided_and_where_all_do_so_nobody_is() {
    one_of_three("round-robin", Conduct::GiveUp, |_, servers| {
        let asks = || {
            let mut connection = tcp::connect(agents()).connected();
            connection.write_all(&[b'?'; 40]).expect("written");
            connection.set_read_timeout(Some(PATIENCE)).expect("set");
            let _ = connection.read(&mut [0; 8]);
            connection
        };
        let mut kept = Vec::new();
        let each = given(servers, || kept.extend((0..60).map(|_| asks())));
        assert!((4..=6).contains(&each[0]), "{each:?}");
        drop(kept);
        all_do(servers, Conduct::GiveUp);
        thread::sleep(Duration::from_millis(1_050));
        let each = given(servers, || {
            drop((0..90).map(|_| asks()).collect::<Vec<_>>());
        });
        assert!(each[1].abs_diff(each[2]) <= 1 && each[1] >= 30, "{each:?}");
    });
}

/// Connects until the first server, which closes at once, is avoided; connections that are served.
fn until_the_first_is_avoided(servers: &[Fickle]) -> Vec<TcpStream> {
    let mut kept = Vec::new();
    let opened = given(servers, || kept.extend((0..24).filter_map(|_| served())));
    assert!((4..=6).contains(&opened[0]), "{opened:?}");
    kept
}

/// What has to be done before the next state of a backend takes no longer.
const FAST: Duration = Duration::from_millis(800);

#[test]
fn a_failing_server_gets_one_trial_at_a_time_and_its_share_once_it_serves() {
    in_time(|machine| {
        let (_balancer, servers) = three(machine, "least-connections", Conduct::Close);
        let begun = Instant::now();
        let mut kept = until_the_first_is_avoided(&servers);
        let many = |kept: &mut Vec<TcpStream>| {
            thread::scope(|scope| {
                let many = || (0..5).filter_map(|_| served()).collect::<Vec<_>>();
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(many)).collect();
                for thread in threads {
                    kept.extend(thread.join().expect("no panic"));
                }
            });
        };
        // It is avoided for a second, then for two, and has proved itself after another one.
        let mut slow = begun.elapsed() >= FAST;
        let mut after = |pause| {
            thread::sleep(Duration::from_millis(pause));
            let begun = Instant::now();
            let given = given(&servers, || many(&mut kept));
            slow |= begun.elapsed() >= FAST;
            given
        };
        let after_a_second = after(1_050);
        servers[0].does(Conduct::Serve);
        let right_after = after(0);
        let on_trial = after(2_050);
        let at_last = after(1_350);
        if slow {
            return None;
        }
        assert_eq!(after_a_second[0], 1, "{after_a_second:?}");
        assert_eq!(right_after[0], 0, "{right_after:?}");
        assert_eq!(on_trial[0], 1, "{on_trial:?}");
        // It has the fewest.
        assert_eq!(at_last, [40, 0, 0]);
        Some(())
    });
}

#[test]
fn where_nobody_else_has_room_a_failing_server_is_the_last_resort() {
    Machine::with(|machine| {
        let yaml = virtual_port("least-connections", 2, &["quota: {per_backend: 20}"]);
        let balancer = Balancer::start(machine, &yaml);
        let servers = [
            Fickle::on(backend(0), Conduct::Close),
            Fickle::on(backend(1), Conduct::Serve),
        ];
        balancer.wait_active(2);
        let _kept = until_the_first_is_avoided(&servers);
        assert_eq!(given(&servers, || assert!(served().is_none())), [1, 0]);
        let service = balancer.service();
        assert!(service.verdicts("avoided-backend") > 0, "{service:?}");
        assert_eq!(service.verdicts("over-quota"), 0);
    });
}

/// In turn: whoever is avoided misses its turn. A SYN that is sent again takes a turn of its own.
#[test]
fn who_leaves_at_once_and_who_is_answered_and_let_go_make_no_server_avoided() {
    one_of_three("round-robin", Conduct::Serve, |_, servers| {
        let in_turn = |work: &dyn Fn()| {
            let each = given(servers, || (0..90).for_each(|_| work()));
            assert!(
                each.iter().all(|number| (27..=33).contains(number)),
                "{each:?}"
            );
        };
        in_turn(&|| drop(tcp::connect(agents()).connected()));
        in_turn(&|| tcp::reset(tcp::connect(agents()).connected()));
        all_do(servers, Conduct::Answer);
        in_turn(&|| {
            let mut connection = tcp::connect(agents()).connected();
            connection
                .write_all(b"GET / HTTP/1.0\r\n\r\n")
                .expect("written");
            let mut answer = Vec::new();
            connection.read_to_end(&mut answer).expect("an answer");
            assert_eq!(answer.len(), 200);
        });
    });
}

#[test]
fn where_all_fail_nobody_is_avoided() {
    one_of_three("round-robin", Conduct::Close, |balancer, servers| {
        all_do(servers, Conduct::Close);
        let each = given(servers, || {
            for _ in 0..90 {
                assert!(served().is_none());
            }
        });
        assert!(each.iter().all(|number| *number >= 15), "{each:?}");
        all_do(servers, Conduct::Serve);
        assert_eq!((0..30).filter_map(|_| served()).count(), 30);
        assert_eq!(balancer.service().verdicts("avoided-backend"), 0);
    });
}

#[test]
fn health_is_not_regarded_where_it_is_off() {
    Machine::with(|machine| {
        let yaml = virtual_port("least-connections", 2, &["health: off"]);
        let balancer = Balancer::start(machine, &yaml);
        let servers = [
            Fickle::on(backend(0), Conduct::Close),
            Fickle::on(backend(1), Conduct::Serve),
        ];
        balancer.wait_active(2);
        let mut kept = Vec::new();
        let each = given(&servers, || kept.extend((0..30).filter_map(|_| served())));
        assert!(each[0] >= 25, "it always has the fewest: {each:?}");
    });
}

/// As a collection of garbage makes it: clients are sent elsewhere for the last second at most, and
/// nothing is held against it.
#[test]
fn a_pause_of_three_seconds_is_a_detour_of_the_last() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let servers: Vec<_> = (0..3).map(|n| Server::on(&[backend(n)])).collect();
        balancer.wait_active(3);
        let mut clients = Vec::new();
        let mut connect_for = |time: Duration| {
            let end = Instant::now() + time;
            while Instant::now() < end {
                clients.push(tcp::connect(agents()).connected());
                thread::sleep(Duration::from_millis(20));
            }
            balancer.service().loads().into_values().collect::<Vec<_>>()
        };
        connect_for(Duration::from_millis(200));
        servers[0].signal(Signal::SIGSTOP);
        let early = connect_for(Duration::from_millis(1_200));
        assert!(early[0].abs_diff(early[1]) <= 1, "{early:?}");
        let noticed = connect_for(Duration::from_secs(1));
        let last = connect_for(Duration::from_millis(800));
        assert_eq!(last[0], noticed[0], "{noticed:?}, {last:?}");
        servers[0].signal(Signal::SIGCONT);
        let after = connect_for(Duration::from_millis(3_500));
        assert!(
            after.iter().all(|count| count.abs_diff(after[1]) <= 1),
            "{after:?}"
        );
    });
}
