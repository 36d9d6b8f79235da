//! Kubernetes Services: which of them a service entry means, and which port of them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;

use super::{Bounds, Facts, Heard, Selection};
use crate::config::{PortChoice, ServiceChoice};
use crate::kubernetes::model::ObjectName;

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
}

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
        })
    }
}

impl ServiceFacts {
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
}
