//! A quota is for a server: its listeners share it.

use std::time::{Duration, Instant};

use anyhow::ensure;
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{
    Balancer, Machine, Server, Service, Signal, eventually, patiently, remains,
};

use crate::support::{
    accept_each, agents, agree, at, backend, group, own_port, virtual_port, virtual_port_of,
};

/// The quotas of the listeners that are there, from the smallest on.
fn parts(service: &Service) -> Vec<u32> {
    let active = service
        .backends
        .iter()
        .filter(|backend| backend.state == "active");
    let mut parts: Vec<u32> = active.filter_map(|backend| backend.quota).collect();
    parts.sort_unstable();
    parts
}

/// The kernel alone would choose again in the group, and fill some beyond their part.
#[test]
fn listeners_of_one_process_share_its_quota() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 10}"]);
        let balancer = Balancer::start(machine, &yaml);
        let mut listeners = group(4);
        balancer.wait_until(|service| parts(service) == [2, 2, 3, 3]);
        let mut clients = tcp::connect_many(agents(), 60);
        assert_eq!(clients.len(), 10);
        let mut loads = agree(&balancer, &mut listeners);
        loads.sort_unstable();
        assert_eq!(loads, [2, 2, 3, 3]);
        clients.pop();
        balancer.wait_until(|service| service.established() == 9);
        clients.extend(tcp::connect_many(agents(), 3));
        assert_eq!(clients.len(), 10);
        let text = balancer.must(&["status"]);
        assert!(text.contains("share a quota of 10"), "{text}");
    });
}

#[test]
fn a_quota_set_by_hand_is_shared_too() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 10}"]);
        let balancer = Balancer::start(machine, &yaml);
        let mut listeners = group(4);
        balancer.wait_until(|service| parts(service) == [2, 2, 3, 3]);
        balancer.quota_set("agents", None, 14);
        assert_eq!(parts(&balancer.service()), [3, 3, 4, 4]);
        let mut clients = tcp::connect_many(agents(), 20);
        assert_eq!(clients.len(), 14);
        // Whichever of its listeners is named.
        let slot = balancer.service().slots()[2];
        balancer.quota_set("agents", Some(slot), 22);
        clients.extend(tcp::connect_many(agents(), 20));
        assert_eq!(clients.len(), 22);
        let loads = agree(&balancer, &mut listeners);
        assert!(loads.iter().all(|load| (5..=6).contains(load)), "{loads:?}");
        // It stays while listeners of the server come and go.
        let joined = Listen::on(&agents()).reuse_port().open();
        balancer.wait_until(|service| {
            service.active() == 5 && parts(service).iter().sum::<u32>() == 22
        });
        remains(Duration::from_secs(3), || {
            ensure!(
                tcp::connect(agents()).is_refused(),
                "{:?}",
                balancer.service()
            );
            Ok(())
        });
        drop(joined);
        let said = balancer.must(&["quota", "clear", "agents"]);
        assert!(said.contains("keep their own quota by hand, 22"), "{said}");
        balancer.quota_clear("agents", Some(slot));
        balancer.wait_until(|service| parts(service).iter().sum::<u32>() == 10);
    });
}

/// What the first alone has taken is not there for the others to give away once more.
#[test]
fn a_listener_that_joins_a_full_server_brings_no_room() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 10}"]);
        let balancer = Balancer::start(machine, &yaml);
        let mut listeners = group(1);
        balancer.wait_until(|service| parts(service) == [10]);
        let mut clients = tcp::connect_many(agents(), 12);
        assert_eq!(clients.len(), 10);
        listeners.extend(group(3));
        balancer.wait_until(|service| parts(service) == [0, 0, 0, 10]);
        assert!(tcp::connect_many(agents(), 5).is_empty());
        clients.truncate(6);
        for _ in 0..6 {
            clients.extend(tcp::connect(agents()).ok());
            let here = agree(&balancer, &mut listeners);
            assert!(here.iter().sum::<usize>() <= 10, "{here:?}");
        }
        balancer.wait_until(|service| parts(service).iter().sum::<u32>() == 10);
        clients.extend(tcp::connect_many(agents(), 5));
        assert_eq!(agree(&balancer, &mut listeners).iter().sum::<usize>(), 10);
        assert_eq!(clients.len(), 10);
    });
}

/// A part of 0 is nobody's wish to close the listener, whatever becomes of the daemon.
#[test]
fn a_listener_whose_part_is_0_is_open_to_all_when_the_daemon_is_gone() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 1}"]);
        let mut balancer = Balancer::start(machine, &format!("{yaml}fail_open_after: 5s\n"));
        let addresses = ["127.0.0.1:11800", "127.0.0.2:11800"].map(at);
        let mut listeners: Vec<_> = addresses.iter().map(|to| Listen::on(to).open()).collect();
        balancer.wait_until(|service| parts(service) == [0, 1]);
        let mut clients: Vec<_> = tcp::connect(addresses[0]).ok().into_iter().collect();
        assert_eq!(clients.len(), 1);
        for to in addresses {
            assert!(tcp::connect(to).is_refused(), "{to}");
        }
        let refused = balancer.service().verdicts("over-quota");
        assert_eq!(refused, 2, "{:?}", balancer.service().verdicts);
        balancer.stop(Signal::SIGKILL);
        eventually(Duration::from_secs(15), || {
            clients.extend(tcp::connect(addresses[1]).ok());
            ensure!(clients.len() > 1, "{:?}", balancer.service().verdicts);
            Ok(())
        });
        for to in addresses {
            clients.extend(tcp::connect_many(to, 5));
        }
        assert_eq!(clients.len(), 12, "{:?}", balancer.service().verdicts);
        agree(&balancer, &mut listeners);
    });
}

/// Until the daemon has seen it, nobody knows that it shares a quota.
#[test]
fn a_new_listener_of_a_full_server_exceeds_its_quota_for_a_moment_only() {
    const QUOTA: usize = 100;
    Machine::with(|machine| {
        let rule = format!("quota: {{per_backend: {QUOTA}}}");
        let balancer = Balancer::start(machine, &own_port("least-connections", &[&rule]));
        let first = Listen::on(&at("127.0.0.1:11800")).open();
        balancer.wait_until(|service| parts(service) == [100]);
        let clients = tcp::connect_many(first.addr(), QUOTA + 10);
        assert_eq!(clients.len(), QUOTA);
        let second = Listen::on(&at("127.0.0.2:11800")).open();
        let begun = Instant::now();
        let (mut more, mut last) = (Vec::new(), Duration::ZERO);
        while let Some(client) = tcp::connect(second.addr()).ok() {
            more.push(client);
            last = begun.elapsed();
            assert!(more.len() <= QUOTA, "more than the server may hold");
            std::thread::sleep(Duration::from_millis(2));
        }
        println!("{} more, the last {last:?} after listen()", more.len());
        assert!(last < patiently(Duration::from_secs(1)), "{last:?}");
        balancer.wait_until(|service| {
            service.active() == 2 && parts(service).iter().sum::<u32>() == 100
        });
        assert!(tcp::connect(second.addr()).is_refused());
    });
}

/// All clients come to one of the two addresses that the process listens at.
#[test]
fn room_goes_to_the_address_that_clients_come_to() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 12}"]);
        let balancer = Balancer::start(machine, &yaml);
        let mut listeners: Vec<Listener> = ["127.0.0.1:11800", "127.0.0.2:11800"]
            .map(|address| Listen::on(address).open())
            .into();
        balancer.wait_until(|service| parts(service) == [6, 6]);
        let mut clients = Vec::new();
        // Half of what the other has no use for goes over in each of a few rounds.
        eventually(Duration::from_secs(30), || {
            clients.extend(tcp::connect(agents()).ok());
            let established = balancer.service().established();
            ensure!(established >= 11, "{established}");
            Ok(())
        });
        clients.extend(tcp::connect_many(at("127.0.0.2:11800"), 9));
        accept_each(&mut listeners);
        let here = agree(&balancer, &mut listeners);
        assert!((11..=12).contains(&here.iter().sum::<usize>()), "{here:?}");
    });
}

/// Two servers on one port: a process with four listeners is no more than one with one.
#[test]
fn servers_are_alike_however_many_listeners_they_have() {
    Machine::with(|machine| {
        let rule = "quota: {clients: 40, headroom: 0%, min_quota: 1}";
        let balancer = Balancer::start(machine, &own_port("least-connections", &[rule]));
        let many = Server::on(&[agents(); 4]);
        let one = Server::on(&[agents()]);
        balancer.wait_until(|service| parts(service) == [5, 5, 5, 5, 20]);
        let sentence = balancer.must(&["quota", "show", "agents"]);
        assert!(sentence.contains("/ 2 ready) = 20"), "{sentence}");
        // By weight, long before either is full.
        let clients = tcp::connect_many(agents(), 24);
        let held = || {
            [
                many.established(11_800).len(),
                one.established(11_800).len(),
            ]
        };
        balancer.wait_until(|service| service.established() == 24);
        assert_eq!((clients.len(), held()), (24, [12, 12]));
        let more = tcp::connect_many(agents(), 16);
        balancer.wait_until(|service| service.established() == 40);
        assert_eq!((more.len(), held()), (16, [20, 20]));
    });
}

/// Processes that listen at one address of the file are servers of their own, and each shares its
/// quota among its listeners.
#[test]
fn servers_behind_a_virtual_port_share_by_process_and_address() {
    Machine::with(|machine| {
        let backends = format!("\"{}\", \"{}\"", backend(0), backend(1));
        let quota = "quota: {per_backend: 6}";
        let yaml = virtual_port_of("least-connections", &backends, &[quota]);
        let balancer = Balancer::start(machine, &yaml);
        let _servers = [
            Server::on(&[backend(0), backend(0), backend(1)]),
            Server::on(&[backend(0)]),
        ];
        balancer.wait_until(|service| parts(service) == [3, 3, 6, 6]);
        let clients = tcp::connect_many(agents(), 30);
        assert_eq!(clients.len(), 18);
    });
}

/// A process that has all its listeners from its parent is one server with it.
#[test]
fn a_prefork_server_is_one_server() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &virtual_port("least-connections", 1, &["quota: {per_backend: 6}"]),
        );
        let _server = Server::shared(&[backend(0), backend(0)]);
        balancer.wait_until(|service| parts(service) == [3, 3]);
        assert_eq!(tcp::connect_many(agents(), 20).len(), 6);
    });
}
