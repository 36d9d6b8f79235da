//! Backends that don't serve: what is told of them, and for how long.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Health, Machine, Server, Service, Signal, patiently};

use crate::support::{agents, backend, source, virtual_port};

/// So soon a backend that stops serving is named, with a second for a busy machine.
const NAMED_WITHIN: Duration = Duration::from_secs(6);

fn servers(number: usize) -> Vec<Server> {
    (0..number).map(|n| Server::on(&[backend(n)])).collect()
}

/// A server that is stopped until it is dropped or goes on.
struct Stopped<'a>(&'a Server);

impl<'a> Stopped<'a> {
    fn stop(server: &'a Server) -> Self {
        send(server, Signal::SIGSTOP);
        Self(server)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        send(self.0, Signal::SIGCONT);
    }
}

fn send(server: &Server, signal: Signal) {
    let pid = i32::try_from(server.pid()).expect("a process id");
    kill(Pid::from_raw(pid), signal).expect("the server can be signalled");
}

fn health(service: &Service, address: SocketAddr) -> &Health {
    let health = &service.backend(address).health;
    health.as_ref().expect("its health is regarded")
}

fn clients(number: usize) -> Vec<TcpStream> {
    let connect = |n| tcp::connect_from(source(n), agents()).connected();
    (0..number).map(connect).collect()
}

fn send_on(clients: &mut [TcpStream]) {
    for client in clients {
        client.write_all(&[7; 10]).expect("a backend that lives");
    }
}

/// Waits, while `meanwhile` is done every 100 ms, until the backend is in one of these states;
/// returns how long that took.
#[track_caller]
fn wait_for(
    balancer: &Balancer,
    address: SocketAddr,
    states: &[&str],
    mut meanwhile: impl FnMut(),
) -> Duration {
    let begin = Instant::now();
    loop {
        meanwhile();
        let service = balancer.service();
        let seen = health(&service, address);
        if states.contains(&seen.state.as_str()) {
            return begin.elapsed();
        }
        assert!(
            begin.elapsed() < patiently(NAMED_WITHIN),
            "it is {seen:?} and not {states:?}\n{}",
            balancer.logs()
        );
        thread::sleep(Duration::from_millis(100));
    }
}

/// Nobody new comes: its connections alone tell it.
#[test]
fn a_server_that_stops_is_named_by_what_it_does_not_read() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let servers = servers(3);
        balancer.wait_active(3);
        let mut clients = clients(9);
        for _ in 0..15 {
            send_on(&mut clients);
            thread::sleep(Duration::from_millis(100));
        }
        let stopped = Stopped::stop(&servers[1]);
        let took = wait_for(&balancer, backend(1), &["hung"], || send_on(&mut clients));
        assert!(took > Duration::from_secs(2), "{took:?}");
        let text = balancer.must(&["status"]);
        let named = format!("! {} (slot 1) is hung since ", backend(1));
        assert!(text.contains(&named), "{text}");
        assert!(text.contains("it does not read what its"), "{text}");
        assert_eq!(text.matches(" is hung since ").count(), 1, "{text}");
        let explained = balancer.must(&["explain", "--from", "127.0.0.1", "--to", "11800"]);
        let avoided = format!("avoided  {} (slot 1): hung since ", backend(1));
        assert!(explained.contains(&avoided), "{explained}");
        let metrics = balancer.must(&["metrics"]);
        let is_it = |line: &&str| {
            line.starts_with("balancer_backend_health{")
                && line.contains("slot=\"1\"")
                && line.ends_with("health=\"hung\"} 1")
        };
        assert_eq!(metrics.lines().filter(is_it).count(), 1, "{metrics}");
        let doctor = balancer.verb(&["doctor"]).stdout;
        assert!(
            doctor.contains(&format!("{} is hung", backend(1))),
            "{doctor}"
        );
        balancer.wait_for_log("(slot 1) is hung since ", 0);
        drop(stopped);
        wait_for(&balancer, backend(1), &["serving"], || {
            send_on(&mut clients);
        });
        balancer.wait_for_log("(slot 1) serves again", 0);
        assert!(!balancer.must(&["status"]).contains('!'));
    });
}

/// Its clients connect and send nothing: its accept queue tells it, within 5 s.
#[test]
fn a_server_that_stops_accepting_is_named() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let servers = servers(3);
        balancer.wait_active(3);
        let _before = clients(3);
        let stopped = Stopped::stop(&servers[0]);
        // The first may still be taken: by a thread that was waiting when it was stopped.
        let _waiting = clients(9);
        wait_for(&balancer, backend(0), &["stalled"], || {});
        let text = balancer.must(&["status"]);
        let named = format!("! {} (slot 0) is stalled since ", backend(0));
        assert!(
            text.contains(&named) && text.contains("accepts none"),
            "{text}"
        );
        drop(stopped);
        wait_for(&balancer, backend(0), &["serving"], || {});
    });
}

#[test]
fn a_server_that_accepts_and_never_reads_is_hung() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let mut deaf = Listen::on(&backend(0)).open();
        let _server = Server::on(&[backend(1)]);
        balancer.wait_active(2);
        let mut clients = Vec::new();
        let mut n = 0;
        wait_for(&balancer, backend(0), &["hung"], || {
            // They come, ask, and go away without an answer.
            let connect = |n| tcp::connect_from(source(n), agents()).connected();
            clients.extend((n..n + 4).map(connect));
            n += 4;
            deaf.accept_all();
            send_on(&mut clients[n - 4..]);
            clients.drain(..n.saturating_sub(40).min(4));
            n = clients.len();
        });
        let service = balancer.service();
        assert_eq!(health(&service, backend(1)).state, "serving");
        // The server lives: it has none of the marks of one that was stopped.
        assert_eq!(health(&service, backend(0)).state, "hung");
    });
}

/// How long a garbage collection takes.
const PAUSE: Duration = Duration::from_millis(2_600);

/// As a garbage collection does it: nearly 3 s in which nothing is accepted or read. It is steered
/// around at the end of that, and serves again right after.
#[test]
fn a_pause_of_three_seconds_is_a_stall_that_ends_with_it() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let servers = servers(2);
        balancer.wait_active(2);
        let mut clients = clients(6);
        let mut play = |span| {
            let begin = Instant::now();
            let mut seen = Vec::new();
            while begin.elapsed() < span {
                send_on(&mut clients);
                let n = clients.len();
                clients.push(tcp::connect_from(source(n), agents()).connected());
                seen.push(health(&balancer.service(), backend(0)).state.clone());
                thread::sleep(Duration::from_millis(50));
            }
            seen
        };
        let mut shown = 0;
        for _ in 0..10 {
            let begun = Instant::now();
            let stopped = Stopped::stop(&servers[0]);
            let (early, late, paused) = thread::scope(|scope| {
                let end = scope.spawn(move || {
                    thread::sleep(PAUSE.saturating_sub(begun.elapsed()));
                    drop(stopped);
                    begun.elapsed()
                });
                let early = play(Duration::from_millis(1_200));
                let late = play(Duration::from_millis(1_400));
                (early, late, end.join().expect("no panic"))
            });
            let after = play(Duration::from_secs(3));
            // A longer one is a hang.
            if paused >= PAUSE + Duration::from_millis(200) {
                continue;
            }
            assert!(early.iter().all(|state| state == "serving"), "{early:?}");
            let is_known = |state: &String| state == "serving" || state == "stalled";
            assert!(
                late.iter().chain(&after).all(is_known),
                "{late:?} {after:?}"
            );
            assert_eq!(
                after.last().map(String::as_str),
                Some("serving"),
                "{after:?}"
            );
            shown += 1;
            if shown == 2 {
                return;
            }
        }
        panic!("too slow to show anything");
    });
}

#[test]
fn with_health_off_nothing_is_told() {
    Machine::with(|machine| {
        let file = virtual_port("least-connections", 2, &["health: off"]);
        let balancer = Balancer::start(machine, &file);
        let servers = servers(2);
        balancer.wait_active(2);
        let mut clients = clients(4);
        let _stopped = Stopped::stop(&servers[0]);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(6) {
            send_on(&mut clients);
            let service = balancer.service();
            assert!(service.backends.iter().all(|one| one.health.is_none()));
            thread::sleep(Duration::from_millis(100));
        }
        assert!(!balancer.must(&["status"]).contains('!'));
        // Switched on, it is told.
        balancer.configure(&virtual_port("least-connections", 2, &[]));
        balancer.must(&["reload"]);
        wait_for(&balancer, backend(0), &["hung"], || send_on(&mut clients));
        balancer.configure(&file);
        balancer.must(&["reload"]);
        assert!(balancer.service().backends[0].health.is_none());
    });
}

/// Without a daemon nobody looks: its last word ends by itself.
#[test]
fn the_word_of_a_daemon_that_was_killed_expires() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let servers = servers(2);
        balancer.wait_active(2);
        let mut clients = clients(4);
        let _stopped = Stopped::stop(&servers[0]);
        wait_for(&balancer, backend(0), &["hung"], || send_on(&mut clients));
        balancer.stop(Signal::SIGKILL);
        let state = health(&balancer.service(), backend(0)).state.clone();
        assert_eq!(state, "hung", "it is read without a daemon");
        wait_for(&balancer, backend(0), &["serving"], || {});
    });
}

/// Not before ten seconds are over: a pause looks the same.
#[test]
fn the_others_make_room_for_the_clients_of_a_server_that_does_not_come_back() {
    Machine::with(|machine| {
        let quota = "quota: {clients: 90, min_quota: 1}";
        // All listen before anything is computed: quotas go down slowly.
        let servers = servers(3);
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[quota]));
        let quotas = || {
            let service = balancer.service();
            [1, 2].map(|n| service.backend(backend(n)).quota)
        };
        balancer.wait_until(|service| {
            service.active() == 3 && service.backends.iter().all(|one| one.quota == Some(30))
        });
        let mut clients = clients(12);
        let stopped = Stopped::stop(&servers[0]);
        let begin = Instant::now();
        wait_for(&balancer, backend(0), &["hung"], || send_on(&mut clients));
        while begin.elapsed() < Duration::from_secs(9) {
            send_on(&mut clients);
            assert_eq!(quotas(), [Some(30); 2], "{:?}", begin.elapsed());
            thread::sleep(Duration::from_millis(100));
        }
        balancer.eventually(|_| {
            ensure!(quotas() == [Some(45); 2], "{:?}", quotas());
            Ok(())
        });
        let before = balancer.service().backend(backend(0)).established;
        assert_eq!(before, 4, "its connections are left alone");
        drop(stopped);
        wait_for(&balancer, backend(0), &["serving"], || {
            send_on(&mut clients);
        });
    });
}
