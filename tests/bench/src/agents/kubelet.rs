//! A stand-in for the kubelets of all nodes: it says that pods are ready, and lets go of those that
//! are to end.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, RandomState};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::fleet::Daemons;
use super::objects::OF_SET;

/// About how long a pod takes until it is ready, and until it has ended.
const STARTS: Duration = Duration::from_secs(3);
const ENDS: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Clone)]
pub struct Kubelet {
    client: Client,
    daemons: Arc<Daemons>,
}

impl Kubelet {
    /// Runs until the set is dropped.
    pub fn start(client: Client, daemons: Arc<Daemons>) -> JoinSet<()> {
        let kubelet = Self { client, daemons };
        let mut task = JoinSet::new();
        task.spawn(kubelet.run());
        task
    }

    async fn run(self) {
        let pods = Api::<Pod>::all(self.client.clone());
        let mut events = pin!(watcher(pods, watcher::Config::default()));
        let (mut started, mut ended) = (HashSet::new(), HashSet::new());
        while let Some(event) = events.next().await {
            let pod = match event {
                Ok(Event::Apply(pod) | Event::InitApply(pod)) => pod,
                Ok(_) => continue,
                Err(error) => {
                    eprintln!("the kubelets' watch: {error}");
                    continue;
                }
            };
            let Some((node, uid)) = node(&pod).zip(pod.uid()) else {
                continue;
            };
            let ends = pod.metadata.deletion_timestamp.is_some();
            let seen = if ends { &mut ended } else { &mut started };
            if seen.insert(uid) {
                tokio::spawn(self.clone().serve(pod, node, ends));
            }
        }
    }

    async fn serve(self, pod: Pod, node: String, ends: bool) {
        let done = if ends {
            self.end(&pod, &node).await
        } else {
            self.begin(&pod, &node).await
        };
        if let Err(error) = done {
            eprintln!("the kubelet of {node}, {}: {error:#}", pod.name_any());
        }
    }

    async fn begin(&self, pod: &Pod, node: &str) -> Result<()> {
        sleep(about(STARTS)).await;
        let address = address(node);
        let status = json!({"status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        let how = PatchParams::default();
        let pods = self.pods(pod)?;
        let name = pod.name_any();
        pods.patch_status(&name, &how, &Patch::Merge(status))
            .await?;
        if is_daemon(pod) {
            self.daemons.pod_is_ready(node, &name);
        }
        Ok(())
    }

    async fn end(&self, pod: &Pod, node: &str) -> Result<()> {
        if is_daemon(pod) {
            self.daemons.pod_ends(node);
        }
        sleep(about(ENDS)).await;
        let now = DeleteParams::default().grace_period(0);
        self.pods(pod)?.delete(&pod.name_any(), &now).await?;
        Ok(())
    }

    fn pods(&self, pod: &Pod) -> Result<Api<Pod>> {
        let namespace = pod.namespace().context("pods have a namespace")?;
        Ok(Api::namespaced(self.client.clone(), &namespace))
    }
}

fn node(pod: &Pod) -> Option<String> {
    pod.spec.as_ref()?.node_name.clone()
}

fn is_daemon(pod: &Pod) -> bool {
    let (key, value) = OF_SET;
    pod.labels().get(key).is_some_and(|found| found == value)
}

/// An address for the pods of a node, which nobody connects to.
fn address(node: &str) -> String {
    let number: u16 = node
        .rsplit('-')
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or_default();
    format!("10.{}.{}.2", 100 + number / 250, number % 250)
}

/// Between half and one and a half of it.
fn about(time: Duration) -> Duration {
    let random = RandomState::new().hash_one(0) % 1000;
    time / 2 + time * u32::try_from(random).unwrap_or_default() / 1000
}
