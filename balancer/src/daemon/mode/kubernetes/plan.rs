//! From the configuration, and what is known of the cluster, to what the maps should hold.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use balancer_common::abi::maps::EXEMPT;
use ipnet::IpNet;

use super::rule::rule;
use crate::config::{
    ClusterQuota, ClusterService, Effect, Kubernetes, MAX_NAME_BYTES, MAX_SERVICES,
};
use crate::dataplane::{ListenAt, Plan, ServicePlan};
use crate::kubernetes::{Endpoint, GroupId, View};

/// The most target ports that the Services of one Kubernetes namespace make, besides those that the
/// file names: anybody may give a Service the labels of an OAP's.
const MOST_PORTS_OF_NAMESPACE: usize = 8;
/// The most exempt sources of all services together: all that the kernel half's table takes.
const MOST_EXEMPT: usize = EXEMPT.entries as usize;
/// The most peers that are exempt on a port: with as many on every port there is room for the rest.
const MOST_PEERS: usize = 192;

/// The target ports of a cluster, and what their services are called: after the first service entry
/// that has the port, and the further ports of an entry by their numbers, too. A port keeps its
/// name for as long as it is there.
#[derive(Debug, Default)]
pub struct PortNames {
    names: BTreeMap<u16, PortName>,
    /// The ports that there are pods for, in the order in which they get what there is not enough
    /// of.
    order: Vec<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct PortName {
    /// The service entry.
    entry: String,
    /// The name of the service that the port makes.
    service: String,
}

/// The node that a plan is for.
pub struct Here<'a> {
    /// Its name.
    pub node: &'a str,
    /// The addresses that it sends from.
    pub addresses: BTreeSet<IpAddr>,
}

impl PortNames {
    /// Adds the ports of groups, and takes those out that nobody has any more: no group, and no
    /// backend that is left. A sentence for whatever gets no service.
    ///
    /// A port needs a pod that is ready, once, or an entry that names its Service. What is found by
    /// labels can't take away from the others: see [`MOST_PORTS_OF_NAMESPACE`].
    pub fn update(&mut self, config: &Kubernetes, view: &View, busy: &HashSet<u16>) -> Vec<String> {
        let (wanted, left_out) = self.wanted(config, view);
        self.names.retain(|port, name| {
            let mut entries = config.services.iter();
            entries.any(|entry| entry.name == name.entry)
                && (busy.contains(port) || wanted.iter().any(|(wanted, _)| wanted == port))
        });
        for (port, entry) in &wanted {
            if !self.names.contains_key(port) {
                let service = self.new_name(entry, *port);
                let entry = (*entry).to_owned();
                self.names.insert(*port, PortName { entry, service });
            }
        }
        self.order = wanted.into_iter().map(|(port, _)| port).collect();
        left_out
    }

    /// The ports that are to have a service, each with its first service entry.
    fn wanted<'a>(
        &self,
        config: &Kubernetes,
        view: &'a View,
    ) -> (Vec<(u16, &'a str)>, Vec<String>) {
        let mut wanted: Vec<(u16, &str)> = Vec::new();
        let mut found: BTreeMap<&str, usize> = BTreeMap::new();
        let mut left_out: BTreeSet<String> = BTreeSet::new();
        for (id, endpoints) in in_order(view) {
            let entry = config.services.iter().find(|entry| entry.name == id.entry);
            let Some(entry) = entry else { continue };
            let is_served = self.names.contains_key(&id.port)
                || entry.is_named()
                || endpoints.iter().any(|endpoint| endpoint.ready);
            if !is_served || wanted.iter().any(|(port, _)| *port == id.port) {
                continue;
            }
            let namespace = id.service.namespace.as_str();
            let of_namespace = found.entry(namespace).or_default();
            if !entry.is_named() && *of_namespace >= MOST_PORTS_OF_NAMESPACE {
                left_out.insert(too_many_of_namespace(namespace));
            } else if wanted.len() >= MAX_SERVICES {
                left_out.insert(too_many_ports());
            } else {
                *of_namespace += usize::from(!entry.is_named());
                wanted.push((id.port, &id.entry));
            }
        }
        (wanted, left_out.into_iter().collect())
    }

    /// Goes on with a port that an earlier daemon named.
    pub fn keep(&mut self, config: &Kubernetes, service: &str, port: u16) {
        let plain = |entry: &&ClusterService| entry.name == service;
        let numbered = |entry: &&ClusterService| numbered(&entry.name, port) == service;
        let entries = || config.services.iter();
        if let Some(entry) = entries().find(plain).or_else(|| entries().find(numbered)) {
            self.names.entry(port).or_insert(PortName {
                entry: entry.name.clone(),
                service: service.to_owned(),
            });
        }
    }

    /// The service entry that a port belongs to.
    pub fn entry<'a>(&self, port: u16, config: &'a Kubernetes) -> Option<&'a ClusterService> {
        let name = self.names.get(&port)?;
        let mut entries = config.services.iter();
        entries.find(|entry| entry.name == name.entry)
    }

    /// The name of the service that a port makes.
    pub fn service(&self, port: u16) -> Option<&str> {
        self.names.get(&port).map(|name| name.service.as_str())
    }

    /// What the maps should hold: one service of the kernel for each target port.
    pub fn plan(&self, config: &Kubernetes, view: &View, here: &Here<'_>) -> Plan {
        let without_pods = self.names.keys().filter(|port| !self.order.contains(port));
        let ports = self.order.iter().chain(without_pods);
        let mut room = MOST_EXEMPT;
        let services = ports.filter_map(|port| {
            let name = self.names.get(port)?;
            let entry = self.entry(*port, config)?;
            let mut exempt = exempt(*port, config, view, here);
            exempt.truncate(room);
            room -= exempt.len();
            Some(ServicePlan {
                name: name.service.clone(),
                port: *port,
                address: None,
                policy: entry.policy,
                virtual_port: false,
                quota: entry.quota.uncomputed(),
                rule: rule(&entry.quota),
                exempt,
                health: entry.health,
                keepalive: entry.keepalive,
                moving: entry.moving,
                effect: Effect::On,
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
        if self.names.values().any(|name| name.service == entry) {
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

/// The groups that there are, in the order in which they get what there is not enough of.
fn in_order(view: &View) -> impl Iterator<Item = (&GroupId, &Vec<Endpoint>)> {
    let groups = view.precedence.iter();
    groups.filter_map(|id| view.groups.get_key_value(id))
}

fn too_many_of_namespace(namespace: &str) -> String {
    format!(
        "the Services of the namespace {namespace} have more than {MOST_PORTS_OF_NAMESPACE} target \
         ports: those of the oldest ones are balanced. An entry `service: {namespace}/NAME` \
         balances another one"
    )
}

fn too_many_ports() -> String {
    format!(
        "the Services that are found have more than {MAX_SERVICES} target ports: those of the \
         oldest ones are balanced. Entries that name a Service come first"
    )
}

/// Whom the backends of a port never refuse, those that matter most first: what runs beside them,
/// the node's kubelet, whom the file names, and each other.
fn exempt(port: u16, config: &Kubernetes, view: &View, here: &Here<'_>) -> Vec<IpNet> {
    let of_port = || in_order(view).filter(move |(group, _)| group.port == port);
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
    let own = here.addresses.iter().map(|address| IpNet::from(*address));
    let certain: BTreeSet<IpNet> = loopback
        .into_iter()
        .chain(own)
        .chain(by_file.copied())
        .collect();
    let peers = peers(of_port, here.node).map(IpNet::from);
    let peers: BTreeSet<IpNet> = peers.filter(|peer| !certain.contains(peer)).collect();
    certain
        .iter()
        .chain(peers.iter().take(MOST_PEERS))
        .copied()
        .collect()
}

/// The pods that the backends of a port on this node have for peers: those of one Kubernetes
/// namespace alone. The kernel half knows exempt sources by port, and who makes a Service in
/// another namespace must not make clients of theirs exempt.
///
/// A pod of its node's network has the address that all clients on that node come from where
/// address translation hides theirs. It can't be told from them, so it is no peer.
fn peers<'a, I>(of_port: impl Fn() -> I, node: &str) -> impl Iterator<Item = IpAddr>
where
    I: Iterator<Item = (&'a GroupId, &'a Vec<Endpoint>)> + 'a,
{
    let is_here = |(_, endpoints): &(&GroupId, &Vec<Endpoint>)| {
        let mut endpoints = endpoints.iter();
        endpoints.any(|endpoint| endpoint.node.as_deref() == Some(node))
    };
    let first = of_port().find(is_here).or_else(|| of_port().next());
    let namespace = first.map(|(group, _)| group.service.namespace.clone());
    of_port()
        .filter(move |(group, _)| Some(&group.service.namespace) == namespace.as_ref())
        .flat_map(|(_, endpoints)| endpoints)
        .filter(|endpoint| !endpoint.host_network)
        .flat_map(|endpoint| &endpoint.addresses)
        .copied()
}

/// The groups whose pods are peers that are not exempt, a sentence each: see [`peers`].
pub fn peers_of_host_networks(config: &Kubernetes, view: &View) -> Vec<String> {
    let is_limited = |id: &GroupId| {
        let mut entries = config
            .services
            .iter()
            .filter(|entry| entry.name == id.entry);
        entries.any(|entry| !matches!(entry.quota, ClusterQuota::Unlimited))
    };
    let groups = view.groups.iter();
    let groups = groups.filter(|(id, endpoints)| endpoints.len() > 1 && is_limited(id));
    let of_hosts = groups.filter_map(|(id, endpoints)| {
        let first = endpoints.iter().find(|endpoint| endpoint.host_network)?;
        Some(format!(
            "pods behind the Service {}, such as {}, use their node's network: connections from \
             there to port {} of the others are not exempt and take places, because clients on \
             that node may come from the same address. Let clients use a port that these servers \
             do not use among each other (SkyWalking: SW_RECEIVER_GRPC_PORT) and balance that; or \
             name the addresses of the nodes under `exempt`, if no client comes from them",
            id.service, first.pod, id.port
        ))
    });
    of_hosts.collect()
}

#[cfg(test)]
mod tests {
    use super::super::fuzzing::endpoint;
    use super::*;
    use crate::config::{Match, MoveRule, PortChoice, ServiceChoice};
    use crate::kubernetes::ObjectName as Object;
    use balancer_common::Policy;

    fn entry(name: &str) -> ClusterService {
        ClusterService {
            name: name.into(),
            of: ServiceChoice::Named {
                namespace: "sw".into(),
                name: name.into(),
            },
            port: PortChoice::Number(11800),
            matching: Match::Service,
            policy: Policy::LeastConnections,
            quota: ClusterQuota::Unlimited,
            exempt: vec!["10.9.0.0/16".parse().unwrap()],
            health: true,
            keepalive: None,
            moving: MoveRule::Off,
            rebalance: true,
        }
    }

    fn config(names: &[&str]) -> Kubernetes {
        Kubernetes {
            services: names.iter().map(|name| entry(name)).collect(),
            publish_every: std::time::Duration::from_secs(2),
            hold_for: std::time::Duration::from_secs(300),
            place: true,
        }
    }

    /// Groups by entry, port, address of their one pod, and namespace, in order of precedence.
    fn in_namespaces(of: &[(&str, u16, &str, &str)]) -> View {
        let mut view = View::default();
        for (entry, port, address, namespace) in of {
            let id = GroupId {
                entry: (*entry).into(),
                service: Object {
                    namespace: (*namespace).into(),
                    name: format!("{entry}-{port}"),
                },
                port: *port,
            };
            let endpoint = Endpoint {
                pod: id.service.clone(),
                uid: (*address).into(),
                addresses: vec![address.parse().unwrap()],
                ..endpoint("node-a")
            };
            if !view.groups.contains_key(&id) {
                view.precedence.push(id.clone());
            }
            view.groups.entry(id).or_default().push(endpoint);
        }
        view
    }

    fn groups(of: &[(&str, u16, &str)]) -> View {
        let of: Vec<_> = of
            .iter()
            .map(|(entry, port, address)| (*entry, *port, *address, "sw"))
            .collect();
        in_namespaces(&of)
    }

    fn here() -> Here<'static> {
        Here {
            node: "node-a",
            addresses: BTreeSet::from(["10.0.0.254".parse().unwrap()]),
        }
    }

    fn names(ports: &PortNames) -> Vec<(u16, &str)> {
        ports
            .names
            .iter()
            .map(|(port, name)| (*port, name.service.as_str()))
            .collect()
    }

    fn exempt_words(service: &ServicePlan) -> Vec<String> {
        service.exempt.iter().map(ToString::to_string).collect()
    }

    /// Entries that mean Services by labels.
    fn by_labels(names: &[&str]) -> Kubernetes {
        let mut config = config(names);
        for entry in &mut config.services {
            entry.of = ServiceChoice::Selected {
                namespace: None,
                selectors: vec!["app=oap".into()],
            };
        }
        config
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
        let view = groups(&[("agents", 11800, "10.0.0.1"), ("prod", 1800, "10.0.0.3")]);
        let mut ports = PortNames::default();
        assert!(ports.update(&config, &view, &HashSet::new()).is_empty());
        let plan = ports.plan(&config, &view, &here());
        let [agents, prod] = &plan.services[..] else {
            panic!("two: {plan:?}")
        };
        let certain = ["10.0.0.254/32", "10.9.0.0/16", "127.0.0.0/8", "::1/128"];
        assert_eq!(
            exempt_words(agents),
            [&certain[..], &["10.0.0.1/32"]].concat()
        );
        assert_eq!(
            exempt_words(prod),
            [&certain[..], &["10.0.0.3/32"]].concat()
        );
        assert_eq!((agents.port, prod.port), (11800, 1800));
    }

    #[test]
    fn a_pod_of_its_nodes_network_makes_nobody_there_exempt() {
        let config = config(&["agents"]);
        let mut view = groups(&[
            ("agents", 11800, "10.0.0.1"),
            ("agents", 11800, "192.0.2.7"),
        ]);
        let exempt = |view: &View| {
            let mut ports = PortNames::default();
            ports.update(&config, view, &HashSet::new());
            exempt_words(&ports.plan(&config, view, &here()).services[0]).split_off(4)
        };
        assert_eq!(exempt(&view), ["10.0.0.1/32", "192.0.2.7/32"]);
        let pods = view.groups.values_mut().flatten();
        pods.for_each(|pod| pod.host_network = *pod.uid == *"192.0.2.7");
        assert_eq!(exempt(&view), ["10.0.0.1/32"]);
        assert_eq!(peers_of_host_networks(&config, &view), Vec::<String>::new());
        let mut limited = config;
        limited.services[0].quota = ClusterQuota::Fixed(9);
        let said = peers_of_host_networks(&limited, &view);
        assert!(
            said[0].contains("to port 11800 of the others are not exempt"),
            "{said:?}"
        );
    }

    #[test]
    fn pods_of_another_namespace_are_no_peers() {
        let config = by_labels(&["agents"]);
        let of = [
            ("agents", 11800, "10.0.0.1", "sw"),
            ("agents", 11800, "10.0.0.2", "sw"),
            ("agents", 11800, "10.66.0.1", "tenant"),
            ("agents", 11800, "10.66.0.2", "tenant"),
        ];
        let peers = |view: &View, here: &Here<'_>| {
            let mut ports = PortNames::default();
            ports.update(&config, view, &HashSet::new());
            let plan = ports.plan(&config, view, here);
            exempt_words(&plan.services[0]).split_off(4)
        };
        let view = in_namespaces(&of);
        assert_eq!(peers(&view, &here()), ["10.0.0.1/32", "10.0.0.2/32"]);
        let there = Here {
            node: "node-b",
            ..here()
        };
        assert_eq!(
            peers(&view, &there),
            ["10.0.0.1/32", "10.0.0.2/32"],
            "nobody is here"
        );
        let mut only_theirs = in_namespaces(&of);
        for (id, endpoints) in &mut only_theirs.groups {
            if id.service.namespace == "sw" {
                for pod in endpoints {
                    pod.node = Some("node-b".into());
                }
            }
        }
        let theirs = ["10.66.0.1/32", "10.66.0.2/32"];
        assert_eq!(
            peers(&only_theirs, &here()),
            theirs,
            "where no other group has a pod"
        );
    }

    #[test]
    fn ports_of_many_services_leave_room_for_those_of_others() {
        let config = by_labels(&["agents"]);
        let address = |index: u16| format!("10.66.{}.{}", index / 250, index % 250);
        let addresses: Vec<String> = (0..200).map(address).collect();
        let namespaces: Vec<String> = (0..20).map(|number| format!("tenant-{number}")).collect();
        let theirs = (0..200_u16).map(|index| {
            let at = usize::from(index);
            (
                "agents",
                2000 + index,
                &*addresses[at],
                &*namespaces[at % 20],
            )
        });
        let of_one = (0..70_u16).map(|index| ("agents", 2000 + index, "10.66.0.1", "tenant"));
        let mut ports = PortNames::default();
        let oldest = [("agents", 11800, "10.0.0.1", "sw")];
        let view = in_namespaces(&oldest.into_iter().chain(of_one).collect::<Vec<_>>());
        let left_out = ports.update(&config, &view, &HashSet::new());
        assert_eq!(ports.names.len(), 1 + 8);
        assert!(
            left_out[0].contains("namespace tenant have more than 8"),
            "{left_out:?}"
        );
        // A younger Service of another namespace still gets its port.
        let younger = [("agents", 21800, "10.0.0.7", "prod")];
        let of_one = (0..70_u16).map(|index| ("agents", 2000 + index, "10.66.0.1", "tenant"));
        let view = in_namespaces(&of_one.chain(younger).collect::<Vec<_>>());
        ports.update(&config, &view, &HashSet::new());
        assert!(ports.names.contains_key(&21800));
        // With many namespaces all services are taken; a Service that the file names comes first.
        let mut config = config;
        config.services.push(entry("named"));
        let named = [("named", 31800, "10.0.0.9", "sw")];
        let view = in_namespaces(&named.into_iter().chain(theirs).collect::<Vec<_>>());
        let left_out = ports.update(&config, &view, &HashSet::new());
        assert!(ports.names.contains_key(&31800));
        assert_eq!(ports.names.len(), MAX_SERVICES);
        assert!(
            left_out[0].contains("more than 64 target ports"),
            "{left_out:?}"
        );
        assert_eq!(ports.plan(&config, &view, &here()).services[0].port, 31800);
    }

    #[test]
    fn a_port_needs_a_ready_pod_once_unless_its_service_is_named() {
        let mut view = groups(&[("agents", 11800, "10.0.0.1")]);
        let unready = |view: &mut View| {
            let pods = view.groups.values_mut().flatten();
            pods.for_each(|pod| pod.ready = false);
        };
        let mut ports = PortNames::default();
        let config = by_labels(&["agents"]);
        unready(&mut view);
        ports.update(&config, &view, &HashSet::new());
        assert_eq!(names(&ports), []);
        ports.update(&self::config(&["agents"]), &view, &HashSet::new());
        assert_eq!(names(&ports), [(11800, "agents")]);
        ports.update(&config, &view, &HashSet::new());
        assert_eq!(names(&ports), [(11800, "agents")], "it keeps it");
    }

    #[test]
    fn peers_without_number_leave_room_for_what_is_certain() {
        let config = by_labels(&["agents"]);
        let addresses: Vec<String> = (0..15_000_u32)
            .map(|index| Ipv4Addr::from(0x0a00_0000 + index).to_string())
            .collect();
        let of: Vec<_> = addresses
            .iter()
            .enumerate()
            .map(|(index, address)| {
                let port = 2000 + u16::try_from(index % 60).unwrap();
                (
                    "agents",
                    port,
                    &**address,
                    ["a", "b", "c", "d", "e", "f", "g", "h"][index % 60 / 8],
                )
            })
            .collect();
        let view = in_namespaces(&of);
        let mut ports = PortNames::default();
        ports.update(&config, &view, &HashSet::new());
        let plan = ports.plan(&config, &view, &here());
        let ids: Vec<u16> = (0..).take(plan.services.len()).collect();
        assert_eq!(plan.services.len(), 60);
        assert!(plan.exempt(&ids).len() <= MOST_EXEMPT);
        for service in &plan.services {
            assert!(
                exempt_words(service).contains(&"127.0.0.0/8".to_owned()),
                "{service:?}"
            );
        }
    }
}
