//! Whether another daemon follows one that is told to end: what it leaves in the kernel is for that
//! one.
//!
//! Pods go before all else where a namespace is deleted (KEP-5080, from Kubernetes 1.33 on), so the
//! `DaemonSet` is still there then. Where a node is deleted it stays anyway. `helm uninstall`
//! deletes the permissions right after the `DaemonSet`, before the pods end. The answer is 403
//! then, and 401 once the API server has forgotten the service account's token: it remembers one
//! for 10 s.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::core::PartialObjectMeta;
use kube::{Api, Client, Error};
use tokio::time::{Instant, timeout};

use super::daemon_set::OwnDaemonSet;
use super::identity::Identity;

/// How long an answer may take: the kubelet kills what does not end in time.
const ANSWER: Duration = Duration::from_secs(3);
/// For how long somebody who may not ask asks again, and the pause between. With the answers it is
/// less than the shortest `terminationGracePeriodSeconds` that the chart takes.
const REFUSED_FOR: Duration = Duration::from_secs(12);
const PAUSE: Duration = Duration::from_secs(1);
/// The token of a pod is void once the API server has no such pod any more.
const UNAUTHORIZED: u16 = 401;
const FORBIDDEN: u16 = 403;

/// What became of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    There,
    Deleted,
    /// The API server does not know this pod any more.
    Disowned,
    /// The daemon may not ask.
    Forbidden,
}

/// What became of all that a next daemon needs.
struct Fates {
    daemon_set: Fate,
    namespace: Fate,
    node: Fate,
}

impl Fates {
    /// Why no daemon follows; `None`: one does, or it is not known.
    fn none_follows(&self, identity: &Identity) -> Option<String> {
        let Identity {
            node,
            pod,
            namespace,
            ..
        } = identity;
        let all = [self.daemon_set, self.namespace, self.node];
        match all {
            [Fate::Deleted, ..] => Some("the DaemonSet of this daemon is gone".to_owned()),
            [_, Fate::Deleted, _] => Some(format!("the namespace {namespace} is being deleted")),
            [.., Fate::Deleted] => Some(format!("the node {node} is deleted")),
            _ if all.contains(&Fate::Disowned) => Some(format!(
                "the API server has no pod {namespace}/{pod} any more"
            )),
            _ => None,
        }
    }
}

/// Asks the API server why no daemon follows this one; `None`: one does, or it is not known.
pub(crate) async fn none_follows(
    client: &Client,
    identity: &Identity,
    daemon_set: &OwnDaemonSet,
) -> Option<String> {
    let until = Instant::now() + REFUSED_FOR;
    loop {
        let fates = fates(client, identity, daemon_set).await;
        let why = fates.none_follows(identity);
        if why.is_some() || fates.daemon_set != Fate::Forbidden {
            return why;
        }
        if Instant::now() + PAUSE > until {
            // Who could never ask has not lost a permission.
            let withdrawn = "its permissions are gone, as after an uninstallation";
            return daemon_set.was_told().then(|| withdrawn.to_owned());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn fates(client: &Client, identity: &Identity, daemon_set: &OwnDaemonSet) -> Fates {
    let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
    let nodes = Api::<PartialObjectMeta<Node>>::all(client.clone());
    let (daemon_set, namespace, node) = tokio::join!(
        fate_of_set(client, identity, daemon_set),
        timeout(ANSWER, namespaces.get_opt(&identity.namespace)),
        timeout(ANSWER, nodes.get_opt(&identity.node)),
    );
    Fates {
        daemon_set,
        namespace: namespace.map_or(Fate::There, fate),
        node: node.map_or(Fate::There, fate),
    }
}

/// Where nobody answers, what was told last counts.
async fn fate_of_set(client: &Client, identity: &Identity, daemon_set: &OwnDaemonSet) -> Fate {
    let Some(name) = daemon_set.name() else {
        return Fate::There;
    };
    let asked = daemon_set.ask(client, &identity.namespace, name);
    let answer = timeout(ANSWER, asked).await;
    let refused = answer.ok().and_then(|answer| refusal(&answer.err()?));
    let last = if daemon_set.is_gone() {
        Fate::Deleted
    } else {
        Fate::There
    };
    refused.unwrap_or(last)
}

/// What an answer says. An object that can't be asked for counts as there: what is kept in the
/// kernel does less harm than what is missing.
fn fate<K>(answer: Result<Option<PartialObjectMeta<K>>, Error>) -> Fate {
    match answer {
        Ok(None) => Fate::Deleted,
        Ok(Some(object)) if object.metadata.deletion_timestamp.is_some() => Fate::Deleted,
        Ok(Some(_)) => Fate::There,
        Err(error) => refusal(&error).unwrap_or(Fate::There),
    }
}

/// What it means that the API server refuses an answer; `None`: it has not.
fn refusal(error: &Error) -> Option<Fate> {
    match error {
        Error::Api(status) if status.code == UNAUTHORIZED => Some(Fate::Disowned),
        Error::Api(status) if status.code == FORBIDDEN => Some(Fate::Forbidden),
        _ => None,
    }
}
