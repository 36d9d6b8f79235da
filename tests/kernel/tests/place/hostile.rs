//! Clients that mean no good, or are simply many.

use std::io::ErrorKind;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpFastOpenConnect;
use socket2::{Domain, Protocol, Socket, Type};
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Cgroup, Machine};

use super::node::{FRONTEND, GROUP, Node, open_servers};
use crate::support::at;

fn socket() -> Socket {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("a socket")
}

#[test]
fn connects_to_elsewhere_are_not_counted() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        for _ in 0..50_000 {
            let error = socket()
                .connect(&at("127.0.0.1:9").into())
                .expect_err("nobody listens");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
        assert!(node.reasons(GROUP).is_empty());
        assert_eq!((node.placed(0).total, node.counts(1)), (0, vec![(0, 0)]));
    });
}

/// Sockets that are placed, and closed before they have sent anything.
#[test]
fn connects_that_are_closed_unsent_leave_nothing() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 2);
        let _servers = open_servers(2);
        for _ in 0..5_000 {
            let client = socket();
            setsockopt(&client, TcpFastOpenConnect, &true).expect("set");
            client.connect(&at(FRONTEND).into()).expect("not sent yet");
        }
        for _ in 0..5_000 {
            let client = socket();
            client.set_nonblocking(true).expect("set");
            let _ = client.connect(&at(FRONTEND).into());
        }
        node.agree(&[0, 0]);
        assert_eq!(node.reasons(GROUP), [("placed", 10_000)].into());
    });
}

/// A socket that listened before it connects is a client's.
#[test]
fn listeners_that_become_clients_leave_nothing() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        let _servers = open_servers(1);
        for _ in 0..100 {
            let listener = Listen::on("127.0.0.1:0").open();
            listener.shutdown();
            let client = socket();
            client.bind(&at("127.0.0.1:0").into()).expect("bound");
            client.listen(1).expect("listens");
            client
                .shutdown(std::net::Shutdown::Both)
                .expect("shut down");
            client.connect(&at(FRONTEND).into()).expect("placed");
        }
        node.agree(&[0]);
        assert_eq!(node.placed(0).total, 100);
    });
}

/// It is the cgroup that made a socket that counts, whoever connects it.
#[test]
fn a_socket_belongs_to_the_cgroup_that_made_it() {
    Machine::with(|machine| {
        let node = Node::placing(machine, 1);
        let _servers = open_servers(1);
        let outside = Cgroup::new();
        let (foreign, own) = (outside.run(socket), socket());
        let error = foreign
            .connect(&at(FRONTEND).into())
            .expect_err("not placed");
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
        outside
            .run(|| own.connect(&at(FRONTEND).into()))
            .expect("placed");
        node.agree(&[1]);
        drop(tcp::connect(at(FRONTEND)).connected());
        drop(own);
        node.agree(&[0]);
        assert_eq!(node.reasons(GROUP), [("placed", 2)].into());
    });
}
