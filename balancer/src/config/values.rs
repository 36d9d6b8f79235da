//! Values that the two modes have in common: a service of this machine and one of a cluster.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use balancer_common::{Policy, abi::Keepalive};
use ipnet::{IpNet, Ipv4Net};

use super::{
    DEFAULT_MIN_QUOTA, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_CLIENT, MAX_EXEMPT,
    MAX_HEADROOM_PERCENT, MAX_KEEPALIVE_IDLE, MAX_KEEPALIVE_INTERVAL, MAX_KEEPALIVE_PROBES,
    MAX_NAME_BYTES, MAX_SERVICES, MoveRule,
    error::Result,
    fields::{Fields, decimal},
    yaml::{Node, Value, shown},
};

/// The items of `services`, of which there is at least one.
pub(super) fn service_entries<'a>(node: &'a Node, smallest: &str) -> Result<&'a [Node]> {
    let nodes = node.list("`services`", "[{name: agents, port: 11800}]")?;
    match nodes.get(MAX_SERVICES) {
        Some(node) => node.fail(format!(
            "{} services, at most {MAX_SERVICES} are possible; remove some, or run several daemons with a --state-dir each",
            nodes.len()
        )),
        None if nodes.is_empty() => {
            node.fail(format!("`services` is empty: nothing to balance; {smallest}"))
        }
        None => Ok(nodes),
    }
}

/// The name of a service.
pub(super) fn service_name(node: &Node) -> Result<String> {
    label(node, "name", node.scalar("a name", "agents")?)
}

/// `text`, which stands in `node` and is `what` in messages, as a DNS label (RFC 1123). Kubernetes
/// wants one of namespaces and Services too.
pub(super) fn label(node: &Node, what: &str, text: &str) -> Result<String> {
    let shown_text = shown(text);
    let bad = text
        .chars()
        .find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-'));
    let problem = if text.is_empty() {
        "is empty".to_owned()
    } else if text.len() > MAX_NAME_BYTES {
        format!("`{shown_text}` is {} bytes long", text.len())
    } else if let Some(bad) = bad {
        format!("`{shown_text}` has `{}` in it", shown(&bad.to_string()))
    } else if text.starts_with('-') || text.ends_with('-') {
        format!("`{shown_text}` starts or ends with a -")
    } else {
        return Ok(text.to_owned());
    };
    node.fail(format!(
        "the {what} {problem}; use up to 63 of a-z, 0-9 and -, the first and the last not a -"
    ))
}

pub(super) fn port(node: &Node) -> Result<u16> {
    let text = node.scalar("a port", "11800")?;
    match decimal(text) {
        Some(port) if port != 0 => Ok(port),
        _ => node.fail(format!(
            "`{}` is not a TCP port; write a number from 1 to 65535",
            shown(text)
        )),
    }
}

/// An address with a port; `what` is its name in messages, and `problem` says why an IP address is
/// none that can be meant.
pub(super) fn address_with_port(
    node: &Node,
    what: &str,
    example: &str,
    problem: impl Fn(IpAddr) -> Option<&'static str>,
) -> Result<SocketAddr> {
    let text = node.scalar(&what.replacen("the", "a", 1), &format!("\"{example}\""))?;
    let problem = match text.parse::<SocketAddr>() {
        Err(_) => match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(_)) => {
                format!("has no port; write ADDRESS:PORT, for example \"{example}\"")
            }
            Ok(IpAddr::V6(_)) => {
                "has no port; write [ADDRESS]:PORT, for example \"[::1]:21801\"".to_owned()
            }
            Err(_) => format!(
                "is not an address with a port; write \"{example}\" or \"[::1]:21801\" (ports from 1 to 65535; names are not resolved)"
            ),
        },
        Ok(address) if address.port() == 0 => {
            "has port 0, on which nobody listens; write its port, from 1 to 65535".to_owned()
        }
        Ok(SocketAddr::V6(v6)) if v6.scope_id() != 0 => {
            format!("has a scope (%); leave the scope out: {what} is known by its address alone")
        }
        Ok(address) => {
            let ip = address.ip().to_canonical();
            match problem(ip) {
                None => return Ok(SocketAddr::new(ip, address.port())),
                Some(problem) => problem.to_owned(),
            }
        }
    };
    node.fail(format!("{what} `{}` {problem}", shown(text)))
}

/// Whether an address can't be an end of a TCP connection.
pub(super) fn no_end_of_a_connection(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V4(v4) if v4.is_broadcast())
}

/// The policy of a service; least-connections where the file gives none.
pub(super) fn policy(fields: &Fields) -> Result<Policy> {
    let read = |node: &Node| {
        let text = node.scalar("a policy", "least-connections")?;
        match Policy::ALL.into_iter().find(|policy| policy.name() == text) {
            Some(policy) => Ok(policy),
            None => node.fail(format!(
                "`{}` is not a policy; write one of {}",
                shown(text),
                Policy::ALL.map(Policy::name).join(", ")
            )),
        }
    };
    Ok(fields
        .optional("policy", read)?
        .unwrap_or(Policy::LeastConnections))
}

/// A setting that is on where the file says nothing. For YAML 1.1, and so for Helm, `on` and `off`
/// are booleans, which it writes as `true` and `false`.
pub(super) fn is_on(fields: &Fields, key: &'static str) -> Result<bool> {
    is_on_or(fields, key, true)
}

/// A setting that is `otherwise` where the file says nothing.
pub(super) fn is_on_or(fields: &Fields, key: &'static str, otherwise: bool) -> Result<bool> {
    let read = |node: &Node| match node.scalar(key, "off")? {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        other => node.fail(format!(
            "{key} `{}` is not understood; write on or off",
            shown(other)
        )),
    };
    Ok(fields.optional(key, read)?.unwrap_or(otherwise))
}

/// What becomes of established connections that are to move.
pub(super) fn moving(fields: &Fields, name: &str) -> Result<MoveRule> {
    let read = |node: &Node| match node.scalar("move", "graceful")? {
        "graceful" => Ok(MoveRule::Graceful),
        "close" => Ok(MoveRule::Close),
        "off" | "false" => Ok(MoveRule::Off),
        other => node.fail(format!(
            "move `{}` is not understood; write graceful, close or off",
            shown(other)
        )),
    };
    Ok(fields
        .optional("move", read)?
        .unwrap_or_else(|| MoveRule::of_service(name)))
}

/// The exempt networks of a service, none twice.
pub(super) fn exempt(fields: &Fields) -> Result<Vec<IpNet>> {
    let Some(nodes) = fields.optional("exempt", |node| node.list("`exempt`", "[10.0.0.0/24]"))?
    else {
        return Ok(Vec::new());
    };
    if let Some(node) = nodes.get(MAX_EXEMPT) {
        return node.fail(format!(
            "{} exempt networks, a service can have at most {MAX_EXEMPT}; join neighbours into larger networks",
            nodes.len()
        ));
    }
    let mut networks = Vec::new();
    for node in nodes {
        let network = network(node)?;
        // Generated lists have a network twice.
        if !networks.contains(&network) {
            networks.push(network);
        }
    }
    Ok(networks)
}

fn network(node: &Node) -> Result<IpNet> {
    let text = node.scalar("an exempt network", "10.0.0.0/24")?;
    let parsed = text
        .parse()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    match parsed {
        Ok(network) if network.addr() == network.network() => Ok(unmapped(network)),
        Ok(network) => node.fail(format!(
            "`{}` has address bits beyond its mask; write {} for the network or {} for the single address",
            shown(text),
            network.trunc(),
            network.addr()
        )),
        Err(_) => node.fail(format!(
            "`{}` is not a network; write it as 10.0.0.0/24 or fd00::/8, or a single address as 10.0.0.5",
            shown(text)
        )),
    }
}

/// An IPv4-mapped network as the IPv4 network that it is: IPv4 clients come as IPv4, also to a
/// dual-stack listener.
fn unmapped(network: IpNet) -> IpNet {
    const MAPPED_BITS: u8 = 96;
    let mapped = |v6: ipnet::Ipv6Net| {
        let bits = v6.prefix_len().checked_sub(MAPPED_BITS)?;
        Ipv4Net::new(v6.addr().to_ipv4_mapped()?, bits).ok()
    };
    match network {
        IpNet::V6(v6) => mapped(v6).map_or(network, IpNet::V4),
        IpNet::V4(_) => network,
    }
}

/// When a client that has vanished is given up, by the mapping at `path`; on where the file says
/// nothing. For `true` and `false` see [`is_on`].
pub(super) fn keepalive(fields: &Fields, path: &'static str) -> Result<Option<Keepalive>> {
    let read = |node: &Node| {
        match &*node.value {
        Value::Scalar(text) => match text.as_str() {
            "on" | "true" => Ok(Some(Keepalive::DEFAULT)),
            "off" | "false" => Ok(None),
            other => node.fail(format!(
                "keepalive `{}` is not understood; write on, off, or settings such as `{{idle: 60s, interval: 10s, probes: 3}}`, which are those of `on`",
                shown(other)
            )),
        },
        _ => keepalive_values(node, path).map(Some),
    }
    };
    Ok(fields
        .optional("keepalive", read)?
        .unwrap_or(Some(Keepalive::DEFAULT)))
}

fn keepalive_values(node: &Node, path: &'static str) -> Result<Keepalive> {
    let fields = Fields::of(node, path)?;
    let default = Keepalive::DEFAULT;
    let probes = |node: &Node| {
        let advice = "leave it out for 3; for none write `keepalive: off`";
        node.number("probes", 1, u32::from(MAX_KEEPALIVE_PROBES), advice)
    };
    let probes = fields.optional("probes", probes)?;
    Ok(Keepalive {
        idle: (fields.optional("idle", |node| seconds(&IDLE, node))?).unwrap_or(default.idle),
        interval: (fields.optional("interval", |node| seconds(&INTERVAL, node))?)
            .unwrap_or(default.interval),
        probes: probes.map_or(default.probes, |probes| {
            u8::try_from(probes).unwrap_or(MAX_KEEPALIVE_PROBES)
        }),
    })
}

const IDLE: Time = Time {
    key: "idle",
    least: 1000,
    most: MAX_KEEPALIVE_IDLE as u64 * 1000,
    shorter: "the kernel counts in seconds",
    longer: "a client that has vanished would hold its place for hours",
    example: "60s",
};

const INTERVAL: Time = Time {
    key: "interval",
    least: 1000,
    most: MAX_KEEPALIVE_INTERVAL as u64 * 1000,
    shorter: "the kernel counts in seconds",
    longer: "a client that has vanished would hold its place for long",
    example: "10s",
};

/// A time in whole seconds, as the kernel takes it.
fn seconds(time: &Time, node: &Node) -> Result<u16> {
    let read = time.read(node)?;
    match u16::try_from(read.as_secs()) {
        Ok(seconds) if read.subsec_nanos() == 0 => Ok(seconds),
        _ => node.fail(format!(
            "{} `{}` is not a whole number of seconds; write for example {}",
            time.key,
            shown(node.scalar(time.key, time.example)?),
            time.example
        )),
    }
}

/// The settings of a quota, the mapping at `path`. A bare number is most likely meant as a fixed
/// one.
pub(super) fn quota_fields<'a>(node: &'a Node, path: &'static str) -> Result<Fields<'a>> {
    if let Value::Scalar(text) = &*node.value
        && decimal(text).is_some_and(|limit| (1..=MAX_CONNECTIONS).contains(&limit))
    {
        return node.fail(format!(
            "`quota` must be `key: value` settings, this is a single value; write `quota: {{per_backend: {text}}}` for as many connections on each backend"
        ));
    }
    Fields::of(node, path)
}

/// A fixed quota: the same for each backend. It stands alone.
pub(super) fn per_backend(fields: &Fields) -> Result<Option<u32>> {
    let computed = ["clients", "connections_per_client", "headroom", "min_quota"];
    fields.optional("per_backend", |node| {
        fields.none_of(&computed, |key| {
            format!(
                "`{key}` beside `per_backend`: a quota is either fixed or computed; keep `per_backend` for a fixed quota, or the other keys for a computed one"
            )
        })?;
        let advice = "to close a backend use `balancer quota set`; for no limit leave `quota` out";
        node.number("per_backend", 1, MAX_CONNECTIONS, advice)
    })
}

/// How many clients there are.
pub(super) fn clients(node: &Node) -> Result<u32> {
    node.number(
        "clients",
        1,
        MAX_CONNECTIONS,
        "leave `quota` out for no limit",
    )
}

/// How many connections each client, or each pod of a class, keeps; 1 where the file gives none.
pub(super) fn connections(fields: &Fields, key: &'static str) -> Result<u32> {
    let advice = "a Java or Python agent opens 1";
    let read = |node: &Node| node.number(key, 1, MAX_CONNECTIONS_PER_CLIENT, advice);
    Ok(fields.optional(key, read)?.unwrap_or(1))
}

/// What no computed quota goes below.
pub(super) fn min_quota(fields: &Fields) -> Result<u32> {
    let advice = "leave it out for no floor";
    let read = |node: &Node| node.number("min_quota", 1, MAX_CONNECTIONS, advice);
    Ok(fields
        .optional("min_quota", read)?
        .unwrap_or(DEFAULT_MIN_QUOTA))
}

/// What a computed quota adds for clients that reconnect or come on top, in percent.
pub(super) fn headroom(fields: &Fields) -> Result<u32> {
    let read = |node: &Node| {
        let text = node.scalar("headroom", "15%")?;
        let percent = text
            .strip_suffix('%')
            .and_then(|number| decimal(number.trim_end()));
        let advice = match (percent, decimal::<u32>(text)) {
            (Some(percent), _) if percent <= MAX_HEADROOM_PERCENT => return Ok(percent),
            // "15" could mean 15 % or 15 times as many.
            (None, Some(number)) if number <= MAX_HEADROOM_PERCENT => {
                format!("write `{number}%` if percent is meant")
            }
            _ => format!(
                "write a whole number of percent from 0% to {MAX_HEADROOM_PERCENT}%, for example 15%"
            ),
        };
        node.fail(format!(
            "headroom `{}` is not a percentage; {advice}",
            shown(text)
        ))
    };
    Ok(fields.optional("headroom", read)?.unwrap_or(0))
}

/// A time in the file.
pub(super) struct Time {
    pub(super) key: &'static str,
    /// In milliseconds.
    pub(super) least: u64,
    /// In milliseconds.
    pub(super) most: u64,
    /// Why not less.
    pub(super) shorter: &'static str,
    /// Why not more.
    pub(super) longer: &'static str,
    pub(super) example: &'static str,
}

const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

impl Time {
    /// Reads the value of the key.
    pub(super) fn read(&self, node: &Node) -> Result<Duration> {
        let Self { key, example, .. } = self;
        let (from, to) = (with_unit(self.least), with_unit(self.most));
        let text = node.scalar(key, example)?;
        match milliseconds(text) {
            Some(time) if (self.least..=self.most).contains(&time) => {
                Ok(Duration::from_millis(time))
            }
            Some(_) => node.fail(format!(
                "{key} `{}` is out of bounds; write a time from {from} (shorter, and {}) to {to} (longer, and {})",
                shown(text), self.shorter, self.longer
            )),
            None => node.fail(format!(
                "{key} `{}` is not a time; write a whole number with a unit, from {from} to {to}, for example {example}",
                shown(text)
            )),
        }
    }
}

/// Reads a time as the file has it, for an argument of the command line.
///
/// # Errors
/// When it is not a whole number with a unit.
pub fn parse_time(text: &str) -> std::result::Result<Duration, String> {
    let time = milliseconds(text).map(Duration::from_millis);
    time.ok_or_else(|| "write a whole number with a unit, for example 30s or 5m".to_owned())
}

/// A whole number with a unit, `30s`, in milliseconds.
fn milliseconds(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let (_, scale) = UNITS
        .iter()
        .find(|(unit, _)| *unit == &text[digits.len()..])?;
    decimal::<u64>(digits.trim_end())?.checked_mul(*scale)
}

/// A time in the largest unit that makes it a whole number.
fn with_unit(milliseconds: u64) -> String {
    let whole = |(_, scale): &&(&str, u64)| milliseconds.is_multiple_of(*scale);
    let (unit, scale) = UNITS.iter().rfind(whole).unwrap_or(&UNITS[0]);
    format!("{}{unit}", milliseconds / scale)
}
