//! Established connections are moved: clients of plain HTTP/2 are told, and nobody else gets a byte
//! that its server did not write.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use anyhow::ensure;
use balancer_common::http2::GOAWAY;
use testkit::fixtures::{Balancer, Machine, tcp};

use crate::support::{agents, backend, own_port, virtual_port};

const DATA: u8 = 0;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
/// A reader's patience with one read.
const PATIENCE: Duration = Duration::from_millis(5);
/// How long a move may take on a busy machine.
const MOVES_WITHIN: Duration = Duration::from_secs(40);

/// A frame of HTTP/2.
fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, 0]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn settings() -> Vec<u8> {
    frame(SETTINGS, 0, &[0, 3, 0, 0, 0, 100])
}

fn ping() -> Vec<u8> {
    frame(PING, 0, &[7; 8])
}

/// What a client has received.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// The payloads of DATA, one after the other.
    data: Vec<u8>,
    /// How many GOAWAYs there were.
    pub goaways: usize,
    /// How many answers of a server that only answers.
    pub pings: usize,
    /// How many bytes of an incomplete frame are at the end.
    rest: usize,
}

/// Takes a stream apart.
///
/// # Panics
/// Where it is none of HTTP/2.
#[track_caller]
pub fn taken_apart(mut bytes: &[u8]) -> Received {
    let mut received = Received::default();
    while bytes.len() >= 9 {
        let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
        let Some(payload) = bytes.get(9..9 + length) else {
            break;
        };
        match bytes[3] {
            DATA => received.data.extend(payload),
            SETTINGS => {}
            PING => received.pings += 1,
            _ => {
                assert_eq!(bytes[..17], GOAWAY, "a frame that nobody has written");
                received.goaways += 1;
            }
        }
        bytes = &bytes[9 + length..];
    }
    received.rest = bytes.len();
    received
}

/// A client that reads what comes.
pub struct Client {
    pub stream: TcpStream,
    pub bytes: Vec<u8>,
    /// The server has ended the connection, and how.
    pub ended: Option<ErrorKind>,
}

impl Client {
    pub fn connect(to: SocketAddr) -> Self {
        Self::try_connect(to).expect("connect")
    }

    /// Takes a new connection instead. The servers end as soon as the test is over: nobody needs
    /// one then.
    pub fn connect_again(&mut self, to: SocketAddr, stop: &AtomicBool) {
        match Self::try_connect(to) {
            Ok(connected) => *self = connected,
            Err(error) => assert!(stop.load(Ordering::Relaxed), "{to}: {error}"),
        }
    }

    fn try_connect(to: SocketAddr) -> io::Result<Self> {
        Self::of(TcpStream::connect(to)?)
    }

    fn of(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            bytes: Vec::new(),
            ended: None,
        })
    }

    /// Reads what has come; false: the connection has ended.
    pub fn read(&mut self) -> bool {
        let mut buffer = vec![0; 1 << 16];
        while self.ended.is_none() {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = Some(ErrorKind::UnexpectedEof),
                Ok(length) => self.bytes.extend(&buffer[..length]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    break;
                }
                Err(error) => self.ended = Some(error.kind()),
            }
        }
        self.ended.is_none()
    }

    /// Reads for a while, or until the connection ends.
    fn read_for(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until && self.read() {}
    }

    fn goaways(&self) -> usize {
        taken_apart(&self.bytes).goaways
    }

    /// Reads until it is told to move.
    #[track_caller]
    fn wait_told(&mut self, balancer: &Balancer) {
        let until = Instant::now() + MOVES_WITHIN;
        while self.read() && self.goaways() == 0 {
            assert!(Instant::now() < until, "not told\n{}", balancer.logs());
        }
        assert_eq!(self.goaways(), 1, "{:?}\n{}", self.ended, balancer.logs());
    }

    /// Reads until the connection ends; returns how.
    #[track_caller]
    fn wait_ended(&mut self, balancer: &Balancer) -> ErrorKind {
        let until = Instant::now() + MOVES_WITHIN;
        while self.read() {
            assert!(Instant::now() < until, "not ended\n{}", balancer.logs());
        }
        self.ended.expect("it has ended")
    }
}

/// Serves every connection of a listener on a thread of its own, until `stop`.
pub fn serve<'s>(
    scope: &'s Scope<'s, '_>,
    listener: TcpListener,
    stop: &'s AtomicBool,
    speak: impl Fn(&TcpStream, &AtomicBool) + Copy + Send + 's,
) {
    listener.set_nonblocking(true).expect("non-blocking");
    scope.spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            if let Ok((stream, _)) = listener.accept() {
                scope.spawn(move || {
                    stream.set_nonblocking(false).expect("blocking");
                    stream.set_nodelay(true).expect("no delay");
                    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                    speak(&stream, stop);
                });
            } else {
                thread::sleep(PATIENCE);
            }
        }
    });
}

/// Stops the servers also when the test panics.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A test with servers that all speak alike.
fn with_servers(
    at: &[SocketAddr],
    speak: impl Fn(&TcpStream, &AtomicBool) + Copy + Send + Sync,
    test: impl FnOnce(&Machine) + Send,
) {
    Machine::with(|machine| {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            for at in at {
                let listener = TcpListener::bind(at).expect("bind");
                serve(scope, listener, &stop, speak);
            }
            test(machine);
        });
    });
}

/// Whether the client has closed; reads what it has sent.
fn client_has_closed(mut stream: &TcpStream) -> bool {
    match stream.read(&mut [0; 4096]) {
        Ok(read) => read == 0,
        Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
    }
}

/// Writes messages without a pause of 20 ms, until the client closes.
fn write_on(
    mut stream: &TcpStream,
    stop: &AtomicBool,
    mut message: impl FnMut(u32) -> Vec<Vec<u8>>,
) {
    let mut open = stream.write_all(&settings()).is_ok();
    let mut number = 0;
    while open && !stop.load(Ordering::Relaxed) {
        for part in message(number) {
            open &= stream.write_all(&part).is_ok();
        }
        number += 1;
        open &= !client_has_closed(stream);
    }
}

/// A payload by whose bytes its place can be told.
fn counting(number: u32, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (number as usize * 31 + at).to_le_bytes()[0])
        .collect()
}

/// What a client has that was sent messages of [`counting`].
#[track_caller]
fn assert_counting(received: &Received, length: usize) {
    for (number, payload) in (0..).zip(received.data.chunks(length)) {
        assert_eq!(
            payload,
            &counting(number, length)[..payload.len()],
            "message {number}"
        );
    }
}

fn shed(balancer: &Balancer, at: SocketAddr, number: usize) {
    balancer.must(&["shed", &at.to_string(), &number.to_string()]);
}

fn wait_left(balancer: &Balancer, left: u64) {
    balancer.eventually(|service| {
        let moved: u64 = service
            .backends
            .iter()
            .map(|backend| backend.moves.left)
            .sum();
        let under_way: u32 = service.backends.iter().map(|one| one.moves.under_way).sum();
        ensure!((moved, under_way) == (left, 0), "{service:?}");
        Ok(())
    });
}

#[test]
fn a_busy_client_is_told_once_between_two_frames() {
    const LENGTH: usize = 100;
    let speak = |stream: &TcpStream, stop: &AtomicBool| {
        write_on(stream, stop, |number| {
            vec![frame(DATA, 1, &counting(number, LENGTH))]
        });
    };
    with_servers(&[agents()], speak, |machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut client = Client::connect(agents());
        client.read_for(Duration::from_millis(100));
        shed(&balancer, agents(), 1);
        client.wait_told(&balancer);
        client.read_for(Duration::from_secs(2));
        let received = taken_apart(&client.bytes);
        assert_eq!(received.goaways, 1, "told once");
        assert_counting(&received, LENGTH);
        drop(client);
        wait_left(&balancer, 1);
        balancer.wait_for_log("moved 1 connections", 0);
    });
}

#[test]
fn messages_of_a_megabyte_and_messages_of_many_frames_stay_whole() {
    const LENGTH: usize = 16_384;
    let speak = |stream: &TcpStream, stop: &AtomicBool| {
        write_on(stream, stop, |number| {
            let frames = |from: u32, many: u32| {
                let frames = (from..from + many).map(|one| frame(DATA, 1, &counting(one, LENGTH)));
                frames.collect::<Vec<_>>().concat()
            };
            // 64 frames at once, and then one alone twice.
            let first = number * 66;
            vec![
                frames(first, 64),
                frames(first + 64, 1),
                frames(first + 65, 1),
            ]
        });
    };
    with_servers(&[agents()], speak, |machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut client = Client::connect(agents());
        client.read_for(Duration::from_millis(50));
        shed(&balancer, agents(), 1);
        client.wait_told(&balancer);
        client.read_for(Duration::from_millis(200));
        let received = taken_apart(&client.bytes);
        assert_eq!(received.goaways, 1, "told once");
        assert_counting(&received, LENGTH);
    });
}

/// Nothing can be told between the parts of a frame, whatever they look like.
#[test]
fn frames_in_several_messages_stay_whole() {
    let imitation = [ping(), frame(DATA, 1, &[0; 4_000]), settings()].concat();
    let zeros = vec![0; 3_000];
    for payload in [&imitation[..], &zeros] {
        let speak = move |stream: &TcpStream, stop: &AtomicBool| {
            write_on(stream, stop, |_| {
                let frame = frame(DATA, 1, payload);
                vec![frame[..9].to_vec(), frame[9..].to_vec()]
            });
        };
        with_servers(&[agents()], speak, |machine| {
            let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
            let mut clients: Vec<_> = (0..5).map(|_| Client::connect(agents())).collect();
            shed(&balancer, agents(), 5);
            for client in &mut clients {
                client.read_for(Duration::from_secs(1));
                let received = taken_apart(&client.bytes);
                assert!(
                    received.data.len() > 2 * payload.len(),
                    "{}",
                    received.data.len()
                );
                let whole = received.data.chunks(payload.len());
                assert!(whole.into_iter().all(|data| data == &payload[..data.len()]));
            }
        });
    }
}

/// A server that answers each message of its client, and is silent otherwise.
pub fn answer(mut stream: &TcpStream, stop: &AtomicBool) {
    let mut open = stream.write_all(&settings()).is_ok();
    while open && !stop.load(Ordering::Relaxed) {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => break,
            Ok(_) => open = stream.write_all(&ping()).is_ok(),
            Err(error) => {
                open = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            }
        }
    }
}

#[test]
fn a_silent_client_is_told_and_closed_when_it_stays() {
    with_servers(&[agents()], answer, |machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut silent = Client::connect(agents());
        silent.read_for(Duration::from_millis(100));
        let mut asking = Client::connect(agents());
        shed(&balancer, agents(), 2);
        // The one that asks shows what its server speaks, and goes when it is told.
        let until = Instant::now() + MOVES_WITHIN;
        let mut told = None;
        while asking.read() && asking.goaways() == 0 {
            asking.stream.write_all(b"?").expect("a request");
            silent.read();
            if silent.goaways() > 0 {
                told.get_or_insert_with(Instant::now);
            }
            assert!(Instant::now() < until, "not told\n{}", balancer.logs());
            thread::sleep(Duration::from_millis(10));
        }
        drop(asking);
        silent.wait_told(&balancer);
        let told = told.unwrap_or_else(Instant::now);
        assert_eq!(silent.wait_ended(&balancer), ErrorKind::ConnectionReset);
        assert!(
            told.elapsed() >= Duration::from_secs(2),
            "{:?}",
            told.elapsed()
        );
        assert_eq!(silent.goaways(), 1);
        wait_left(&balancer, 2);
    });
}

const PONG: &[u8] = b"+PONG\r\n";
const HTTP_1_RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
/// The first bytes of a handshake record of TLS, and a record of data.
const TLS_HELLO: &[u8] = &[0x16, 3, 3, 0, 4, 2, 0, 0, 0];
const TLS_DATA: &[u8] = &[0x17, 3, 3, 0, 5, 0, 0, 0, 4, 1];

/// Answers each request in the protocol that it begins like; a slow one late.
fn answer_in_kind(mut stream: &TcpStream, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut request = [0; 64];
        match stream.read(&mut request) {
            Ok(0) => break,
            Ok(_) => {
                if request[0] == b's' {
                    thread::sleep(Duration::from_secs(3));
                }
                let answer = match request[0] {
                    b'G' => HTTP_1_RESPONSE,
                    0x16 => TLS_HELLO,
                    0x17 => TLS_DATA,
                    _ => PONG,
                };
                if stream.write_all(answer).is_err() {
                    break;
                }
            }
            Err(_) => {}
        }
    }
}

#[test]
fn another_protocol_gets_no_byte_and_its_request_is_waited_for() {
    with_servers(&[agents()], answer_in_kind, |machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut client = Client::connect(agents());
        client.stream.write_all(b"quick\r\n").expect("a request");
        client.read_for(Duration::from_millis(100));
        client.stream.write_all(b"slow\r\n").expect("a request");
        shed(&balancer, agents(), 1);
        assert_eq!(client.wait_ended(&balancer), ErrorKind::UnexpectedEof);
        assert_eq!(client.bytes, [PONG, PONG].concat());
        wait_left(&balancer, 1);
    });
}

/// A request and its answer.
type Exchange = (&'static [u8], &'static [u8]);

#[test]
fn http_1_and_tls_get_no_byte_that_their_server_has_not_written() {
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: oap\r\n\r\n";
    with_servers(&[agents()], answer_in_kind, |machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let exchanges = [
            [(REQUEST, HTTP_1_RESPONSE); 4],
            [
                (TLS_HELLO, TLS_HELLO),
                (TLS_DATA, TLS_DATA),
                (TLS_DATA, TLS_DATA),
                (TLS_DATA, TLS_DATA),
            ],
        ];
        let mut clients = exchanges.map(|exchange| (Client::connect(agents()), exchange));
        let exchange = |clients: &mut [(Client, [Exchange; 4])], number: usize| {
            for (client, exchange) in clients {
                // One that has ended takes no more requests.
                let _ = client.stream.write_all(exchange[number].0);
                client.read_for(Duration::from_millis(100));
            }
        };
        exchange(&mut clients, 0);
        shed(&balancer, agents(), 2);
        (1..4).for_each(|number| exchange(&mut clients, number));
        for (client, exchange) in &mut clients {
            client.wait_ended(&balancer);
            let answers = exchange.map(|(_, answer)| answer).concat();
            assert!(answers.starts_with(&client.bytes), "{:?}", client.bytes);
            assert!(client.bytes.len() >= exchange[0].1.len());
        }
        wait_left(&balancer, 2);
    });
}

#[test]
fn exempt_connections_and_services_that_move_none_are_left_alone() {
    with_servers(&[agents()], answer, |machine| {
        let exempt = own_port("least-connections", &["exempt: [127.0.0.0/8]"]);
        let balancer = Balancer::start(machine, &exempt);
        let mut client = Client::connect(agents());
        shed(&balancer, agents(), 5);
        balancer.wait_for_log("moved 0 connections", 0);
        assert!(client.read() && client.goaways() == 0);

        balancer.configure(&own_port("least-connections", &["move: off"]));
        balancer.must(&["reload"]);
        let refused = balancer.verb(&["shed", &agents().to_string(), "1"]);
        assert_eq!(refused.code, 1);
        assert!(refused.stderr.contains("move: off"), "{}", refused.stderr);
        let unknown = balancer.verb(&["drain", "127.0.0.1:1"]);
        assert!(
            unknown.stderr.contains("no backend is at `127.0.0.1:1`"),
            "{}",
            unknown.stderr
        );
    });
}

/// What the kernel half has not classified is exempt by its source all the same.
#[test]
fn an_exempt_connection_that_is_older_than_the_balancer_stays() {
    with_servers(&[agents()], answer, |machine| {
        let exempt = SocketAddr::new("127.0.0.9".parse().expect("an address"), 0);
        let exempt = tcp::connect_from(exempt, agents()).connected();
        let mut client = Client::connect(agents());
        let yaml = own_port("least-connections", &["exempt: [127.0.0.9/32]"]);
        let balancer = Balancer::start(machine, &yaml);
        shed(&balancer, agents(), 5);
        client.wait_ended(&balancer);
        balancer.wait_for_log("moved 1 connections", 0);
        let from = exempt.local_addr().expect("connected").to_string();
        let why = balancer.must(&["explain", "--connection", &from]);
        assert!(
            why.contains("is never moved: its source is exempt"),
            "{why}"
        );
        let moved = client.stream.local_addr().expect("it was connected");
        let why = balancer.must(&["explain", "--connection", &moved.to_string()]);
        assert!(why.contains(" s ago: by hand"), "{why}");
        let nobody = balancer.verb(&["explain", "--connection", "127.0.0.8:1"]);
        assert!(
            nobody.stderr.contains("no backend of this node"),
            "{nobody:?}"
        );
        let mut exempt = Client::of(exempt).expect("a client");
        assert!(exempt.read() && exempt.goaways() == 0);
    });
}

#[test]
fn a_drain_that_is_ended_moves_no_more() {
    const CLIENTS: u32 = 60;
    with_servers(&[agents()], answer, |machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let clients: Vec<_> = (0..CLIENTS).map(|_| Client::connect(agents())).collect();
        balancer.wait_until(|service| service.established() == CLIENTS);
        balancer.must(&["drain", &agents().to_string(), "--timeout", "0s"]);
        balancer.wait_for_log("moving all", 0);
        balancer.must(&["quota", "clear", "agents", "--slot", "0"]);
        balancer.wait_for_log("agents: 127.0.0.1:11800 (slot 0): moved", 0);
        balancer.eventually(|service| {
            let under_way: u32 = service.backends.iter().map(|one| one.moves.under_way).sum();
            ensure!(under_way == 0, "{service:?}");
            ensure!(service.established() > 0, "{service:?}");
            Ok(())
        });
        drop(clients);
    });
}

#[test]
fn a_call_that_never_ends_is_ended_where_that_is_asked_for() {
    const LENGTH: usize = 50;
    let speak = |stream: &TcpStream, stop: &AtomicBool| {
        write_on(stream, stop, |number| {
            // Pauses like those of a client that streams.
            thread::sleep(Duration::from_millis(40));
            vec![frame(DATA, 1, &counting(number, LENGTH))]
        });
    };
    with_servers(&[agents()], speak, |machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &["move: close"]));
        let mut client = Client::connect(agents());
        shed(&balancer, agents(), 1);
        client.wait_told(&balancer);
        let told = Instant::now();
        client.wait_ended(&balancer);
        assert!(
            told.elapsed() >= Duration::from_secs(9),
            "{:?}",
            told.elapsed()
        );
        let received = taken_apart(&client.bytes);
        assert_counting(&received, LENGTH);
        assert_eq!((received.goaways, received.rest), (1, 0));
        wait_left(&balancer, 1);
    });
}

/// Goes where it is told, as the clients of gRPC do, until `stop`.
fn follow(to: SocketAddr, stop: &AtomicBool) {
    let mut client = Client::connect(to);
    while !stop.load(Ordering::Relaxed) {
        let asked = client.stream.write_all(b"?").is_ok();
        if !asked || !client.read() || client.goaways() > 0 {
            client.connect_again(to, stop);
        }
        thread::sleep(Duration::from_millis(30));
    }
}

#[test]
fn a_drained_backend_gets_empty_and_no_new_connections_until_it_is_put_back() {
    let backends = [backend(0), backend(1), backend(2)];
    with_servers(&backends, answer, |machine| {
        let yaml = virtual_port("least-connections", 3, &["quota: {clients: 12}"]);
        let balancer = Balancer::start(machine, &yaml);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            for _ in 0..12 {
                scope.spawn(|| follow(agents(), &stop));
            }
            balancer.wait_until(|service| service.established() == 12);
            let drained = backends[1];
            let said = balancer.must(&["drain", &drained.to_string(), "--timeout", "40s"]);
            assert!(said.ends_with("0 connections are left\n"), "{said}");
            let loads = balancer.eventually(|service| {
                ensure!(service.established() == 12, "{service:?}");
                Ok(service.loads())
            });
            assert_eq!(loads[&drained], 0, "{loads:?}");
            let rest = [loads[&backends[0]], loads[&backends[2]]];
            assert!(rest[0].abs_diff(rest[1]) <= 2, "{loads:?}");
            let text = balancer.must(&["status"]);
            assert!(text.contains("drained"), "{text}");

            balancer.must(&["undrain", &drained.to_string()]);
            shed(&balancer, backends[0], 3);
            balancer.wait_until(|service| {
                service.established() == 12 && service.loads()[&drained] >= 2
            });
        });
    });
}

/// A backend that joins is filled, a connection a second, and nobody is told twice.
#[test]
fn a_new_backend_gets_its_share_of_what_is_established() {
    let backends = [backend(0), backend(1), backend(2)];
    with_servers(&backends, answer, |machine| {
        let yaml = virtual_port("least-connections", 2, &[]);
        let balancer = Balancer::start(machine, &yaml);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            for _ in 0..24 {
                scope.spawn(|| follow(agents(), &stop));
            }
            balancer.wait_until(|service| service.established() == 24);
            balancer.configure(&virtual_port("least-connections", 3, &[]));
            balancer.reload();
            let began = Instant::now();
            let even = || {
                let service = balancer.service();
                let loads = service.loads();
                let apart = loads.values().max()? - loads.values().min()?;
                (loads.len() == 3 && service.established() == 24 && apart <= 2).then_some(loads)
            };
            let loads = loop {
                if let Some(loads) = even() {
                    break loads;
                }
                let text = balancer.must(&["rebalance", "--dry-run"]);
                let late = began.elapsed() > Duration::from_secs(150);
                assert!(!late, "{text}\n{}", balancer.logs());
                thread::sleep(Duration::from_millis(500));
            };
            let moved: u64 = (balancer.service().backends.iter())
                .map(|one| one.moves.left)
                .sum();
            assert!(
                (6..=12).contains(&moved),
                "{moved} moved: {loads:?}\n{}",
                balancer.logs()
            );
            balancer.wait_for_log("its share is 8", 0);
        });
    });
}

/// A daemon that is killed while messages are looked at leaves an ordinary connection behind.
#[test]
fn a_killed_daemon_leaves_connections_as_they_were() {
    const LENGTH: usize = 200;
    let speak = |stream: &TcpStream, stop: &AtomicBool| {
        write_on(stream, stop, |number| {
            // Never whole in one message, so that it is looked at for the whole second.
            let frame = frame(DATA, 1, &counting(number, LENGTH));
            vec![frame[..100].to_vec(), frame[100..].to_vec()]
        });
    };
    with_servers(&[agents()], speak, |machine| {
        let mut balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut client = Client::connect(agents());
        shed(&balancer, agents(), 1);
        client.read_for(Duration::from_millis(1_300));
        balancer.stop(testkit::fixtures::Signal::SIGKILL);
        let before = client.bytes.len();
        client.read_for(Duration::from_secs(1));
        assert!(client.bytes.len() > before + 1_000, "it goes on");
        balancer.launch();
        client.read_for(Duration::from_secs(1));
        let received = taken_apart(&client.bytes);
        assert_counting(&received, LENGTH);
        assert_eq!(received.goaways, 0, "nobody has asked for it since");
    });
}
