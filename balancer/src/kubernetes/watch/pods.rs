//! Pods, of which only the metadata is fetched: the weight of those that serve, and the number of those that keep connections.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};

use super::{Store, Watch, start};
use crate::config::{MAX_WEIGHT, PodClass};
use crate::kubernetes::health::Notifier;
use crate::kubernetes::{Demand, ObjectName};

/// The annotation that gives a pod's share relative to the others.
pub(in crate::kubernetes) const WEIGHT: &str = "balancer.skywalking.apache.org/weight";

/// What is watched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::kubernetes) struct Key {
    namespace: Option<String>,
    labels: String,
}

impl Key {
    /// The pods that a Service means.
    pub(in crate::kubernetes) fn of_service(
        service: &ObjectName,
        labels: &BTreeMap<String, String>,
    ) -> Self {
        let pairs = labels.iter().map(|(key, value)| format!("{key}={value}"));
        Self {
            namespace: Some(service.namespace.clone()),
            labels: pairs.collect::<Vec<_>>().join(","),
        }
    }
}

impl From<&PodClass> for Key {
    fn from(class: &PodClass) -> Self {
        Self {
            namespace: class.namespace.clone(),
            labels: class.selector.clone(),
        }
    }
}

/// What is of interest in a pod that may serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kubernetes) struct Facts {
    pub(in crate::kubernetes) uid: String,
    /// What its annotation says; an error is the text that is no weight.
    pub(in crate::kubernetes) weight: Result<u32, String>,
    /// A Job owns it: it does not serve, whatever its labels say.
    pub(in crate::kubernetes) job: bool,
}

impl Facts {
    fn of(pod: &PartialObjectMeta<Pod>) -> Self {
        let weight = match pod.annotations().get(WEIGHT) {
            None => Ok(1),
            Some(text) => match text.trim().parse() {
                Ok(weight) if (1..=MAX_WEIGHT).contains(&weight) => Ok(weight),
                _ => Err(text.chars().take(40).collect()),
            },
        };
        Self {
            uid: pod.uid().unwrap_or_default(),
            weight,
            job: pod
                .owner_references()
                .iter()
                .any(|daemon_set| daemon_set.kind == "Job"),
        }
    }
}

/// Watches the pods that a Service means.
pub(in crate::kubernetes) fn watch(
    client: &Client,
    key: &Key,
    notifier: &Notifier,
) -> Watch<Facts> {
    let config = watcher::Config::default().labels(&key.labels);
    let store = Store::new("pods", key.namespace.as_deref(), notifier);
    start(
        client,
        |client| api(client, key),
        config,
        &store,
        |pod, _| Some(Facts::of(pod)),
    )
}

/// Watches the pods of a class that are running.
pub(in crate::kubernetes) fn count(client: &Client, key: &Key, notifier: &Notifier) -> Watch<()> {
    let config = watcher::Config::default()
        .labels(&key.labels)
        .fields("status.phase=Running");
    let store = Store::new("pods", key.namespace.as_deref(), notifier);
    start(
        client,
        |client| api(client, key),
        config,
        &store,
        |_, _| Some(()),
    )
}

fn api(client: Client, key: &Key) -> Api<PartialObjectMeta<Pod>> {
    match &key.namespace {
        Some(namespace) => Api::namespaced(client, namespace),
        None => Api::all(client),
    }
}

/// How many connections they keep: pairs of how many pods, and how many connections each.
pub(in crate::kubernetes) fn demand(classes: &[(usize, u32)]) -> Demand {
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
    use super::*;
    use serde_json::json;

    fn facts(weight: Option<&str>, daemon_set: &str) -> Facts {
        let annotations = weight.map_or_else(|| json!({}), |weight| json!({WEIGHT: weight}));
        let pod = serde_json::from_value(
            json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": {
            "name": "p", "namespace": "sw", "uid": "u", "annotations": annotations,
            "ownerReferences": [{"apiVersion": "x/v1", "kind": daemon_set, "name": "o", "uid": "v"}]}}),
        )
        .unwrap();
        Facts::of(&pod)
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
    fn a_pod_of_a_job_is_marked() {
        assert!(facts(None, "Job").job);
        assert!(!facts(None, "StatefulSet").job);
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
            Key::of_service(&service, &labels.into()).labels,
            "app=sw,component=oap"
        );
    }
}
