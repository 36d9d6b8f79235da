//! Kubernetes Services: which of them a service entry means, and which port of them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;

use super::{Bounds, Facts, Heard, Selection};
use crate::config::{PortChoice, ServiceChoice};
use crate::kubernetes::model::{ObjectName, Traffic};

/// The selections of one choice: a label selector can't say "or".
pub(super) fn selections(choice: &ServiceChoice) -> Vec<Selection> {
    match choice {
        ServiceChoice::Named { namespace, name } => vec![Selection::named(namespace, name)],
        ServiceChoice::Selected {
            namespace,
            selectors,
        } => selectors
            .iter()
            .map(|labels| Selection::labelled(namespace.clone(), labels))
            .collect(),
    }
}

/// The most Services of one namespace that a selector means. Who has more can name them.
const MOST_OF_NAMESPACE: usize = 8;
/// The most Services that a selector means.
const MOST_FOLLOWED: usize = 256;

/// Those of the Services of a selection that are followed, the oldest first, and a sentence for
/// each namespace that has more of them: anybody may give a Service the labels of an OAP's.
pub(super) fn followed(
    found: &BTreeMap<ObjectName, ServiceFacts>,
) -> (Vec<(&ObjectName, &ServiceFacts)>, Vec<String>) {
    let mut oldest_first: Vec<_> = found.iter().collect();
    oldest_first.sort_by_key(|(_, facts)| facts.age_order());
    let mut of_namespace: BTreeMap<&str, usize> = BTreeMap::new();
    oldest_first.retain(|(name, _)| {
        let number = of_namespace.entry(&name.namespace).or_default();
        *number += 1;
        *number <= MOST_OF_NAMESPACE
    });
    let more = of_namespace
        .into_iter()
        .filter(|(_, number)| *number > MOST_OF_NAMESPACE);
    let mut left_out: Vec<String> = more
        .map(|(namespace, number)| {
            format!(
                "the namespace {namespace} has {number} Services of one selector: the \
                 {MOST_OF_NAMESPACE} oldest are balanced. An entry `service: \
                 {namespace}/NAME` balances another one"
            )
        })
        .collect();
    if oldest_first.len() > MOST_FOLLOWED {
        let number = oldest_first.len();
        left_out.push(format!(
            "{number} Services of one selector are too many: the {MOST_FOLLOWED} oldest are \
             balanced. An entry `service: NAMESPACE/NAME` balances another one"
        ));
    }
    oldest_first.truncate(MOST_FOLLOWED);
    (oldest_first, left_out)
}

/// What is of interest in a Kubernetes Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceFacts {
    /// The TCP ports of the Service.
    ports: Vec<ServicePort>,
    /// Labels of its pods; `None`: somebody else makes its `EndpointSlices`.
    pub(super) pods: Option<BTreeMap<String, String>>,
    /// When it was made, by the API server's clock.
    created: Option<Time>,
    /// The cluster addresses that kube-proxy carries on.
    addresses: Vec<IpAddr>,
    /// How its traffic is to go.
    pub(super) traffic: Traffic,
}

/// The annotation that leaves a Service, or a pod's own connects, alone where it says `off`.
pub(crate) const PLACE: &str = "balancer.skywalking.apache.org/place";
/// The label of a Service that is another proxy's than kube-proxy's.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// The annotation of topology aware routing.
const TOPOLOGY: &str = "service.kubernetes.io/topology-mode";

/// A TCP port of a Kubernetes Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServicePort {
    /// The port's name, by which `EndpointSlices` refer to it; empty where it has none.
    pub(super) name: String,
    number: u16,
    /// The port of the pods; `None`: it is a name, which may mean another number in each pod.
    pub(super) target: Option<u16>,
}

/// Whether a port is a TCP port; without a protocol it is.
pub(super) fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

impl Facts for ServiceFacts {
    type Object = Service;
    const RESOURCE: &'static str = "services";
    const MOST: Bounds = Bounds {
        of_namespace: 256,
        in_all: 4_096,
    };

    fn digest(service: &Service, _: Option<&Self>, _: Heard) -> Option<Self> {
        let spec = service.spec.clone().unwrap_or_default();
        let (addresses, traffic) = (addresses(service, &spec), traffic(service, &spec));
        let ports = spec.ports.unwrap_or_default().into_iter();
        let tcp = ports.filter(|port| is_tcp(port.protocol.as_deref()));
        let ports = tcp.filter_map(|port| {
            let number = u16::try_from(port.port).ok()?;
            let target = match port.target_port {
                None | Some(IntOrString::Int(0)) => Some(number),
                Some(IntOrString::Int(target)) => u16::try_from(target).ok(),
                Some(IntOrString::String(name)) => name.parse().ok(),
            };
            Some(ServicePort {
                name: port.name.unwrap_or_default(),
                number,
                target,
            })
        });
        Some(Self {
            ports: ports.collect(),
            pods: spec.selector.filter(|labels| !labels.is_empty()),
            created: service.creation_timestamp(),
            addresses,
            traffic,
        })
    }
}

/// The addresses that kube-proxy carries on (`ShouldSkipService` in
/// `pkg/proxy/util/utils.go`).
fn addresses(service: &Service, spec: &ServiceSpec) -> Vec<IpAddr> {
    let is_external = spec.type_.as_deref() == Some("ExternalName");
    if is_external || service.labels().contains_key(OTHER_PROXY) {
        return Vec::new();
    }
    let mut addresses: Vec<&String> = spec.cluster_ips.iter().flatten().collect();
    if addresses.is_empty() {
        addresses.extend(&spec.cluster_ip);
    }
    // A headless one has `None`.
    let parsed = addresses.into_iter();
    parsed.filter_map(|text| text.parse().ok()).collect()
}

fn traffic(service: &Service, spec: &ServiceSpec) -> Traffic {
    let annotations = service.annotations();
    let is_local = |policy: &Option<String>| policy.as_deref() == Some("Local");
    let mode = annotations.get(TOPOLOGY).map(String::as_str);
    Traffic {
        own_node_only: is_local(&spec.internal_traffic_policy),
        affinity: spec.session_affinity.as_deref() == Some("ClientIP"),
        left_alone: is_off(annotations),
        near: spec.traffic_distribution.is_some() || matches!(mode, Some("Auto" | "auto")),
        outside: matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"))
            || spec
                .external_ips
                .as_ref()
                .is_some_and(|ips| !ips.is_empty()),
        other_proxy: service.labels().contains_key(OTHER_PROXY),
    }
}

/// Whether annotations say that something is not placed.
pub(crate) fn is_off(annotations: &BTreeMap<String, String>) -> bool {
    let said = annotations.get(PLACE).map(|text| text.trim());
    matches!(said, Some("off" | "false"))
}

impl ServiceFacts {
    /// What clients connect to for this port.
    pub(super) fn frontends(&self, port: &ServicePort) -> Vec<SocketAddr> {
        let addresses = self.addresses.iter();
        addresses
            .map(|address| SocketAddr::new(*address, port.number))
            .collect()
    }

    /// Oldest first: nobody can make a Service that is older than those that are there.
    pub(super) fn age_order(&self) -> impl Ord + use<> {
        (self.created.is_none(), self.created.clone())
    }

    /// The port that is meant.
    pub(super) fn port(&self, choice: &PortChoice) -> Option<&ServicePort> {
        self.ports.iter().find(|port| match choice {
            PortChoice::Number(number) => port.number == *number,
            PortChoice::Name(name) => port.name == *name,
        })
    }

    /// The TCP ports of the Service, for a message: `11800 (grpc), 12800`.
    pub(super) fn ports_in_words(&self) -> String {
        let ports = self.ports.iter().map(|port| match port.name.as_str() {
            "" => port.number.to_string(),
            name => format!("{} ({name})", port.number),
        });
        match ports.collect::<Vec<_>>() {
            ports if ports.is_empty() => "none".to_owned(),
            ports => ports.join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_port_is_found_by_number_or_name_and_udp_is_none() {
        let service =
            serde_json::from_value(json!({"spec": {"selector": {"app": "oap"}, "ports": [
                {"name": "dns", "port": 11800, "protocol": "UDP"},
                {"name": "grpc", "port": 11800, "protocol": "TCP", "targetPort": 21800},
                {"name": "rest", "port": 12800, "targetPort": "http"},
                {"name": "same", "port": 9000},
            ]}}))
            .unwrap();
        let facts = ServiceFacts::digest(&service, None, Heard::Listed).unwrap();
        let grpc = facts.port(&PortChoice::Number(11800)).unwrap();
        assert_eq!((grpc.name.as_str(), grpc.target), ("grpc", Some(21800)));
        let by_name = |name: &str| facts.port(&PortChoice::Name(name.to_owned()));
        assert_eq!(by_name("rest").unwrap().target, None);
        assert_eq!(by_name("same").unwrap().target, Some(9000));
        assert_eq!(by_name("dns"), None);
        assert_eq!(
            facts.ports_in_words(),
            "11800 (grpc), 12800 (rest), 9000 (same)"
        );
    }

    fn facts(service: serde_json::Value) -> ServiceFacts {
        let service = serde_json::from_value(service).unwrap();
        ServiceFacts::digest(&service, None, Heard::Listed).unwrap()
    }

    #[test]
    fn clients_connect_to_the_cluster_addresses_of_both_families_and_to_nothing_else() {
        let frontends = |metadata: serde_json::Value, mut spec: serde_json::Value| {
            spec["ports"] = json!([{"name": "grpc", "port": 11800, "nodePort": 30_800}]);
            let facts = facts(json!({"metadata": metadata, "spec": spec}));
            let port = facts.port(&PortChoice::Number(11800)).unwrap();
            let frontends = facts.frontends(port).into_iter();
            frontends.map(|at| at.to_string()).collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        let both = json!({"type": "LoadBalancer", "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7", "fd00:96::7"], "externalIPs": ["192.0.2.1"]});
        assert_eq!(
            frontends(json!({}), both.clone()),
            ["10.96.0.7:11800", "[fd00:96::7]:11800"]
        );
        assert_eq!(
            frontends(json!({"labels": {OTHER_PROXY: "mine"}}), both),
            none
        );
        let one = json!({"clusterIP": "10.96.0.7"});
        assert_eq!(frontends(json!({}), one), ["10.96.0.7:11800"]);
        let headless = json!({"clusterIP": "None", "clusterIPs": ["None"]});
        assert_eq!(frontends(json!({}), headless), none);
        let external = json!({"type": "ExternalName", "externalName": "oap.example"});
        assert_eq!(frontends(json!({}), external), none);
    }

    #[test]
    fn what_a_service_says_of_its_traffic_is_known() {
        let traffic = |annotations: serde_json::Value, spec: serde_json::Value| {
            facts(json!({"metadata": {"annotations": annotations}, "spec": spec})).traffic
        };
        let usual = json!({"internalTrafficPolicy": "Cluster", "sessionAffinity": "None"});
        assert_eq!(traffic(json!({}), usual), Traffic::default());
        assert_eq!(traffic(json!({PLACE: "on"}), json!({})), Traffic::default());
        let special = json!({"internalTrafficPolicy": "Local", "sessionAffinity": "ClientIP",
            "trafficDistribution": "PreferClose", "type": "NodePort"});
        let expected = Traffic {
            own_node_only: true,
            affinity: true,
            left_alone: true,
            near: true,
            outside: true,
            other_proxy: false,
        };
        assert_eq!(traffic(json!({PLACE: "off"}), special), expected);
        let other = facts(json!({"metadata": {"labels": {OTHER_PROXY: "mine"}}, "spec": {}}));
        assert!(other.traffic.other_proxy);
        assert!(traffic(json!({TOPOLOGY: "Auto"}), json!({})).near);
    }
}
