//! Which addresses there may be at either end of `connect:`: IPv6, IPv4 over IPv6 sockets, and the
//! endpoints' own.

use std::net::{SocketAddr, TcpStream};

use serde_json::Value;
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Machine, Netns};

use super::{agree, endpoint, group, loads, quoted, servers, spread};
use crate::support::at;

/// What clients connect to; no route leads to either.
const FRONTENDS: [&str; 2] = ["10.9.0.9:11800", "[fd00:9::9]:11800"];
/// The IPv4 one as Java has it.
const MAPPED: &str = "[::ffff:10.9.0.9]:11800";
/// Endpoints, IPv4 first.
const ENDPOINTS: [&str; 5] = [
    "10.9.0.11:11800",
    "10.9.0.12:11800",
    "[fd00:9::11]:11800",
    "[fd00:9::12]:11800",
    "[fd00:9::13]:11800",
];

fn file(to: &[&str], endpoints: &[&str]) -> String {
    format!("services: [{{name: agents, connect: {{to: {to:?}, endpoints: {endpoints:?}}}}}]")
}

/// Servers at addresses that the machine gets.
fn open(machine: &Machine, endpoints: &[&str]) -> Vec<Listener> {
    let open = |to: &&str| {
        machine.netns.add_address(at(to).ip());
        Listen::on(to).open()
    };
    endpoints.iter().map(open).collect()
}

fn explain(balancer: &Balancer, from: &str, to: &str) -> Value {
    let json = balancer.must(&["explain", "--from", from, "--to", to, "-o", "json"]);
    serde_json::from_str(&json).expect("JSON")
}

#[test]
fn each_family_stays_in_its_own_and_is_spread_evenly_there() {
    Machine::with(|machine| {
        let mut servers = open(machine, &ENDPOINTS);
        let balancer = Balancer::start(machine, &file(&FRONTENDS, &ENDPOINTS));
        let mut clients = tcp::connect_many(at(FRONTENDS[1]), 9);
        assert_eq!(agree(&balancer, &mut servers), [0, 0, 3, 3, 3]);
        clients.extend(tcp::connect_many(at(FRONTENDS[0]), 4));
        clients.extend(tcp::connect_many(at(MAPPED), 4));
        assert_eq!(agree(&balancer, &mut servers), [4, 4, 3, 3, 3]);
        let shown = |client: &TcpStream| client.peer_addr().expect("connected");
        assert_eq!(shown(&clients[0]), at(FRONTENDS[1]));
        assert_eq!(shown(&clients[9]), at(FRONTENDS[0]));
        assert_eq!(shown(&clients[13]), at(MAPPED));

        let group = group(&balancer);
        assert_eq!(group.frontends, FRONTENDS.map(at));
        assert_eq!(group.endpoint(at(ENDPOINTS[4])).name, ENDPOINTS[4]);
        for (from, to, family) in [
            ("::1", FRONTENDS[1], 2..5),
            ("127.0.0.1", FRONTENDS[0], 0..2),
        ] {
            let said = explain(&balancer, from, to);
            assert_eq!(said["reason"], "placed", "{said}");
            let address = said["endpoint"]["address"].as_str().expect("an endpoint");
            assert!(ENDPOINTS[family.clone()].contains(&address), "{said}");
            let candidates = said["candidates"].as_array().map(Vec::len);
            assert_eq!(candidates, Some(family.len()), "{said}");
        }
        let metrics = balancer.must(&["metrics"]);
        let line = r#"balancer_place_placed_total{group="agents",endpoint="[fd00:9::13]:11800"} 3"#;
        assert!(metrics.contains(line), "{metrics}");
        drop(clients);
        agree(&balancer, &mut servers);
    });
}

/// As where two container runtimes give out the same addresses.
#[test]
fn explain_says_that_several_network_namespaces_have_the_clients_address() {
    Machine::with(|machine| {
        let _servers = open(machine, &ENDPOINTS);
        let balancer = Balancer::start(machine, &file(&FRONTENDS, &ENDPOINTS));
        let client = "10.9.77.1";
        let [first, second] = [(); 2].map(|()| Netns::new());
        for netns in [&first, &second] {
            netns.add_address(client.parse().expect("an address"));
        }
        let said = || {
            let said = explain(&balancer, client, FRONTENDS[0]);
            said["sentence"].as_str().expect("text").to_owned()
        };
        let nobody = said();
        assert!(nobody.contains("No network namespace of"), "{nobody}");
        let one = first.run(said);
        assert!(!one.contains("network namespace"), "{one}");
        let both = first.run(|| second.run(said));
        assert!(both.contains("(1 more)"), "{both}");
    });
}

/// As the agents of a host where there is nothing but IPv6; one endpoint does not answer.
#[test]
fn an_endpoint_of_ipv6_that_refuses_is_avoided() {
    Machine::with(|machine| {
        let endpoints = &ENDPOINTS[2..];
        let mut servers = open(machine, endpoints);
        let balancer = Balancer::start(machine, &file(&FRONTENDS[1..], endpoints));
        drop(servers.remove(2).close());
        let outcomes: Vec<_> = (0..20).map(|_| tcp::connect(at(FRONTENDS[1]))).collect();
        let refused = outcomes.iter().filter(|one| one.is_refused()).count();
        assert!((1..=3).contains(&refused), "{refused} of 20 were refused");
        let clients: Vec<_> = outcomes.into_iter().filter_map(tcp::Outcome::ok).collect();
        assert_eq!(clients.len(), 20 - refused);
        let loads = agree(&balancer, &mut servers);
        assert!(spread(&loads) <= 1, "{loads:?}");
        let failed = group(&balancer).endpoint(at(endpoints[2])).failed;
        assert_eq!(failed, refused as u64);
    });
}

/// As an agent lists several OAPs: whichever it takes it gets the one that should have it, and that
/// may be the same.
#[test]
fn what_clients_connect_to_may_be_the_endpoints_themselves() {
    Machine::with(|machine| {
        let mut servers = servers(3);
        let own: Vec<String> = quoted(3);
        let own = own.join(", ");
        let file =
            format!("services: [{{name: agents, connect: {{to: [{own}], endpoints: [{own}]}}}}]");
        let balancer = Balancer::start(machine, &file);
        let mut clients = tcp::connect_many(endpoint(0), 12);
        assert_eq!(agree(&balancer, &mut servers), [4, 4, 4]);
        clients.extend(tcp::connect_many(endpoint(2), 9));
        assert_eq!(agree(&balancer, &mut servers), [7, 7, 7]);
        let seen: Vec<SocketAddr> = clients
            .iter()
            .map(|client| client.peer_addr().expect("connected"))
            .collect();
        assert!(
            seen[..12].iter().all(|peer| *peer == endpoint(0)),
            "{seen:?}"
        );
        assert!(
            seen[12..].iter().all(|peer| *peer == endpoint(2)),
            "{seen:?}"
        );
        let group = group(&balancer);
        assert_eq!(group.verdicts["placed"], 21, "{group:?}");
        let to = endpoint(0).to_string();
        assert_eq!(explain(&balancer, "127.0.0.1", &to)["reason"], "placed");
        // A listed one that is down costs nobody anything once it is known.
        drop(servers.remove(0).close());
        let outcomes: Vec<_> = (0..20).map(|_| tcp::connect(endpoint(0))).collect();
        let refused = outcomes.iter().filter(|one| one.is_refused()).count();
        assert!((1..=3).contains(&refused), "{refused} of 20 were refused");
        drop((clients, outcomes));
        assert_eq!(loads(&mut servers), [0, 0]);
    });
}
