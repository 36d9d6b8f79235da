//! From located YAML to a valid [`Config`].

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use balancer_common::Policy;

use super::{
    Backend, Config, ConfigError, DEFAULT_FAIL_OPEN_AFTER, DEFAULT_MIN_QUOTA, MAX_SERVICE_BACKENDS,
    MAX_WEIGHT, NetnsScope, QuotaRule, Service,
    conflicts::{Located, check_conflicts},
    error::at_line,
    fields::{Fields, Result, list, number, scalar},
    read_kubernetes::kubernetes,
    values::{
        Time, clients, entries, exempt, headroom, min_quota, nothing_computed, per_backend,
        per_client, policy, port, service_name,
    },
    yaml::{self, Entry, Node, Value, shown},
};

const SMALLEST: &str = "start with\n  services:\n    - name: agents\n      port: 11800";

pub(super) fn config(text: &str) -> Result<Config> {
    let Some(root) = yaml::parse(text)? else {
        return Err(ConfigError::new("there are no settings in it", SMALLEST));
    };
    let file = Fields::of(
        &root,
        "the file",
        &["services", "kubernetes", "fail_open_after", "namespaces"],
    )?;
    let kubernetes = match file.get("kubernetes") {
        Some(node) => {
            nothing_of_this_machine(&file)?;
            Some(kubernetes(node)?)
        }
        None => None,
    };
    let services = match (&kubernetes, file.get("services")) {
        (_, Some(node)) => located_services(node)?,
        (Some(_), None) => Vec::new(),
        (None, None) => {
            return Err(at_line(
                root.line,
                "`services` is missing in the file, and so is `kubernetes`",
                "add `services: …`, or `kubernetes: …` to balance the pods of a cluster",
            ));
        }
    };
    check_conflicts(&services)?;
    Ok(Config {
        services: services
            .into_iter()
            .map(|service| service.service)
            .collect(),
        fail_open_after: file
            .optional("fail_open_after", |node| FAIL_OPEN_AFTER.read(node))?
            .unwrap_or(DEFAULT_FAIL_OPEN_AFTER),
        namespaces: match &kubernetes {
            Some(_) => NetnsScope::Pods,
            None => file
                .optional("namespaces", namespaces)?
                .unwrap_or(NetnsScope::Own),
        },
        kubernetes,
    })
}

const FAIL_OPEN_AFTER: Time = Time {
    key: "fail_open_after",
    bounds: 1000..=3_600_000,
    from: "1s",
    to: "1h",
    less: "a busy machine alone would lift every quota",
    more: "a dead daemon's quotas would refuse clients for hours",
    example: "30s or 2m",
};

/// Refuses what says by hand what `kubernetes` finds out.
fn nothing_of_this_machine(file: &Fields) -> Result<()> {
    let advice = |key: &str| match key {
        "services" => {
            "what the cluster's Services are is said in `kubernetes`: move the services there, or run a second daemon with a --state-dir of its own for those of this machine"
        }
        _ => "the pods' namespaces are found: remove it",
    };
    let other = file
        .entries
        .iter()
        .find(|entry| ["services", "namespaces"].contains(&entry.key.as_str()));
    match other {
        Some(Entry { key, line, .. }) => Err(at_line(
            *line,
            format!("`{key}` beside `kubernetes`"),
            advice(key),
        )),
        None => Ok(()),
    }
}

fn located_services(node: &Node) -> Result<Vec<Located>> {
    let nodes = entries(node, SMALLEST)?;
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
        nothing_computed(&fields, &COMPUTED)?;
        return Ok(QuotaRule::Fixed(per_backend(fixed)?));
    }
    Ok(QuotaRule::Computed {
        clients: fields.optional("clients", clients)?,
        connections_per_client: per_client(&fields)?,
        headroom_percent: fields.optional("headroom", headroom)?.unwrap_or(0),
        min_quota: fields
            .optional("min_quota", min_quota)?
            .unwrap_or(DEFAULT_MIN_QUOTA),
    })
}

fn namespaces(node: &Node) -> Result<NetnsScope> {
    const ADVICE: &str = "write own, all, or a list of absolute paths such as [/run/netns/blue]";
    let nodes = match &*node.value {
        Value::Scalar(word) if word == "own" => return Ok(NetnsScope::Own),
        Value::Scalar(word) if word == "all" => return Ok(NetnsScope::All),
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
    Ok(NetnsScope::Paths(paths))
}
