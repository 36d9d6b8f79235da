//! The data plane outlives its daemon: whatever happens to the daemon, under load, clients notice
//! nothing, the counts are those of the socket table, and nothing is left behind.

mod adoption;
mod every_step;
mod fixture;
mod older;
pub mod pins;
mod poisoned;
pub mod upgrade;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use testkit::fixtures::tcp::{self, Outcome};
use testkit::fixtures::{Balancer, Machine, Signal, long, patiently, process};

use self::fixture::{Fixture, Own, random_time};
use self::pins::Traces;
use crate::support::{agents, agree, group, open_listeners, own_port, virtual_port};

/// Longer than a start takes on a machine that is not busy.
const A_START: Duration = Duration::from_millis(600);

/// So much time, or less where tests are shortened.
fn for_long(full: Duration, short: Duration) -> Duration {
    if long() { full } else { short }
}

/// So many times, or fewer where tests are shortened.
fn times(full: usize, short: usize) -> usize {
    if long() { full } else { short }
}

#[test]
fn a_kill_every_300_ms_costs_nothing() {
    Machine::with(|machine| {
        let mut fixture = Fixture::start(machine, Own::Group);
        let end = Instant::now() + for_long(Duration::from_secs(30), Duration::from_secs(4));
        let (mut kills, mut ready) = (0, 0);
        while Instant::now() < end {
            // Exactly so long, at any moment of the start, and at any moment of a daemon that is
            // ready.
            let pause = Duration::from_millis(300);
            match kills % 3 {
                0 => thread::sleep(pause),
                1 => thread::sleep(random_time(2 * pause)),
                _ => {
                    fixture.balancer.wait_ready();
                    thread::sleep(random_time(pause));
                }
            }
            ready += usize::from(fixture.kill());
            kills += 1;
            fixture.balancer.spawn();
        }
        fixture.kill();
        fixture.launch();
        println!("{kills} kills, {ready} of them of a daemon that was ready");
        fixture.finish("kill_every_300_ms");
    });
}

#[test]
fn killed_twice_in_a_row() {
    Machine::with(|machine| {
        let mut fixture = Fixture::start(machine, Own::Group);
        for _ in 0..times(20, 3) {
            fixture.kill();
            fixture.balancer.spawn();
            thread::sleep(random_time(A_START));
            fixture.kill();
            fixture.launch();
        }
        fixture.finish("killed_twice_in_a_row");
    });
}

/// The pins that an interrupted start leaves are not in the way of the next one; it adopts what the
/// interrupted ones have left undone. Half of the starts begin from nothing, with servers and
/// connections that are there already.
#[test]
fn killed_at_any_moment_of_the_start() {
    Machine::with(|machine| {
        let mut fixture = Fixture::late(machine, Own::Addresses);
        for round in 0..times(60, 8) {
            fixture.balancer.spawn();
            thread::sleep(random_time(A_START));
            fixture.kill();
            if round % 2 == 0 {
                fixture.balancer.must(&["unload"]);
                assert!(!fixture.balancer.state().exists(), "unload clears it");
            }
        }
        fixture.launch();
        fixture.press_virtual();
        fixture.finish("killed_at_any_moment_of_the_start");
    });
}

/// Without a daemon refusing goes on until `fail_open_after`, and then nobody is refused; steering
/// goes on for ever.
#[test]
fn without_a_daemon_refusing_ends_and_steering_goes_on() {
    let limit = 2000;
    let rest = ["quota: {per_backend: 4}"];
    let mut cases = vec![(
        "own port",
        own_port("least-connections", &rest),
        group as fn(usize) -> Vec<_>,
    )];
    for policy in ["least-connections", "round-robin", "source-hash"] {
        cases.push((policy, virtual_port(policy, 2, &rest), open_listeners));
    }
    for (name, yaml, open) in cases {
        Machine::with(|machine| {
            let yaml = format!("{yaml}fail_open_after: {limit}ms\n");
            let mut traces = Traces::default();
            let mut balancer = Balancer::start(machine, &yaml);
            let mut listeners = open(2);
            let mut clients = tcp::connect_many(agents(), 8);
            assert_eq!(agree(&balancer, &mut listeners), [4, 4], "{name}");
            assert!(balancer.status().agent.alive, "{name}");
            traces.note(balancer.state());
            balancer.stop(Signal::SIGKILL);
            let (mut refused, mut admitted) = (0, 0);
            let deadline = Instant::now() + Duration::from_secs(30);
            while admitted < 20 {
                thread::sleep(Duration::from_millis(20));
                assert!(
                    Instant::now() < deadline,
                    "{refused} refused, {admitted} admitted"
                );
                let age = || {
                    balancer
                        .status()
                        .agent
                        .heartbeat_age_ms
                        .expect("it has lived")
                };
                let before = age();
                match tcp::connect(agents()) {
                    Outcome::Refused => {
                        assert!(before <= limit, "{name}: refused after {before} ms");
                        refused += 1;
                    }
                    Outcome::Connected(client) => {
                        let after = age();
                        assert!(after >= limit, "{name}: admitted within {after} ms");
                        clients.push(client);
                        admitted += 1;
                    }
                    other => panic!("{name}: {other:?}"),
                }
            }
            assert!(refused > 0, "{name}: nobody was refused after the kill");
            assert!(!balancer.status().agent.alive);
            let stale = balancer.service().verdicts("fail-open-stale");
            assert!(stale >= admitted, "{name}: {stale} of {admitted}");
            let loads = agree(&balancer, &mut listeners);
            assert_eq!(loads.iter().sum::<usize>(), 28, "{name}: {loads:?}");
            // Clients of one source go to the same backend with source-hash.
            assert!(
                name == "source-hash" || loads == [14, 14],
                "{name}: {loads:?}"
            );
            // The next daemon goes on where that one left.
            balancer.launch();
            assert!(tcp::connect(agents()).is_refused());
            let same = balancer.service().verdicts("fail-open-stale");
            assert_eq!(same, stale, "{name}: its counters go on");
            println!("fail_open, {name}: {refused} refused, then {admitted} admitted");
            drop(clients);
            assert_eq!(agree(&balancer, &mut listeners), [0, 0], "{name}");
            balancer.must(&["unload"]);
            assert!(balancer.wait().success());
            traces.assert_gone(machine, &balancer);
        });
    }
}

#[test]
fn a_second_daemon_says_who_holds_it_and_harms_nobody() {
    Machine::with(|machine| {
        let fixture = Fixture::start(machine, Own::Group);
        let before = pins::pins(fixture.balancer.state());
        let heartbeat = || fixture.balancer.status().agent;
        for _ in 0..times(50, 10) {
            let mut command = fixture.balancer.command(&["run", "--config"]);
            command.arg(fixture.balancer.config()).arg("--cgroup");
            command.arg(fixture.balancer.cgroup());
            let second = machine
                .netns
                .run(|| process::output_within(&mut command, patiently(A_START * 50)));
            let second = second.expect("the second daemon ends by itself");
            let complaint = String::from_utf8_lossy(&second.stderr).into_owned();
            assert_eq!(second.status.code(), Some(1), "{complaint}");
            let pid = fixture.balancer.pid().to_string();
            let names_it = complaint
                .split(|char: char| !char.is_ascii_digit())
                .any(|word| word == pid);
            assert!(names_it, "process {pid} is not named: {complaint}");
        }
        assert_eq!(
            pins::pins(fixture.balancer.state()),
            before,
            "it is unharmed"
        );
        assert!(heartbeat().alive);
        fixture.balancer.quota_set("full", None, 2);
        fixture.finish("two_daemons");
    });
}

/// Readers take no lock: they never keep a daemon from starting, and never fail while one starts.
#[test]
fn readers_and_starts_are_not_in_each_others_way() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut listeners = group(2);
        let clients = tcp::connect_many(agents(), 10);
        let mut traces = Traces::default();
        let (stop, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
        let command = |arguments: &[&str]| {
            let command = balancer.command(arguments);
            move || {
                let mut again = std::process::Command::new(command.get_program());
                again.args(command.get_args());
                again
            }
        };
        let status = command(&["status", "-o", "json"]);
        let explain = command(&[
            "explain",
            "--from",
            "127.0.0.9",
            "--to",
            "11800",
            "-o",
            "json",
        ]);
        let read = |number: usize| {
            while !stop.load(Ordering::Relaxed) {
                let mut command = if number.is_multiple_of(2) {
                    status()
                } else {
                    explain()
                };
                let output = process::output(&mut command).expect("a reader can be started");
                let complaint = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "a reader failed: {complaint}");
                reads.fetch_add(1, Ordering::Relaxed);
                // A machine at its end shows nothing.
                thread::sleep(Duration::from_millis(100));
            }
        };
        thread::scope(|scope| {
            let _stopping = Stopping(&stop);
            let readers: Vec<_> = (0..20)
                .map(|number| scope.spawn(move || read(number)))
                .collect();
            for round in 0..times(20, 2) {
                let signal = [Signal::SIGTERM, Signal::SIGKILL][round % 2];
                balancer.stop(signal);
                balancer.launch();
                traces.note(balancer.state());
            }
            stop.store(true, Ordering::Relaxed);
            for reader in readers {
                reader.join().expect("no reader fails");
            }
        });
        println!("readers: {} reads", reads.into_inner());
        agree(&balancer, &mut listeners);
        drop(clients);
        assert_eq!(agree(&balancer, &mut listeners), [0, 0]);
        fixture::assert_no_drift(&balancer);
        balancer.must(&["unload"]);
        assert!(balancer.wait().success());
        traces.assert_gone(machine, &balancer);
    });
}

/// Ends the readers also when a start fails.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Slot, quota and address of every backend of a service.
fn slots(balancer: &Balancer, service: &str) -> BTreeMap<u32, (std::net::SocketAddr, Option<u32>)> {
    let status = balancer.status();
    let backends = status.service(service).backends.iter();
    backends
        .map(|backend| (backend.slot, (backend.address, backend.quota)))
        .collect()
}
