//! The `DaemonSet` of this daemon. It owns the node report; when it goes, so does the data plane.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::client::{observed, pause};
use super::health::{ApiError, Health, Notifier, Target};
use super::identity::Identity;
use super::watch::{Bounds, Facts, Selection, Store};

/// What is known of the `DaemonSet`.
pub(crate) struct OwnDaemonSet {
    store: Arc<Store<DaemonSetFacts>>,
    /// How asking for the daemon's pod fares, which names the `DaemonSet`.
    pod: Arc<Health>,
}

#[derive(PartialEq, Eq)]
struct DaemonSetFacts {
    uid: String,
    deleting: bool,
}

impl Facts for DaemonSetFacts {
    type Object = PartialObjectMeta<DaemonSet>;
    const RESOURCE: &'static str = "daemonsets.apps";
    const MOST: Bounds = Bounds {
        of_namespace: 1,
        in_all: 1,
    };

    fn digest(set: &Self::Object, _: Option<&Self>) -> Option<Self> {
        Some(Self {
            uid: set.uid().unwrap_or_default(),
            deleting: set.metadata.deletion_timestamp.is_some(),
        })
    }
}

impl OwnDaemonSet {
    pub(crate) fn new(namespace: &str, notifier: &Notifier) -> Arc<Self> {
        let pods = Target::new("pods", Some(namespace));
        Arc::new(Self {
            store: Store::new(Some(namespace), notifier),
            pod: Arc::new(Health::new(pods, notifier)),
        })
    }

    /// Whether it was seen and is no more, or is being deleted. One that was made anew under its
    /// name counts as the old one: it adopts the pods.
    pub(crate) fn is_gone(&self) -> bool {
        let listing = self.store.listing();
        listing.seen && listing.complete && listing.items.values().all(|facts| facts.deleting)
    }

    /// The owner references of what belongs to it; none as long as it is not known.
    pub(crate) fn references(&self) -> Value {
        let listing = self.store.listing();
        let references = listing.items.iter().map(|(name, DaemonSetFacts { uid, .. })| {
            json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "name": name.name, "uid": uid})
        });
        references.collect()
    }

    /// How its requests fare.
    pub(crate) fn healths(&self) -> [&Health; 2] {
        [&self.store.health, &self.pod]
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
        let client = observed(client, &self.pod);
        let pods = Api::<PartialObjectMeta<Pod>>::namespaced(client, &identity.namespace);
        let mut failures = 0;
        loop {
            match pods.get_opt(&identity.pod).await {
                Ok(pod) => {
                    self.pod.succeeded();
                    let name = pod.as_ref().and_then(owner);
                    if name.is_none() {
                        tracing::info!(
                            "Kubernetes: the pod {}/{} is not there or belongs to no DaemonSet: the \
                             node report stays when the balancer is uninstalled, and so does the \
                             data plane (`balancer unload` takes it away)",
                            identity.namespace,
                            identity.pod,
                        );
                    }
                    return name;
                }
                Err(error) => {
                    if let Some(error) = ApiError::of(&error, "get", &self.pod.target) {
                        self.pod.failed(error);
                    }
                    tokio::time::sleep(pause(failures)).await;
                    failures += 1;
                }
            }
        }
    }
}

fn owner(pod: &PartialObjectMeta<Pod>) -> Option<String> {
    let mut owners = pod.owner_references().iter();
    let daemon_set =
        owners.find(|owner| owner.kind == "DaemonSet" && owner.api_version.starts_with("apps/"))?;
    Some(daemon_set.name.clone())
}
