//! The pod and the `DaemonSet` of this daemon. The pod owns the node report; when the `DaemonSet`
//! goes, so does the data plane.
//!
//! A pod goes with its `DaemonSet` as well as with its node, and the API server's garbage collector
//! takes the report away with it. The `DaemonSet` is asked for: a watch would bring each of N
//! daemons each change of its status, some three for each of N pods of a rollout.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::SetOnce;

use super::client::{observed, pause};
use super::health::{ApiError, Health, Notifier, Target};
use super::identity::Identity;

/// What is known of the daemon's pod and its `DaemonSet`.
pub(crate) struct OwnDaemonSet {
    /// The daemon's pod; empty as long as it is not known.
    pod: SetOnce<OwnPod>,
    /// How asking for it fares.
    asking: Arc<Health>,
    /// What the API server told of the `DaemonSet` last.
    told: Mutex<Option<Told>>,
    /// How asking for the `DaemonSet` fares.
    asking_for_set: Arc<Health>,
    notifier: Notifier,
}

/// Whether there is a `DaemonSet`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    There,
    /// It is no more, or is being deleted.
    Gone,
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

impl OwnDaemonSet {
    pub(crate) fn new(namespace: &str, notifier: &Notifier) -> Arc<Self> {
        let health = |resource| {
            let target = Target::new(resource, Some(namespace));
            Arc::new(Health::new(target, notifier))
        };
        Arc::new(Self {
            pod: SetOnce::new(),
            asking: health("pods"),
            told: Mutex::default(),
            asking_for_set: health("daemonsets.apps"),
            notifier: notifier.clone(),
        })
    }

    fn told(&self) -> MutexGuard<'_, Option<Told>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was no more, or was being deleted, when it was asked for last. One that was made
    /// anew under its name counts as the old one: it adopts the pods.
    pub(crate) fn is_gone(&self) -> bool {
        *self.told() == Some(Told::Gone)
    }

    /// Whether the API server has ever told of it: who asks may ask.
    pub(crate) fn was_told(&self) -> bool {
        self.told().is_some()
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

    /// The name of the `DaemonSet`, as far as it is known.
    pub(crate) fn name(&self) -> Option<&str> {
        self.pod.get()?.daemon_set.as_deref()
    }

    /// How its requests fare.
    pub(crate) fn healths(&self) -> [&Health; 2] {
        [&self.asking, &self.asking_for_set]
    }

    /// Asks for the `DaemonSet` of this name, and notes whether it is there.
    ///
    /// # Errors
    /// Those of the request. They are told as a problem.
    pub(crate) async fn ask(
        &self,
        client: &Client,
        namespace: &str,
        name: &str,
    ) -> kube::Result<Option<DaemonSet>> {
        let health = &self.asking_for_set;
        let sets = Api::<DaemonSet>::namespaced(observed(client, health), namespace);
        let named = ListParams::default().fields(&format!("metadata.name={name}"));
        let mut found = sets.list(&named).await.inspect_err(|error| {
            if let Some(error) = ApiError::of(error, "list", &health.target) {
                health.failed(error);
            }
        })?;
        health.succeeded();
        let found = found.items.pop();
        let is_deleted = |set: &DaemonSet| set.metadata.deletion_timestamp.is_some();
        let told = if found.as_ref().is_none_or(is_deleted) {
            Told::Gone
        } else {
            Told::There
        };
        if self.told().replace(told) != Some(told) {
            self.notifier.notify();
        }
        Ok(found)
    }

    /// Finds out which pod is this daemon's, and to which `DaemonSet` it belongs. Asks until it is
    /// known.
    pub(crate) async fn run(self: Arc<Self>, client: Client, identity: Identity) {
        let client = observed(&client, &self.asking);
        let pods = Api::<PartialObjectMeta<Pod>>::namespaced(client, &identity.namespace);
        let mut failures = 0;
        loop {
            match pods.get_opt(&identity.pod).await {
                Ok(pod) => {
                    self.asking.succeeded();
                    let is_owned = pod.as_ref().and_then(owner).is_some();
                    if let Some(own) = pod.and_then(|pod| own_pod(&identity.pod, &pod)) {
                        // Asked for once: there is none before.
                        let _ = self.pod.set(own);
                    }
                    if !is_owned {
                        tracing::info!(
                            "Kubernetes: the pod {}/{} is not there or belongs to no DaemonSet: the \
                             data plane stays when the balancer is uninstalled (`balancer unload` \
                             takes it away), and without a pod so does the node report",
                            identity.namespace,
                            identity.pod,
                        );
                    }
                    return;
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
