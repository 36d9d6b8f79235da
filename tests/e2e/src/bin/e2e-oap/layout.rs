//! Who has which address in the run's netns.
//!
//! A connection to an address of the own machine has this address as its source too. So what goes
//! to an OAP's own address, which only the other OAPs do, comes from [`PEERS`] and is exempt; what
//! goes to the virtual address is not.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// How many OAP servers there are.
pub const NODES: usize = 3;
/// Where agents and Envoy connect to. Nothing listens on the services' ports here.
pub const VIRTUAL: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 11, 1, 1));
/// Addresses of the OAPs, which are exempt for each other.
pub const PEERS: &str = "10.11.0.0/24";
/// `ZooKeeper`.
pub const ZOOKEEPER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 11, 2, 1)), 2181);
/// Where Envoy serves.
pub const ENVOY: SocketAddr = SocketAddr::new(VIRTUAL, 10080);
/// The port of a node's GraphQL API.
pub const REST_PORT: u16 = 12800;

/// A service of the balancer and what stands behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The service's name in the configuration.
    pub name: &'static str,
    /// The virtual port.
    pub port: u16,
    /// The port of each OAP.
    pub backend_port: u16,
    /// The quota of each OAP in the configuration.
    pub quota: u32,
}

impl Service {
    /// The local ports that an OAP's end of a connection may have: the virtual one where it was
    /// steered.
    pub fn ports(&self) -> [u16; 2] {
        [self.port, self.backend_port]
    }

    /// Where an OAP serves it.
    pub fn backend(&self, index: usize) -> SocketAddr {
        SocketAddr::new(node(index), self.backend_port)
    }
}

/// What agents connect to. The OAPs use its backend port among themselves.
pub const AGENTS: Service = Service {
    name: "agents",
    port: 11800,
    backend_port: 21800,
    quota: 2,
};
/// What Envoy sends its access logs to.
pub const ALS: Service = Service {
    name: "als",
    port: 11802,
    backend_port: 21802,
    quota: 1,
};

/// The address of an OAP, counted from 0.
pub fn node(index: usize) -> IpAddr {
    const { assert!(NODES < 10) };
    let last = u8::try_from(index + 1).expect("fewer than ten nodes");
    Ipv4Addr::new(10, 11, 0, last).into()
}

/// Whether this is the address of an OAP.
pub fn is_peer(address: IpAddr) -> bool {
    (0..NODES).any(|index| node(index) == address)
}

/// All addresses that the netns must have.
pub fn addresses() -> Vec<IpAddr> {
    let mut addresses: Vec<_> = (0..NODES).map(node).collect();
    addresses.extend([VIRTUAL, ZOOKEEPER.ip()]);
    addresses
}

/// The daemon's configuration.
pub fn configuration() -> String {
    let services: String = [AGENTS, ALS].map(service).concat();
    format!("services:\n{services}")
}

/// The same, and connections move where OAPs have an uneven number of them.
pub fn evened_out() -> String {
    configuration().replace("rebalance: off", "rebalance: on")
}

/// The same with a service of its own for each OAP: an agent that knows all of them has to go on by
/// itself from one that refuses it.
pub fn one_by_one() -> String {
    let one = |index: usize| {
        let backend = [AGENTS.backend(index)];
        entry(
            &name_of_one(index),
            port_of_one(index),
            &backend,
            AGENTS.quota,
        )
    };
    let services: String = (0..NODES).map(one).collect();
    format!("services:\n{services}")
}

/// What the service of one OAP is called.
pub fn name_of_one(index: usize) -> String {
    format!("{}-{}", AGENTS.name, index + 1)
}

fn port_of_one(index: usize) -> u16 {
    AGENTS.port + 11 + u16::try_from(index).expect("a few")
}

/// What an agent is told that reports through the one virtual port.
pub fn one_address() -> String {
    format!("{VIRTUAL}:{}", AGENTS.port)
}

/// What an agent is told that chooses by itself.
pub fn three_addresses() -> String {
    let one = |index| format!("{VIRTUAL}:{}", port_of_one(index));
    let addresses: Vec<_> = (0..NODES).map(one).collect();
    addresses.join(",")
}

fn service(service: Service) -> String {
    let backends: Vec<_> = (0..NODES).map(|index| service.backend(index)).collect();
    entry(service.name, service.port, &backends, service.quota)
}

fn entry(name: &str, port: u16, backends: &[SocketAddr], quota: u32) -> String {
    let backends: Vec<_> = backends.iter().map(|at| format!("\"{at}\"")).collect();
    format!(
        "  - name: {}\n    port: {}\n    policy: least-connections\n    backends: [{}]\n    quota: {{per_backend: {}}}\n    exempt: [{PEERS}]\n    rebalance: off\n",
        name,
        port,
        backends.join(", "),
        quota,
    )
}
