//! `EndpointSlices`: which pods serve a port of a Service, and at which addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::{Endpoint as SliceEndpoint, EndpointSlice};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};

use super::{Store, Watch, start};
use crate::kubernetes::ObjectName;
use crate::kubernetes::health::Notifier;

/// The label that names the Service of a slice.
const SERVICE: &str = "kubernetes.io/service-name";
/// With more Services than this all slices are watched: their names would make too long a URL.
const MOST_NAMES: usize = 64;

/// What is watched: the slices of some Services.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::kubernetes) struct Key {
    namespace: Option<String>,
    services: BTreeSet<String>,
}

impl Key {
    /// For these Services; `None` if there are none.
    pub(in crate::kubernetes) fn of<'a>(
        services: impl IntoIterator<Item = &'a ObjectName>,
    ) -> Option<Self> {
        let mut namespaces = BTreeSet::new();
        let mut names = BTreeSet::new();
        for service in services {
            namespaces.insert(service.namespace.as_str());
            names.insert(service.name.clone());
        }
        let first = namespaces.pop_first()?;
        Some(Self {
            namespace: namespaces.is_empty().then(|| first.to_owned()),
            services: names,
        })
    }

    /// Slices of this Service are among those that are watched.
    pub(in crate::kubernetes) fn covers(&self, service: &ObjectName) -> bool {
        self.services.contains(&service.name)
            && self
                .namespace
                .as_ref()
                .is_none_or(|namespace| *namespace == service.namespace)
    }

    fn selector(&self) -> String {
        if self.services.len() > MOST_NAMES {
            return SERVICE.to_owned();
        }
        let names = self.services.iter().map(String::as_str).collect::<Vec<_>>();
        format!("{SERVICE} in ({})", names.join(","))
    }
}

/// What is of interest in a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kubernetes) struct Facts {
    service: String,
    /// TCP ports: the name of the Service's port, and the number in the pods.
    ports: Vec<(String, u16)>,
    pods: Vec<Pod>,
}

/// A pod in a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kubernetes) struct Pod {
    pub(in crate::kubernetes) name: ObjectName,
    pub(in crate::kubernetes) uid: String,
    pub(in crate::kubernetes) addresses: Vec<IpAddr>,
    pub(in crate::kubernetes) node: Option<String>,
    pub(in crate::kubernetes) ready: bool,
    pub(in crate::kubernetes) terminating: bool,
}

impl Facts {
    fn of(slice: &EndpointSlice) -> Option<Self> {
        let service = slice.labels().get(SERVICE)?.clone();
        let namespace = slice.namespace().unwrap_or_default();
        let ports = slice.ports.iter().flatten().filter(|port| {
            port.protocol
                .as_deref()
                .is_none_or(|protocol| protocol == "TCP")
        });
        let ports = ports.filter_map(|port| {
            let number = u16::try_from(port.port?).ok()?;
            Some((port.name.clone().unwrap_or_default(), number))
        });
        Some(Self {
            service,
            ports: ports.collect(),
            pods: slice
                .endpoints
                .iter()
                .filter_map(|endpoint| Pod::of(endpoint, &namespace))
                .collect(),
        })
    }
}

impl Pod {
    /// `None`: it is not a pod.
    fn of(endpoint: &SliceEndpoint, namespace: &str) -> Option<Self> {
        let target = endpoint
            .target_ref
            .as_ref()
            .filter(|target| target.kind.as_deref() == Some("Pod"))?;
        let conditions = endpoint.conditions.clone().unwrap_or_default();
        let terminating = conditions.terminating.unwrap_or(false);
        Some(Self {
            name: ObjectName {
                namespace: target
                    .namespace
                    .clone()
                    .unwrap_or_else(|| namespace.to_owned()),
                name: target.name.clone()?,
            },
            uid: target.uid.clone()?,
            // Names (address type FQDN) are none.
            addresses: endpoint
                .addresses
                .iter()
                .filter_map(|address| address.parse().ok())
                .collect(),
            node: endpoint.node_name.clone(),
            // Where a Service publishes addresses that are not ready, a pod that ends is ready too.
            ready: conditions.ready.unwrap_or(true) && !terminating,
            terminating,
        })
    }

    /// The same pod in another slice: of the other address family, or twice while the controller moves it. The two may be of different age;
    /// the one that gives it less wins.
    fn merge(&mut self, other: &Self) {
        for address in &other.addresses {
            if !self.addresses.contains(address) {
                self.addresses.push(*address);
            }
        }
        self.node = self.node.take().or_else(|| other.node.clone());
        self.ready &= other.ready;
        self.terminating |= other.terminating;
    }
}

/// The pods behind the port that a Service calls `port`, by their own port, each once, in the order of their names.
pub(in crate::kubernetes) fn behind<'a>(
    slices: impl IntoIterator<Item = (&'a ObjectName, &'a Facts)>,
    service: &ObjectName,
    port: &str,
) -> BTreeMap<u16, Vec<Pod>> {
    let mut found = BTreeMap::<u16, BTreeMap<(ObjectName, String), Pod>>::new();
    for (slice, facts) in slices {
        if slice.namespace != service.namespace || facts.service != service.name {
            continue;
        }
        for (_, number) in facts.ports.iter().filter(|(name, _)| name == port) {
            let group = found.entry(*number).or_default();
            for pod in &facts.pods {
                group
                    .entry((pod.name.clone(), pod.uid.clone()))
                    .and_modify(|known| known.merge(pod))
                    .or_insert_with(|| pod.clone());
            }
        }
    }
    let sorted = |pods: BTreeMap<_, Pod>| {
        pods.into_values()
            .map(|mut pod| {
                pod.addresses.sort_unstable();
                pod
            })
            .collect()
    };
    found
        .into_iter()
        .map(|(port, pods)| (port, sorted(pods)))
        .collect()
}

pub(in crate::kubernetes) fn watch(
    client: &Client,
    key: &Key,
    notifier: &Notifier,
) -> Watch<Facts> {
    let config = watcher::Config::default().labels(&key.selector());
    let namespace = key.namespace.as_deref();
    let store = Store::new("endpointslices.discovery.k8s.io", namespace, notifier);
    let api = |client| match namespace {
        Some(namespace) => Api::<EndpointSlice>::namespaced(client, namespace),
        None => Api::all(client),
    };
    start(client, api, config, &store, |slice, _| Facts::of(slice))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn named(name: &str) -> ObjectName {
        ObjectName {
            namespace: "sw".to_owned(),
            name: name.to_owned(),
        }
    }

    fn slice(name: &str, kind: &str, ports: &Value, endpoints: &Value) -> (ObjectName, Facts) {
        let slice = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "sw", "labels": {SERVICE: "oap"}},
            "addressType": kind, "ports": ports, "endpoints": endpoints,
        }))
        .unwrap();
        (named(name), Facts::of(&slice).unwrap())
    }

    fn endpoint(pod: &str, address: &str, conditions: &Value) -> Value {
        json!({"addresses": [address], "conditions": conditions, "nodeName": "node-a",
            "targetRef": {"kind": "Pod", "name": pod, "namespace": "sw", "uid": format!("uid-{pod}")}})
    }

    fn pods(slices: &[(ObjectName, Facts)], port: &str) -> BTreeMap<u16, Vec<Pod>> {
        behind(
            slices.iter().map(|(name, facts)| (name, facts)),
            &named("oap"),
            port,
        )
    }

    #[test]
    fn what_is_not_said_of_an_endpoint_means_what_the_api_says() {
        let cases = [
            (json!({}), true, false),
            (json!(null), true, false),
            (json!({"ready": false}), false, false),
            (json!({"ready": true, "terminating": null}), true, false),
            (
                json!({"ready": false, "serving": true, "terminating": true}),
                false,
                true,
            ),
            (json!({"ready": true, "terminating": true}), false, true),
        ];
        for (conditions, ready, terminating) in cases {
            let slices = [slice(
                "a",
                "IPv4",
                &json!([{"name": "grpc", "port": 11800}]),
                &json!([endpoint("oap-0", "10.0.0.1", &conditions)]),
            )];
            let pod = &pods(&slices, "grpc")[&11800][0];
            assert_eq!(
                (pod.ready, pod.terminating),
                (ready, terminating),
                "{conditions}"
            );
        }
    }

    #[test]
    fn families_and_duplicates_of_a_pod_are_one() {
        let ports = json!([{"name": "grpc", "port": 11800, "protocol": "TCP"}, {"name": "grpc", "port": 53, "protocol": "UDP"}]);
        let ready = json!({"ready": true});
        let slices = [
            slice(
                "a",
                "IPv4",
                &ports,
                &json!([
                    endpoint("oap-1", "10.0.0.2", &ready),
                    endpoint("oap-0", "10.0.0.1", &ready)
                ]),
            ),
            slice(
                "b",
                "IPv6",
                &ports,
                &json!([endpoint("oap-0", "fd00::1", &ready)]),
            ),
            slice(
                "c",
                "IPv4",
                &ports,
                &json!([endpoint("oap-0", "10.0.0.1", &json!({"ready": false}))]),
            ),
        ];
        let found = pods(&slices, "grpc");
        assert_eq!(found.keys().collect::<Vec<_>>(), [&11800], "UDP is none");
        let group = &found[&11800];
        assert_eq!(group.len(), 2);
        assert_eq!(group[0].name, named("oap-0"));
        assert_eq!(
            group[0].addresses,
            [
                "10.0.0.1".parse::<IpAddr>().unwrap(),
                "fd00::1".parse().unwrap()
            ]
        );
        assert!(!group[0].ready && group[1].ready);
    }

    #[test]
    fn a_named_target_port_may_be_another_number_in_each_pod() {
        let ready = json!({});
        let slices = [
            slice(
                "a",
                "IPv4",
                &json!([{"name": "grpc", "port": 11800}]),
                &json!([endpoint("oap-0", "10.0.0.1", &ready)]),
            ),
            slice(
                "b",
                "IPv4",
                &json!([{"name": "grpc", "port": 21800}]),
                &json!([endpoint("oap-1", "10.0.0.2", &ready)]),
            ),
            slice(
                "c",
                "IPv4",
                &json!([{"name": "rest", "port": 12800}]),
                &json!([endpoint("oap-1", "10.0.0.2", &ready)]),
            ),
            slice("d", "IPv4", &json!(null), &json!([])),
        ];
        let found = pods(&slices, "grpc");
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [11800, 21800]);
        assert_eq!(found[&21800][0].uid, "uid-oap-1");
    }

    #[test]
    fn what_is_no_pod_or_of_another_service_is_left_out() {
        let ports = json!([{"port": 11800}]);
        let (name, facts) = slice(
            "a",
            "IPv4",
            &ports,
            &json!([{"addresses": ["192.0.2.1"]},
                {"addresses": ["192.0.2.2"], "targetRef": {"kind": "Node", "name": "n", "uid": "u"}}]),
        );
        let found = behind([(&name, &facts)], &named("oap"), "");
        assert!(found[&11800].is_empty());
        assert!(behind([(&name, &facts)], &named("other"), "").is_empty());
    }

    #[test]
    fn one_watch_covers_all_services_of_an_entry() {
        let other = ObjectName {
            namespace: "b".to_owned(),
            name: "oap2".to_owned(),
        };
        assert_eq!(Key::of([]), None);
        let one = Key::of([&named("oap")]).unwrap();
        assert_eq!(one.namespace.as_deref(), Some("sw"));
        assert_eq!(one.selector(), "kubernetes.io/service-name in (oap)");
        assert!(one.covers(&named("oap")) && !one.covers(&other));
        let both = Key::of([&named("oap"), &other]).unwrap();
        assert_eq!(both.namespace, None);
        assert_eq!(both.selector(), "kubernetes.io/service-name in (oap,oap2)");
        assert!(both.covers(&named("oap")) && both.covers(&other));
    }
}
