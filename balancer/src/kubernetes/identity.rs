//! Which node, pod and namespace this daemon belongs to, as the downward API tells it.

use std::env;
use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};

/// Where in the cluster this daemon is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The name of its node.
    pub node: String,
    /// The name of its pod.
    pub pod: String,
    /// The namespace of its pod, in which the daemons publish their reports.
    pub namespace: String,
    /// The node's own addresses, of either family.
    pub node_ips: Vec<IpAddr>,
}

impl Identity {
    /// Reads `NODE_NAME`, `POD_NAME`, `POD_NAMESPACE` and `NODE_IP` (several addresses with commas
    /// between, as `status.hostIPs` gives them).
    ///
    /// # Errors
    /// If one is missing, empty, or no address.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let read = |name: &str, field: &str| {
            variable(name)
                .map(|value| value.trim().to_owned())
                .filter(|value| !value.is_empty())
                .with_context(|| {
                    format!(
                        "the environment variable {name} is not set: with `kubernetes:` in the \
                         configuration the balancer has to know which pod it is. The chart sets it \
                         from {field} by the downward API; outside a pod set it by hand"
                    )
                })
        };
        let addresses = read("NODE_IP", "status.hostIP")?;
        let node_ips = addresses
            .split(',')
            .map(|address| {
                address.trim().parse().with_context(|| {
                    format!(
                        "the environment variable NODE_IP is {addresses:?}, and {address:?} is no \
                         IP address: it takes the node's addresses (status.hostIP, or \
                         status.hostIPs) with commas between"
                    )
                })
            })
            .collect::<Result<Vec<IpAddr>>>()?;
        let node = read("NODE_NAME", "spec.nodeName")?;
        let namespace = read("POD_NAMESPACE", "metadata.namespace")?;
        let pod = read("POD_NAME", "metadata.name")?;
        for (name, value) in [
            ("NODE_NAME", &node),
            ("POD_NAMESPACE", &namespace),
            ("POD_NAME", &pod),
        ] {
            ensure!(
                is_name(value),
                "the environment variable {name} is {value:?}, which can't be the name of anything \
                 in Kubernetes: it takes lower-case letters, digits, '-' and '.'"
            );
        }
        Ok(Self {
            node,
            pod,
            namespace,
            node_ips,
        })
    }
}

/// Whether a value is a DNS subdomain, as names are that go into URLs and selectors.
fn is_name(value: &str) -> bool {
    let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    value.len() <= 253 && value.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(pairs: &[(&str, &str)]) -> Result<Identity> {
        Identity::from_variables(|name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn reads_what_the_chart_sets() {
        let read = identity(&[
            ("NODE_NAME", "node-a"),
            ("POD_NAME", "balancer-x7"),
            ("POD_NAMESPACE", "balancer"),
            ("NODE_IP", "10.0.0.1,fd00::1"),
        ])
        .unwrap();
        assert_eq!(read.node, "node-a");
        assert_eq!(
            read.node_ips,
            [
                "10.0.0.1".parse::<IpAddr>().unwrap(),
                "fd00::1".parse().unwrap()
            ]
        );
    }

    #[test]
    fn names_the_variable_that_is_missing_or_wrong() {
        let all = [
            ("NODE_NAME", "node-a"),
            ("POD_NAME", "pod"),
            ("POD_NAMESPACE", "balancer"),
            ("NODE_IP", "10.0.0.1"),
        ];
        for (index, (name, _)) in all.iter().enumerate() {
            let mut some = all.to_vec();
            some.remove(index);
            let error = format!("{:#}", identity(&some).unwrap_err());
            assert!(
                error.contains(name) && error.contains("chart"),
                "{name}: {error}"
            );
            some.push((name, "A node/../x"));
            let error = format!("{:#}", identity(&some).unwrap_err());
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}
