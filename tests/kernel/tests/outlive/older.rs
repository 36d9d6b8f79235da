//! Connections that are older than the data plane: those that were open when the last one was taken
//! out of the kernel.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use testkit::fixtures::tcp::{self, Listener};
use testkit::fixtures::{Balancer, Machine, Server, Signal, diag, eventually};

use super::fixture::assert_no_drift;
use crate::support::{
    accept_each, agents, agree, backend, group, open_listeners, own_port, virtual_port,
};

const PORT: u16 = 11_800;
const SETTLES_WITHIN: Duration = Duration::from_secs(5);

/// How a data plane is taken out.
#[derive(Clone, Copy, Debug)]
enum Way {
    Unload,
    Interrupt,
    /// `unload` after a `kill -9`: no daemon answers it.
    UnloadAfterKill,
}

impl Way {
    /// Takes it out; returns what the operator is told.
    #[track_caller]
    fn take_out(self, balancer: &mut Balancer) -> String {
        match self {
            Self::Unload => {
                let answer = balancer.must(&["unload"]);
                assert!(balancer.wait().success());
                answer
            }
            Self::Interrupt => {
                assert!(balancer.stop(Signal::SIGINT).success());
                balancer.logs()
            }
            Self::UnloadAfterKill => {
                balancer.stop(Signal::SIGKILL);
                balancer.must(&["unload"])
            }
        }
    }
}

/// Waits until each server has as many connections counted on its backend as it holds.
#[track_caller]
fn agree_by_process(balancer: &Balancer, servers: &[(&Server, SocketAddr)]) -> Vec<usize> {
    eventually(SETTLES_WITHIN, || {
        let service = balancer.service();
        let held: Vec<_> = servers
            .iter()
            .map(|(server, _)| server.established(PORT).len())
            .collect();
        let counted: Vec<_> = servers
            .iter()
            .map(|(_, address)| service.backend(*address).established as usize)
            .collect();
        ensure!(counted == held, "counted {counted:?}, held {held:?}");
        Ok(held)
    })
}

/// Waits until a server has accepted so many that still stand.
#[track_caller]
fn holds(server: &Server, connections: usize) {
    eventually(SETTLES_WITHIN, || {
        let held = server.established(PORT).len();
        ensure!(held == connections, "{held}, want {connections}");
        Ok(())
    });
}

fn unattributed(balancer: &Balancer) -> u32 {
    balancer.service().unattributed
}

/// What `doctor` says of them: `ok` or `warn`, and what it found.
fn doctor(balancer: &Balancer) -> (String, String) {
    let json = balancer.must(&["doctor", "-o", "json"]);
    let report: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let checks = report["checks"].as_array().expect("a list");
    let check = checks
        .iter()
        .find(|check| check["name"] == "older connections")
        .unwrap_or_else(|| panic!("no such check in {json}"));
    let text = |key: &str| check[key].as_str().expect("a text").to_owned();
    (text("status"), text("found"))
}

/// Virtual port, two servers of a process each, a quota of 60 for each.
#[test]
fn what_outlives_a_data_plane_on_a_virtual_port_is_its_processes() {
    for way in [Way::Unload, Way::Interrupt, Way::UnloadAfterKill] {
        Machine::with(|machine| {
            let yaml = virtual_port("least-connections", 2, &["quota: {per_backend: 60}"]);
            let mut balancer = Balancer::start(machine, &yaml);
            let servers = [0, 1].map(|n| (Server::on(&[backend(n)]), backend(n)));
            let servers = servers
                .each_ref()
                .map(|(server, address)| (server, *address));
            balancer.wait_active(2);
            let mut clients = tcp::connect_many(agents(), 100);
            assert_eq!(agree_by_process(&balancer, &servers), [50, 50]);
            let told = way.take_out(&mut balancer);
            assert!(told.contains("100 established connections"), "{told}");
            assert_eq!(diag::accepted(PORT).len(), 100, "they stay");

            balancer.launch();
            assert_eq!(agree_by_process(&balancer, &servers), [50, 50], "{way:?}");
            assert_eq!(unattributed(&balancer), 0);
            assert_eq!(doctor(&balancer).0, "ok");
            // The next daemon needs no look at processes.
            balancer.stop(Signal::SIGKILL);
            balancer.launch();
            assert_eq!(agree_by_process(&balancer, &servers), [50, 50], "{way:?}");
            // New ones get the rest of the quota.
            clients.extend(tcp::connect_many(agents(), 50));
            assert_eq!(agree_by_process(&balancer, &servers), [60, 60], "{way:?}");
            clients.drain(..100);
            assert_eq!(agree_by_process(&balancer, &servers), [10, 10], "{way:?}");
            clients.clear();
            assert_eq!(agree_by_process(&balancer, &servers), [0, 0], "{way:?}");
            assert_no_drift(&balancer);
        });
    }
}

/// What its processes leave open is said, wherever somebody may look.
#[test]
fn what_a_process_with_two_backends_holds_is_named() {
    Machine::with(|machine| {
        let yaml = virtual_port("least-connections", 4, &["quota: {per_backend: 30}"]);
        let mut balancer = Balancer::start(machine, &yaml);
        let servers = [0, 1].map(|n| (Server::on(&[backend(n)]), backend(n)));
        let servers = servers
            .each_ref()
            .map(|(server, address)| (server, *address));
        let both = Server::on(&[backend(2), backend(3)]);
        balancer.wait_active(4);
        let mut clients = tcp::connect_many(agents(), 100);
        assert_eq!(agree_by_process(&balancer, &servers), [25, 25]);
        holds(&both, 50);
        Way::Unload.take_out(&mut balancer);

        balancer.launch();
        assert_eq!(agree_by_process(&balancer, &servers), [25, 25]);
        assert_eq!(balancer.service().established(), 50);
        assert_eq!(unattributed(&balancer), 50);
        let logs = balancer.logs();
        let line = logs
            .lines()
            .find(|line| line.contains("WARN") && line.contains("50 established connections"));
        let line = line.unwrap_or_else(|| panic!("nothing is said:\n{logs}"));
        assert!(
            line.contains(&format!("(process {})", both.pid())),
            "{line}"
        );
        let status = balancer.must(&["status"]);
        assert!(status.contains("50 established connections"), "{status}");
        let (finding, found) = doctor(&balancer);
        assert_eq!(finding, "warn");
        assert!(found.contains("agents: 50"), "{found}");

        // Those that are known take their places: 5 and 5 are left there, all of the others'.
        clients.extend(tcp::connect_many(agents(), 100));
        assert_eq!(clients.len(), 100 + 5 + 5 + 30 + 30);
        assert_eq!(agree_by_process(&balancer, &servers), [30, 30]);
        clients.drain(..100);
        balancer.wait_until(|service| service.unattributed == 0);
        assert_eq!(agree_by_process(&balancer, &servers), [5, 5]);
        assert_eq!(doctor(&balancer).0, "ok");
        assert_no_drift(&balancer);
    });
}

/// Each worker of a pre-forked server has the listener.
#[test]
fn a_listener_of_several_processes_is_one_backend() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let servers = [0, 1].map(|n| (Server::shared(&[backend(n)]), backend(n)));
        let servers = servers
            .each_ref()
            .map(|(server, address)| (server, *address));
        balancer.wait_active(2);
        let _clients = tcp::connect_many(agents(), 40);
        assert_eq!(agree_by_process(&balancer, &servers), [20, 20]);
        Way::Unload.take_out(&mut balancer);
        balancer.launch();
        assert_eq!(agree_by_process(&balancer, &servers), [20, 20]);
        assert_eq!(unattributed(&balancer), 0);
    });
}

/// A server that has closed its listener and lives on with its connections.
#[test]
fn what_a_process_without_a_backend_holds_is_named() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let mut draining = open_listeners(1).remove(0);
        let clients = tcp::connect_many(agents(), 6);
        eventually(SETTLES_WITHIN, || {
            draining.accept_all();
            ensure!(draining.accepted.len() == 6, "not all are accepted");
            Ok(())
        });
        let held = draining.close();
        Way::Unload.take_out(&mut balancer);
        let _server = Server::on(&[backend(1)]);
        balancer.launch();
        assert_eq!(
            (balancer.service().established(), unattributed(&balancer)),
            (0, 6)
        );
        let logs = balancer.logs();
        let reason = "6 held by a process with none of its backends";
        assert!(logs.contains(reason), "{logs}");
        drop((clients, held));
        balancer.wait_until(|service| service.unattributed == 0);
    });
}

/// Nobody has them until they are accepted.
#[test]
fn what_nobody_has_accepted_yet_is_named_until_somebody_does() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let mut listeners = open_listeners(1);
        let clients = tcp::connect_many(agents(), 7);
        balancer.wait_until(|service| service.established() == 7);
        Way::Unload.take_out(&mut balancer);
        balancer.launch();
        assert_eq!(unattributed(&balancer), 7);
        assert_eq!(balancer.service().established(), 0);
        assert_eq!(listeners[0].accept_all(), 7);
        balancer.wait_until(|service| service.unattributed == 0);
        assert_eq!(agree(&balancer, &mut listeners), [7]);
        drop(clients);
        assert_eq!(agree(&balancer, &mut listeners), [0]);
        assert_no_drift(&balancer);
    });
}

/// Somebody's own connection may have a virtual port for its own port: nobody listens there.
#[test]
fn a_connection_from_a_virtual_port_is_none_through_it() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let _listeners = open_listeners(1);
        let mut elsewhere = vec![tcp::Listen::on("127.0.0.1:9000").open()];
        let source = crate::support::at("127.0.0.1:11800");
        let client = tcp::connect_from(source, elsewhere[0].addr()).connected();
        accept_each(&mut elsewhere);
        let checks = balancer.status().agent.checks;
        eventually(SETTLES_WITHIN, || {
            ensure!(balancer.status().agent.checks > checks.map(|checks| checks + 2));
            Ok(())
        });
        let service = balancer.service();
        assert_eq!((service.established(), service.unattributed), (0, 0));
        drop(client);
    });
}

/// Own port, two listeners of one address: which of the two has a connection nobody can tell.
#[test]
fn a_group_of_one_process_shares_its_connections_evenly() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 30}"]);
        let mut balancer = Balancer::start(machine, &yaml);
        let mut listeners = group(2);
        let mut clients = tcp::connect_many(agents(), 20);
        assert_eq!(agree(&balancer, &mut listeners), [10, 10]);
        Way::Unload.take_out(&mut balancer);
        balancer.launch();
        assert_eq!(counted(&balancer), [10, 10]);
        // The quotas hold: there is room for ten more.
        clients.extend(tcp::connect_many(agents(), 30));
        assert_eq!(clients.len(), 30);
        wait_counted(&balancer, &mut listeners, &[15, 15]);
        clients.drain(..14);
        wait_counted(&balancer, &mut listeners, &[8, 8]);
        clients.clear();
        wait_counted(&balancer, &mut listeners, &[0, 0]);
        assert_no_drift(&balancer);
    });
}

fn counted(balancer: &Balancer) -> Vec<u32> {
    let service = balancer.service();
    let counts = service.backends.iter().map(|backend| backend.established);
    counts.collect()
}

#[track_caller]
fn wait_counted(balancer: &Balancer, listeners: &mut [Listener], wanted: &[u32]) {
    eventually(SETTLES_WITHIN, || {
        accept_each(listeners);
        let counted = counted(balancer);
        ensure!(counted == wanted, "{counted:?}, want {wanted:?}");
        Ok(())
    });
}

/// Own port, a group of two processes: each holds its own connections.
#[test]
fn a_group_of_two_processes_has_the_connections_that_each_holds() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let servers = [(); 2].map(|()| Server::on(&[agents()]));
        balancer.wait_active(2);
        let mut clients = tcp::connect_many(agents(), 20);
        // Not even: those of the first leave.
        for server in &servers {
            holds(server, 10);
        }
        let first = servers[0].established(PORT);
        clients.retain(|client| {
            let client = client.local_addr().expect("it is connected");
            !first.iter().any(|row| row.remote == client)
        });
        holds(&servers[0], 0);
        holds(&servers[1], 10);
        Way::Unload.take_out(&mut balancer);
        balancer.launch();
        let mut counted = counted(&balancer);
        counted.sort_unstable();
        assert_eq!(counted, [0, 10]);
    });
}
