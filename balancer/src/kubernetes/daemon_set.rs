//! The pod and the `DaemonSet` of this daemon. The pod owns the node report; when the `DaemonSet`
//! goes, so does the data plane.
//!
//! A pod goes with its `DaemonSet` as well as with its node, and the API server's garbage collector
//! takes the report away with it.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::SetOnce;

use super::client::{observed, pause};
use super::health::{ApiError, Health, Notifier, Target};
use super::identity::Identity;
use super::watch::{Bounds, Facts, Heard, Selection, Store};

/// What is known of the daemon's pod and its `DaemonSet`.
pub(crate) struct OwnDaemonSet {
    store: Arc<Store<DaemonSetFacts>>,
    /// The daemon's pod; empty as long as it is not known.
    pod: SetOnce<OwnPod>,
    /// How asking for it fares.
    asking: Arc<Health>,
}

/// What is known of the daemon's pod.
#[derive(Clone, Debug)]
pub(crate) struct OwnPod {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// The `DaemonSet` that owns it.
    pub(crate) daemon_set: Option<String>,
}

#[derive(PartialEq, Eq)]
struct DaemonSetFacts {
    deleting: bool,
}

impl Facts for DaemonSetFacts {
    type Object = PartialObjectMeta<DaemonSet>;
    const RESOURCE: &'static str = "daemonsets.apps";
    const MOST: Bounds = Bounds {
        of_namespace: 1,
        in_all: 1,
    };

    fn digest(set: &Self::Object, _: Option<&Self>, _: Heard) -> Option<Self> {
        Some(Self {
            deleting: set.metadata.deletion_timestamp.is_some(),
        })
    }
}

impl OwnDaemonSet {
    pub(crate) fn new(namespace: &str, notifier: &Notifier) -> Arc<Self> {
        let pods = Target::new("pods", Some(namespace));
        Arc::new(Self {
            store: Store::new(Some(namespace), notifier),
            pod: SetOnce::new(),
            asking: Arc::new(Health::new(pods, notifier)),
        })
    }

    /// Whether it was seen and is no more, or is being deleted. One that was made anew under its
    /// name counts as the old one: it adopts the pods.
    pub(crate) fn is_gone(&self) -> bool {
        let listing = self.store.listing();
        listing.seen && listing.complete && listing.items.values().all(|facts| facts.deleting)
    }

    /// The owner references of what belongs to this daemon; none as long as its pod is not known.
    pub(crate) fn references(&self) -> Value {
        let references = self.pod.get().into_iter().map(
            |OwnPod { name, uid, .. }| json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}),
        );
        references.collect()
    }

    /// The daemon's pod; waits until it is known, for ever where there is none.
    pub(crate) async fn pod(&self) -> OwnPod {
        self.pod.wait().await.clone()
    }

    /// How its requests fare.
    pub(crate) fn healths(&self) -> [&Health; 2] {
        [&self.store.health, &self.asking]
    }

    /// Finds out which one it is, and watches it for ever.
    pub(crate) async fn run(self: Arc<Self>, client: Client, identity: Identity) {
        let Some(name) = self.name(&client, &identity).await else {
            return;
        };
        let selection = Selection::named(&identity.namespace, &name);
        self.store.follow(&client, &selection).await;
    }

    /// The name of the `DaemonSet` that owns this daemon's pod; `None`: none does. Asks until it is
    /// known.
    async fn name(&self, client: &Client, identity: &Identity) -> Option<String> {
        let client = observed(client, &self.asking);
        let pods = Api::<PartialObjectMeta<Pod>>::namespaced(client, &identity.namespace);
        let mut failures = 0;
        loop {
            match pods.get_opt(&identity.pod).await {
                Ok(pod) => {
                    self.asking.succeeded();
                    let name = pod.as_ref().and_then(owner);
                    if let Some(own) = pod.and_then(|pod| own_pod(&identity.pod, &pod)) {
                        // Asked for once: there is none before.
                        let _ = self.pod.set(own);
                    }
                    if name.is_none() {
                        tracing::info!(
                            "Kubernetes: the pod {}/{} is not there or belongs to no DaemonSet: the \
                             data plane stays when the balancer is uninstalled (`balancer unload` \
                             takes it away), and without a pod so does the node report",
                            identity.namespace,
                            identity.pod,
                        );
                    }
                    return name;
                }
                Err(error) => {
                    if let Some(error) = ApiError::of(&error, "get", &self.asking.target) {
                        self.asking.failed(error);
                    }
                    tokio::time::sleep(pause(failures)).await;
                    failures += 1;
                }
            }
        }
    }
}

fn own_pod(name: &str, pod: &PartialObjectMeta<Pod>) -> Option<OwnPod> {
    Some(OwnPod {
        name: name.to_owned(),
        uid: pod.uid()?,
        labels: pod.labels().clone(),
        daemon_set: owner(pod),
    })
}

pub(crate) fn owner(pod: &PartialObjectMeta<Pod>) -> Option<String> {
    let mut owners = pod.owner_references().iter();
    let daemon_set =
        owners.find(|owner| owner.kind == "DaemonSet" && owner.api_version.starts_with("apps/"))?;
    Some(daemon_set.name.clone())
}
