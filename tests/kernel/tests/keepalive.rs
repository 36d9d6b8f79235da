//! Clients that have vanished leave, and those that live stay.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use socket2::{SockRef, TcpKeepalive};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Machine, Netns, Signal, eventually, long, process};

use crate::support::{accept_each, agents, at, own_port, virtual_port_of};

/// What a connection's server side has: keepalive, idle, interval, probes, user timeout.
type Options = (bool, u64, u64, u32, Option<u64>);

/// What a kernel gives to a socket that nobody has changed.
const UNTOUCHED: Options = (false, 7_200, 75, 9, None);
/// What the balancer gives where nothing is configured.
const OURS: Options = (true, 60, 10, 3, Some(90_000));

fn options(stream: &TcpStream) -> Options {
    let socket = SockRef::from(stream);
    let timeout = socket.tcp_user_timeout().expect("TCP_USER_TIMEOUT");
    (
        socket.keepalive().expect("SO_KEEPALIVE"),
        socket.tcp_keepalive_time().expect("TCP_KEEPIDLE").as_secs(),
        socket
            .tcp_keepalive_interval()
            .expect("TCP_KEEPINTVL")
            .as_secs(),
        socket.tcp_keepalive_retries().expect("TCP_KEEPCNT"),
        timeout.map(|timeout| u64::try_from(timeout.as_millis()).expect("small")),
    )
}

/// What a server does to its sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    /// Nothing.
    Plain,
    /// `SO_KEEPALIVE` alone, as Java's gRPC.
    Java,
    /// Values of its own, as Go's.
    Go,
    /// A user timeout without keepalive, as Python's gRPC.
    Python,
    /// All of keepalive, and the kernel's own two hours are what it wants.
    Patient,
}

const SERVERS: [Server; 5] = [
    Server::Plain,
    Server::Java,
    Server::Go,
    Server::Python,
    Server::Patient,
];

impl Server {
    fn apply<'a>(self, socket: impl Into<SockRef<'a>>) {
        let socket = socket.into();
        let seconds = |seconds| Duration::from_secs(seconds);
        let keepalive = |idle, interval, probes| {
            let values = TcpKeepalive::new()
                .with_time(seconds(idle))
                .with_interval(seconds(interval))
                .with_retries(probes);
            socket.set_tcp_keepalive(&values).expect("keepalive");
        };
        let user_timeout = || {
            let timeout = Some(seconds(20));
            socket.set_tcp_user_timeout(timeout).expect("user timeout");
        };
        match self {
            Self::Plain => {}
            Self::Java => socket.set_keepalive(true).expect("SO_KEEPALIVE"),
            Self::Go => {
                keepalive(15, 15, 9);
                user_timeout();
            }
            Self::Python => user_timeout(),
            Self::Patient => keepalive(7_200, 75, 9),
        }
    }

    /// What a connection has in the end, when the server has set it on its listener, or once it has
    /// accepted.
    const fn expected(self) -> Options {
        match self {
            Self::Plain | Self::Java => OURS,
            Self::Go => (true, 15, 15, 9, Some(20_000)),
            Self::Python => (true, 60, 10, 3, Some(20_000)),
            Self::Patient => (true, 7_200, 75, 9, Some(90_000)),
        }
    }
}

/// A listener for each of [`SERVERS`], each with an address of its own.
fn one_of_each() -> Vec<(Server, Listener)> {
    let listen = |(n, server)| (server, Listen::on(&address(n)).open());
    (1..).zip(SERVERS).map(listen).collect()
}

fn address(n: usize) -> SocketAddr {
    at(&format!("127.0.0.{n}:11800"))
}

/// Connects to a listener and accepts there.
fn accepted(listener: &mut Listener) -> (TcpStream, &TcpStream) {
    let client = tcp::connect(listener.addr()).connected();
    eventually(Duration::from_secs(2), || {
        ensure!(listener.accept_all() == 1, "not accepted");
        Ok(())
    });
    (client, listener.accepted.last().expect("just accepted"))
}

#[test]
fn what_a_server_has_chosen_stays_and_the_rest_is_set() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut clients = Vec::new();
        for (server, mut listener) in one_of_each() {
            // Chosen after it was accepted.
            let (client, stream) = accepted(&mut listener);
            assert_eq!(options(stream), OURS, "before {server:?} does anything");
            server.apply(stream);
            assert_eq!(options(stream), server.expected(), "{server:?}, accepted");
            clients.push(client);
            // Chosen for the listener.
            server.apply(&listener);
            let (client, stream) = accepted(&mut listener);
            assert_eq!(options(stream), server.expected(), "{server:?}, listening");
            clients.push(client);
        }
        // A client that has vanished is gone within three minutes, with unread data or without.
        let (_, idle, interval, probes, user_timeout) = OURS;
        assert!(idle + interval * u64::from(probes) < 180);
        assert!(user_timeout.is_some_and(|timeout| (90_000..180_000).contains(&timeout)));
        assert!(!balancer.logs().contains("WARN"), "{}", balancer.logs());
    });
}

#[test]
fn it_can_be_turned_off_and_changed() {
    Machine::with(|machine| {
        let with = |keepalive| own_port("least-connections", &[keepalive]);
        let balancer = Balancer::start(machine, &with("keepalive: off"));
        let mut listener = Listen::on(&agents()).open();
        let (first, _) = accepted(&mut listener);
        balancer.configure(&with("keepalive: {idle: 2m, probes: 5}"));
        balancer.must(&["reload"]);
        let (second, _) = accepted(&mut listener);
        balancer.configure(&with("keepalive: {idle: 5s, interval: 1s}"));
        balancer.must(&["reload"]);
        let (third, _) = accepted(&mut listener);
        let seen: Vec<_> = listener.accepted.iter().map(options).collect();
        let longer = (true, 120, 10, 5, Some(170_000));
        // Less than 90 s would end clients that live and do not read.
        let shorter = (true, 5, 1, 3, None);
        assert_eq!(seen, [UNTOUCHED, longer, shorter]);
        drop((first, second, third));
    });
}

/// The other rules hold for what others listen on.
#[test]
fn connections_of_nobodys_backends_are_left_alone() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &[]);
        let _balancer = Balancer::start(machine, &yaml);
        let mut listener = Listen::on("127.0.0.1:11900").open();
        let (_client, stream) = accepted(&mut listener);
        assert_eq!(options(stream), UNTOUCHED);
    });
}

/// Tries until each of so many clients has a connection.
fn all_get_in(to: SocketAddr, clients: usize, within: Duration) -> (usize, Duration) {
    let begin = Instant::now();
    let mut held = tcp::connect_many(to, clients);
    let at_once = held.len();
    while held.len() < clients {
        assert!(begin.elapsed() < within, "{} of {clients} in", held.len());
        thread::sleep(Duration::from_millis(200));
        held.extend(tcp::connect_many(to, clients - held.len()));
    }
    (at_once, begin.elapsed())
}

#[test]
fn clients_behind_a_cut_link_give_their_places_to_others() {
    let keepalive = "keepalive: {idle: 3s, interval: 1s, probes: 7}";
    let (silent, longest) = cut_link(keepalive, Duration::from_secs(30));
    assert!(silent >= 90, "{silent}");
    assert!((5..=12).contains(&longest), "{longest}");
}

/// With what nobody has configured, and with data that half of the clients have not acknowledged.
#[test]
fn clients_behind_a_cut_link_give_their_places_to_others_within_three_minutes() {
    if long() {
        cut_link("exempt: []", Duration::from_secs(180));
    }
}

/// 100 clients vanish, and 100 others come. The quota is fixed: a computed one lets them in when
/// nobody has room. Returns how many connections `status` has called silent at most, and for how
/// many seconds.
fn cut_link(key: &str, within: Duration) -> (u32, u32) {
    const CLIENTS: usize = 100;
    let machine = Machine::new();
    machine.run(|| {
        let beyond = Netns::new();
        machine
            .netns
            .connect_to(&beyond, "10.1.0.1/24", "10.1.0.2/24");
        let rest = ["quota: {per_backend: 55}", key];
        let backends = r#""10.1.0.1:21000", "10.1.0.1:21001""#;
        let yaml = virtual_port_of("least-connections", backends, &rest);
        let balancer = Balancer::start(&machine, &yaml);
        let mut listeners = ["10.1.0.1:21000", "10.1.0.1:21001"].map(|at| Listen::on(at).open());
        balancer.wait_active(2);
        let to = at("10.1.0.1:11800");
        let vanished = beyond.run(|| tcp::connect_many(to, CLIENTS));
        assert_eq!(vanished.len(), CLIENTS);
        balancer.wait_until(|service| service.established() == 100);
        let quotas = balancer.service();
        let quotas = quotas.backends.iter().map(|backend| backend.quota);
        assert_eq!(quotas.collect::<Vec<_>>(), [Some(55); 2]);
        accept_each(&mut listeners);
        beyond.ip("link set veth0 down");
        if long() {
            // Nothing tells these from clients that do not read, but for the time.
            for mut stream in &listeners[0].accepted {
                stream.write_all(b"x").expect("it is sent");
            }
        }
        let done = AtomicBool::new(false);
        let silent = thread::scope(|scope| {
            let most = scope.spawn(|| most_silent(&balancer, &done));
            let (at_once, took) = all_get_in(to, CLIENTS, within);
            done.store(true, Ordering::Release);
            println!("cut link: {at_once} of {CLIENTS} in at once, all after {took:?}");
            assert!(at_once <= 10, "{at_once} found room");
            assert!(took >= Duration::from_secs(4), "{took:?}");
            most.join().expect("status can be read")
        });
        println!("cut link: {} silent at most, for {} s", silent.0, silent.1);
        drop(vanished);
        silent
    })
}

/// The most connections that `status` calls silent until `done`, and the longest silence.
fn most_silent(balancer: &Balancer, done: &AtomicBool) -> (u32, u32) {
    let mut most = (0, 0);
    while !done.load(Ordering::Acquire) {
        let service = balancer.service();
        let silent: u32 = service.backends.iter().map(|backend| backend.silent).sum();
        let longest = service.backends.iter().map(|one| one.longest_silence_s);
        most = (most.0.max(silent), most.1.max(longest.max().unwrap_or(0)));
        thread::sleep(Duration::from_millis(100));
    }
    most
}

/// Its window is closed, and it answers every probe of it.
#[test]
fn a_client_that_lives_and_does_not_read_stays() {
    Machine::with(|machine| {
        let rest = ["keepalive: {idle: 1s, interval: 1s, probes: 1}"];
        let _balancer = Balancer::start(machine, &own_port("least-connections", &rest));
        let mut listener = Listen::on(&agents()).open();
        let (mut idle, _) = accepted(&mut listener);
        let (mut client, _) = accepted(&mut listener);
        let mut server = listener.accepted.pop().expect("accepted");
        server.set_nonblocking(true).expect("non-blocking");
        let chunk = vec![0; 65_536];
        let mut sent = 0;
        loop {
            match server.write(&chunk) {
                Ok(length) => sent += length,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        thread::sleep(Duration::from_secs(5));
        let mut received = 0;
        let mut buffer = chunk;
        while received < sent {
            received += client.read(&mut buffer).expect("the connection stands");
        }
        let waiting = listener.accepted.pop().expect("accepted");
        (&waiting).write_all(b"x").expect("the connection stands");
        idle.read_exact(&mut [0]).expect("the connection stands");
    });
}

/// Waits until the connections that a listener has accepted have these options.
#[track_caller]
fn come_to_have(listener: &Listener, expected: Options) {
    eventually(Duration::from_secs(5), || {
        let seen: Vec<_> = listener.accepted.iter().map(options).collect();
        ensure!(
            seen.iter().all(|seen| *seen == expected),
            "{seen:?}, want {expected:?}"
        );
        Ok(())
    });
}

#[test]
fn connections_that_are_older_than_the_data_plane_get_it_too() {
    const EACH: usize = 20;
    Machine::with(|machine| {
        let mut servers = one_of_each();
        let mut clients = Vec::new();
        for (server, listener) in &mut servers {
            clients.extend(tcp::connect_many(listener.addr(), EACH));
            accept_each(std::slice::from_mut(listener));
            listener.accepted.iter().for_each(|one| server.apply(one));
        }
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        for (server, listener) in &servers {
            let expected = match server {
                // Nothing tells that it was set from what the kernel gives.
                Server::Patient => OURS,
                server => server.expected(),
            };
            come_to_have(listener, expected);
        }
        balancer.wait_for_log("keepalive: turned on for", 0);
        // No copy of a descriptor is left: a server that closes ends the connection.
        for listener in servers.iter_mut().map(|(_, listener)| listener) {
            listener.accepted.drain(..).for_each(process::close_now);
        }
        for client in &mut clients {
            client
                .set_read_timeout(Some(Duration::from_millis(500)))
                .expect("a time limit");
            assert_eq!(client.read(&mut [0]).expect("a FIN comes"), 0);
        }
    });
}

#[test]
fn older_connections_are_left_alone_where_it_is_off() {
    Machine::with(|machine| {
        let mut listener = Listen::on(&agents()).open();
        let (_client, _) = accepted(&mut listener);
        let rest = ["keepalive: off"];
        let balancer = Balancer::start(machine, &own_port("least-connections", &rest));
        balancer.wait_until(|service| service.established() == 1);
        let checks = balancer.status().agent.checks;
        eventually(Duration::from_secs(5), || {
            ensure!(
                balancer.status().agent.checks > checks,
                "no other comparison"
            );
            Ok(())
        });
        come_to_have(&listener, UNTOUCHED);
    });
}

/// While no daemon lives nobody confirms a pod's listener.
#[test]
fn connections_that_came_before_their_backend_was_confirmed_get_it_too() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &[]) + "namespaces: all\n";
        let mut balancer = Balancer::start(machine, &yaml);
        balancer.stop(Signal::SIGKILL);
        let netns = Netns::new();
        netns.run(|| {
            machine.cgroup.enter();
            let mut listener = Listen::on(&agents()).open();
            let (_client, stream) = accepted(&mut listener);
            assert_eq!(options(stream), UNTOUCHED, "nobody's yet");
            balancer.launch();
            come_to_have(&listener, OURS);
            let (_client, stream) = accepted(&mut listener);
            assert_eq!(options(stream), OURS);
        });
    });
}
