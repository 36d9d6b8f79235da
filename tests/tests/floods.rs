//! Floods: honest clients get in beside them, the counts stay those of the socket table, and nothing is left of them.

use std::fmt;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use balancer_tests::fixtures::flood::{Flood, Kind, Sent};
use balancer_tests::fixtures::tcp::{self, Listen, Listener, Outcome};
use balancer_tests::fixtures::{Balancer, Machine, long};

use crate::support::{accept_each, agents, agree, backend, farm, group, own_port, virtual_port};

const HONEST: usize = 50;
/// How often each honest client connects during a flood.
const ROUNDS: u32 = 4;
/// How long they take for all rounds.
const SPAN: Duration = Duration::from_millis(2600);
const IN_TIME: Duration = Duration::from_secs(1);
/// The kernel's third SYN comes after 3 s.
const PATIENCE: Duration = Duration::from_millis(3500);

/// What became of connects.
#[derive(Clone, Debug, Default)]
struct Tally {
    connected: usize,
    late: usize,
    refused: usize,
    reset: usize,
    timed_out: usize,
    /// When, since the first, those began that failed or were late.
    failures: Vec<Duration>,
}

impl Tally {
    fn all(&self) -> usize {
        self.connected + self.late + self.refused + self.reset + self.timed_out
    }

    fn in_time(&self) -> f64 {
        let percent = |count: usize| u32::try_from(count).map(f64::from).expect("few");
        100.0 * percent(self.connected) / percent(self.all()).max(1.0)
    }

    fn add(&mut self, other: Self) {
        self.connected += other.connected;
        self.late += other.late;
        self.refused += other.refused;
        self.reset += other.reset;
        self.timed_out += other.timed_out;
        self.failures.extend(other.failures);
    }

    fn note(&mut self, begun: Duration, took: Duration, outcome: &Outcome) {
        match outcome {
            Outcome::Connected(_) if took <= IN_TIME => {
                self.connected += 1;
                return;
            }
            Outcome::Connected(_) => self.late += 1,
            Outcome::Refused => self.refused += 1,
            Outcome::Reset => self.reset += 1,
            Outcome::TimedOut => self.timed_out += 1,
        }
        self.failures.push(begun);
    }

    /// A connection that stood at first was cut.
    fn was_cut(&mut self, begun: Duration) {
        self.connected -= 1;
        self.reset += 1;
        self.failures.push(begun);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} of {} within a second ({:.1} %), {} late, {} refused, {} reset, {} without an answer",
            self.connected,
            self.all(),
            self.in_time(),
            self.late,
            self.refused,
            self.reset,
            self.timed_out
        )?;
        if let (Some(first), Some(last)) = (self.failures.iter().min(), self.failures.iter().max())
        {
            write!(formatter, ", the failures from {first:.1?} to {last:.1?}")?;
        }
        Ok(())
    }
}

/// Honest clients that connect at regular times, all of them once a round, hold until their next round, and keep the last.
fn honest_clients() -> (Tally, Vec<TcpStream>) {
    let begun = Instant::now();
    let results: Vec<_> = thread::scope(|scope| {
        let clients: Vec<_> = (0..HONEST)
            .map(|n| scope.spawn(move || honest_client(n, begun)))
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("no connect panics"))
            .collect()
    });
    let mut all = Tally::default();
    let mut kept = Vec::new();
    for (tally, stream) in results {
        all.add(tally);
        kept.extend(stream);
    }
    (all, kept)
}

fn honest_client(number: usize, first: Instant) -> (Tally, Option<TcpStream>) {
    let turns = u32::try_from(HONEST).expect("few") * ROUNDS;
    let mut tally = Tally::default();
    let mut held: Option<(Duration, TcpStream)> = None;
    for round in 0..ROUNDS {
        let turn = u32::try_from(number).expect("few") + round * (turns / ROUNDS);
        thread::sleep((SPAN * turn / turns).saturating_sub(first.elapsed()));
        if let Some((since, stream)) = held.take()
            && was_cut(&stream)
        {
            tally.was_cut(since);
        }
        let begun = first.elapsed();
        let outcome = tcp::attempt(None, agents(), PATIENCE);
        tally.note(begun, first.elapsed().saturating_sub(begun), &outcome);
        held = outcome.ok().map(|stream| (begun, stream));
    }
    (tally, held.map(|(_, stream)| stream))
}

fn was_cut(stream: &TcpStream) -> bool {
    tcp::was_reset(stream, Duration::ZERO)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    OwnPort,
    VirtualPort,
}

impl Topology {
    const fn backends(self) -> usize {
        match self {
            Self::OwnPort => 1,
            Self::VirtualPort => 3,
        }
    }

    /// Room for the honest clients and a few more.
    const fn quota(self) -> usize {
        HONEST.div_ceil(self.backends()) + 2
    }

    fn yaml(self) -> String {
        let quota = format!("quota: {{per_backend: {}}}", self.quota());
        match self {
            Self::OwnPort => own_port("least-connections", &[&quota]),
            Self::VirtualPort => virtual_port("least-connections", self.backends(), &[&quota]),
        }
    }

    fn listeners(self, backlog: i32) -> Vec<Listener> {
        match self {
            Self::OwnPort => vec![Listen::on(&agents()).backlog(backlog).open()],
            Self::VirtualPort => (0..self.backends())
                .map(|n| Listen::on(&backend(n)).backlog(backlog).open())
                .collect(),
        }
    }

    /// As many listeners where the kernel alone finds them.
    fn bare_listeners(self, backlog: i32) -> Vec<Listener> {
        (0..self.backends())
            .map(|_| Listen::on(&agents()).backlog(backlog).reuse_port().open())
            .collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    rate: u32,
    syncookies: &'static str,
    topology: Topology,
    backlog: i32,
}

impl fmt::Display for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} SYNs/s, tcp_syncookies={}, {:?}, backlog {}",
            self.rate, self.syncookies, self.topology, self.backlog
        )
    }
}

/// Runs `work` while the listeners accept and the flood comes; the flood begins first.
fn during<T>(
    flood: &Flood,
    rate: u32,
    listeners: &mut [Listener],
    work: impl FnOnce() -> T,
) -> (Sent, T) {
    let (flooding, accepting) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let sender = scope.spawn(|| flood.run(rate, &flooding));
        let acceptor = scope.spawn(|| {
            while !accepting.load(Ordering::Relaxed) {
                accept_each(listeners);
                thread::sleep(Duration::from_millis(1));
            }
        });
        let done = work();
        flooding.store(true, Ordering::Relaxed);
        let sent = sender.join().expect("the flood is sent");
        accepting.store(true, Ordering::Relaxed);
        acceptor.join().expect("accepting");
        (sent, done)
    })
}

/// The same flood and the same clients without a balancer.
fn bare(case: Case) -> (Sent, Tally) {
    let machine = Machine::new();
    machine.run(|| {
        machine
            .netns
            .sysctl("net.ipv4.tcp_syncookies", case.syncookies);
        let mut listeners = case.topology.bare_listeners(case.backlog);
        let flood = Flood::prepare(&machine.netns, agents(), Kind::HalfOpen);
        let (sent, (tally, _kept)) = during(&flood, case.rate, &mut listeners, honest_clients);
        (sent, tally)
    })
}

fn half_open(case: Case) {
    Machine::with(|machine| {
        machine
            .netns
            .sysctl("net.ipv4.tcp_syncookies", case.syncookies);
        let balancer = Balancer::start(machine, &case.topology.yaml());
        let mut listeners = case.topology.listeners(case.backlog);
        balancer.wait_active(listeners.len());
        // No backend is quite new: it has had clients, and so is known to complete handshakes.
        drop(tcp::connect_many(agents(), listeners.len()));
        let flood = Flood::prepare(&machine.netns, agents(), Kind::HalfOpen);
        let (sent, (mut tally, kept)) = during(&flood, case.rate, &mut listeners, honest_clients);
        for _ in kept.iter().filter(|stream| was_cut(stream)) {
            tally.was_cut(SPAN);
        }
        println!("{case}: {sent} reached; {tally}");
        if long() || tally.in_time() < 99.0 {
            let (sent, bare) = bare(case);
            println!("{case}: {sent} reached; {bare}; without the balancer");
        }
        println!("{:?}", balancer.service().verdicts);
    });
}

#[test]
fn half_open_matrix() {
    for rate in [100, 1_000, 5_000, 20_000] {
        for syncookies in ["1"] {
            for topology in [Topology::OwnPort, Topology::VirtualPort] {
                for backlog in [128, 4096] {
                    half_open(Case {
                        rate,
                        syncookies,
                        topology,
                        backlog,
                    });
                }
            }
        }
    }
}
