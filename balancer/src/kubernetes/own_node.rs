//! The zone of this node, which its `Node` alone tells. It is asked for once, and only where a
//! Service prefers near pods.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::Notify;

use super::client::{observed, pause};
use super::health::{ApiError, Health, Notifier, Target};

/// The label with a node's zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Who may not ask tries again after so long.
const FORBIDDEN_PAUSE: Duration = Duration::from_secs(600);

/// What is known of this daemon's node.
pub(crate) struct OwnNode {
    /// `None` within: it has none.
    zone: OnceLock<Option<String>>,
    wanted: Notify,
    /// How asking for it fares.
    pub(crate) asking: Arc<Health>,
    notifier: Notifier,
}

impl OwnNode {
    pub(crate) fn new(notifier: &Notifier) -> Arc<Self> {
        Arc::new(Self {
            zone: OnceLock::new(),
            wanted: Notify::new(),
            asking: Arc::new(Health::new(Target::new("nodes", None), notifier)),
            notifier: notifier.clone(),
        })
    }

    /// The zone, as far as it is known; it is asked for from now on.
    pub(crate) fn zone(&self) -> Option<String> {
        self.wanted.notify_one();
        self.zone.get().cloned().flatten()
    }

    /// Finds it out once it is wanted.
    pub(crate) async fn run(self: Arc<Self>, client: Client, node: String) {
        self.wanted.notified().await;
        let client = observed(&client, &self.asking);
        let nodes = Api::<PartialObjectMeta<Node>>::all(client);
        let mut failures = 0;
        loop {
            match nodes.get_opt(&node).await {
                Ok(node) => {
                    let zone = node.and_then(|node| node.labels().get(ZONE).cloned());
                    self.zone.get_or_init(|| zone);
                    self.asking.succeeded();
                    self.notifier.notify();
                    return;
                }
                Err(error) => {
                    let error = ApiError::of(&error, "get", &self.asking.target);
                    let is_forbidden = matches!(error, Some(ApiError::Forbidden(..)));
                    if let Some(error) = error {
                        self.asking.failed(error);
                    }
                    let rest = if is_forbidden {
                        FORBIDDEN_PAUSE
                    } else {
                        pause(failures)
                    };
                    tokio::time::sleep(rest).await;
                    failures += 1;
                }
            }
        }
    }
}
