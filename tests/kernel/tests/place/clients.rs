//! Every kind of client.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::ensure;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpFastOpenConnect;
use socket2::{Domain, Protocol, Socket, Type};
use testkit::fixtures::tcp::canonical;
use testkit::fixtures::{Machine, eventually};

use super::node::{FRONTEND, FRONTEND_V6, Node, loads, open_servers};
use crate::support::at;

const MPTCP: i32 = 262;
/// include/linux/socket.h
const MSG_FASTOPEN: i32 = 0x2000_0000;
const SETTLES_WITHIN: Duration = Duration::from_secs(3);

fn socket(domain: Domain) -> Socket {
    Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).expect("a socket")
}

fn mapped() -> SocketAddr {
    at("[::ffff:10.99.0.1]:11800")
}

fn connected(domain: Domain, to: SocketAddr) -> Socket {
    let socket = socket(domain);
    socket.connect(&to.into()).expect("placed");
    socket
}

fn non_blocking() -> Socket {
    let socket = socket(Domain::IPV4);
    socket.set_nonblocking(true).expect("set");
    let error = socket.connect(&at(FRONTEND).into()).expect_err("not yet");
    assert_eq!(
        error.raw_os_error(),
        Some(nix::libc::EINPROGRESS),
        "{error}"
    );
    eventually(SETTLES_WITHIN, || {
        ensure!(socket.take_error()?.is_none() && socket.peer_addr().is_ok());
        Ok(())
    });
    socket
}

fn bound_first() -> Socket {
    let socket = socket(Domain::IPV4);
    socket.bind(&at("127.0.0.9:0").into()).expect("bound");
    socket.connect(&at(FRONTEND).into()).expect("placed");
    socket
}

/// The SYN goes with the first bytes.
fn fast_open_connect() -> Socket {
    let socket = socket(Domain::IPV4);
    setsockopt(&socket, TcpFastOpenConnect, &true).expect("set");
    socket.connect(&at(FRONTEND).into()).expect("placed");
    (&socket).write_all(b"hello").expect("sent");
    socket
}

fn fast_open_send() -> Socket {
    let socket = socket(Domain::IPV4);
    let sent = socket.send_to_with_flags(b"hello", &at(FRONTEND).into(), MSG_FASTOPEN);
    assert_eq!(sent.expect("sent"), 5);
    socket
}

fn mptcp() -> Socket {
    let protocol = Some(Protocol::from(MPTCP));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, protocol).expect("a socket");
    socket.connect(&at(FRONTEND).into()).expect("placed");
    socket
}

/// A kind of client, and what `getpeername()` tells it.
type Kind = (&'static str, fn() -> Socket, Option<&'static str>);

const KINDS: [Kind; 8] = [
    (
        "IPv4",
        || connected(Domain::IPV4, at(FRONTEND)),
        Some(FRONTEND),
    ),
    (
        "IPv4 through an IPv6 socket",
        || connected(Domain::IPV6, mapped()),
        Some("[::ffff:10.99.0.1]:11800"),
    ),
    (
        "IPv6",
        || connected(Domain::IPV6, at(FRONTEND_V6)),
        Some(FRONTEND_V6),
    ),
    ("non-blocking", non_blocking, Some(FRONTEND)),
    ("bound first", bound_first, Some(FRONTEND)),
    ("TCP_FASTOPEN_CONNECT", fast_open_connect, Some(FRONTEND)),
    ("MSG_FASTOPEN", fast_open_send, Some(FRONTEND)),
    // The hook's socket is not the one that was placed.
    ("MPTCP", mptcp, None),
];

#[test]
fn every_kind_reaches_an_endpoint_is_counted_and_sees_the_frontend() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        let mut servers = open_servers(1);
        machine.netns.sysctl("net.ipv4.tcp_fastopen", "1");
        for (kind, connect, shown) in KINDS {
            let client = connect();
            eventually(SETTLES_WITHIN, || {
                let loads = loads(&mut servers);
                ensure!(
                    loads == [1] && node.counts(1) == [(1, 0)],
                    "{kind}: {loads:?} {:?}",
                    node.counts(1)
                );
                Ok(())
            });
            let accepted = servers[0]
                .iter_mut()
                .flat_map(|server| server.accepted.drain(..));
            let accepted: Vec<TcpStream> = accepted.collect();
            let peer = canonical(accepted[0].peer_addr().expect("connected"));
            let local = client.local_addr().expect("bound").as_socket().expect("IP");
            assert_eq!(peer, canonical(local), "{kind}: accept() shows the client");
            if let Some(shown) = shown {
                let seen = client.peer_addr().expect("connected").as_socket();
                assert_eq!(seen, Some(at(shown)), "{kind}");
            }
            drop((client, accepted));
            node.agree(&[0]);
        }
        let expected = [("placed", KINDS.len() as u64)].into();
        assert_eq!(node.reasons(0), expected);
    });
}

/// Half closed either way, a client still sees what it connected to.
#[test]
fn a_connection_that_is_closing_shows_the_frontend() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        let mut servers = open_servers(1);
        let mut client = TcpStream::connect(FRONTEND).expect("placed");
        eventually(Duration::from_secs(5), || {
            servers[0][0].accept_all();
            ensure!(servers[0][0].accepted.pop().is_some(), "none has come");
            Ok(())
        });
        assert_eq!(client.read(&mut [0]).expect("a FIN"), 0);
        node.agree(&[0]);
        assert_eq!(client.peer_addr().expect("not closed"), at(FRONTEND));
    });
}

#[test]
fn what_is_no_tcp_is_left_alone() {
    Machine::with(|machine| {
        let mut node = Node::placing(machine, 1);
        node.add_frontend("127.0.0.50:11800", 0, 0);
        let client = UdpSocket::bind("127.0.0.1:0").expect("bound");
        client.connect("127.0.0.50:11800").expect("connected");
        assert_eq!(
            client.peer_addr().expect("connected"),
            at("127.0.0.50:11800")
        );
        assert_eq!(node.reasons(0), [("not-tcp", 1)].into());
    });
}

/// A socket that has failed on its endpoint may connect elsewhere: that is not counted, and shown
/// as it is.
#[test]
fn a_socket_that_connects_elsewhere_afterwards_is_no_placed_one() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        let client = socket(Domain::IPV4);
        let refused = client
            .connect(&at(FRONTEND).into())
            .expect_err("nobody listens");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let elsewhere = testkit::fixtures::tcp::Listen::on("127.0.0.7:7000").open();
        client.connect(&elsewhere.addr().into()).expect("connected");
        let seen = client.peer_addr().expect("connected").as_socket();
        assert_eq!(seen, Some(elsewhere.addr()));
        node.agree(&[0]);
        assert_eq!((node.placed(0).total, node.placed(0).failed), (1, 1));
    });
}

/// No route leads to the endpoint: there is no SYN, and what the hook has noted is void.
#[test]
fn a_connect_that_sends_no_syn_is_not_counted_then_or_later() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        node.add_endpoint(0, [at("10.1.2.3:4")], 1);
        let client = socket(Domain::IPV4);
        let error = client.connect(&at(FRONTEND).into()).expect_err("no route");
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
        let elsewhere = testkit::fixtures::tcp::Listen::on("127.0.0.7:7000").open();
        client.connect(&elsewhere.addr().into()).expect("connected");
        let seen = client.peer_addr().expect("connected").as_socket();
        assert_eq!(seen, Some(elsewhere.addr()));
        assert_eq!((node.placed(0).total, node.counts(1)), (0, vec![(0, 0)]));
        let _ = client.as_fd();
    });
}

#[test]
fn a_socket_may_connect_again_and_again() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 2);
        let mut servers = open_servers(2);
        let client = socket(Domain::IPV4);
        for round in 1..=20 {
            client.connect(&at(FRONTEND).into()).expect("placed");
            eventually(SETTLES_WITHIN, || {
                let established: u64 = node.counts(2).iter().map(|counts| counts.0).sum();
                ensure!(established == 1, "round {round}: {:?}", node.counts(2));
                Ok(())
            });
            let seen = client.peer_addr().expect("connected").as_socket();
            assert_eq!(seen, Some(at(FRONTEND)));
            rustix::net::connect_unspec(&client).expect("disconnected");
            assert_eq!(node.counts(2), [(0, 0); 2]);
        }
        let totals = [0, 1].map(|endpoint| node.placed(endpoint).total);
        assert_eq!(totals, [10, 10], "in turn");
        loads(&mut servers);
    });
}
