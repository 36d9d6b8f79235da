//! `connect:` on one host: where its clients' connects go, from the file to `status`.

mod addresses;

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, EndpointGroup, Machine, Signal, eventually, patiently};

use crate::support::at;

/// What clients connect to; nobody listens there.
const FRONTEND: &str = "127.0.0.9:11800";
/// How long the maps may take to follow.
const SETTLES_WITHIN: Duration = Duration::from_secs(8);

fn endpoint(n: usize) -> SocketAddr {
    at(&format!("127.0.0.{}:11800", 11 + n))
}

/// The file with these endpoints, in YAML.
fn file_of(endpoints: &[String]) -> String {
    format!(
        "services:\n- name: agents\n  connect:\n    to: [\"{FRONTEND}\"]\n    endpoints: [{}]\n",
        endpoints.join(", ")
    )
}

fn file(endpoints: usize) -> String {
    file_of(&quoted(endpoints))
}

fn quoted(endpoints: usize) -> Vec<String> {
    let quoted = |n| format!("\"{}\"", endpoint(n));
    (0..endpoints).map(quoted).collect()
}

fn servers(number: usize) -> Vec<Listener> {
    (0..number)
        .map(|n| Listen::on(&endpoint(n)).open())
        .collect()
}

fn connect(number: usize) -> Vec<TcpStream> {
    tcp::connect_many(at(FRONTEND), number)
}

/// The connections of each server, by the socket table.
fn loads(servers: &mut [Listener]) -> Vec<usize> {
    servers.iter_mut().map(Listener::established).collect()
}

fn group(balancer: &Balancer) -> EndpointGroup {
    let mut placing = balancer.status().placing;
    assert_eq!(placing.len(), 1, "{placing:?}");
    placing.remove(0)
}

/// Waits until `status` has placed on each server what the socket table says; returns that.
#[track_caller]
fn agree(balancer: &Balancer, servers: &mut [Listener]) -> Vec<usize> {
    eventually(SETTLES_WITHIN, || {
        let loads = loads(servers);
        let group = group(balancer);
        for (server, load) in servers.iter().zip(&loads) {
            let placed = group.endpoint(server.addr()).established;
            ensure!(
                placed == *load as u64,
                "{group:#?}, in the socket table {loads:?}"
            );
        }
        let in_flight: u64 = group.endpoints.iter().map(|one| one.in_flight).sum();
        ensure!(in_flight == 0, "{in_flight} in flight");
        Ok(loads)
    })
}

fn spread(loads: &[usize]) -> usize {
    let (most, least) = (loads.iter().max(), loads.iter().min());
    most.expect("a server") - least.expect("a server")
}

/// The links that place, by their pins.
fn links(balancer: &Balancer) -> Vec<String> {
    let version = format!("v{}", balancer_common::abi::VERSION);
    let pins = std::fs::read_dir(balancer.state().join(version)).expect("the state directory");
    let names = pins.map(|pin| {
        pin.expect("a pin")
            .file_name()
            .to_string_lossy()
            .into_owned()
    });
    names
        .filter(|name| name.starts_with("link_place_"))
        .collect()
}

#[test]
fn connects_are_spread_evenly_and_status_shows_it() {
    Machine::with(|machine| {
        let mut servers = servers(4);
        let balancer = Balancer::start(machine, &file(4));
        let clients = connect(41);
        for client in &clients {
            let peer = client.peer_addr().expect("a peer");
            assert_eq!(peer, at(FRONTEND), "the client sees what it connected to");
        }
        let loads = agree(&balancer, &mut servers);
        assert!(spread(&loads) <= 1, "{loads:?}");
        assert_eq!(loads.iter().sum::<usize>(), 41);
        let beside = tcp::connect(endpoint(0)).connected();
        assert_eq!(beside.peer_addr().expect("a peer"), endpoint(0));
        let group = group(&balancer);
        assert_eq!(group.frontends, [at(FRONTEND)]);
        assert_eq!(group.verdicts["placed"], 41, "{group:?}");
        let text = balancer.must(&["status"]);
        for words in [
            "agents: connects to 127.0.0.9:11800",
            "by the connections of this node alone",
            "127.0.0.14:11800  active",
            "41  placed  sent to the endpoint that should have it",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
        assert!(
            text.lines().all(|line| line.chars().count() <= 80),
            "{text}"
        );
        let metrics = balancer.must(&["metrics"]);
        let line = "balancer_place_placed_total{group=\"agents\",endpoint=\"127.0.0.11:11800\"} ";
        assert!(metrics.contains(line), "{metrics}");
        drop((clients, beside));
        agree(&balancer, &mut servers);
    });
}

#[test]
fn weights_are_shares() {
    Machine::with(|machine| {
        let mut servers = servers(3);
        let mut endpoints = quoted(3);
        endpoints[0] = format!("{{address: {}, weight: 2}}", endpoints[0]);
        let balancer = Balancer::start(machine, &file_of(&endpoints));
        let clients = connect(40);
        assert_eq!(agree(&balancer, &mut servers), [20, 10, 10]);
        balancer.configure(&file(3));
        balancer.reload();
        eventually(SETTLES_WITHIN, || {
            let weight = group(&balancer).endpoint(endpoint(0)).weight;
            ensure!(weight == 1, "weight {weight}");
            Ok(())
        });
        let more = connect(20);
        assert_eq!(agree(&balancer, &mut servers), [20, 20, 20]);
        drop((clients, more));
    });
}

#[test]
fn a_dead_server_is_avoided_and_gets_its_share_when_it_is_back() {
    Machine::with(|machine| {
        let mut servers = servers(4);
        let balancer = Balancer::start(machine, &file(4));
        let dead = servers.remove(1);
        drop(dead.close());
        let outcomes: Vec<_> = (0..30).map(|_| tcp::connect(at(FRONTEND))).collect();
        let refused = outcomes.iter().filter(|one| one.is_refused()).count();
        assert!((1..=3).contains(&refused), "{refused} of 30 were refused");
        let mut clients: Vec<_> = outcomes.into_iter().filter_map(tcp::Outcome::ok).collect();
        assert_eq!(clients.len(), 30 - refused);
        let others = agree(&balancer, &mut servers);
        assert!(spread(&others) <= 1, "{others:?}");
        let failed = group(&balancer).endpoint(endpoint(1)).failed;
        assert_eq!(failed, refused as u64);
        servers.insert(1, Listen::on(&endpoint(1)).open());
        eventually(SETTLES_WITHIN, || {
            let avoided = group(&balancer).endpoint(endpoint(1)).avoided.is_some();
            ensure!(!avoided, "it is still avoided");
            Ok(())
        });
        clients.extend(connect(14));
        let loads = agree(&balancer, &mut servers);
        assert!(spread(&loads) <= 1, "{loads:?}");
        drop(clients);
    });
}

#[test]
fn who_is_avoided_is_shown_with_the_reason() {
    Machine::with(|machine| {
        let _servers = servers(2);
        let balancer = Balancer::start(machine, &file(3));
        // It is avoided for a second, and longer each time.
        let avoided = eventually(SETTLES_WITHIN, || {
            let _tried: Vec<_> = (0..3).map(|_| tcp::connect(at(FRONTEND))).collect();
            let group = group(&balancer);
            let avoided = group.endpoint(endpoint(2)).avoided.clone();
            avoided.with_context(|| format!("it is not avoided: {group:?}"))
        });
        assert!(avoided.reason.contains("refused"), "{avoided:?}");
        assert!(avoided.since_ms + avoided.for_ms <= 30_001, "{avoided:?}");
    });
}

#[test]
fn a_reload_adds_and_removes_endpoints_without_losing_counts() {
    Machine::with(|machine| {
        let mut servers = servers(4);
        let balancer = Balancer::start(machine, &file(3));
        let mut clients = connect(30);
        assert_eq!(agree(&balancer, &mut servers[..3]), [10, 10, 10]);
        balancer.configure(&file(4));
        balancer.must(&["reload"]);
        clients.extend(connect(10));
        assert_eq!(agree(&balancer, &mut servers), [10, 10, 10, 10]);
        balancer.configure(&file(2));
        balancer.must(&["reload"]);
        clients.extend(connect(4));
        assert_eq!(agree(&balancer, &mut servers), [12, 12, 10, 10]);
        let group_now = group(&balancer);
        assert!(group_now.endpoint(endpoint(3)).leaving, "{group_now:?}");
        assert!(balancer.must(&["status"]).contains("is removed"));
        drop(clients);
        for server in &mut servers {
            server.established();
        }
        eventually(SETTLES_WITHIN, || {
            let left = group(&balancer).endpoints.len();
            ensure!(left == 2, "{left} endpoints");
            Ok(())
        });
    });
}

#[test]
fn what_was_placed_outlives_the_daemon() {
    Machine::with(|machine| {
        let mut servers = servers(3);
        let mut balancer = Balancer::start(machine, &file(3));
        let mut clients = connect(30);
        agree(&balancer, &mut servers);
        balancer.stop(Signal::SIGKILL);
        clients.truncate(17);
        clients.extend(connect(4));
        agree(&balancer, &mut servers);
        balancer.launch();
        let loads = agree(&balancer, &mut servers);
        assert_eq!(loads.iter().sum::<usize>(), 21);
        clients.extend(connect(9));
        let loads = agree(&balancer, &mut servers);
        assert!(spread(&loads) <= 1, "{loads:?}");
        let group = group(&balancer);
        assert_eq!(group.endpoints.len(), 3, "each is known again: {group:?}");
        assert_eq!(group.verdicts["placed"], 43, "{group:?}");
        drop(clients);
    });
}

#[test]
fn without_a_daemon_connects_are_left_as_they_are_after_a_while() {
    Machine::with(|machine| {
        let servers = servers(2);
        let yaml = file(2) + "fail_open_after: 1s\n";
        let mut balancer = Balancer::start(machine, &yaml);
        balancer.stop(Signal::SIGKILL);
        std::thread::sleep(patiently(Duration::from_millis(1_200)));
        assert!(
            tcp::connect(at(FRONTEND)).is_refused(),
            "nobody listens there"
        );
        let group = group(&balancer);
        assert_eq!(group.verdicts["fail-open-stale"], 1, "{group:?}");
        drop(servers);
    });
}

#[test]
fn a_file_without_connect_detaches_and_unload_leaves_nothing() {
    Machine::with(|machine| {
        let mut servers = servers(2);
        let balancer = Balancer::start(machine, &file(2));
        let clients = connect(4);
        assert_eq!(links(&balancer).len(), 4);
        balancer.configure("services: [{name: other, port: 11900}]");
        balancer.must(&["reload"]);
        assert_eq!(links(&balancer), [""; 0]);
        assert!(tcp::connect(at(FRONTEND)).is_refused());
        assert_eq!(agree(&balancer, &mut servers), [2, 2], "still counted");
        drop(clients);
        for server in &mut servers {
            server.established();
        }
        eventually(SETTLES_WITHIN, || {
            let left = balancer.status().placing;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        });
        balancer.configure(&file(2));
        balancer.must(&["reload"]);
        assert_eq!(links(&balancer).len(), 4);
        let clients = connect(4);
        agree(&balancer, &mut servers);
        balancer.must(&["unload"]);
        assert!(!balancer.is_loaded());
        assert!(tcp::connect(at(FRONTEND)).is_refused());
        drop(clients);
    });
}

#[test]
fn explain_says_which_endpoint_the_next_connect_gets() {
    Machine::with(|machine| {
        let _servers = servers(3);
        let balancer = Balancer::start(machine, &file(3));
        let pid = std::process::id().to_string();
        let mut clients = connect(7);
        for from in ["127.0.0.1", "127.0.0.1:40001"].into_iter().cycle().take(9) {
            let asked = ["explain", "--from", from, "--to", FRONTEND, "-o", "json"];
            let json = balancer.must(&asked);
            let said: serde_json::Value = serde_json::from_str(&json).expect("JSON");
            assert_eq!(said["reason"], "placed", "{json}");
            assert_eq!(
                said["candidates"].as_array().map(Vec::len),
                Some(3),
                "{json}"
            );
            let totals = |group: &EndpointGroup| -> Vec<u64> {
                group.endpoints.iter().map(|one| one.total).collect()
            };
            let before = group(&balancer);
            clients.extend(connect(1));
            let after = group(&balancer);
            let (before_all, after_all) = (totals(&before), totals(&after));
            let went = (0..3).find(|n| before_all[*n] != after_all[*n]);
            let went = &after.endpoints[went.expect("it went somewhere")].name;
            assert_eq!(said["endpoint"]["name"], went.as_str(), "{json}");
        }
        let text = balancer.must(&["explain", "--from", "127.0.0.1", "--to", FRONTEND]);
        for words in [
            "it goes to 127.0.0.1",
            "group    agents",
            "CANDIDATE",
            "connections of this node",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
        let other = balancer.must(&["explain", "--from", &pid, "--to", "127.0.0.9:11801"]);
        assert!(other.contains("is no frontend"), "{other}");
        let finished = balancer.verb(&["explain", "--from", &pid, "--to", "11800"]);
        assert_eq!(finished.code, 2, "{}", finished.stderr);
        let gone = balancer.verb(&["explain", "--from", "4194303", "--to", FRONTEND]);
        assert!(
            gone.stderr.contains("there is no process 4194303"),
            "{}",
            gone.stderr
        );
    });
}

#[test]
fn explain_names_a_sidecar() {
    Machine::with(|machine| {
        let _servers = servers(2);
        let balancer = Balancer::start(machine, &file(2));
        let _sidecar = Listen::on("127.0.0.1:15001").open();
        let text = balancer.must(&["explain", "--from", "127.0.0.1", "--to", FRONTEND]);
        assert!(text.contains("sidecar: a sidecar captures"), "{text}");
        assert!(tcp::connect(at(FRONTEND)).is_refused());
        let verdicts = group(&balancer).verdicts;
        assert_eq!(verdicts["sidecar"], 1, "{verdicts:?}");
    });
}
