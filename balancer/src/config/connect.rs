//! The key `connect`: where connects of this host go.

use std::{collections::HashMap, net::SocketAddr};

use super::{
    MAX_CONNECT_ENDPOINTS, MAX_CONNECT_ENDPOINTS_IN_ALL, MAX_CONNECT_TO, MAX_CONNECT_TO_IN_ALL,
    MAX_WEIGHT,
    error::Result,
    fields::Fields,
    values::{address_with_port, no_end_of_a_connection},
    yaml::{Node, Value},
};

/// Where clients of this host connect to, and where their connects may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// The name of its service entry.
    pub name: String,
    /// What clients connect to, at least one: no address twice in the file, and none without an
    /// endpoint of its family. Never an IPv4-mapped IPv6 address, as in `endpoints`.
    pub to: Vec<SocketAddr>,
    /// Where their connects may go, at least one, no address twice.
    pub endpoints: Vec<ConnectEndpoint>,
}

/// Where connects may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectEndpoint {
    /// Its address. The same weight wherever it is listed.
    pub address: SocketAddr,
    /// Its share relative to the others, 1 to [`MAX_WEIGHT`]; 1 without a key.
    pub weight: u32,
}

/// What `node`, the value of `connect`, says; `name` is that of its entry.
pub(super) fn connect(node: &Node, name: String) -> Result<Connect> {
    let fields = Fields::of(node, "services.connect")?;
    let connect = Connect {
        name,
        to: fields.required("to", frontends)?,
        endpoints: fields.required("endpoints", endpoints)?,
    };
    check_repeated(&connect, node)?;
    check_families(&connect, node)?;
    check_loopback(&connect, node)?;
    Ok(connect)
}

fn frontends(node: &Node) -> Result<Vec<SocketAddr>> {
    let nodes = items(node, "to", MAX_CONNECT_TO)?;
    let address = |node| end(node, "the address", "to", "10.0.0.9:11800");
    nodes.iter().map(address).collect()
}

fn endpoints(node: &Node) -> Result<Vec<ConnectEndpoint>> {
    let nodes = items(node, "endpoints", MAX_CONNECT_ENDPOINTS)?;
    nodes.iter().map(endpoint).collect()
}

fn items<'a>(node: &'a Node, key: &str, most: usize) -> Result<&'a [Node]> {
    let nodes = node.list(&format!("`{key}`"), "[\"10.0.0.11:11800\"]")?;
    if nodes.is_empty() {
        return node.fail(format!(
            "`{key}` is an empty list: no connect would go anywhere else; list at least one address, or remove `connect`"
        ));
    }
    match nodes.get(most) {
        Some(node) => node.fail(format!(
            "{} addresses in `{key}`, it can have at most {most}; remove some, or split the entry",
            nodes.len()
        )),
        None => Ok(nodes),
    }
}

fn endpoint(node: &Node) -> Result<ConnectEndpoint> {
    let address = |node: &Node| end(node, "the endpoint", "an endpoint", "10.0.0.11:11800");
    match &*node.value {
        Value::Map(_) => {
            let fields = Fields::of(node, "services.connect.endpoints")?;
            let advice = "to take an endpoint out, remove it from the list";
            let weight = |node: &Node| node.number("weight", 1, MAX_WEIGHT, advice);
            Ok(ConnectEndpoint {
                address: fields.required("address", address)?,
                weight: fields.optional("weight", weight)?.unwrap_or(1),
            })
        }
        _ => Ok(ConnectEndpoint {
            address: address(node)?,
            weight: 1,
        }),
    }
}

/// An address with a port that clients can connect to.
fn end(node: &Node, what: &str, kind: &str, example: &str) -> Result<SocketAddr> {
    if matches!(&*node.value, Value::List(_)) {
        return node.fail(format!(
            "{kind} is an address, this is a list; write \"{example}\"; an IPv6 address needs the quotes: \"[fd00::9]:11800\""
        ));
    }
    address_with_port(node, what, example, |ip| {
        if ip.is_unspecified() {
            Some("is no address of its own; write the address that clients connect to")
        } else if no_end_of_a_connection(ip) {
            Some("can't be connected to over TCP; write a unicast address")
        } else {
            None
        }
    })
}

/// The values of a list of `connect`.
fn listed<'a>(node: &'a Node, key: &str) -> &'a [Node] {
    match &*node.at(key).value {
        Value::List(nodes) => nodes,
        _ => &[],
    }
}

fn check_repeated(connect: &Connect, node: &Node) -> Result<()> {
    let mut seen = HashMap::new();
    for (address, node) in connect.to.iter().zip(listed(node, "to")) {
        if let Some(line) = seen.insert(address, node.place.line) {
            return node.fail(format!(
                "the address {address} is listed twice in `to`, first on line {line}; keep one"
            ));
        }
    }
    let mut seen = HashMap::new();
    for (endpoint, node) in connect.endpoints.iter().zip(listed(node, "endpoints")) {
        let address = endpoint.address;
        if let Some(line) = seen.insert(address, node.place.line) {
            return node.fail(format!(
                "the endpoint {address} is listed twice, first on line {line}; keep one, with a `weight` if it should get more"
            ));
        }
    }
    Ok(())
}

/// A connection stays in the address family that the client has chosen.
fn check_families(connect: &Connect, node: &Node) -> Result<()> {
    let addresses = connect.endpoints.iter().map(|one| one.address);
    let addresses: Vec<SocketAddr> = addresses.collect();
    for (frontend, node) in connect.to.iter().zip(listed(node, "to")) {
        if !addresses.iter().any(|one| same_family(one, frontend)) {
            return node.fail(format!(
                "{frontend} has no endpoint of its address family, and a connect stays in its own; list an {} endpoint, or remove it from `to`",
                family(frontend)
            ));
        }
    }
    for (address, node) in addresses.iter().zip(listed(node, "endpoints")) {
        if !connect.to.iter().any(|one| same_family(one, address)) {
            return node.fail(format!(
                "no address in `to` is {}, so no connect would go to {address}; remove the endpoint, or list an {} address in `to`",
                family(address),
                family(address)
            ));
        }
    }
    Ok(())
}

fn same_family(one: &SocketAddr, other: &SocketAddr) -> bool {
    one.is_ipv4() == other.is_ipv4()
}

const fn family(address: &SocketAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// A socket that is bound to the host's own address reaches no loopback address, and the other
/// way round.
fn check_loopback(connect: &Connect, node: &Node) -> Result<()> {
    let remote = |one: &&SocketAddr| !one.ip().is_loopback();
    let Some(remote) = connect.to.iter().find(remote) else {
        return Ok(());
    };
    for (endpoint, node) in connect.endpoints.iter().zip(listed(node, "endpoints")) {
        if endpoint.address.ip().is_loopback() {
            return node.fail(format!(
                "the endpoint {} is a loopback address, and {remote} in `to` is none; write the address that others reach it by, or list loopback addresses alone in `to`",
                endpoint.address
            ));
        }
    }
    Ok(())
}

/// Checks what concerns several entries. `nodes` are the values of `connect` in the file.
pub(super) fn check_connects(connects: &[Connect], nodes: &[Node]) -> Result<()> {
    check_frontends(connects, nodes)?;
    check_weights(connects, nodes)
}

fn check_frontends(connects: &[Connect], nodes: &[Node]) -> Result<()> {
    let mut seen: HashMap<SocketAddr, (&str, usize)> = HashMap::new();
    for (connect, node) in connects.iter().zip(nodes) {
        for (address, node) in connect.to.iter().zip(listed(node, "to")) {
            let before = seen.insert(*address, (&connect.name, node.place.line));
            if let Some((first, line)) = before {
                return node.fail(format!(
                    "{address} is already in `to` of `{first}`, on line {line}; connects to it go to the endpoints of one entry: keep one of the two"
                ));
            }
            if seen.len() > MAX_CONNECT_TO_IN_ALL {
                return node.fail(format!(
                    "more than {MAX_CONNECT_TO_IN_ALL} addresses in the `to` of all entries; remove some"
                ));
            }
        }
    }
    Ok(())
}

fn check_weights(connects: &[Connect], nodes: &[Node]) -> Result<()> {
    let mut seen: HashMap<SocketAddr, (u32, usize)> = HashMap::new();
    for (connect, node) in connects.iter().zip(nodes) {
        for (endpoint, node) in connect.endpoints.iter().zip(listed(node, "endpoints")) {
            let ConnectEndpoint { address, weight } = *endpoint;
            let (other, line) = *seen.entry(address).or_insert((weight, node.place.line));
            if other != weight {
                return node.fail(format!(
                    "the endpoint {address} has weight {weight} here and {other} on line {line}; what it can carry is one number: give it the same weight in both"
                ));
            }
            if seen.len() > MAX_CONNECT_ENDPOINTS_IN_ALL {
                return node.fail(format!(
                    "more than {MAX_CONNECT_ENDPOINTS_IN_ALL} endpoints in all; remove some"
                ));
            }
        }
    }
    Ok(())
}
