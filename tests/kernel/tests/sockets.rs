//! Kinds of sockets.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::wire::Wire;
use testkit::fixtures::{Balancer, Machine, Service, diag, eventually};

use crate::support::{agents, agree, at, group, landing, own_port, virtual_port_of};

/// Accepted Fast Open connections may be sent data with the SYN: include/linux/socket.h.
const MSG_FASTOPEN: i32 = 0x2000_0000;

#[test]
fn ipv6_on_an_own_port() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 6}"]),
        );
        let mut listeners = vec![Listen::on("[::1]:11800").open()];
        let clients = tcp::connect_many(at("[::1]:11800"), 9);
        assert_eq!(clients.len(), 6);
        assert_eq!(agree(&balancer, &mut listeners), [6]);
        // Nobody listens there for IPv4: that is for the kernel to say.
        assert!(tcp::connect(agents()).is_refused());
        assert!(balancer.service().verdicts("no-backend") > 0);
    });
}

#[test]
fn ipv6_on_a_virtual_port() {
    Machine::with(|machine| {
        let backends = r#""[::1]:21000", "[::1]:21001""#;
        let balancer = Balancer::start(
            machine,
            &virtual_port_of("least-connections", backends, &["quota: {per_backend: 6}"]),
        );
        let mut listeners: Vec<_> = ["[::1]:21000", "[::1]:21001"]
            .map(|address| Listen::on(address).open())
            .into();
        let clients = tcp::connect_many(at("[::1]:11800"), 15);
        assert_eq!(clients.len(), 12);
        assert_eq!(agree(&balancer, &mut listeners), [6, 6]);
    });
}

/// As an OAP listens: one `AF_INET6` socket for both.
#[test]
fn a_dual_stack_listener_takes_both_families() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &own_port(
                "least-connections",
                &[
                    "quota: {per_backend: 10}",
                    "exempt: [127.0.9.0/24, \"::1\"]",
                ],
            ),
        );
        let mut listeners = vec![Listen::on("[::]:11800").dual_stack().open()];
        machine
            .netns
            .add_address("2001:db8::1".parse().expect("an address"));
        let mut clients = tcp::connect_many(agents(), 4);
        clients.extend(tcp::connect_many(at("[2001:db8::1]:11800"), 4));
        assert_eq!(clients.len(), 8);
        let exempt = [at("[::1]:0"), at("127.0.9.1:0")].map(|source| {
            tcp::connect_from(
                source,
                if source.is_ipv6() {
                    at("[::1]:11800")
                } else {
                    agents()
                },
            )
            .connected()
        });
        assert_eq!(agree(&balancer, &mut listeners), [10]);
        assert_eq!(balancer.service().backends[0].exempt, 2);
        clients.extend(tcp::connect_many(agents(), 2));
        assert!(tcp::connect(agents()).is_refused());
        assert!(tcp::connect(at("[2001:db8::1]:11800")).is_refused());
        assert_eq!(agree(&balancer, &mut listeners), [12]);
        drop(exempt);
    });
}

#[test]
fn each_family_goes_only_to_listeners_that_take_it() {
    Machine::with(|machine| {
        let backends = r#""127.0.0.1:21000", "[::1]:21001", "[::1]:21002""#;
        let balancer = Balancer::start(machine, &virtual_port_of("round-robin", backends, &[]));
        let mut listeners = vec![
            Listen::on("127.0.0.1:21000").open(),
            Listen::on("[::1]:21001").open(),
            Listen::on("[::]:21002").dual_stack().open(),
        ];
        let v4 = tcp::connect_many(agents(), 10);
        assert_eq!(agree(&balancer, &mut listeners), [5, 0, 5]);
        let v6 = tcp::connect_many(at("[::1]:11800"), 10);
        assert_eq!(agree(&balancer, &mut listeners), [5, 5, 10]);
        assert_eq!((v4.len(), v6.len()), (10, 10));
        // One that takes IPv6 alone, in the place of the dual-stack one.
        drop(listeners.pop());
        listeners.push(Listen::on("[::]:21002").open());
        balancer.wait_active(3);
        let v4 = tcp::connect_many(agents(), 10);
        assert_eq!(agree(&balancer, &mut listeners), [15, 5, 0]);
        drop(v4);
    });
}

/// As in the kernel: otherwise a local user could take connections of the network by listening on
/// 127.0.0.1.
#[test]
fn candidates_are_those_of_the_destination_address() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut listeners = vec![
            Listen::on("0.0.0.0:11800").reuse_port().open(),
            Listen::on("127.0.0.1:11800").reuse_port().open(),
            Listen::on("127.0.0.2:11800").reuse_port().open(),
        ];
        let first = tcp::connect_many(agents(), 9);
        assert_eq!(
            (first.len(), agree(&balancer, &mut listeners)),
            (9, vec![0, 9, 0])
        );
        let second = tcp::connect_many(at("127.0.0.2:11800"), 3);
        assert_eq!(
            (second.len(), agree(&balancer, &mut listeners)),
            (3, vec![0, 9, 3])
        );
        let others = tcp::connect_many(at("127.0.0.3:11800"), 9);
        assert_eq!(
            (others.len(), agree(&balancer, &mut listeners)),
            (9, vec![9, 9, 3])
        );
    });
}

/// The kernel lets only one user listen on an address: this one gives a listener away afterwards.
#[test]
fn candidates_are_those_of_one_user() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("round-robin", &[]));
        let mut listeners = vec![Listen::on(&agents()).reuse_port().open()];
        listeners[0].give_to(12_345);
        listeners.push(Listen::on(&agents()).reuse_port().owner(12_345).open());
        let clients = tcp::connect_many(agents(), 20);
        assert_eq!(clients.len(), 20);
        let mut loads = agree(&balancer, &mut listeners);
        loads.sort_unstable();
        assert_eq!(loads, [0, 20]);
    });
}

#[test]
fn a_listener_bound_to_the_interface_wins() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("round-robin", &[]));
        machine
            .netns
            .ip("link add elsewhere type veth peer name end");
        let mut listeners = vec![
            Listen::on(&agents()).reuse_port().open(),
            Listen::on(&agents()).reuse_port().device("lo").open(),
            Listen::on(&agents())
                .reuse_port()
                .device("elsewhere")
                .open(),
        ];
        let clients = tcp::connect_many(agents(), 20);
        assert_eq!(clients.len(), 20);
        assert_eq!(agree(&balancer, &mut listeners), [0, 20, 0]);
    });
}

/// A service with an address is only for what is sent there; a service without one has the rest of
/// the port.
#[test]
fn an_exact_address_wins_over_any() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            r#"
services:
  - {name: vip, port: 11800, address: 127.0.0.9, policy: least-connections, backends: ["127.0.0.1:21000"], quota: {per_backend: 2}}
  - {name: rest, port: 11800, policy: least-connections, quota: {per_backend: 3}}
"#,
        );
        let mut listeners = vec![
            Listen::on("127.0.0.1:21000").open(),
            Listen::on("0.0.0.0:11800").open(),
        ];
        let vip = tcp::connect_many(at("127.0.0.9:11800"), 5);
        let rest = tcp::connect_many(agents(), 5);
        assert_eq!((vip.len(), rest.len()), (2, 3));
        assert_eq!(crate::support::loads(&mut listeners), [2, 3]);
        let status = balancer.status();
        assert_eq!(
            (
                status.service("vip").established(),
                status.service("rest").established()
            ),
            (2, 3)
        );
        assert!(status.service("vip").verdicts("over-quota") >= 3);
        assert!(status.service("rest").verdicts("over-quota") >= 2);
        // A backend's own address is not the service's: nobody is steered away from it.
        assert_eq!(tcp::connect_many(at("127.0.0.1:21000"), 1).len(), 1);
    });
}

#[test]
fn an_mptcp_listener_is_counted_and_held_to_its_quota_but_not_steered_to() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 5}"]),
        );
        let mut listener = Listen::on(&agents()).mptcp().open();
        let clients = tcp::connect_many(agents(), 8);
        assert_eq!(clients.len(), 5);
        assert_eq!(listener.accept_all(), 5);
        let service = balancer.service();
        assert_eq!(service.established(), 5, "{service:?}");
        assert_eq!(diag::accepted(11800).len(), 5);
        let backend = &service.backends[0];
        assert_eq!(
            (backend.steerable, backend.pending),
            (Some(false), None),
            "{backend:?}"
        );
        assert!(
            backend
                .note
                .as_ref()
                .is_some_and(|note| note.contains("MPTCP") || note.contains("Multipath")),
            "{backend:?}"
        );
        assert!(service.verdicts("over-quota") >= 3, "{service:?}");
        drop(clients);
        balancer.wait_until(|service| service.established() == 0);
        drop(listener);
        balancer.wait_until(|service| service.backends.is_empty());
    });
}

#[test]
fn connections_of_mptcp_clients_are_counted() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut listener = Listen::on(&agents()).mptcp().open();
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let client = Socket::new(Domain::IPV4, Type::STREAM, Some(262.into()))
                    .expect("an MPTCP socket");
                client.connect(&agents().into()).expect("it connects");
                client
            })
            .collect();
        assert_eq!(listener.accept_all(), 4);
        balancer.wait_until(|service| service.established() == 4);
        drop((clients, listener));
        balancer.wait_until(|service| service.backends.is_empty());
    });
}

#[test]
fn a_virtual_port_passes_over_mptcp_backends() {
    Machine::with(|machine| {
        let backends = r#""127.0.0.1:21000", "127.0.0.1:21001""#;
        let balancer = Balancer::start(machine, &virtual_port_of("round-robin", backends, &[]));
        let mut listeners = vec![
            Listen::on("127.0.0.1:21000").mptcp().open(),
            Listen::on("127.0.0.1:21001").open(),
        ];
        let clients = tcp::connect_many(agents(), 10);
        assert_eq!(clients.len(), 10);
        assert_eq!(agree(&balancer, &mut listeners), [0, 10]);
    });
}

fn allow_fast_open(machine: &Machine) {
    // Client, server, client without a cookie, server without a cookie, every listener
    // (Documentation/networking/ip-sysctl).
    machine.netns.sysctl(
        "net.ipv4.tcp_fastopen",
        &(0x1 | 0x2 | 0x4 | 0x200 | 0x400).to_string(),
    );
}

/// The accept side exists, and can be accepted, from the SYN on; it is established after the ACK.
#[test]
fn fast_open_counts_when_the_handshake_is_complete() {
    Machine::with(|machine| {
        allow_fast_open(machine);
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 8}"]),
        );
        let mut listener = Listen::on(&agents()).open();
        let wire = Wire::open(&machine.netns);
        (0..5).for_each(|n| wire.syn_with_data(Wire::client(n), agents(), b"hello"));
        let answers = wire.answers(Duration::from_millis(50));
        assert_eq!(answers.len(), 5);
        assert_eq!(listener.accept_all(), 5, "Fast Open is in use");
        let service = balancer.service();
        assert_eq!(
            (service.established(), service.backends[0].pending),
            (0, Some(5))
        );
        // Three places are left.
        let clients = tcp::connect_many(agents(), 5);
        assert_eq!(clients.len(), 3);
        wire.ack_all(&answers);
        let mut listeners = vec![listener];
        assert_eq!(agree(&balancer, &mut listeners), [8]);
        listeners[0].accepted.clear();
        assert_eq!(agree(&balancer, &mut listeners), [0]);
    });
}

fn connect_fast(to: SocketAddr) -> Socket {
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    client
        .send_to_with_flags(b"hello", &to.into(), MSG_FASTOPEN)
        .expect("it connects");
    client
}

#[test]
fn fast_open_clients_are_not_miscounted() {
    Machine::with(|machine| {
        allow_fast_open(machine);
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut listeners = group(2);
        let clients: Vec<_> = (0..20).map(|_| connect_fast(agents())).collect();
        assert_eq!(agree(&balancer, &mut listeners).iter().sum::<usize>(), 20);
        // A client that resets at once.
        for client in clients {
            SockRef::from(&client.as_fd())
                .set_linger(Some(Duration::ZERO))
                .expect("SO_LINGER");
        }
        assert_eq!(agree(&balancer, &mut listeners), [0, 0]);
    });
}

/// A SYN to a backend's own address and port is for that backend.
#[test]
fn a_backends_own_address_is_not_balanced() {
    Machine::with(|machine| {
        let backends = r#""127.0.0.1:21000", "127.0.0.1:21001""#;
        let _balancer = Balancer::start(
            machine,
            &virtual_port_of("least-connections", backends, &["quota: {per_backend: 1}"]),
        );
        let mut listeners: Vec<Listener> = ["127.0.0.1:21000", "127.0.0.1:21001"]
            .map(|address| Listen::on(address).open())
            .into();
        for _ in 0..3 {
            let _direct = tcp::connect(at("127.0.0.1:21001")).connected();
            assert_eq!(landing(&mut listeners), 1);
        }
    });
}

/// With `tcp_migrate_req` a listener that closes hands on what it has not accepted. `doctor` warns
/// of it: such connections count on the closed listener's slot until they end, and nothing is
/// repaired.
#[test]
fn what_a_closing_listener_hands_on_stays_counted_on_it() {
    Machine::with(|machine| {
        machine.netns.sysctl("net.ipv4.tcp_migrate_req", "1");
        let yaml = own_port("least-connections", &["quota: {per_backend: 40}"]);
        let balancer = Balancer::start(machine, &yaml);
        let mut listeners = group(2);
        let clients = tcp::connect_many(agents(), 20);
        // Ten wait in the queue of each.
        let mut closing = listeners.remove(0);
        assert_eq!(closing.accept_all(), 10);
        let more = tcp::connect_many(agents(), 10);
        assert_eq!((clients.len(), more.len()), (20, 10));
        let kept = closing.close();
        let is = |service: &Service, expected: &[(&str, u32)]| {
            let backends = service.backends.iter();
            let mut here: Vec<(&str, u32)> = backends
                .filter(|backend| backend.address == agents())
                .map(|backend| (backend.state.as_str(), backend.established))
                .collect();
            here.sort_unstable();
            here == expected && established() == here.iter().map(|(_, count)| count).sum::<u32>()
        };
        let counted = |expected: &[(&str, u32)]| {
            balancer.wait_until(|service| is(service, expected));
            let checks = balancer.status().agent.checks;
            // A deviation is repaired when three passes have seen it.
            eventually(Duration::from_secs(30), || {
                let passes = checks.map(|checks| checks + 4);
                anyhow::ensure!(balancer.status().agent.checks > passes, "too few passes");
                Ok(())
            });
            assert!(is(&balancer.service(), expected));
            let agent = balancer.status().agent;
            assert_eq!((agent.drift, agent.repairs), (Some(0), Some(0)));
        };
        counted(&[("active", 15), ("closed", 15)]);
        assert_eq!(listeners[0].accept_all(), 20);
        counted(&[("active", 15), ("closed", 15)]);
        // The slot is not freed while one of them is left.
        drop(kept);
        counted(&[("active", 15), ("closed", 5)]);
        drop((clients, more));
        listeners[0].accepted.clear();
        counted(&[("active", 0)]);
    });
}

/// The established connections by the socket table.
fn established() -> u32 {
    diag::accepted(11800).len().try_into().expect("a few")
}
