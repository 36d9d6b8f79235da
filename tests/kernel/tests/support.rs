//! What many tests begin with: a service of that shape, its listeners, and the comparison with the
//! socket table.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZero;
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use testkit::fixtures::tcp::{self, Listen, Listener, Outcome};
use testkit::fixtures::{Balancer, Machine, Service, eventually};

/// How long counts may take to follow the socket table: packets of another CPU may be under way.
const SETTLES_WITHIN: Duration = Duration::from_secs(3);

/// Where clients of the service `agents` connect to.
pub fn agents() -> SocketAddr {
    at("127.0.0.1:11800")
}

pub fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address with a port")
}

/// The address of the backend number `n` of a virtual port.
pub fn backend(n: usize) -> SocketAddr {
    SocketAddr::new(
        Ipv4Addr::LOCALHOST.into(),
        u16::try_from(21_000 + n).expect("a port"),
    )
}

/// A source address of its own for each `n` below 60,000, apart from 127.0.0.0/16.
pub fn source(n: usize) -> SocketAddr {
    let n = u32::try_from(n).expect("a small number");
    let first = u32::from(Ipv4Addr::new(127, 1, 0, 1));
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from(first + n)), 0)
}

/// The service `agents` as a virtual port with so many backends; `rest` are further keys, a line
/// each.
pub fn virtual_port(policy: &str, backends: usize, rest: &[&str]) -> String {
    let addresses: Vec<_> = (0..backends)
        .map(|n| format!("\"{}\"", backend(n)))
        .collect();
    virtual_port_of(policy, &addresses.join(", "), rest)
}

/// The same with these backends, in YAML.
pub fn virtual_port_of(policy: &str, backends: &str, rest: &[&str]) -> String {
    let backends = format!("backends: [{backends}]");
    let lines: Vec<_> = [backends.as_str()]
        .into_iter()
        .chain(rest.iter().copied())
        .collect();
    own_port(policy, &lines)
}

/// The service `agents`, whose backends listen on its port.
pub fn own_port(policy: &str, rest: &[&str]) -> String {
    let keys: String = rest.iter().flat_map(|line| ["    ", line, "\n"]).collect();
    format!("services:\n  - name: agents\n    port: 11800\n    policy: {policy}\n{keys}")
}

/// Listeners for [`virtual_port`].
pub fn open_listeners(backends: usize) -> Vec<Listener> {
    (0..backends)
        .map(|n| Listen::on(&backend(n)).open())
        .collect()
}

/// A `SO_REUSEPORT` group on the service's own port.
pub fn group(listeners: usize) -> Vec<Listener> {
    (0..listeners)
        .map(|_| Listen::on(&agents()).reuse_port().open())
        .collect()
}

/// Accepts what waits on any of them.
pub fn accept_each(listeners: &mut [Listener]) {
    for listener in listeners {
        listener.accept_all();
    }
}

/// The socket table's established connections of each listener.
pub fn loads(listeners: &mut [Listener]) -> Vec<usize> {
    listeners.iter_mut().map(Listener::established).collect()
}

/// Waits until the balancer's counts are those of the socket table; returns them.
///
/// Listeners of one address are compared as a set: which slot is whose nobody can tell from
/// outside.
#[track_caller]
pub fn agree(balancer: &Balancer, listeners: &mut [Listener]) -> Vec<usize> {
    eventually(SETTLES_WITHIN, || {
        let counted = by_address(counts(&balancer.service()));
        let loads = loads(listeners);
        let real = by_address(
            listeners
                .iter()
                .map(Listener::addr)
                .zip(loads.iter().copied()),
        );
        ensure!(
            counted == real,
            "counted {counted:?}, in the socket table {real:?}"
        );
        Ok(loads)
    })
}

/// The count of every backend, the closed ones too.
pub fn counts(service: &Service) -> impl Iterator<Item = (SocketAddr, usize)> {
    service
        .backends
        .iter()
        .map(|backend| (backend.address, backend.established as usize))
}

/// The counts above 0 of each address, sorted.
pub fn by_address(
    counts: impl Iterator<Item = (SocketAddr, usize)>,
) -> BTreeMap<SocketAddr, Vec<usize>> {
    let mut grouped: BTreeMap<SocketAddr, Vec<usize>> = BTreeMap::new();
    for (address, count) in counts.filter(|(_, count)| *count > 0) {
        grouped.entry(address).or_default().push(count);
    }
    for counts in grouped.values_mut() {
        counts.sort_unstable();
    }
    grouped
}

/// `each` connects in each of so many threads, at the same time.
pub fn storm(threads: usize, each: usize, to: SocketAddr) -> Vec<Outcome> {
    thread::scope(|scope| {
        let storming: Vec<_> = (0..threads)
            .map(|_| scope.spawn(move || (0..each).map(|_| tcp::connect(to)).collect::<Vec<_>>()))
            .collect();
        storming
            .into_iter()
            .flat_map(|thread| thread.join().expect("no connect panics"))
            .collect()
    })
}

/// How many of the outcomes are refusals.
pub fn refusals(outcomes: &[Outcome]) -> usize {
    outcomes
        .iter()
        .filter(|outcome| outcome.is_refused())
        .count()
}

/// The connections among the outcomes.
pub fn connections(outcomes: Vec<Outcome>) -> Vec<std::net::TcpStream> {
    outcomes.into_iter().filter_map(Outcome::ok).collect()
}

/// Which of the listeners took the one new connection.
#[track_caller]
pub fn landing(listeners: &mut [Listener]) -> usize {
    eventually(Duration::from_secs(1), || {
        let mut found = listeners
            .iter_mut()
            .enumerate()
            .filter_map(|(n, listener)| (listener.accept_all() > 0).then_some(n));
        let landing = found.next();
        landing.ok_or_else(|| anyhow::anyhow!("no listener has it"))
    })
}

/// CPUs that can take SYNs at the same time.
pub fn cpus() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// Plays on a machine of its own, again where it was too slow to show anything: then it says
/// `None`.
#[track_caller]
pub fn in_time<T: Send>(play: impl Fn(&Machine) -> Option<T> + Sync) -> T {
    for _ in 0..10 {
        let mut shown = None;
        Machine::with(|machine| shown = play(machine));
        if let Some(shown) = shown {
            return shown;
        }
    }
    panic!("too slow to show anything, ten times");
}
