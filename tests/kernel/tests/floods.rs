//! Floods: honest clients get in beside them, the counts stay those of the socket table, and
//! nothing is left of them.

use std::fmt;
use std::io::ErrorKind;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use testkit::fixtures::flood::{Flood, Kind, Sent};
use testkit::fixtures::tcp::{self, Listen, Listener, Outcome};
use testkit::fixtures::{Balancer, Machine, Service, long, remains};

use crate::support::{
    accept_each, agents, agree, backend, connections, cpus, own_port, source, virtual_port,
};

const HONEST: usize = 50;
/// How often each honest client connects during a flood.
const ROUNDS: u32 = 4;
const IN_TIME: Duration = Duration::from_secs(1);
/// The kernel's third SYN comes after 3 s.
const PATIENCE: Duration = Duration::from_millis(3500);

/// How long honest clients take for all rounds.
fn span() -> Duration {
    Duration::from_secs(if long() { 6 } else { 4 })
}

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

    fn is_bad(&self) -> bool {
        self.connected * 100 < self.all() * 99
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

/// Honest clients that connect at regular times, all of them once a round, hold until their next
/// round, and keep the last.
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
        thread::sleep((span() * turn / turns).saturating_sub(first.elapsed()));
        if let Some((since, stream)) = held.take() {
            if was_cut(&stream) {
                tally.was_cut(since);
            }
            // A process that is being started may hold a copy of the socket: closing alone would
            // not end the connection.
            let _ = stream.shutdown(Shutdown::Both);
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

/// Runs `work` while the listeners accept.
fn accepting<T>(listeners: &mut [Listener], work: impl FnOnce() -> T) -> T {
    /// Of connections that have ended, before they are dropped.
    const MANY: usize = 1_000;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let acceptor = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                accept_each(listeners);
                for listener in listeners.iter_mut().filter(|it| it.accepted.len() > MANY) {
                    listener.accepted.retain(goes_on);
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        acceptor.join().expect("accepting");
        result
    })
}

/// Whether the other side has neither closed nor reset.
fn goes_on(stream: &TcpStream) -> bool {
    let peeked = stream
        .set_nonblocking(true)
        .and_then(|()| stream.peek(&mut [0]));
    peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// Runs `work` while the listeners accept and the flood comes; the flood begins first.
fn during<T>(
    flood: &Flood,
    rate: u32,
    listeners: &mut [Listener],
    work: impl FnOnce() -> T,
) -> (Sent, T) {
    accepting(listeners, || {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let sender = scope.spawn(|| flood.run(rate, &stop));
            let done = work();
            stop.store(true, Ordering::Relaxed);
            (sender.join().expect("the flood is sent"), done)
        })
    })
}

/// The flood and the clients of a case, without a balancer.
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

/// A flood of this kind beside honest clients: they get in, and the counts are those of the socket
/// table.
fn beside(balancer: &Balancer, flood: &Flood, rate: u32, listeners: &mut [Listener]) -> Beside {
    let (sent, (mut tally, kept)) = during(flood, rate, listeners, honest_clients);
    for _ in kept.iter().filter(|stream| was_cut(stream)) {
        tally.was_cut(span());
    }
    let established: usize = agree(balancer, listeners).iter().sum();
    let alive = kept.iter().filter(|stream| !was_cut(stream)).count();
    assert_eq!(established, alive, "none but the honest ones: {tally}");
    Beside { sent, tally, kept }
}

struct Beside {
    sent: Sent,
    tally: Tally,
    kept: Vec<TcpStream>,
}

/// What every flood must leave: no refusal but for the quota, nothing pending, and the quota in
/// force.
fn left_well(balancer: &Balancer, listeners: &mut [Listener], kept: Vec<TcpStream>, quota: usize) {
    const TOO_MANY: usize = 5;
    let service = balancer.service();
    assert_eq!(service.active(), listeners.len(), "{service:?}");
    let expected = ["admitted", "steered", "over-quota", "over-quota-cookie"];
    for (reason, count) in &service.verdicts {
        assert!(
            expected.contains(&reason.as_str()) || *count == 0,
            "{count} × {reason}: {service:?}"
        );
    }
    wait_for_none_pending(balancer);
    let refused = over_quota(&balancer.service());
    let room = quota - kept.len();
    let more: Vec<_> = (0..room + TOO_MANY)
        .map(|_| {
            // With cookies the last ACK of one client and the SYN of the next may meet, each on a
            // CPU of its own.
            thread::sleep(Duration::from_millis(5));
            tcp::connect(agents())
        })
        .collect();
    assert_eq!(
        agree(balancer, listeners).iter().sum::<usize>(),
        quota,
        "the quota after the flood: {:?}",
        balancer.service()
    );
    let service = balancer.service();
    assert!(
        over_quota(&service) >= refused + TOO_MANY as u64,
        "{refused} before, then {room} in and {TOO_MANY} over: {more:?}; {service:?}"
    );
    drop((kept, more));
    assert_eq!(agree(balancer, listeners).iter().sum::<usize>(), 0);
    wait_for_none_pending(balancer);
    let _again = tcp::connect(agents()).connected();
    assert_eq!(agree(balancer, listeners).iter().sum::<usize>(), 1);
}

/// A flood may have ended between a SYN and the RST that takes it back: that one is pending for a
/// second.
fn wait_for_none_pending(balancer: &Balancer) {
    balancer.wait_until(|service| {
        let mut backends = service.backends.iter();
        backends.all(|backend| backend.pending == Some(0))
    });
}

fn over_quota(service: &Service) -> u64 {
    service.verdicts("over-quota") + service.verdicts("over-quota-cookie")
}

fn half_open(case: Case) {
    Machine::with(|machine| {
        machine
            .netns
            .sysctl("net.ipv4.tcp_syncookies", case.syncookies);
        let balancer = Balancer::start(machine, &case.topology.yaml());
        let mut listeners = case.topology.listeners(case.backlog);
        balancer.wait_active(listeners.len());
        // No backend is quite new: each has had a client, and so is known to complete handshakes.
        drop(tcp::connect_many(agents(), listeners.len()));
        let flood = Flood::prepare(&machine.netns, agents(), Kind::HalfOpen);
        let Beside { sent, tally, kept } = beside(&balancer, &flood, case.rate, &mut listeners);
        println!("{case}: {sent} reached; {tally}");
        assert!(
            case.rate > 1_000 || sent.rate() * 2.0 >= f64::from(case.rate),
            "{case}: only {sent} reached"
        );
        if long() || tally.is_bad() {
            // The kernel alone is the yardstick.
            let (sent, bare) = bare(case);
            println!("{case}: {sent} reached; {bare}; without the balancer");
            assert!(
                !tally.is_bad() || bare.connected <= tally.connected,
                "{case}: {tally}; without the balancer {bare}; {:?}",
                balancer.service()
            );
        }
        let quota = case.topology.quota() * listeners.len();
        left_well(&balancer, &mut listeners, kept, quota);
    });
}

/// Several cases at the same time, each on a machine of its own.
fn at_once<T: Send>(cases: impl IntoIterator<Item = T>, run: impl Fn(T) + Copy + Send) {
    thread::scope(|scope| {
        let running: Vec<_> = cases
            .into_iter()
            .map(|case| scope.spawn(move || run(case)))
            .collect();
        for case in running {
            case.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

/// These cases, or where long tests are asked for, all that there are with these rates.
fn half_open_floods(rates: [u32; 2], together: usize, short: &[Case]) {
    if !long() {
        return in_turn(short, together);
    }
    let mut cases = Vec::new();
    for rate in rates {
        for syncookies in ["1", "2"] {
            for topology in [Topology::OwnPort, Topology::VirtualPort] {
                for backlog in [128, 512, 4096] {
                    cases.push(case(rate, syncookies, topology, backlog));
                }
            }
        }
    }
    in_turn(&cases, together);
}

/// So many at the same time.
fn in_turn(cases: &[Case], together: usize) {
    for cases in cases.chunks(together) {
        at_once(cases, |case| half_open(*case));
    }
}

const fn case(rate: u32, syncookies: &'static str, topology: Topology, backlog: i32) -> Case {
    Case {
        rate,
        syncookies,
        topology,
        backlog,
    }
}

#[test]
fn slow_half_open_floods_do_not_lock_honest_clients_out() {
    half_open_floods(
        [100, 1_000],
        4,
        &[
            case(100, "1", Topology::OwnPort, 4096),
            case(100, "1", Topology::VirtualPort, 128),
            case(1_000, "1", Topology::VirtualPort, 512),
            case(1_000, "2", Topology::OwnPort, 128),
        ],
    );
}

#[test]
fn fast_half_open_floods_do_not_lock_honest_clients_out() {
    half_open_floods(
        [5_000, 20_000],
        1,
        &[
            case(5_000, "2", Topology::VirtualPort, 4096),
            case(20_000, "1", Topology::OwnPort, 128),
        ],
    );
}

/// Segments that no connection goes with are look-ups like SYNs, and change nothing.
#[test]
fn stray_segments_change_nothing() {
    let cases = [Topology::OwnPort, Topology::VirtualPort]
        .into_iter()
        .flat_map(|topology| [Kind::TakenBack, Kind::Garbage].map(|kind| (kind, topology)));
    at_once(cases, |(kind, topology)| stray(kind, topology));
}

fn stray(kind: Kind, topology: Topology) {
    let rate = if long() { 5_000 } else { 2_000 };
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &topology.yaml());
        let mut listeners = topology.listeners(4096);
        balancer.wait_active(listeners.len());
        drop(tcp::connect_many(agents(), listeners.len()));
        let flood = Flood::prepare(&machine.netns, agents(), kind);
        let Beside { sent, tally, kept } = beside(&balancer, &flood, rate, &mut listeners);
        println!("{kind:?}, {topology:?}: {sent} reached; {tally}");
        assert!(!tally.is_bad(), "{kind:?}, {topology:?}: {tally}");
        let looked_up: u64 = balancer.service().verdicts.values().sum();
        let honest = u64::try_from(tally.all()).expect("few");
        // Each segment is looked up once at the most.
        assert!(
            (honest..=sent.segments + 2 * honest + 10).contains(&looked_up),
            "{looked_up} look-ups for {} segments",
            sent.segments
        );
        let quota = topology.quota() * listeners.len();
        left_well(&balancer, &mut listeners, kept, quota);
    });
}

/// Connects as fast as it can until told to stop; returns what it does not drop, and how many
/// connects were made.
fn connect_flood(stop: &AtomicBool, keep: bool) -> (Vec<TcpStream>, u64) {
    let (mut held, mut connected) = (Vec::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        match tcp::connect(agents()).ok() {
            Some(stream) if keep => held.push(stream),
            Some(stream) => {
                tcp::reset(stream);
                // Not faster than one thread can accept.
                thread::sleep(Duration::from_micros(200));
            }
            None => continue,
        }
        connected += 1;
    }
    (held, connected)
}

/// Whoever completes handshakes and stays uses up the quota: that is what a quota is. It is never
/// exceeded, nobody who is in is hurt, and when the connections go there is room at once.
#[test]
fn connections_that_are_kept_use_up_the_quota_and_no_more() {
    const QUOTA: usize = 200;
    const BEFORE: usize = 20;
    const FLOODERS: usize = 3;
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 200}"]);
        let balancer = Balancer::start(machine, &yaml);
        let mut listeners = vec![Listen::on(&agents()).open()];
        balancer.wait_active(1);
        let honest = |n| tcp::connect_from(source(n), agents());
        let before: Vec<_> = (0..BEFORE).map(|n| honest(n).connected()).collect();
        let stop = AtomicBool::new(false);
        let held: Vec<_> = thread::scope(|scope| {
            let flooders: Vec<_> = (0..FLOODERS)
                .map(|_| scope.spawn(|| connect_flood(&stop, true).0))
                .collect();
            balancer.wait_until(|service| service.established() as usize >= QUOTA);
            remains(Duration::from_secs(1), || {
                let service = balancer.service();
                let counted = service.established() as usize;
                ensure!(
                    (QUOTA..=QUOTA + 2 * cpus()).contains(&counted),
                    "{service:?}"
                );
                ensure!(
                    honest(BEFORE).is_refused(),
                    "somebody got in over the quota"
                );
                Ok(())
            });
            stop.store(true, Ordering::Relaxed);
            flooders
                .into_iter()
                .flat_map(|flooder| flooder.join().expect("no connect panics"))
                .collect()
        });
        assert_eq!(agree(&balancer, &mut listeners), [BEFORE + held.len()]);
        assert!(!before.iter().any(was_cut), "nobody who is in is hurt");
        let service = balancer.service();
        assert!(service.verdicts("over-quota") > 100, "{service:?}");
        drop(held);
        assert_eq!(agree(&balancer, &mut listeners), [BEFORE]);
        let after: Vec<_> = (BEFORE..BEFORE + HONEST).map(honest).collect();
        assert_eq!(connections(after).len(), HONEST, "room again at once");
        left_well(&balancer, &mut listeners, before, QUOTA);
    });
}

/// One source that connects and resets thousands of times a second.
#[test]
fn connections_that_are_reset_at_once_hurt_nobody() {
    at_once(
        [Topology::OwnPort, Topology::VirtualPort],
        connect_and_reset,
    );
}

fn connect_and_reset(topology: Topology) {
    const FLOODERS: usize = 2;
    // A connection that was reset waits to be accepted all the same: room for those of some
    // seconds.
    const BACKLOG: i32 = 65_535;
    Machine::with(|machine| {
        machine
            .netns
            .sysctl("net.core.somaxconn", &BACKLOG.to_string());
        let balancer = Balancer::start(machine, &topology.yaml());
        let mut listeners = topology.listeners(BACKLOG);
        balancer.wait_active(listeners.len());
        let (stop, begun) = (AtomicBool::new(false), Instant::now());
        let (connected, (mut tally, kept)) = accepting(&mut listeners, || {
            thread::scope(|scope| {
                let flooders: Vec<_> = (0..FLOODERS)
                    .map(|_| scope.spawn(|| connect_flood(&stop, false).1))
                    .collect();
                let honest = honest_clients();
                stop.store(true, Ordering::Relaxed);
                let connected = flooders
                    .into_iter()
                    .map(|flooder| flooder.join().expect("no connect panics"))
                    .sum::<u64>();
                (connected, honest)
            })
        });
        let rate = Sent {
            segments: connected,
            during: begun.elapsed(),
        };
        for _ in kept.iter().filter(|stream| was_cut(stream)) {
            tally.was_cut(span());
        }
        println!("connect and reset, {topology:?}: {rate} reached; {tally}");
        assert!(rate.rate() > 200.0, "only {rate} are no flood");
        assert!(!tally.is_bad(), "{topology:?}: {tally}");
        assert_eq!(
            agree(&balancer, &mut listeners).iter().sum::<usize>(),
            kept.len()
        );
        let quota = topology.quota() * listeners.len();
        left_well(&balancer, &mut listeners, kept, quota);
    });
}
