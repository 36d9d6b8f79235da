//! The `DaemonSet` that this agent belongs to: it owns what the agent publishes, and when it goes, so does the data plane.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

use super::Identity;
use super::client::{observed, pause};
use super::health::{ApiError, Health, Notifier};
use super::watch::{Store, follow};

/// What is known of the `DaemonSet`.
#[derive(Debug)]
pub(super) struct OwnDaemonSet {
    store: Arc<Store<Facts>>,
    /// Its pod, for the name of the `DaemonSet`.
    pod: Arc<Health>,
    /// It was there once.
    seen: AtomicBool,
}

#[derive(Debug, PartialEq, Eq)]
struct Facts {
    uid: String,
    deleting: bool,
}

impl OwnDaemonSet {
    pub(super) fn new(namespace: &str, notifier: &Notifier) -> Arc<Self> {
        Arc::new(Self {
            store: Store::new("daemonsets.apps", Some(namespace), notifier),
            pod: Arc::new(Health::new("pods", Some(namespace), notifier)),
            seen: AtomicBool::new(false),
        })
    }

    /// It was seen and is no more, or is being deleted. One that was made anew under the same name counts as the same: it adopts the pods.
    pub(super) fn is_gone(&self) -> bool {
        let listing = self.store.listing();
        self.seen.load(Ordering::Relaxed)
            && listing.complete
            && listing.items.values().all(|facts| facts.deleting)
    }

    /// For the metadata of what belongs to it; empty as long as it is not known.
    pub(super) fn references(&self) -> Value {
        let listing = self.store.listing();
        let references = listing.items.iter().map(|(name, facts)| {
            json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "name": name.name, "uid": facts.uid})
        });
        references.collect()
    }

    /// What goes wrong here.
    pub(super) fn healths(&self) -> [&Health; 2] {
        [&self.store.health, &self.pod]
    }

    /// Finds out which one it is, and watches it for ever.
    pub(super) async fn run(self: Arc<Self>, client: Client, identity: Identity) {
        let Some(name) = self.name(&client, &identity).await else {
            return;
        };
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let client = observed(&client, &self.store.health);
        let api = Api::<PartialObjectMeta<DaemonSet>>::namespaced(client, &identity.namespace);
        let store = Arc::clone(&self.store);
        follow(api, config, store, move |set, _| {
            self.seen.store(true, Ordering::Relaxed);
            Some(Facts {
                uid: set.uid().unwrap_or_default(),
                deleting: set.metadata.deletion_timestamp.is_some(),
            })
        })
        .await;
    }

    /// The name of the `DaemonSet` that owns this agent's pod; `None`: none does. Asks until it is known.
    async fn name(&self, client: &Client, identity: &Identity) -> Option<String> {
        let client = observed(client, &self.pod);
        let pods = Api::<PartialObjectMeta<Pod>>::namespaced(client, &identity.namespace);
        let mut failures = 0;
        loop {
            match pods.get_opt(&identity.pod).await {
                Ok(pod) => {
                    self.pod.fine();
                    let name = pod.as_ref().and_then(daemon_set);
                    if name.is_none() {
                        tracing::info!(
                            "Kubernetes: the pod {}/{} {}: what this agent publishes stays when the balancer is uninstalled, and so does \
                             its data plane (`balancer unload` takes it away)",
                            identity.namespace,
                            identity.pod,
                            if pod.is_some() {
                                "belongs to no DaemonSet"
                            } else {
                                "does not exist"
                            },
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

fn daemon_set(pod: &PartialObjectMeta<Pod>) -> Option<String> {
    pod.owner_references()
        .iter()
        .find(|daemon_set| {
            daemon_set.kind == "DaemonSet" && daemon_set.api_version.starts_with("apps/")
        })
        .map(|daemon_set| daemon_set.name.clone())
}
