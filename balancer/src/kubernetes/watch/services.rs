//! Services: which of them an entry means, and which port of them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::runtime::watcher;
use kube::{Api, Client};

use super::{Store, Watch, start};
use crate::config::{PortChoice, ServiceChoice};
use crate::kubernetes::health::Notifier;

/// What is watched; entries that mean the same share a watch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::kubernetes) struct Key {
    namespace: Option<String>,
    name: Option<String>,
    labels: Option<String>,
}

impl Key {
    /// The watches that find what is meant together: a label selector can't say "or".
    pub(in crate::kubernetes) fn of(choice: &ServiceChoice) -> Vec<Self> {
        match choice {
            ServiceChoice::Named { namespace, name } => vec![Self {
                namespace: Some(namespace.clone()),
                name: Some(name.clone()),
                labels: None,
            }],
            ServiceChoice::Selected {
                namespace,
                selectors,
            } => selectors
                .iter()
                .map(|selector| Self {
                    namespace: namespace.clone(),
                    name: None,
                    labels: Some(selector.clone()),
                })
                .collect(),
        }
    }
}

/// What is of interest in a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kubernetes) struct Facts {
    /// Its TCP ports.
    ports: Vec<Port>,
    /// Which pods it means; `None`: its `EndpointSlices` are made by somebody else.
    pub(in crate::kubernetes) pods: Option<BTreeMap<String, String>>,
}

/// A TCP port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kubernetes) struct Port {
    /// Its name, by which `EndpointSlices` refer to it; empty where it has none.
    pub(in crate::kubernetes) name: String,
    number: u16,
    /// The port of the pods; `None`: it is a name, which may mean another number in each pod.
    pub(in crate::kubernetes) target: Option<u16>,
}

impl Facts {
    pub(in crate::kubernetes) fn of(service: &Service) -> Self {
        let spec = service.spec.clone().unwrap_or_default();
        let tcp = spec.ports.unwrap_or_default().into_iter().filter(|port| {
            port.protocol
                .as_deref()
                .is_none_or(|protocol| protocol == "TCP")
        });
        let ports = tcp.filter_map(|port| {
            let number = u16::try_from(port.port).ok()?;
            let target = match port.target_port {
                None | Some(IntOrString::Int(0)) => Some(number),
                Some(IntOrString::Int(target)) => u16::try_from(target).ok(),
                Some(IntOrString::String(name)) => name.parse().ok(),
            };
            Some(Port {
                name: port.name.unwrap_or_default(),
                number,
                target,
            })
        });
        Self {
            ports: ports.collect(),
            pods: spec.selector.filter(|labels| !labels.is_empty()),
        }
    }

    /// The port that is meant.
    pub(in crate::kubernetes) fn port(&self, choice: &PortChoice) -> Option<&Port> {
        self.ports.iter().find(|port| match choice {
            PortChoice::Number(number) => port.number == *number,
            PortChoice::Name(name) => port.name == *name,
        })
    }

    /// Its ports, for a message.
    pub(in crate::kubernetes) fn ports_in_words(&self) -> String {
        let words = self
            .ports
            .iter()
            .map(|port| match port.name.as_str() {
                "" => port.number.to_string(),
                name => format!("{} ({name})", port.number),
            })
            .collect::<Vec<_>>();
        if words.is_empty() {
            "none".to_owned()
        } else {
            words.join(", ")
        }
    }
}

pub(in crate::kubernetes) fn watch(
    client: &Client,
    key: &Key,
    notifier: &Notifier,
) -> Watch<Facts> {
    let mut config = watcher::Config::default();
    if let Some(labels) = &key.labels {
        config = config.labels(labels);
    }
    if let Some(name) = &key.name {
        config = config.fields(&format!("metadata.name={name}"));
    }
    let namespace = key.namespace.as_deref();
    let store = Store::new("services", namespace, notifier);
    let api = |client| match namespace {
        Some(namespace) => Api::<Service>::namespaced(client, namespace),
        None => Api::all(client),
    };
    start(client, api, config, &store, |service, _| {
        Some(Facts::of(service))
    })
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
        let facts = Facts::of(&service);
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
