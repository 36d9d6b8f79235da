//! From the configuration, and what is known of the cluster, to what the maps should hold.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::pod_resolver::Groups;
use crate::config::{ClusterService, Kubernetes, MAX_NAME_BYTES};
use crate::dataplane::{ListenAt, Plan, ServicePlan};

/// The target ports of a cluster, and what their services are called: after the first service entry
/// that has the port, and the further ports of an entry by their numbers, too. A port keeps its
/// name for as long as it is there.
#[derive(Debug, Default)]
pub struct PortNames(BTreeMap<u16, PortName>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct PortName {
    /// The service entry.
    entry: String,
    /// The name of the service that the port makes.
    service: String,
}

impl PortNames {
    /// Adds the ports of groups, and takes those out that nobody has any more: no group, and no
    /// backend that is left.
    pub fn update(&mut self, config: &Kubernetes, groups: &Groups, busy: &HashSet<u16>) {
        self.0.retain(|port, name| {
            let mut entries = config.services.iter();
            entries.any(|entry| entry.name == name.entry)
                && (busy.contains(port) || groups.keys().any(|group| group.port == *port))
        });
        for entry in &config.services {
            for group in groups.keys().filter(|group| group.entry == entry.name) {
                if !self.0.contains_key(&group.port) {
                    let service = self.new_name(&entry.name, group.port);
                    let entry = entry.name.clone();
                    self.0.insert(group.port, PortName { entry, service });
                }
            }
        }
    }

    /// Goes on with a port that an earlier daemon named.
    pub fn keep(&mut self, config: &Kubernetes, service: &str, port: u16) {
        let plain = |entry: &&ClusterService| entry.name == service;
        let numbered = |entry: &&ClusterService| numbered(&entry.name, port) == service;
        let entries = || config.services.iter();
        if let Some(entry) = entries().find(plain).or_else(|| entries().find(numbered)) {
            self.0.entry(port).or_insert(PortName {
                entry: entry.name.clone(),
                service: service.to_owned(),
            });
        }
    }

    /// The service entry that a port belongs to.
    pub fn entry<'a>(&self, port: u16, config: &'a Kubernetes) -> Option<&'a ClusterService> {
        let name = self.0.get(&port)?;
        let mut entries = config.services.iter();
        entries.find(|entry| entry.name == name.entry)
    }

    /// What the maps should hold: one service of the kernel for each target port. `node` are the
    /// addresses that the node sends from.
    pub fn plan(&self, config: &Kubernetes, groups: &Groups, node: &BTreeSet<IpAddr>) -> Plan {
        let services = self.0.iter().filter_map(|(port, name)| {
            let entry = self.entry(*port, config)?;
            Some(ServicePlan {
                name: name.service.clone(),
                port: *port,
                address: None,
                policy: entry.policy,
                virtual_port: false,
                quota: entry.quota.uncomputed(),
                rule: entry.quota.to_string(),
                exempt: exempt(*port, config, groups, node),
                listen: vec![ListenAt {
                    address: None,
                    port: *port,
                    weight: 1,
                }],
            })
        });
        Plan {
            services: services.collect(),
            netns: Vec::new(),
            any_netns: true,
        }
    }

    fn new_name(&self, entry: &str, port: u16) -> String {
        if self.0.values().any(|name| name.service == entry) {
            numbered(entry, port)
        } else {
            entry.to_owned()
        }
    }
}

/// The name of a further port of an entry, not longer than a name may be.
fn numbered(entry: &str, port: u16) -> String {
    let suffix = format!("-{port}");
    let stem = entry.get(..MAX_NAME_BYTES - suffix.len());
    format!("{}{suffix}", stem.unwrap_or(entry))
}

/// Whom the backends of a port never refuse: each other, the node's kubelet, what runs beside them,
/// and whom the file names.
fn exempt(port: u16, config: &Kubernetes, groups: &Groups, node: &BTreeSet<IpAddr>) -> Vec<IpNet> {
    let of_port = || groups.iter().filter(move |(group, _)| group.port == port);
    let peers = of_port()
        .flat_map(|(_, endpoints)| endpoints)
        .flat_map(|endpoint| &endpoint.addresses);
    let entries: HashSet<&str> = of_port().map(|(group, _)| group.entry.as_str()).collect();
    let by_file = config
        .services
        .iter()
        .filter(|entry| entries.contains(entry.name.as_str()))
        .flat_map(|entry| &entry.exempt);
    let loopback = [
        IpNet::new_assert(Ipv4Addr::new(127, 0, 0, 0).into(), 8),
        IpAddr::from(Ipv6Addr::LOCALHOST).into(),
    ];
    let all: BTreeSet<IpNet> = peers
        .chain(node)
        .map(|address| IpNet::from(*address))
        .chain(by_file.copied())
        .chain(loopback)
        .collect();
    all.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ClusterQuota, PortChoice, ServiceChoice};
    use crate::kubernetes::{Endpoint, GroupId, ObjectName as Object};
    use balancer_common::Policy;

    fn entry(name: &str) -> ClusterService {
        ClusterService {
            name: name.into(),
            of: ServiceChoice::Named {
                namespace: "sw".into(),
                name: name.into(),
            },
            port: PortChoice::Number(11800),
            policy: Policy::LeastConnections,
            quota: ClusterQuota::Unlimited,
            exempt: vec!["10.9.0.0/16".parse().unwrap()],
        }
    }

    fn config(names: &[&str]) -> Kubernetes {
        Kubernetes {
            services: names.iter().map(|name| entry(name)).collect(),
            publish_every: std::time::Duration::from_secs(2),
            hold_for: std::time::Duration::from_secs(300),
        }
    }

    fn groups(of: &[(&str, u16, &str)]) -> Groups {
        let group = |(entry, port, address): &(&str, u16, &str)| {
            let id = GroupId {
                entry: (*entry).into(),
                service: Object {
                    namespace: "sw".into(),
                    name: (*entry).into(),
                },
                port: *port,
            };
            let endpoint = Endpoint {
                pod: id.service.clone(),
                uid: (*address).into(),
                addresses: vec![address.parse().unwrap()],
                node: None,
                ready: true,
                terminating: false,
                weight: 1,
            };
            (id, vec![endpoint])
        };
        of.iter().map(group).collect()
    }

    fn names(ports: &PortNames) -> Vec<(u16, &str)> {
        ports
            .0
            .iter()
            .map(|(port, name)| (*port, name.service.as_str()))
            .collect()
    }

    #[test]
    fn a_port_keeps_its_name_for_as_long_as_it_is_there() {
        let config = config(&["agents", "prod"]);
        let nobody = HashSet::new();
        let mut ports = PortNames::default();
        ports.update(&config, &groups(&[("agents", 11800, "10.0.0.1")]), &nobody);
        assert_eq!(names(&ports), [(11800, "agents")]);
        let more = groups(&[
            ("agents", 1800, "10.0.0.1"),
            ("agents", 11800, "10.0.0.2"),
            ("prod", 11800, "10.0.0.3"),
        ]);
        ports.update(&config, &more, &nobody);
        assert_eq!(names(&ports), [(1800, "agents-1800"), (11800, "agents")]);
        let busy = HashSet::from([11800]);
        ports.update(&config, &groups(&[("agents", 1800, "10.0.0.1")]), &busy);
        assert_eq!(names(&ports), [(1800, "agents-1800"), (11800, "agents")]);
        ports.update(&config, &groups(&[("agents", 1800, "10.0.0.1")]), &nobody);
        assert_eq!(names(&ports), [(1800, "agents-1800")]);
    }

    #[test]
    fn names_of_an_earlier_daemon_are_kept_where_their_entry_is() {
        let config = config(&["agents"]);
        let mut ports = PortNames::default();
        for (name, port) in [
            ("agents", 21800),
            ("agents-1800", 1800),
            ("other", 5),
            ("agents-7", 8),
        ] {
            ports.keep(&config, name, port);
        }
        assert_eq!(names(&ports), [(1800, "agents-1800"), (21800, "agents")]);
        let long = "a".repeat(63);
        assert_eq!(numbered(&long, 11800).len(), 63);
        assert!(numbered(&long, 11800).ends_with("a-11800"));
    }

    #[test]
    fn peers_the_node_and_loopback_are_exempt_of_the_port_that_they_serve() {
        let config = config(&["agents", "prod"]);
        let groups = groups(&[("agents", 11800, "10.0.0.1"), ("prod", 1800, "10.0.0.3")]);
        let mut ports = PortNames::default();
        ports.update(&config, &groups, &HashSet::new());
        let plan = ports.plan(
            &config,
            &groups,
            &BTreeSet::from(["10.0.0.254".parse().unwrap()]),
        );
        let [prod, agents] = &plan.services[..] else {
            panic!("two: {plan:?}")
        };
        let words = |service: &ServicePlan| -> Vec<String> {
            service.exempt.iter().map(ToString::to_string).collect()
        };
        assert_eq!(
            words(agents),
            [
                "10.0.0.1/32",
                "10.0.0.254/32",
                "10.9.0.0/16",
                "127.0.0.0/8",
                "::1/128"
            ]
        );
        assert_eq!(
            words(prod),
            [
                "10.0.0.3/32",
                "10.0.0.254/32",
                "10.9.0.0/16",
                "127.0.0.0/8",
                "::1/128"
            ]
        );
        assert_eq!((agents.port, prod.port), (11800, 1800));
    }
}
