//! Kubernetes Services: which of them a service entry means, and which port of them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Facts, Selection};
use crate::config::{PortChoice, ServiceChoice};

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

/// What is of interest in a Kubernetes Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceFacts {
    /// The TCP ports of the Service.
    ports: Vec<ServicePort>,
    /// Labels of its pods; `None`: somebody else makes its `EndpointSlices`.
    pub(super) pods: Option<BTreeMap<String, String>>,
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

    fn digest(service: &Service, _: Option<&Self>) -> Option<Self> {
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
        })
    }
}

impl ServiceFacts {
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
        let facts = ServiceFacts::digest(&service, None).unwrap();
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
