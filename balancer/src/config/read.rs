//! From located YAML to a valid [`Config`].

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use balancer_common::Policy;

use super::{
    Backend, Config, ConfigError, Connect, DEFAULT_FAIL_OPEN_AFTER, Effect, Kubernetes,
    MAX_SERVICE_BACKENDS, MAX_WEIGHT, NetnsScope, QuotaRule, Service,
    conflicts::{check_names, check_services},
    connect::{check_connects, connect},
    error::Result,
    fields::Fields,
    read_kubernetes::kubernetes,
    values::{
        Time, address_with_port, clients, connections, exempt, headroom, is_on, is_on_or,
        keepalive, min_quota, moving, no_end_of_a_connection, per_backend, policy, port,
        quota_fields, service_entries, service_name,
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
    let effect = file.optional("mode", effect)?.unwrap_or_default();
    let kubernetes = file.optional("kubernetes", |node| {
        nothing_of_this_machine(&file)?;
        let kubernetes = kubernetes(node)?;
        let services = kubernetes.services.into_iter();
        Ok(Kubernetes {
            services: services.map(|entry| entry.within(effect)).collect(),
            ..kubernetes
        })
    })?;
    let (services, connects) = match &kubernetes {
        Some(_) => (Vec::new(), Vec::new()),
        None => match file.optional("services", services)? {
            Some(services) => services,
            None => return root.fail(
                "`services` is missing in the file, and so is `kubernetes`; add `services: …`, or `kubernetes: …` to balance the pods of a cluster",
            ),
        },
    };
    Ok(Config {
        services: services
            .into_iter()
            .map(|service| service.within(effect))
            .collect(),
        connects,
        effect,
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

/// For YAML 1.1, and so for Helm, `on` is a boolean, which it writes as `true`.
fn effect(node: &Node) -> Result<Effect> {
    let text = node.scalar("mode", "dry-run")?;
    let named = |effect: &Effect| effect.name() == text;
    match Effect::ALL.into_iter().find(named) {
        Some(effect) => Ok(effect),
        None if text == "true" => Ok(Effect::On),
        None => node.fail(format!(
            "mode `{}` is not understood; write count (connections are counted, nothing else), dry-run (what would be refused is counted, too) or on",
            shown(text)
        )),
    }
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

fn services(node: &Node) -> Result<(Vec<Service>, Vec<Connect>)> {
    let nodes = service_entries(node, SMALLEST)?;
    let (mut names, mut services, mut connects) = (Vec::new(), Vec::new(), Vec::new());
    let (mut service_nodes, mut connect_nodes) = (Vec::new(), Vec::new());
    for node in nodes {
        let entry = entry(node)?;
        names.push(entry.name);
        if let Some(service) = entry.service {
            services.push(service);
            service_nodes.push(node.clone());
        }
        if let Some(connect) = entry.connect {
            connects.push(connect);
            connect_nodes.push(node.at("connect").clone());
        }
    }
    check_names(names.iter().map(String::as_str), nodes)?;
    check_services(&services, &service_nodes)?;
    check_connects(&connects, &connect_nodes)?;
    Ok((services, connects))
}

/// A service entry: what listens on this host's port, where clients of this host connect to, or
/// both.
struct ServiceEntry {
    name: String,
    service: Option<Service>,
    connect: Option<Connect>,
}

fn entry(node: &Node) -> Result<ServiceEntry> {
    let fields = Fields::of(node, "services")?;
    let name = fields.required("name", service_name)?;
    let connect = fields.optional("connect", |node| connect(node, name.clone()))?;
    let service = if connect.is_some() && fields.first(&["port"]).is_none() {
        fields.none_of(OF_PORT, |key| {
            format!(
                "`{key}` without `port`: it is about what listens on this host; add `port: …`, or remove it"
            )
        })?;
        None
    } else {
        Some(service(&fields, name.clone())?)
    };
    Ok(ServiceEntry {
        name,
        service,
        connect,
    })
}

/// The keys of an entry that are about its port.
const OF_PORT: &[&str] = &[
    "address",
    "policy",
    "backends",
    "quota",
    "exempt",
    "health",
    "keepalive",
    "move",
    "rebalance",
];

fn service(fields: &Fields, name: String) -> Result<Service> {
    let backends = fields.optional("backends", backends)?;
    let policy = policy(fields)?;
    // A hash of its source brings a client back to where it was.
    let evens_out = backends.is_some() && policy != Policy::SourceHash;
    Ok(Service {
        rebalance: is_on_or(fields, "rebalance", evens_out)?,
        moving: moving(fields, &name)?,
        name,
        port: fields.required("port", port)?,
        address: fields.optional("address", service_address)?,
        policy,
        backends,
        quota: fields
            .optional("quota", quota)?
            .unwrap_or(QuotaRule::Unlimited),
        exempt: exempt(fields)?,
        health: is_on(fields, "health")?,
        keepalive: keepalive(fields, "services.keepalive")?,
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
        Ok(address) if no_end_of_a_connection(address) => {
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
    address_with_port(node, "the backend", "127.0.0.1:21801", |ip| {
        if ip.is_unspecified() {
            Some(
                "is no address of its own; write the address that clients could reach it by, for example 127.0.0.1 for a listener on any address",
            )
        } else if no_end_of_a_connection(ip) {
            Some("can't be listened on over TCP; write a unicast address")
        } else {
            None
        }
    })
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
