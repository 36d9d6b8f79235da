//! `EndpointSlices`: which pods serve a port of a Kubernetes Service, and at which addresses.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::discovery::v1::{Endpoint as SliceEndpoint, EndpointSlice};
use kube::ResourceExt as _;

use super::contested::drop_contested;
use super::services::is_tcp;
use super::{Bounds, Facts, Heard, Selection};
use crate::kubernetes::health::Problems;
use crate::kubernetes::model::{Endpoint, GroupId, ObjectName, Offered};

/// The label that names the Kubernetes Service of a slice.
const SERVICE: &str = "kubernetes.io/service-name";
/// With more Services than this all slices are watched: their names would make too long a URL.
const MOST_NAMES: usize = 64;

/// The slices of some Kubernetes Services, which one watch lists.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SliceSet {
    namespace: Option<String>,
    services: BTreeSet<String>,
}

impl SliceSet {
    /// For these Services; `None` if there are none.
    pub(super) fn of<'a>(services: impl IntoIterator<Item = &'a ObjectName>) -> Option<Self> {
        let mut namespaces = BTreeSet::new();
        let mut names = BTreeSet::new();
        for service in services {
            namespaces.insert(&service.namespace);
            names.insert(service.name.clone());
        }
        let first = namespaces.pop_first()?;
        Some(Self {
            namespace: namespaces.is_empty().then(|| first.clone()),
            services: names,
        })
    }

    /// Whether the slices of this Service are among them.
    pub(super) fn covers(&self, service: &ObjectName) -> bool {
        let namespace = self.namespace.as_ref();
        self.services.contains(&service.name)
            && namespace.is_none_or(|namespace| *namespace == service.namespace)
    }

    pub(super) fn selection(&self) -> Selection {
        Selection::labelled(self.namespace.clone(), self.labels())
    }

    fn labels(&self) -> String {
        if self.services.len() > MOST_NAMES {
            return SERVICE.to_owned();
        }
        let names = self.services.iter().map(String::as_str).collect::<Vec<_>>();
        format!("{SERVICE} in ({})", names.join(","))
    }
}

/// What is of interest in a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SliceFacts {
    service: String,
    /// TCP ports: the name of the Service's port, and the number in the pods.
    ports: Vec<(String, u16)>,
    pods: Vec<Endpoint>,
    /// It has an endpoint that is ready and no pod of its namespace.
    has_others: bool,
}

impl Facts for SliceFacts {
    type Object = EndpointSlice;
    const RESOURCE: &'static str = "endpointslices.discovery.k8s.io";
    const MOST: Bounds = Bounds {
        of_namespace: 6_000,
        in_all: 24_000,
    };
    // Each may have a thousand endpoints (`maxEndpoints`, pkg/apis/discovery/validation), some 300
    // bytes of text each.
    const PAGE: u32 = 16;

    fn digest(slice: &EndpointSlice, _: Option<&Self>, _: Heard) -> Option<Self> {
        let service = slice.labels().get(SERVICE)?.clone();
        let namespace = slice.namespace().unwrap_or_default();
        let ports = slice.ports.iter().flatten();
        let tcp = ports.filter(|port| is_tcp(port.protocol.as_deref()));
        let ports = tcp.filter_map(|port| {
            let number = u16::try_from(port.port?).ok()?;
            Some((port.name.clone().unwrap_or_default(), number))
        });
        let endpoints = || slice.endpoints.iter();
        let is_other =
            |one: &SliceEndpoint| endpoint(one, &namespace).is_none() && offered(one).ready;
        Some(Self {
            service,
            ports: ports.collect(),
            pods: endpoints()
                .filter_map(|pod| endpoint(pod, &namespace))
                .collect(),
            has_others: endpoints().any(is_other),
        })
    }

    fn weight(&self) -> usize {
        1 + self.pods.len()
    }
}

/// What a slice says of a pod, with the weight of one without annotation, as if it had a network
/// and the kernel as others do; `None`: it is no pod, or
/// not one of the slice's own namespace, whose owners may write what they like of other pods.
fn endpoint(endpoint: &SliceEndpoint, namespace: &str) -> Option<Endpoint> {
    let target = endpoint.target_ref.clone()?;
    let is_elsewhere = target.namespace.is_some_and(|of| of != namespace);
    if target.kind.as_deref() != Some("Pod") || is_elsewhere {
        return None;
    }
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let terminating = conditions.terminating.unwrap_or(false);
    // Names (address type FQDN) are no addresses.
    let addresses = endpoint.addresses.iter();
    let addresses: BTreeSet<_> = addresses.filter_map(|text| text.parse().ok()).collect();
    Some(Endpoint {
        pod: ObjectName {
            namespace: namespace.to_owned(),
            name: target.name?,
        },
        uid: target.uid?,
        addresses: addresses.into_iter().collect(),
        node: endpoint.node_name.clone(),
        // Where a Service publishes addresses that are not ready, a pod that ends is ready too.
        ready: conditions.ready.unwrap_or(true) && !terminating,
        terminating,
        weight: 1,
        confirmed: false,
        host_network: false,
        runtime_class: None,
        offered: offered(endpoint),
    })
}

/// What is said of an endpoint, read as kube-proxy does (`pkg/proxy/endpointslicecache.go`).
fn offered(endpoint: &SliceEndpoint) -> Offered {
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref();
    let zones = hints.and_then(|hints| hints.for_zones.as_ref());
    let nodes = hints.and_then(|hints| hints.for_nodes.as_ref());
    Offered {
        ready: conditions.and_then(|said| said.ready) != Some(false),
        serving: conditions.and_then(|said| said.serving) != Some(false),
        for_zones: zones
            .into_iter()
            .flatten()
            .map(|zone| zone.name.clone())
            .collect(),
        for_nodes: nodes
            .into_iter()
            .flatten()
            .map(|node| node.name.clone())
            .collect(),
    }
}

/// Adds what another slice says of the pod: one of the other address family, or the old place
/// while the controller moves it. Of two ages, the one that gives the pod less counts.
fn merge(pod: &mut Endpoint, other: &Endpoint) {
    pod.addresses.extend(&other.addresses);
    pod.addresses.sort_unstable();
    pod.addresses.dedup();
    pod.node = pod.node.take().or_else(|| other.node.clone());
    pod.ready &= other.ready;
    pod.terminating |= other.terminating;
    let (offered, others) = (&mut pod.offered, &other.offered);
    offered.ready &= others.ready;
    offered.serving &= others.serving;
    offered.for_zones.extend(others.for_zones.iter().cloned());
    offered.for_nodes.extend(others.for_nodes.iter().cloned());
}

/// The pods behind the port that a Kubernetes Service calls `port`, by target port. Each pod is
/// there once, in the order of names.
pub(super) fn behind<'a>(
    slices: impl IntoIterator<Item = (&'a ObjectName, &'a SliceFacts)>,
    service: &ObjectName,
    port: &str,
) -> BTreeMap<u16, Vec<Endpoint>> {
    let mut found = BTreeMap::<u16, BTreeMap<_, Endpoint>>::new();
    for (slice, facts) in slices {
        if slice.namespace != service.namespace || facts.service != service.name {
            continue;
        }
        for (_, target) in facts.ports.iter().filter(|(name, _)| name == port) {
            let pods = found.entry(*target).or_default();
            for pod in &facts.pods {
                pods.entry((&pod.pod, &pod.uid))
                    .and_modify(|known| merge(known, pod))
                    .or_insert_with(|| pod.clone());
            }
        }
    }
    let by_port = found.into_iter();
    by_port
        .map(|(port, pods)| (port, pods.into_values().collect()))
        .collect()
}

/// Whether somebody who is no pod serves the port that a Kubernetes Service calls `port`.
pub(super) fn has_others<'a>(
    slices: impl IntoIterator<Item = (&'a ObjectName, &'a SliceFacts)>,
    service: &ObjectName,
    port: &str,
) -> bool {
    slices.into_iter().any(|(slice, facts)| {
        slice.namespace == service.namespace
            && facts.service == service.name
            && facts.has_others
            && facts.ports.iter().any(|(name, _)| name == port)
    })
}

/// For the fuzz targets: the groups that an `EndpointSlice` in JSON makes by an entry, where no pod
/// is known. Pods that another namespace claims too are left out.
///
/// # Errors
/// When it is none.
pub fn groups_beside_slice(
    text: &str,
    entry: &str,
    mut groups: BTreeMap<GroupId, Vec<Endpoint>>,
) -> Result<BTreeMap<GroupId, Vec<Endpoint>>, String> {
    let slice: EndpointSlice = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let name = ObjectName::of(&slice);
    let facts = SliceFacts::digest(&slice, None, Heard::Listed).ok_or("it is of no Service")?;
    let service = ObjectName {
        namespace: name.namespace.clone(),
        name: facts.service.clone(),
    };
    let ports: BTreeSet<&String> = facts.ports.iter().map(|(name, _)| name).collect();
    for port in ports {
        for (port, endpoints) in behind([(&name, &facts)], &service, port) {
            let id = GroupId {
                entry: entry.to_owned(),
                service: service.clone(),
                port,
            };
            groups.entry(id).or_insert(endpoints);
        }
    }
    drop_contested(&mut groups, &mut Problems::default());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    use serde_json::{Value, json};

    fn named(name: &str) -> ObjectName {
        ObjectName {
            namespace: "sw".to_owned(),
            name: name.to_owned(),
        }
    }

    fn slice(name: &str, kind: &str, ports: &Value, endpoints: &Value) -> (ObjectName, SliceFacts) {
        let slice = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "sw", "labels": {SERVICE: "oap"}},
            "addressType": kind, "ports": ports, "endpoints": endpoints,
        }))
        .unwrap();
        (
            named(name),
            SliceFacts::digest(&slice, None, Heard::Listed).unwrap(),
        )
    }

    fn item(pod: &str, address: &str, conditions: &Value) -> Value {
        json!({"addresses": [address], "conditions": conditions, "nodeName": "node-a",
            "targetRef": {"kind": "Pod", "name": pod, "namespace": "sw", "uid": format!("uid-{pod}")}})
    }

    fn pods(slices: &[(ObjectName, SliceFacts)], port: &str) -> BTreeMap<u16, Vec<Endpoint>> {
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
                &json!([item("oap-0", "10.0.0.1", &conditions)]),
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
    fn kube_proxy_is_told_of_ready_ones_that_end_and_of_zones() {
        let cases = [
            (json!(null), true, true),
            (
                json!({"ready": false, "serving": true, "terminating": true}),
                false,
                true,
            ),
            (
                json!({"ready": true, "serving": false, "terminating": true}),
                true,
                false,
            ),
        ];
        for (conditions, ready, serving) in cases {
            let mut one = item("oap-0", "10.0.0.1", &conditions);
            one["hints"] = json!({"forZones": [{"name": "b"}, {"name": "a"}],
                "forNodes": [{"name": "n"}]});
            let ports = json!([{"name": "grpc", "port": 11800}]);
            let slices = [slice("a", "IPv4", &ports, &json!([one]))];
            let expected = Offered {
                ready,
                serving,
                for_zones: ["a", "b"].map(str::to_owned).into(),
                for_nodes: ["n"].map(str::to_owned).into(),
            };
            assert_eq!(
                pods(&slices, "grpc")[&11800][0].offered,
                expected,
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
                    item("oap-1", "10.0.0.2", &ready),
                    item("oap-0", "10.0.0.1", &ready)
                ]),
            ),
            slice(
                "b",
                "IPv6",
                &ports,
                &json!([item("oap-0", "fd00::1", &ready)]),
            ),
            slice(
                "c",
                "IPv4",
                &ports,
                &json!([item("oap-0", "10.0.0.1", &json!({"ready": false}))]),
            ),
        ];
        let found = pods(&slices, "grpc");
        assert_eq!(found.keys().collect::<Vec<_>>(), [&11800], "UDP is none");
        let group = &found[&11800];
        assert_eq!(group.len(), 2);
        assert_eq!(group[0].pod, named("oap-0"));
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
                &json!([item("oap-0", "10.0.0.1", &ready)]),
            ),
            slice(
                "b",
                "IPv4",
                &json!([{"name": "grpc", "port": 21800}]),
                &json!([item("oap-1", "10.0.0.2", &ready)]),
            ),
            slice(
                "c",
                "IPv4",
                &json!([{"name": "rest", "port": 12800}]),
                &json!([item("oap-1", "10.0.0.2", &ready)]),
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
        assert!(has_others([(&name, &facts)], &named("oap"), ""));
        assert!(!has_others([(&name, &facts)], &named("oap"), "grpc"));
        assert!(behind([(&name, &facts)], &named("other"), "").is_empty());
    }

    #[test]
    fn one_watch_covers_all_services_of_an_entry() {
        let other = ObjectName {
            namespace: "b".to_owned(),
            name: "oap2".to_owned(),
        };
        assert_eq!(SliceSet::of([]), None);
        let one = SliceSet::of([&named("oap")]).unwrap();
        assert_eq!(one.namespace.as_deref(), Some("sw"));
        assert_eq!(one.labels(), "kubernetes.io/service-name in (oap)");
        assert!(one.covers(&named("oap")) && !one.covers(&other));
        let both = SliceSet::of([&named("oap"), &other]).unwrap();
        assert_eq!(both.namespace, None);
        assert_eq!(both.labels(), "kubernetes.io/service-name in (oap,oap2)");
        assert!(both.covers(&named("oap")) && both.covers(&other));
    }
}
