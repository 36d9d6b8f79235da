//! Values that services have in common, whether the file lists them or a cluster does.

use std::{
    net::{IpAddr, Ipv6Addr},
    ops::RangeInclusive,
    time::Duration,
};

use balancer_common::Policy;
use ipnet::{IpNet, Ipv4Net};

use super::{
    MAX_CONNECTIONS, MAX_CONNECTIONS_PER_CLIENT, MAX_EXEMPT, MAX_HEADROOM_PERCENT, MAX_NAME_BYTES,
    MAX_SERVICES,
    error::at_line,
    fields::{Fields, Result, decimal, list, number, scalar},
    yaml::{Node, shown},
};

/// The items of `services`, of which there is at least one.
pub(super) fn entries<'a>(node: &'a Node, smallest: &str) -> Result<&'a [Node]> {
    let nodes = list(node, "`services`", "- name: agents")?;
    if nodes.is_empty() {
        return Err(at_line(
            node.line,
            "`services` is empty: nothing to balance",
            smallest,
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
    Ok(nodes)
}

/// The name of a service.
pub(super) fn service_name(node: &Node) -> Result<String> {
    label(node, "name", scalar(node, "a name", "agents")?)
}

/// `text`, which stands in `node` and is `what` in messages, as a DNS label (RFC 1123): what Kubernetes wants of namespaces and Services too.
pub(super) fn label(node: &Node, what: &str, text: &str) -> Result<String> {
    const ADVICE: &str = "use up to 63 of a-z, 0-9 and -, the first and the last not a -";
    let wrong = |problem: String| Err(at_line(node.line, problem, ADVICE));
    if text.is_empty() {
        return wrong(format!("the {what} is empty"));
    }
    if text.len() > MAX_NAME_BYTES {
        return wrong(format!(
            "the {what} `{}` is {} bytes long",
            shown(text),
            text.len()
        ));
    }
    if let Some(bad) = text
        .chars()
        .find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-'))
    {
        return wrong(format!(
            "the {what} `{}` has `{}` in it",
            shown(text),
            shown(&bad.to_string())
        ));
    }
    if text.starts_with('-') || text.ends_with('-') {
        return wrong(format!(
            "the {what} `{}` starts or ends with a -",
            shown(text)
        ));
    }
    Ok(text.to_owned())
}

pub(super) fn port(node: &Node) -> Result<u16> {
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

pub(super) fn policy(node: &Node) -> Result<Policy> {
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

pub(super) fn headroom(node: &Node) -> Result<u32> {
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

pub(super) fn exempt(node: &Node) -> Result<Vec<IpNet>> {
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

/// How many clients there are.
pub(super) fn clients(node: &Node) -> Result<u32> {
    number(
        node,
        "clients",
        1,
        MAX_CONNECTIONS,
        "leave `quota` out for no limit",
    )
}

/// How many connections each of them keeps: `connections_per_client`.
pub(super) fn per_client(fields: &Fields) -> Result<u32> {
    const KEY: &str = "connections_per_client";
    Ok(fields
        .optional(KEY, |node| connections_each(node, KEY))?
        .unwrap_or(1))
}

/// How many connections a client or a pod keeps.
pub(super) fn connections_each(node: &Node, key: &str) -> Result<u32> {
    number(
        node,
        key,
        1,
        MAX_CONNECTIONS_PER_CLIENT,
        "a Java or Python agent opens 1",
    )
}

/// Refuses the `computed` keys of a quota, for the one that has `per_backend`.
pub(super) fn nothing_computed(quota: &Fields, computed: &[&str]) -> Result<()> {
    let other = quota
        .entries
        .iter()
        .find(|entry| computed.contains(&entry.key.as_str()));
    match other {
        Some(other) => Err(at_line(
            other.line,
            format!(
                "`{}` beside `per_backend`: a quota is either fixed or computed",
                other.key
            ),
            "keep `per_backend` for a fixed quota, or the other keys for a computed one",
        )),
        None => Ok(()),
    }
}

/// A quota that is the same for each backend.
pub(super) fn per_backend(node: &Node) -> Result<u32> {
    let advice = "to close a backend use `balancer quota set`; for no limit leave `quota` out";
    number(node, "per_backend", 1, MAX_CONNECTIONS, advice)
}

/// What no computed quota goes below.
pub(super) fn min_quota(node: &Node) -> Result<u32> {
    number(node, "min_quota", 1, MAX_CONNECTIONS, "leave it out for 16")
}

/// A time in the file: its key, in which bounds it must be, and what to say when it is not.
pub(super) struct Time {
    pub(super) key: &'static str,
    /// In milliseconds.
    pub(super) bounds: RangeInclusive<u64>,
    /// The bounds in words.
    pub(super) from: &'static str,
    pub(super) to: &'static str,
    /// Why not less, and why not more.
    pub(super) less: &'static str,
    pub(super) more: &'static str,
    pub(super) example: &'static str,
}

impl Time {
    /// Reads the value of the key.
    pub(super) fn read(&self, node: &Node) -> Result<Duration> {
        let Self { key, from, to, .. } = self;
        let text = scalar(node, key, self.example)?;
        let Some(milliseconds) = milliseconds(text) else {
            return Err(at_line(
                node.line,
                format!("{key} `{}` is not a time", shown(text)),
                format!(
                    "write a whole number with a unit, from {from} to {to}, for example {}",
                    self.example
                ),
            ));
        };
        if !self.bounds.contains(&milliseconds) {
            return Err(at_line(
                node.line,
                format!("{key} `{}` is out of bounds", shown(text)),
                format!(
                    "write a time from {from} (shorter, and {}) to {to} (longer, and {})",
                    self.less, self.more
                ),
            ));
        }
        Ok(Duration::from_millis(milliseconds))
    }
}

/// A whole number with a unit, `30s`, in milliseconds.
fn milliseconds(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let (_, scale) = UNITS
        .iter()
        .find(|(unit, _)| *unit == &text[digits.len()..])?;
    decimal(digits.trim_end())?.checked_mul(*scale)
}
