//! Whether another daemon follows one that is told to end: what it leaves in the kernel is for that
//! one.
//!
//! Pods go before all else where a namespace is deleted (KEP-5080, from Kubernetes 1.33 on), so the
//! `DaemonSet` is still there then. Where a node is deleted it stays anyway.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::core::PartialObjectMeta;
use kube::{Api, Client, Error};
use tokio::time::timeout;

use super::identity::Identity;

/// How long an answer may take: the kubelet kills what does not end in time.
const ANSWER: Duration = Duration::from_secs(3);
/// The token of a pod is void once the API server has no such pod any more.
const UNAUTHORIZED: u16 = 401;

/// What became of an object.
enum Fate {
    There,
    Deleted,
    /// The API server does not know this pod any more.
    Disowned,
}

/// Asks the API server why no daemon follows this one; `None`: one does, or it is not known.
pub(crate) async fn none_follows(client: &Client, identity: &Identity) -> Option<String> {
    let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
    let nodes = Api::<PartialObjectMeta<Node>>::all(client.clone());
    let (namespace, node) = (&identity.namespace, &identity.node);
    let fates = tokio::join!(
        timeout(ANSWER, namespaces.get_opt(namespace)),
        timeout(ANSWER, nodes.get_opt(node)),
    );
    match (fate(fates.0.ok()?), fate(fates.1.ok()?)) {
        (Fate::Deleted, _) => Some(format!("the namespace {namespace} is being deleted")),
        (_, Fate::Deleted) => Some(format!("the node {node} is deleted")),
        (Fate::Disowned, _) | (_, Fate::Disowned) => Some(format!(
            "the API server has no pod {namespace}/{} any more",
            identity.pod
        )),
        (Fate::There, Fate::There) => None,
    }
}

/// What an answer says. An object that can't be asked for counts as there: what is kept in the
/// kernel does less harm than what is missing.
fn fate<K>(answer: Result<Option<PartialObjectMeta<K>>, Error>) -> Fate {
    match answer {
        Ok(None) => Fate::Deleted,
        Ok(Some(object)) if object.metadata.deletion_timestamp.is_some() => Fate::Deleted,
        Err(Error::Api(status)) if status.code == UNAUTHORIZED => Fate::Disowned,
        Ok(Some(_)) | Err(_) => Fate::There,
    }
}
