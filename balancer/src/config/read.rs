//! From located YAML to a valid [`Config`].

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use super::{
    Backend, Config, ConfigError, DEFAULT_FAIL_OPEN_AFTER, MAX_SERVICE_BACKENDS, MAX_WEIGHT,
    NetnsScope, QuotaRule, Service,
    conflicts::check_services,
    error::Result,
    fields::Fields,
    read_kubernetes::kubernetes,
    values::{
        Time, clients, connections, exempt, headroom, is_on, keepalive, min_quota, per_backend,
        policy, port, quota_fields, service_entries, service_name,
    },
    yaml::{self, Node, Value, shown},
};

const SMALLEST: &str = "start with `services: [{name: agents, port: 11800}]`";

const FAIL_OPEN_AFTER: Time = Time {
    key: "fail_open_after",
    least: 1000,
    most: 3_600_000,
    shorter: "a busy machine alone would lift every quota",
    longer: "a dead daemon's quotas would refuse clients for hours",
    example: "30s or 2m",
};

pub(super) fn config(text: &str) -> Result<Config> {
    let Some(root) = yaml::parse(text)? else {
        return Err(ConfigError::new(format!(
            "there are no settings in it; {SMALLEST}"
        )));
    };
    let file = Fields::of(&root, "")?;
    let kubernetes = file.optional("kubernetes", |node| {
        nothing_of_this_machine(&file)?;
        kubernetes(node)
    })?;
    let services = match &kubernetes {
        Some(_) => Vec::new(),
        None => match file.optional("services", services)? {
            Some(services) => services,
            None => return root.fail(
                "`services` is missing in the file, and so is `kubernetes`; add `services: …`, or `kubernetes: …` to balance the pods of a cluster",
            ),
        },
    };
    Ok(Config {
        services,
        fail_open_after: file
            .optional("fail_open_after", |node| FAIL_OPEN_AFTER.read(node))?
            .unwrap_or(DEFAULT_FAIL_OPEN_AFTER),
        namespaces: match &kubernetes {
            Some(_) => NetnsScope::Pods,
            None => file
                .optional("namespaces", netns_scope)?
                .unwrap_or(NetnsScope::Own),
        },
        kubernetes,
    })
}

/// Refuses what says by hand what `kubernetes` finds out.
fn nothing_of_this_machine(file: &Fields) -> Result<()> {
    file.none_of(&["services", "namespaces"], |key| {
        let advice = match key {
            "services" => "what the cluster's Services are is said in `kubernetes`: move the services there, or run a second daemon with a --state-dir of its own for those of this machine",
            _ => "the pods' namespaces are found: remove it",
        };
        format!("`{key}` beside `kubernetes`; {advice}")
    })
}

fn services(node: &Node) -> Result<Vec<Service>> {
    let nodes = service_entries(node, SMALLEST)?;
    let services = nodes.iter().map(service).collect::<Result<Vec<_>>>()?;
    check_services(&services, nodes)?;
    Ok(services)
}

fn service(node: &Node) -> Result<Service> {
    let fields = Fields::of(node, "services")?;
    Ok(Service {
        name: fields.required("name", service_name)?,
        port: fields.required("port", port)?,
        address: fields.optional("address", service_address)?,
        policy: policy(&fields)?,
        backends: fields.optional("backends", backends)?,
        quota: fields
            .optional("quota", quota)?
            .unwrap_or(QuotaRule::Unlimited),
        exempt: exempt(&fields)?,
        health: is_on(&fields, "health")?,
        keepalive: keepalive(&fields, "services.keepalive")?,
    })
}

fn service_address(node: &Node) -> Result<IpAddr> {
    let text = node.scalar("an address", "10.0.0.9")?;
    let address = text.parse::<IpAddr>().map(|address| address.to_canonical());
    let problem = match address {
        Err(_) => {
            "is not an IP address; write an IPv4 or IPv6 address without a port (names are not resolved), or leave `address` out for any"
        }
        Ok(address) if address.is_unspecified() => {
            "is no address of its own; leave `address` out for any address"
        }
        Ok(address) if unreachable(address) => {
            "can't be connected to over TCP; write a unicast address"
        }
        Ok(address) => return Ok(address),
    };
    node.fail(format!("`{}` {problem}", shown(text)))
}

fn backends(node: &Node) -> Result<Vec<Backend>> {
    let nodes = node.list("`backends`", "[\"127.0.0.1:21801\"]")?;
    if nodes.is_empty() {
        return node.fail(
            "`backends` is an empty list: nobody could take a connection; list at least one address, or leave `backends` out to use every listener on the port itself",
        );
    }
    if let Some(node) = nodes.get(MAX_SERVICE_BACKENDS) {
        return node.fail(format!(
            "{} backends, a service can have at most {MAX_SERVICE_BACKENDS}; remove some, or split the service",
            nodes.len()
        ));
    }
    nodes.iter().map(backend).collect()
}

fn backend(node: &Node) -> Result<Backend> {
    match &*node.value {
        Value::Map(_) => {
            let fields = Fields::of(node, "services.backends")?;
            let advice = "to take a backend out, remove it from the list";
            let weight = |node: &Node| node.number("weight", 1, MAX_WEIGHT, advice);
            Ok(Backend {
                address: fields.required("address", backend_address)?,
                weight: fields.optional("weight", weight)?.unwrap_or(1),
            })
        }
        Value::List(_) => node.fail(
            "a backend is an address, this is a list; write \"127.0.0.1:21801\"; an IPv6 address needs the quotes: \"[::1]:21801\"",
        ),
        _ => Ok(Backend { address: backend_address(node)?, weight: 1 }),
    }
}

fn backend_address(node: &Node) -> Result<SocketAddr> {
    let text = node.scalar("a backend", "\"127.0.0.1:21801\"")?;
    let problem = match text.parse::<SocketAddr>() {
        Err(_) => match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(_)) => "has no port; write ADDRESS:PORT, for example \"127.0.0.1:21801\"",
            Ok(IpAddr::V6(_)) => "has no port; write [ADDRESS]:PORT, for example \"[::1]:21801\"",
            Err(_) => {
                "is not an address with a port; write \"127.0.0.1:21801\" or \"[::1]:21801\" (ports from 1 to 65535; names are not resolved)"
            }
        },
        Ok(address) if address.port() == 0 => {
            "has port 0, on which nobody listens; write its port, from 1 to 65535"
        }
        Ok(SocketAddr::V6(v6)) if v6.scope_id() != 0 => {
            "has a scope (%); leave the scope out: a backend is known by its address alone"
        }
        Ok(address) => match address.ip().to_canonical() {
            ip if ip.is_unspecified() => {
                "is no address of its own; write the address that clients could reach it by, for example 127.0.0.1 for a listener on any address"
            }
            ip if unreachable(ip) => "can't be listened on over TCP; write a unicast address",
            ip => return Ok(SocketAddr::new(ip, address.port())),
        },
    };
    node.fail(format!("the backend `{}` {problem}", shown(text)))
}

/// Whether `address` can't be an end of a TCP connection.
fn unreachable(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V4(v4) if v4.is_broadcast())
}

fn quota(node: &Node) -> Result<QuotaRule> {
    let fields = quota_fields(node, "services.quota")?;
    if matches!(&*node.value, Value::Map(entries) if entries.is_empty()) {
        return node.fail(
            "`quota` has no settings; write `per_backend: N` or `clients: N` in it, or leave `quota` out for no limit",
        );
    }
    if let Some(limit) = per_backend(&fields)? {
        return Ok(QuotaRule::Fixed(limit));
    }
    Ok(QuotaRule::Computed {
        clients: fields.optional("clients", clients)?,
        connections_per_client: connections(&fields, "connections_per_client")?,
        headroom_percent: headroom(&fields)?,
        min_quota: min_quota(&fields)?,
    })
}

fn netns_scope(node: &Node) -> Result<NetnsScope> {
    let problem = match &*node.value {
        Value::Scalar(word) if word == "own" => return Ok(NetnsScope::Own),
        Value::Scalar(word) if word == "all" => return Ok(NetnsScope::All),
        Value::Scalar(word) => format!("namespaces `{}` is not understood", shown(word)),
        Value::List(nodes) if nodes.is_empty() => {
            "`namespaces` is an empty list: nothing would be guarded".to_owned()
        }
        Value::List(nodes) => return netns_paths(nodes).map(NetnsScope::Paths),
        other => format!("`namespaces` is {}", other.kind()),
    };
    node.fail(format!(
        "{problem}; write own, all, or a list of absolute paths such as [/run/netns/blue]"
    ))
}

fn netns_paths(nodes: &[Node]) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    let mut seen = HashSet::new();
    for node in nodes {
        let text = node.scalar("a namespace", "/run/netns/blue")?;
        let path = PathBuf::from(text);
        let problem = if !path.is_absolute() {
            "is not an absolute path; write /run/netns/NAME or /proc/PID/ns/net"
        } else if !seen.insert(text) {
            "is listed twice; keep one of the two"
        } else {
            paths.push(path);
            continue;
        };
        return node.fail(format!("the namespace `{}` {problem}", shown(text)));
    }
    Ok(paths)
}
