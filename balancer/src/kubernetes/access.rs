//! Whether the API server answers, and what it would refuse.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Api;
use kube::api::PostParams;

use super::client::Connection;
use super::health::{ApiRequest, Target};
use super::identity::Identity;
use super::watch::pods::classes;
use crate::config::{Kubernetes, ServiceChoice};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);

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
                "the API server at {server} does not answer within {} s: see whether it runs and \
                 whether this node reaches it",
                ANSWER.as_secs()
            )
        })?
        .with_context(|| {
            format!(
                "the API server at {server} does not say its version: see whether it runs and is one"
            )
        })?;
    Ok(version.git_version)
}

/// The requests of a daemon with this configuration that its service account may not send.
///
/// # Errors
/// If the API server can't be asked.
pub async fn permissions(
    connection: &Connection,
    config: &Kubernetes,
    identity: &Identity,
) -> Result<Vec<ApiRequest>> {
    let api = Api::<SelfSubjectAccessReview>::all(connection.client.clone());
    let mut missing = Vec::new();
    for request in requests(config, identity) {
        let review = review(&request);
        let how = PostParams::default();
        let answer = tokio::time::timeout(ANSWER, api.create(&how, &review))
            .await
            .map_err(anyhow::Error::from)
            .and_then(|answer| answer.map_err(anyhow::Error::from))
            .with_context(|| {
                format!(
                    "the API server at {} can't be asked whether this service account may {} {}",
                    connection.server, request.verb, request.target.resource
                )
            })?;
        if !answer.status.is_some_and(|status| status.allowed) {
            missing.push(request);
        }
    }
    Ok(missing)
}

fn review(request: &ApiRequest) -> SelfSubjectAccessReview {
    let resource = request.target.resource;
    let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
    SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                verb: Some(request.verb.to_owned()),
                resource: Some(resource.to_owned()),
                group: Some(group.to_owned()),
                namespace: request.target.namespace.clone(),
                // A namespace is in itself, for whoever may see this one alone.
                name: (request.target.namespace.clone()).filter(|_| resource == "namespaces"),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    }
}

/// All requests of a daemon with this configuration.
fn requests(config: &Kubernetes, identity: &Identity) -> BTreeSet<ApiRequest> {
    let mut requests = BTreeSet::new();
    let mut add = |resource, namespace: Option<&str>, verbs: &[&'static str]| {
        requests.extend(verbs.iter().map(|&verb| ApiRequest {
            verb,
            target: Target::new(resource, namespace),
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
        for class in classes(entry) {
            add("pods", class.namespace.as_deref(), &watch);
        }
    }
    if config.place {
        // The pods of this node that are not placed, and its zone.
        add("pods", None, &watch);
    }
    let own = Some(identity.namespace.as_str());
    let publish = ["list", "watch", "create", "patch", "delete"];
    add("configmaps", own, &publish);
    add("daemonsets.apps", own, &["list"]);
    add("pods", own, &["get"]);
    add("namespaces", own, &["get"]);
    add("nodes", None, &["get"]);
    requests
}
