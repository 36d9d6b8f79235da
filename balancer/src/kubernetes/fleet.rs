//! This daemon among all daemons: how many they are, and its rank, by which nodes that know the
//! same do not all choose the same.
//!
//! The pods of the `DaemonSet` are listed now and then. To watch them would cost each node an event
//! for each pod of a rollout.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt};
use tokio::time::Instant;

use super::client::{jitter, pause};
use super::daemon_set::{OwnDaemonSet, OwnPod, owner};
use super::identity::Identity;
use super::status::DaemonsStatus;
use crate::place::GroupPlan;

/// With more daemons than this the rank follows from the node's name: among so many, ranks that are
/// not quite even do no harm, and their lists would cost the API server too much.
const MOST_LISTED: u32 = 256;
/// The time between two lists, and by how much it is spread.
const EVERY: Duration = Duration::from_secs(240);
const SPREAD_SECONDS: u32 = 120;
/// Labels of a pod that its `DaemonSet` changes with each rollout.
const OF_REVISION: [&str; 2] = ["controller-revision-hash", "pod-template-generation"];

/// The rank of this node, and of how many: from 0.
type Rank = (u32, u32);

/// How many nodes should have a daemon, and have one that is ready.
type Numbers = (u32, u32);

/// What is known of the other daemons.
pub(crate) struct Fleet {
    known: Mutex<Known>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    rank: Rank,
    /// How many nodes should have a daemon, how many have one that is ready, and when that was
    /// asked; `None`: not known.
    daemons: Option<(u32, u32, Instant)>,
}

impl Fleet {
    /// As long as nobody has been asked, the rank follows from the node's name.
    pub(crate) fn new(node: &str) -> Arc<Self> {
        let known = Known {
            rank: rank_by_name(node),
            daemons: None,
        };
        Arc::new(Self {
            known: Mutex::new(known),
        })
    }

    /// The rank of this node.
    pub(crate) fn rank(&self) -> Rank {
        self.known().rank
    }

    /// How many nodes should have a daemon; 0: not known.
    pub(crate) fn nodes(&self) -> u32 {
        self.known().daemons.map_or(0, |(wanted, _, _)| wanted)
    }

    /// How many nodes should have a daemon, and have one that is ready.
    pub(crate) fn daemons(&self) -> Option<DaemonsStatus> {
        let (wanted, ready, at) = self.known().daemons?;
        Some(DaemonsStatus {
            wanted,
            ready,
            seconds_ago: at.elapsed().as_secs(),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For ever: finds out how many daemons there are, and whether their `DaemonSet` is there. Who
    /// may not ask goes by the node's name.
    pub(crate) async fn run(
        self: Arc<Self>,
        client: Client,
        identity: Identity,
        daemon_set: Arc<OwnDaemonSet>,
    ) {
        let own = daemon_set.pod().await;
        let (node, namespace) = (identity.node, identity.namespace);
        let Some(set) = &own.daemon_set else {
            return;
        };
        let mut failures = 0;
        loop {
            let Ok(found) = daemon_set.ask(&client, &namespace, set).await else {
                tokio::time::sleep(pause(failures)).await;
                failures += 1;
                continue;
            };
            failures = 0;
            let numbers = found.and_then(|set| numbers(&set));
            let rank = rank(&client, &namespace, &own, numbers).await;
            let rank = rank.unwrap_or_else(|| rank_by_name(&node));
            let daemons = numbers.map(|(wanted, ready)| (wanted, ready, Instant::now()));
            *self.known() = Known { rank, daemons };
            let spread = Duration::from_secs(jitter(SPREAD_SECONDS).into());
            tokio::time::sleep(EVERY + spread).await;
        }
    }
}

/// How many nodes should have a daemon, and have one that is ready.
fn numbers(set: &DaemonSet) -> Option<Numbers> {
    let number = |count: i32| u32::try_from(count).unwrap_or_default();
    let status = set.status.as_ref()?;
    Some((
        number(status.desired_number_scheduled),
        number(status.number_ready),
    ))
}

/// The rank of this daemon, where they are few.
async fn rank(
    client: &Client,
    namespace: &str,
    own: &OwnPod,
    numbers: Option<Numbers>,
) -> Option<Rank> {
    if numbers.is_some_and(|(wanted, _)| wanted > MOST_LISTED) {
        return None;
    }
    let pods = Api::<PartialObjectMeta<Pod>>::namespaced(client.clone(), namespace);
    let of_set = ListParams::default()
        .labels(&selector(own))
        .limit(MOST_LISTED * 2);
    match pods.list(&of_set).await {
        Ok(listed) => rank_among(own, &listed.items),
        Err(error) => {
            tracing::debug!("the other daemons can't be listed: {error}");
            None
        }
    }
}

/// The labels that the pods of a `DaemonSet` have in common.
fn selector(own: &OwnPod) -> String {
    let labels = own.labels.iter();
    let common = labels.filter(|(key, _)| !OF_REVISION.contains(&key.as_str()));
    let pairs = common.map(|(key, value)| format!("{key}={value}"));
    pairs.collect::<Vec<_>>().join(",")
}

/// The place of a pod among those of its `DaemonSet`, in the order of names.
fn rank_among(own: &OwnPod, pods: &[PartialObjectMeta<Pod>]) -> Option<Rank> {
    let is_of_set = |pod: &&PartialObjectMeta<Pod>| owner(pod) == own.daemon_set;
    let mut names: Vec<String> = pods
        .iter()
        .filter(is_of_set)
        .map(ResourceExt::name_any)
        .collect();
    names.sort_unstable();
    let rank = names.binary_search(&own.name).ok()?;
    Some((rank.try_into().ok()?, names.len().try_into().ok()?))
}

/// A rank that nobody else has to be known for: the name's hash (FNV-1a) among all hashes.
fn rank_by_name(node: &str) -> Rank {
    let hash = node.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    // The last bytes alone reach the low bits: names that differ in a number differ everywhere.
    let hash = (hash ^ (hash >> 15)).wrapping_mul(0x85eb_ca6b);
    (hash ^ (hash >> 13), GroupPlan::BY_LOT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, set: &str) -> PartialObjectMeta<Pod> {
        let owner = json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "name": set, "uid": "u"});
        serde_json::from_value(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {
            "name": name, "ownerReferences": [owner]}}))
        .unwrap()
    }

    fn own(name: &str) -> OwnPod {
        OwnPod {
            name: name.to_owned(),
            uid: "u".to_owned(),
            labels: [("app", "balancer"), ("controller-revision-hash", "7")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            daemon_set: Some("balancer".to_owned()),
        }
    }

    #[test]
    fn a_rank_is_the_place_among_the_pods_of_the_daemon_set() {
        let pods = [
            ("x", "balancer"),
            ("b", "balancer"),
            ("a", "other"),
            ("d", "balancer"),
        ];
        let pods = pods.map(|(name, set)| pod(name, set));
        assert_eq!(rank_among(&own("b"), &pods), Some((0, 3)));
        assert_eq!(rank_among(&own("x"), &pods), Some((2, 3)));
        assert_eq!(rank_among(&own("not-there"), &pods), None);
        assert_eq!(selector(&own("b")), "app=balancer");
    }

    #[test]
    fn ranks_by_name_are_spread() {
        let ranks = (0..1000).map(|number| rank_by_name(&format!("node-{number}")).0);
        let mut tenths = [0; 10];
        for rank in ranks {
            tenths[usize::try_from((u64::from(rank) * 10) >> 32).unwrap()] += 1;
        }
        assert!(tenths.iter().all(|of| (70..130).contains(of)), "{tenths:?}");
    }
}
