//! Whether the API server answers, and what it would refuse.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Api;
use kube::api::PostParams;

use super::Identity;
use super::client::Connection;
use super::health::{place, role};
use crate::config::{ClusterInput, ClusterQuota, Kubernetes, ServiceChoice};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Something that is needed and not allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Missing {
    /// `list`, `watch`, …
    pub verb: &'static str,
    /// The plural with its API group, as `kubectl` takes it: `endpointslices.discovery.k8s.io`.
    pub resource: &'static str,
    /// `None`: in all namespaces.
    pub namespace: Option<String>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the service account may not {} {} {}: the chart's {} allows it",
            self.verb,
            self.resource,
            place(self.namespace.as_deref()),
            role(self.verb, self.resource),
        )
    }
}

/// Asks the API server for its version.
///
/// # Errors
/// If it does not answer within five seconds, or not with a version.
pub async fn reachable(connection: &Connection) -> Result<String> {
    let server = &connection.server;
    let version = tokio::time::timeout(ANSWER, connection.client.apiserver_version())
        .await
        .with_context(|| {
            format!(
                "the API server at {server} does not answer within {} s: see whether it runs and whether this node reaches it",
                ANSWER.as_secs()
            )
        })?
        .with_context(|| format!("the API server at {server} does not say its version: see whether it runs and is one"))?;
    Ok(version.git_version)
}

/// What the daemon would not be allowed to do with this configuration.
///
/// # Errors
/// If the API server can't be asked.
pub async fn permissions(
    connection: &Connection,
    config: &Kubernetes,
    identity: &Identity,
) -> Result<Vec<Missing>> {
    let api = Api::<SelfSubjectAccessReview>::all(connection.client.clone());
    let mut missing = Vec::new();
    for need in needs(config, identity) {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(attributes(&need)),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let how = PostParams::default();
        let answer = tokio::time::timeout(ANSWER, api.create(&how, &review))
            .await
            .map_err(anyhow::Error::from)
            .and_then(|answer| answer.map_err(anyhow::Error::from))
            .with_context(|| {
                format!(
                    "the API server at {} can't be asked whether this service account may {} {}",
                    connection.server, need.verb, need.resource
                )
            })?;
        if !answer.status.is_some_and(|status| status.allowed) {
            missing.push(need);
        }
    }
    Ok(missing)
}

fn attributes(need: &Missing) -> ResourceAttributes {
    let (resource, group) = need.resource.split_once('.').unwrap_or((need.resource, ""));
    ResourceAttributes {
        verb: Some(need.verb.to_owned()),
        resource: Some(resource.to_owned()),
        group: Some(group.to_owned()),
        namespace: need.namespace.clone(),
        ..ResourceAttributes::default()
    }
}

/// Everything that the daemon does, each once.
fn needs(config: &Kubernetes, identity: &Identity) -> BTreeSet<Missing> {
    let mut needs = BTreeSet::new();
    let mut add = |resource, namespace: Option<&str>, verbs: &[&'static str]| {
        needs.extend(verbs.iter().map(|&verb| Missing {
            verb,
            resource,
            namespace: namespace.map(str::to_owned),
        }));
    };
    let watch = ["list", "watch"];
    for entry in &config.services {
        let namespace = match &entry.of {
            ServiceChoice::Named { namespace, .. } => Some(namespace.as_str()),
            ServiceChoice::Selected { namespace, .. } => namespace.as_deref(),
        };
        for resource in ["services", "endpointslices.discovery.k8s.io", "pods"] {
            add(resource, namespace, &watch);
        }
        if let ClusterQuota::Shared {
            input: ClusterInput::Pods(classes),
            ..
        } = &entry.quota
        {
            for class in classes {
                add("pods", class.namespace.as_deref(), &watch);
            }
        }
    }
    let own = Some(identity.namespace.as_str());
    add(
        "configmaps",
        own,
        &["list", "watch", "create", "patch", "delete"],
    );
    add("daemonsets.apps", own, &watch);
    add("pods", own, &["get"]);
    needs
}
