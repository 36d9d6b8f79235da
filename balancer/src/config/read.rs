//! From located YAML to a valid [`Config`].

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use balancer_common::Policy;
use ipnet::{IpNet, Ipv4Net};

use super::{
    Backend, Config, ConfigError, DEFAULT_FAIL_OPEN_AFTER, DEFAULT_MIN_QUOTA, MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_CLIENT, MAX_EXEMPT, MAX_HEADROOM_PERCENT, MAX_NAME_BYTES,
    MAX_SERVICE_BACKENDS, MAX_SERVICES, MAX_WEIGHT, Namespaces, QuotaRule, Service,
    error::at_line,
    fields::{Fields, Result, decimal, list, number, scalar},
    together::{Located, check_together},
    yaml::{self, Node, Value, shown},
};

const SMALLEST: &str = "start with\n  services:\n    - name: agents\n      port: 11800";

pub(super) fn config(text: &str) -> Result<Config> {
    let Some(root) = yaml::parse(text)? else {
        return Err(ConfigError::new("there are no settings in it", SMALLEST));
    };
    let file = Fields::of(
        &root,
        "the file",
        &["services", "fail_open_after", "namespaces"],
    )?;
    let services = located_services(file.required("services")?)?;
    check_together(&services)?;
    Ok(Config {
        services: services
            .into_iter()
            .map(|service| service.service)
            .collect(),
        fail_open_after: file
            .optional("fail_open_after", fail_open_after)?
            .unwrap_or(DEFAULT_FAIL_OPEN_AFTER),
        namespaces: file
            .optional("namespaces", namespaces)?
            .unwrap_or(Namespaces::Own),
        kubernetes: None,
    })
}

fn located_services(node: &Node) -> Result<Vec<Located>> {
    let nodes = list(node, "`services`", "- name: agents")?;
    if nodes.is_empty() {
        return Err(at_line(
            node.line,
            "`services` is empty: nothing to balance",
            SMALLEST,
        ));
    }
    if nodes.len() > MAX_SERVICES {
        return Err(at_line(
            nodes[MAX_SERVICES].line,
            format!(
                "{} services, at most {MAX_SERVICES} are possible",
                nodes.len()
            ),
            "remove some, or run several daemons with a --state-dir each",
        ));
    }
    nodes.iter().map(service).collect()
}

fn service(node: &Node) -> Result<Located> {
    let fields = Fields::of(
        node,
        "a service",
        &[
            "name", "port", "address", "policy", "backends", "quota", "exempt",
        ],
    )?;
    let name = fields.required("name")?;
    let port_node = fields.required("port")?;
    let backends = fields.optional("backends", backends)?;
    let (backends, backend_lines) = match backends {
        Some((backends, lines)) => (Some(backends), lines),
        None => (None, Vec::new()),
    };
    Ok(Located {
        name_line: name.line,
        port_line: port_node.line,
        backend_lines,
        service: Service {
            name: service_name(name)?,
            port: port(port_node)?,
            address: fields.optional("address", service_address)?,
            policy: fields
                .optional("policy", policy)?
                .unwrap_or(Policy::LeastConnections),
            backends,
            quota: fields
                .optional("quota", quota)?
                .unwrap_or(QuotaRule::Unlimited),
            exempt: fields.optional("exempt", exempt)?.unwrap_or_default(),
        },
    })
}

fn service_name(node: &Node) -> Result<String> {
    const ADVICE: &str = "use up to 63 of a-z, 0-9 and -, the first and the last not a -";
    let name = scalar(node, "a name", "agents")?;
    let wrong = |problem: String| Err(at_line(node.line, problem, ADVICE));
    if name.is_empty() {
        return wrong("the name is empty".to_owned());
    }
    if name.len() > MAX_NAME_BYTES {
        return wrong(format!(
            "the name `{}` is {} bytes long",
            shown(name),
            name.len()
        ));
    }
    if let Some(bad) = name
        .chars()
        .find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-'))
    {
        return wrong(format!(
            "the name `{}` has `{}` in it",
            shown(name),
            shown(&bad.to_string())
        ));
    }
    if name.starts_with('-') || name.ends_with('-') {
        return wrong(format!(
            "the name `{}` starts or ends with a -",
            shown(name)
        ));
    }
    Ok(name.to_owned())
}

fn port(node: &Node) -> Result<u16> {
    let text = scalar(node, "a port", "11800")?;
    decimal(text)
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port != 0)
        .ok_or_else(|| {
            at_line(
                node.line,
                format!("`{}` is not a TCP port", shown(text)),
                "write a number from 1 to 65535",
            )
        })
}

fn service_address(node: &Node) -> Result<IpAddr> {
    let text = scalar(node, "an address", "10.0.0.9")?;
    let wrong = |problem: &str, advice: &str| {
        at_line(node.line, format!("`{}` {problem}", shown(text)), advice)
    };
    let address = text.parse::<IpAddr>().map_err(|_| {
        wrong(
            "is not an IP address",
            "write an IPv4 or IPv6 address without a port (names are not resolved), or leave `address` out for any",
        )
    })?;
    let address = address.to_canonical();
    if address.is_unspecified() {
        return Err(wrong(
            "is no address of its own",
            "leave `address` out for any address",
        ));
    }
    if unreachable(address) {
        return Err(wrong(
            "can't be connected to over TCP",
            "write a unicast address",
        ));
    }
    Ok(address)
}

fn policy(node: &Node) -> Result<Policy> {
    let text = scalar(node, "a policy", "least-connections")?;
    Policy::ALL
        .into_iter()
        .find(|policy| policy.name() == text)
        .ok_or_else(|| {
            let known: Vec<&str> = Policy::ALL.into_iter().map(Policy::name).collect();
            at_line(
                node.line,
                format!("`{}` is not a policy", shown(text)),
                format!("write one of {}", known.join(", ")),
            )
        })
}

fn backends(node: &Node) -> Result<(Vec<Backend>, Vec<usize>)> {
    let nodes = list(node, "`backends`", "[\"127.0.0.1:21801\"]")?;
    if nodes.is_empty() {
        return Err(at_line(
            node.line,
            "`backends` is an empty list: nobody could take a connection",
            "list at least one address, or leave `backends` out to use every listener on the port itself",
        ));
    }
    if nodes.len() > MAX_SERVICE_BACKENDS {
        return Err(at_line(
            nodes[MAX_SERVICE_BACKENDS].line,
            format!(
                "{} backends, a service can have at most {MAX_SERVICE_BACKENDS}",
                nodes.len()
            ),
            "remove some, or split the service",
        ));
    }
    let backends = nodes.iter().map(backend).collect::<Result<_>>()?;
    Ok((backends, nodes.iter().map(|node| node.line).collect()))
}

fn backend(node: &Node) -> Result<Backend> {
    match &*node.value {
        Value::Map(_) => {
            let fields = Fields::of(node, "a backend", &["address", "weight"])?;
            Ok(Backend {
                address: backend_address(fields.required("address")?)?,
                weight: fields.optional("weight", weight)?.unwrap_or(1),
            })
        }
        Value::List(_) => Err(at_line(
            node.line,
            "a backend is an address, this is a list",
            "write \"127.0.0.1:21801\"; an IPv6 address needs the quotes: \"[::1]:21801\"",
        )),
        _ => Ok(Backend {
            address: backend_address(node)?,
            weight: 1,
        }),
    }
}

fn backend_address(node: &Node) -> Result<SocketAddr> {
    let text = scalar(node, "a backend", "\"127.0.0.1:21801\"")?;
    let wrong = |problem: &str, advice: &str| {
        Err(at_line(
            node.line,
            format!("the backend `{}` {problem}", shown(text)),
            advice,
        ))
    };
    let Ok(address) = text.parse::<SocketAddr>() else {
        return match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(_)) => wrong(
                "has no port",
                "write ADDRESS:PORT, for example \"127.0.0.1:21801\"",
            ),
            Ok(IpAddr::V6(_)) => wrong(
                "has no port",
                "write [ADDRESS]:PORT, for example \"[::1]:21801\"",
            ),
            Err(_) => wrong(
                "is not an address with a port",
                "write \"127.0.0.1:21801\" or \"[::1]:21801\" (ports from 1 to 65535; names are not resolved)",
            ),
        };
    };
    if address.port() == 0 {
        return wrong(
            "has port 0, on which nobody listens",
            "write its port, from 1 to 65535",
        );
    }
    if matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0) {
        return wrong(
            "has a scope (%)",
            "leave the scope out: a backend is known by its address alone",
        );
    }
    let ip = address.ip().to_canonical();
    if ip.is_unspecified() {
        return wrong(
            "is no address of its own",
            "write the address that clients could reach it by, for example 127.0.0.1 for a listener on any address",
        );
    }
    if unreachable(ip) {
        return wrong("can't be listened on over TCP", "write a unicast address");
    }
    Ok(SocketAddr::new(ip, address.port()))
}

/// Whether `address` can't be an end of a TCP connection.
fn unreachable(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V4(v4) if v4.is_broadcast())
}

fn weight(node: &Node) -> Result<u32> {
    number(
        node,
        "weight",
        1,
        MAX_WEIGHT,
        "to take a backend out, remove it from the list",
    )
}

fn quota(node: &Node) -> Result<QuotaRule> {
    const COMPUTED: [&str; 4] = ["clients", "connections_per_client", "headroom", "min_quota"];
    let fields = Fields::of(
        node,
        "`quota`",
        &[
            "per_backend",
            "clients",
            "connections_per_client",
            "headroom",
            "min_quota",
        ],
    )?;
    if fields.entries.is_empty() {
        return Err(at_line(
            node.line,
            "`quota` has no settings",
            "write `per_backend: N` or `clients: N` in it, or leave `quota` out for no limit",
        ));
    }
    if let Some(fixed) = fields.get("per_backend") {
        if let Some(other) = fields
            .entries
            .iter()
            .find(|entry| COMPUTED.contains(&entry.key.as_str()))
        {
            return Err(at_line(
                other.line,
                format!(
                    "`{}` beside `per_backend`: a quota is either fixed or computed",
                    other.key
                ),
                "keep `per_backend` for a fixed quota, or the other keys for a computed one",
            ));
        }
        let advice = "to close a backend use `balancer quota set`; for no limit leave `quota` out";
        return Ok(QuotaRule::Fixed(number(
            fixed,
            "per_backend",
            1,
            MAX_CONNECTIONS,
            advice,
        )?));
    }
    let clients = |node: &Node| {
        number(
            node,
            "clients",
            1,
            MAX_CONNECTIONS,
            "leave `quota` out for no limit",
        )
    };
    let per_client = |node: &Node| {
        number(
            node,
            "connections_per_client",
            1,
            MAX_CONNECTIONS_PER_CLIENT,
            "a Java or Python agent opens 1",
        )
    };
    let min_quota =
        |node: &Node| number(node, "min_quota", 1, MAX_CONNECTIONS, "leave it out for 16");
    Ok(QuotaRule::Computed {
        clients: fields.optional("clients", clients)?,
        connections_per_client: fields
            .optional("connections_per_client", per_client)?
            .unwrap_or(1),
        headroom_percent: fields.optional("headroom", headroom)?.unwrap_or(0),
        min_quota: fields
            .optional("min_quota", min_quota)?
            .unwrap_or(DEFAULT_MIN_QUOTA),
    })
}

fn headroom(node: &Node) -> Result<u32> {
    let text = scalar(node, "headroom", "15%")?;
    let percent = text
        .strip_suffix('%')
        .and_then(|number| decimal(number.trim_end()));
    if let Some(percent) = percent.and_then(|percent| u32::try_from(percent).ok())
        && percent <= MAX_HEADROOM_PERCENT
    {
        return Ok(percent);
    }
    // "15" could mean 15 % or 15 times as many: ask.
    let advice = match decimal(text) {
        Some(number) if number <= u64::from(MAX_HEADROOM_PERCENT) => {
            format!("write `{number}%` if percent is meant")
        }
        _ => format!(
            "write a whole number of percent from 0% to {MAX_HEADROOM_PERCENT}%, for example 15%"
        ),
    };
    Err(at_line(
        node.line,
        format!("headroom `{}` is not a percentage", shown(text)),
        advice,
    ))
}

fn exempt(node: &Node) -> Result<Vec<IpNet>> {
    let nodes = list(node, "`exempt`", "[10.0.0.0/24]")?;
    if nodes.len() > MAX_EXEMPT {
        return Err(at_line(
            nodes[MAX_EXEMPT].line,
            format!(
                "{} exempt networks, a service can have at most {MAX_EXEMPT}",
                nodes.len()
            ),
            "join neighbours into larger networks",
        ));
    }
    let mut networks = Vec::new();
    for node in nodes {
        let network = network(node)?;
        // The same network twice says the same thing twice: generated lists do that.
        if !networks.contains(&network) {
            networks.push(network);
        }
    }
    Ok(networks)
}

fn network(node: &Node) -> Result<IpNet> {
    let text = scalar(node, "an exempt network", "10.0.0.0/24")?;
    let parsed = text
        .parse::<IpNet>()
        .or_else(|error| text.parse::<IpAddr>().map(IpNet::from).map_err(|_| error));
    let Ok(network) = parsed else {
        return Err(at_line(
            node.line,
            format!("`{}` is not a network", shown(text)),
            "write it as 10.0.0.0/24 or fd00::/8, or a single address as 10.0.0.5",
        ));
    };
    if network.addr() != network.network() {
        return Err(at_line(
            node.line,
            format!("`{}` has address bits beyond its mask", shown(text)),
            format!(
                "write {} for the network or {} for the single address",
                network.trunc(),
                network.addr()
            ),
        ));
    }
    Ok(unmapped(network))
}

/// An IPv4-mapped network as the IPv4 network that it is: IPv4 clients come as IPv4, also to a dual-stack listener.
fn unmapped(network: IpNet) -> IpNet {
    const MAPPED_BITS: u8 = 96;
    let mapped = |v6: Ipv6Addr| v6.to_ipv4_mapped();
    match network {
        IpNet::V6(v6) if v6.prefix_len() >= MAPPED_BITS => mapped(v6.addr())
            .and_then(|v4| Ipv4Net::new(v4, v6.prefix_len() - MAPPED_BITS).ok())
            .map_or(network, IpNet::V4),
        _ => network,
    }
}

fn fail_open_after(node: &Node) -> Result<Duration> {
    const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
    const BOUNDS: std::ops::RangeInclusive<u64> = 1000..=3_600_000;
    let text = scalar(node, "fail_open_after", "30s")?;
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = UNITS
        .iter()
        .find(|(unit, _)| *unit == &text[digits.len()..]);
    let milliseconds = unit.and_then(|(_, scale)| decimal(digits.trim_end())?.checked_mul(*scale));
    let Some(milliseconds) = milliseconds else {
        return Err(at_line(
            node.line,
            format!("fail_open_after `{}` is not a time", shown(text)),
            "write a whole number with a unit, from 1s to 1h, for example 30s or 2m",
        ));
    };
    if !BOUNDS.contains(&milliseconds) {
        return Err(at_line(
            node.line,
            format!("fail_open_after `{}` is out of bounds", shown(text)),
            "write a time from 1s (shorter, and a busy machine alone would lift every quota) to 1h (longer, and a dead daemon's quotas would refuse clients for hours)",
        ));
    }
    Ok(Duration::from_millis(milliseconds))
}

fn namespaces(node: &Node) -> Result<Namespaces> {
    const ADVICE: &str = "write own, all, or a list of absolute paths such as [/run/netns/blue]";
    let nodes = match &*node.value {
        Value::Scalar(word) if word == "own" => return Ok(Namespaces::Own),
        Value::Scalar(word) if word == "all" => return Ok(Namespaces::All),
        Value::List(nodes) if !nodes.is_empty() => nodes,
        Value::List(_) => {
            return Err(at_line(
                node.line,
                "`namespaces` is an empty list: nothing would be guarded",
                ADVICE,
            ));
        }
        Value::Scalar(word) => {
            return Err(at_line(
                node.line,
                format!("namespaces `{}` is not understood", shown(word)),
                ADVICE,
            ));
        }
        other => {
            return Err(at_line(
                node.line,
                format!("`namespaces` is {}", other.kind()),
                ADVICE,
            ));
        }
    };
    let mut paths = Vec::new();
    let mut seen = HashSet::new();
    for node in nodes {
        let path = PathBuf::from(scalar(node, "a namespace", "/run/netns/blue")?);
        if !path.is_absolute() {
            return Err(at_line(
                node.line,
                format!(
                    "the namespace `{}` is not an absolute path",
                    shown(&path.to_string_lossy())
                ),
                "write /run/netns/NAME or /proc/PID/ns/net",
            ));
        }
        if !seen.insert(path.clone()) {
            return Err(at_line(
                node.line,
                format!(
                    "the namespace `{}` is listed twice",
                    shown(&path.to_string_lossy())
                ),
                "keep one of the two",
            ));
        }
        paths.push(path);
    }
    Ok(Namespaces::Paths(paths))
}
