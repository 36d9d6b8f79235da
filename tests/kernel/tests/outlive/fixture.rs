//! An instance under load: what happens to it, and what every test of this topic ends with.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use testkit::fixtures::load::{Load, Settled};
use testkit::fixtures::tcp::{Listen, Listener};
use testkit::fixtures::{Balancer, Machine, Signal, Status, eventually};

use super::pins::{Traces, attached};
use crate::support::{agents, at, backend, by_address, counts, loads};

/// How long counts may take to follow the socket table on a busy machine.
const SETTLES_WITHIN: Duration = Duration::from_secs(10);
/// Connections that are held on each backend, and the room that come-and-go clients have beside
/// them.
pub const HELD: usize = 12;
const QUOTA: usize = 30;
/// Connects a second of each thread of clients.
const RATE: u32 = 500;

/// Where the listeners of the own port are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own {
    /// Both at one address, with `SO_REUSEPORT`.
    Group,
    /// Each at an address of its own: so that a connection tells which of them it came from.
    Addresses,
}

/// Where clients of the virtual port connect to.
pub fn virtual_service() -> SocketAddr {
    at("127.0.0.1:11801")
}

/// A service whose one backend is at its quota.
pub fn full_service() -> SocketAddr {
    at("127.0.0.1:11802")
}

/// An own port and a virtual port with room, and an own port without. On a busy machine it may take
/// long until one of the daemons that are killed all the time gives a sign of life: refusing must
/// not end meanwhile.
pub fn yaml() -> String {
    let backends: Vec<_> = (0..3).map(|n| format!("\"{}\"", backend(n))).collect();
    let backends = backends.join(", ");
    // One process listens twice there.
    let of_two = 2 * QUOTA;
    format!(
        "services:
  - {{name: agents, port: 11800, policy: least-connections, quota: {{per_backend: {of_two}}}}}
  - {{name: als, port: 11801, policy: least-connections, backends: [{backends}], quota: {{per_backend: {QUOTA}}}}}
  - {{name: full, port: 11802, quota: {{per_backend: 2}}}}
fail_open_after: 600s
"
    )
}

impl Own {
    /// Where the clients connect to.
    pub fn targets(self) -> Vec<SocketAddr> {
        match self {
            Self::Group => vec![agents()],
            Self::Addresses => vec![agents(), at("127.0.0.2:11800")],
        }
    }

    fn open(self) -> Vec<Listener> {
        match self {
            Self::Group => crate::support::group(2),
            Self::Addresses => self
                .targets()
                .iter()
                .map(|at| Listen::on(at).open())
                .collect(),
        }
    }
}

/// An instance, its servers and its clients.
pub struct Fixture<'a> {
    pub machine: &'a Machine,
    pub balancer: Balancer<'a>,
    pub load: Load,
    own: Own,
    traces: Traces,
}

impl<'a> Fixture<'a> {
    /// A daemon, then servers, then clients of all three services.
    #[track_caller]
    pub fn start(machine: &'a Machine, own: Own) -> Self {
        let mut fixture = Self::prepare(machine, own, || Balancer::start(machine, &yaml()));
        fixture.note();
        fixture.press_own();
        fixture.press_virtual();
        fixture
    }

    /// Servers and clients of the own port; the daemon is to come late.
    #[track_caller]
    pub fn late(machine: &'a Machine, own: Own) -> Self {
        let mut fixture = Self::prepare(machine, own, || Balancer::prepare(machine, &yaml()));
        fixture.press_own();
        fixture
    }

    fn prepare(machine: &'a Machine, own: Own, balancer: impl FnOnce() -> Balancer<'a>) -> Self {
        machine
            .netns
            .sysctl("net.ipv4.ip_local_port_range", "22000 65000");
        let balancer = balancer();
        let mut listeners = own.open();
        listeners.extend(crate::support::open_listeners(3));
        listeners.push(Listen::on(&full_service()).open());
        Self {
            machine,
            balancer,
            load: Load::on(listeners),
            own,
            traces: Traces::default(),
        }
    }

    fn press_own(&mut self) {
        let targets = self.own.targets();
        for to in &targets {
            self.load.hold(*to, 2 * HELD / targets.len());
        }
        self.load.hold(full_service(), 2);
        for to in targets.iter().cycle().take(2) {
            self.load.come_and_go(*to, RATE);
        }
    }

    /// Clients of the virtual port, which nobody answers without a balancer, and those of the
    /// service without room.
    #[track_caller]
    pub fn press_virtual(&mut self) {
        self.load.hold(virtual_service(), 3 * HELD);
        for _ in 0..2 {
            self.load.come_and_go(virtual_service(), RATE);
        }
        self.load.knock(full_service(), 100);
    }

    /// Remembers what the instance has in the kernel; no start may be under way.
    pub fn note(&mut self) {
        self.traces.note(self.balancer.state());
    }

    /// Starts a daemon and waits until it is ready; each program must be attached once.
    #[track_caller]
    pub fn launch(&mut self) {
        self.balancer.launch();
        self.note();
        assert_eq!(attached(self.machine), (1, 1), "{}", self.balancer.logs());
    }

    /// kill -9 of a daemon that must live; says whether it had become ready.
    #[track_caller]
    pub fn kill(&mut self) -> bool {
        let ready = self.balancer.is_ready();
        let ended = self.balancer.ended();
        assert!(
            ended.is_none(),
            "the daemon ended by itself, {ended:?}:\n{}",
            self.balancer.logs()
        );
        self.balancer.stop(Signal::SIGKILL);
        ready
    }

    /// How all tests end: with a daemon that is ready, no client saw an error, counts equal the
    /// socket table and follow it to 0, and `unload` leaves nothing. Prints what happened in a
    /// line.
    #[track_caller]
    pub fn finish(self, test: &str) {
        let Self {
            machine,
            mut balancer,
            load,
            mut traces,
            ..
        } = self;
        let Settled {
            report,
            mut listeners,
            held,
        } = load.settle();
        let status = balancer.status();
        println!("{test}: {report}; {}", audit_line(&status));
        report.assert_no_failures();
        agree_everywhere(&balancer, &mut listeners);
        assert_no_drift(&balancer);
        drop(held);
        let left = agree_everywhere(&balancer, &mut listeners);
        assert!(left.iter().all(|count| *count == 0), "{left:?}");
        assert_no_drift(&balancer);
        traces.note(balancer.state());
        balancer.must(&["unload"]);
        assert!(balancer.wait().success(), "{}", balancer.logs());
        traces.assert_gone(machine, &balancer);
    }
}

/// The numbers of the audit, in words.
pub fn audit_line(status: &Status) -> String {
    let agent = &status.agent;
    let number = |number: Option<u64>| number.map_or("unknown".into(), |number| number.to_string());
    format!(
        "checks {}, drift {}, repairs {}",
        number(agent.checks),
        number(agent.drift),
        number(agent.repairs)
    )
}

/// The audit has found nothing, where there is one.
#[track_caller]
pub fn assert_no_drift(balancer: &Balancer) {
    let agent = balancer.status().agent;
    let found = (agent.drift.unwrap_or(0), agent.repairs.unwrap_or(0));
    assert_eq!(found, (0, 0), "drift and repairs:\n{}", balancer.logs());
}

/// Waits until the counts of all services are those of the socket table; returns them by listener.
#[track_caller]
pub fn agree_everywhere(balancer: &Balancer, listeners: &mut [Listener]) -> Vec<usize> {
    eventually(SETTLES_WITHIN, || {
        let status = balancer.status();
        let counted = by_address(status.services.iter().flat_map(counts));
        let loads = loads(listeners);
        let addresses = listeners.iter().map(Listener::addr);
        let real = by_address(addresses.zip(loads.iter().copied()));
        ensure!(
            counted == real,
            "counted {counted:?}, in the socket table {real:?}\n{}",
            balancer.logs()
        );
        Ok(loads)
    })
}

/// A moment before `limit`.
pub fn random_time(limit: Duration) -> Duration {
    let microseconds = usize::try_from(limit.as_micros()).expect("a short time");
    Duration::from_micros(random(microseconds) as u64)
}

/// A number below `limit`.
pub fn random(limit: usize) -> usize {
    let drawn = RandomState::new().build_hasher().finish();
    usize::try_from(drawn % limit.max(1) as u64).expect("it is below a usize")
}
