//! Pods: where those that serve are, at which addresses and with which weight, and the number of
//! those that keep connections. Of the latter only the metadata is fetched.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::core::PartialObjectMeta;

use super::services::is_off;
use super::{Bounds, Facts, Heard, Selection};
use crate::config::{ClusterInput, ClusterQuota, ClusterService, MAX_WEIGHT, PodClass};
use crate::kubernetes::model::{Demand, ObjectName};

/// A pod without its spec and status.
type Metadata = PartialObjectMeta<Pod>;

/// The annotation that gives a pod's share relative to the others.
pub(crate) const WEIGHT: &str = "balancer.skywalking.apache.org/weight";

/// The pods that a Kubernetes Service means: without a selector any of its namespace.
pub(super) fn of_service(
    service: &ObjectName,
    labels: Option<&BTreeMap<String, String>>,
) -> Selection {
    let namespace = Some(service.namespace.clone());
    let Some(labels) = labels else {
        return Selection {
            namespace,
            ..Selection::default()
        };
    };
    let pairs = labels.iter().map(|(key, value)| format!("{key}={value}"));
    let labels = pairs.collect::<Vec<_>>().join(",");
    Selection::labelled(namespace, labels)
}

/// The running pods of a class.
pub(super) fn of_class(class: &PodClass) -> Selection {
    Selection {
        fields: Some("status.phase=Running".to_owned()),
        ..Selection::labelled(class.namespace.clone(), &class.selector)
    }
}

/// The pods of a node.
pub(super) fn of_node(node: &str) -> Selection {
    Selection {
        fields: Some(format!("spec.nodeName={node}")),
        ..Selection::default()
    }
}

/// The classes of pods that an entry's quota follows from.
pub(crate) fn classes(entry: &ClusterService) -> &[PodClass] {
    match &entry.quota {
        ClusterQuota::Shared {
            input: ClusterInput::Pods(classes),
            ..
        } => classes,
        _ => &[],
    }
}

/// What is of interest in a pod that may serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodFacts {
    pub(super) uid: String,
    /// The addresses that its kubelet says it has; none once it has ended: others may get them.
    pub(super) addresses: Vec<IpAddr>,
    /// The node that it runs on.
    pub(super) node: Option<String>,
    /// What its annotation says; an error is the text that is no weight.
    pub(super) weight: Result<u32, String>,
    /// A Job owns it: it does not serve, whatever its labels say.
    pub(super) job: bool,
    /// It uses its node's network.
    pub(super) host_network: bool,
    /// The runtime class that it asks for.
    pub(super) runtime_class: Option<String>,
}

impl Facts for PodFacts {
    type Object = Pod;
    const RESOURCE: &'static str = "pods";
    const MOST: Bounds = Bounds {
        of_namespace: 5_000,
        in_all: 20_000,
    };

    fn digest(pod: &Pod, _: Option<&Self>, _: Heard) -> Option<Self> {
        let weight = match pod.annotations().get(WEIGHT) {
            None => Ok(1),
            Some(text) => match text.trim().parse() {
                Ok(weight) if (1..=MAX_WEIGHT).contains(&weight) => Ok(weight),
                _ => Err(text.chars().take(40).collect()),
            },
        };
        let mut owners = pod.owner_references().iter();
        let spec = pod.spec.as_ref();
        Some(Self {
            uid: pod.uid().unwrap_or_default(),
            addresses: addresses(pod),
            node: spec.and_then(|spec| spec.node_name.clone()),
            weight,
            job: owners.any(|owner| owner.kind == "Job"),
            host_network: spec.and_then(|spec| spec.host_network) == Some(true),
            runtime_class: spec.and_then(|spec| spec.runtime_class_name.clone()),
        })
    }
}

fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else {
        return Vec::new();
    };
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return Vec::new();
    }
    let all = status.pod_ips.iter().flatten();
    all.filter_map(|address| address.ip.parse().ok()).collect()
}

/// A pod of a class, which is only counted.
#[derive(PartialEq)]
pub(super) struct Counted;

impl Facts for Counted {
    type Object = Metadata;
    const RESOURCE: &'static str = PodFacts::RESOURCE;
    const MOST: Bounds = Bounds {
        of_namespace: 20_000,
        in_all: 100_000,
    };

    fn digest(_: &Metadata, _: Option<&Self>, _: Heard) -> Option<Self> {
        Some(Self)
    }
}

/// A pod that wants its connects left alone.
#[derive(PartialEq)]
pub(super) struct LeftAlone {
    pub(super) uid: String,
}

impl Facts for LeftAlone {
    type Object = Metadata;
    const RESOURCE: &'static str = PodFacts::RESOURCE;
    // As many as there is room for in the kernel half's table.
    const MOST: Bounds = Bounds {
        of_namespace: 1_024,
        in_all: 1_024,
    };

    fn digest(pod: &Metadata, _: Option<&Self>, _: Heard) -> Option<Self> {
        let uid = pod.uid()?;
        is_off(pod.annotations()).then_some(Self { uid })
    }
}

/// How many connections pods keep, by pairs of how many pods, and how many connections each.
pub(super) fn demand(classes: &[(usize, u32)]) -> Demand {
    let words = classes
        .iter()
        .map(|(pods, each)| format!("{pods} pods × {each}"))
        .collect::<Vec<_>>();
    Demand {
        connections: classes
            .iter()
            .map(|(pods, each)| (*pods as u64).saturating_mul(u64::from(*each)))
            .fold(0, u64::saturating_add),
        words: words.join(" + "),
    }
}

#[cfg(test)]
mod tests {
    use super::super::services::PLACE;
    use super::*;
    use serde_json::json;

    fn facts(weight: Option<&str>, owner: &str) -> PodFacts {
        let annotations = weight.map_or_else(|| json!({}), |weight| json!({WEIGHT: weight}));
        let pod = serde_json::from_value(json!({"metadata": {
            "name": "p", "namespace": "sw", "uid": "u", "annotations": annotations,
            "ownerReferences": [{"apiVersion": "x/v1", "kind": owner, "name": "o", "uid": "v"}]}}))
        .unwrap();
        PodFacts::digest(&pod, None, Heard::Listed).unwrap()
    }

    #[test]
    fn a_weight_is_a_number_in_its_bounds() {
        assert_eq!(facts(None, "ReplicaSet").weight, Ok(1));
        assert_eq!(facts(Some(" 3 "), "ReplicaSet").weight, Ok(3));
        for wrong in ["0", "1001", "-1", "two", ""] {
            assert_eq!(
                facts(Some(wrong), "ReplicaSet").weight,
                Err(wrong.to_owned())
            );
        }
    }

    #[test]
    fn a_pod_says_that_its_connects_are_left_alone() {
        let digest = |annotations: serde_json::Value| {
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {
                "name": "p", "uid": "u", "annotations": annotations}});
            let pod = serde_json::from_value(pod).unwrap();
            LeftAlone::digest(&pod, None, Heard::Listed).map(|pod| pod.uid)
        };
        assert_eq!(digest(json!({PLACE: "off"})).as_deref(), Some("u"));
        assert_eq!(digest(json!({PLACE: "on"})), None);
        assert_eq!(digest(json!({})), None);
    }

    #[test]
    fn a_pod_of_a_job_is_marked() {
        assert!(facts(None, "Job").job);
        assert!(!facts(None, "StatefulSet").job);
    }

    #[test]
    fn the_network_and_the_runtime_of_a_pod_are_known() {
        let facts = |spec: serde_json::Value| {
            let pod = json!({"metadata": {"name": "p"}, "spec": spec});
            let pod = serde_json::from_value(pod).unwrap();
            PodFacts::digest(&pod, None, Heard::Listed).unwrap()
        };
        let usual = facts(json!({"containers": []}));
        assert!(!usual.host_network && usual.runtime_class.is_none());
        let other =
            facts(json!({"containers": [], "hostNetwork": true, "runtimeClassName": "gvisor"}));
        assert!(other.host_network);
        assert_eq!(other.runtime_class.as_deref(), Some("gvisor"));
    }

    #[test]
    fn a_demand_says_how_it_comes_about() {
        let demand = demand(&[(180, 1), (11, 3)]);
        assert_eq!(demand.connections, 213);
        assert_eq!(demand.words, "180 pods × 1 + 11 pods × 3");
    }

    #[test]
    fn the_labels_of_a_service_become_a_selector() {
        let service = ObjectName {
            namespace: "sw".to_owned(),
            name: "oap".to_owned(),
        };
        let labels =
            [("app", "sw"), ("component", "oap")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(
            of_service(&service, Some(&labels.into())).labels.as_deref(),
            Some("app=sw,component=oap")
        );
    }
}
