//! The balancer of a whole cluster, as the API server alone tells of it: for a look from outside.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt};

use super::client::Connection;
use super::model::{NodeReport, ObjectName};
use super::watch::node_reports::{KEY, LABELS, parse_text};

/// What the chart labels everything with.
const PART_OF: &str = "app.kubernetes.io/part-of=balancer";
/// The key of the daemon's file in its Secret.
const FILE: &str = "balancer.yaml";

/// What there is of the balancer in a cluster.
#[derive(Debug)]
pub struct Survey {
    /// Its `DaemonSet`.
    pub daemon_set: ObjectName,
    /// How many daemons there should be.
    pub desired: i32,
    /// The daemons by node.
    pub daemons: BTreeMap<String, SurveyedDaemon>,
    /// All nodes.
    pub nodes: Vec<String>,
    /// The node reports by node.
    pub reports: BTreeMap<String, SurveyedReport>,
}

/// One daemon.
#[derive(Debug)]
pub struct SurveyedDaemon {
    /// Its pod.
    pub pod: String,
    /// Its image.
    pub image: String,
    /// It answers.
    pub ready: bool,
}

/// One node report.
#[derive(Debug)]
pub struct SurveyedReport {
    /// How long ago the API server took it, by this machine's clock.
    pub age: Option<Duration>,
    /// What it says; an error is the problem with it.
    pub report: Result<NodeReport, String>,
}

/// Looks at the balancer of a cluster: in that namespace, or wherever there is one.
///
/// # Errors
/// When the API server does not answer or allow it, or there is no balancer, or several are.
pub async fn survey(connection: &Connection, namespace: Option<&str>) -> Result<Survey> {
    let client = &connection.client;
    let set = daemon_set(client, namespace).await?;
    let namespace = set.namespace().unwrap_or_default();
    let nodes = Api::<PartialObjectMeta<Node>>::all(client.clone());
    let nodes = nodes.list_metadata(&ListParams::default()).await;
    let nodes = nodes.context("cannot list the nodes")?;
    let status = set.status.as_ref();
    Ok(Survey {
        desired: status.map_or(0, |status| status.desired_number_scheduled),
        daemons: daemons(client, &namespace, &set).await?,
        nodes: nodes.items.iter().map(ResourceExt::name_any).collect(),
        reports: reports(client, &namespace).await?,
        daemon_set: ObjectName::of(&set),
    })
}

async fn daemon_set(client: &Client, namespace: Option<&str>) -> Result<DaemonSet> {
    let api: Api<DaemonSet> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let sets = api.list(&ListParams::default().labels(PART_OF)).await;
    let mut sets =
        sets.context("cannot list the DaemonSets; name its namespace with --namespace")?;
    let names: Vec<_> = sets
        .items
        .iter()
        .map(|set| ObjectName::of(set).to_string())
        .collect();
    match (sets.items.pop(), names.len()) {
        (Some(set), 1) => Ok(set),
        (None, _) => bail!(
            "no DaemonSet of the balancer ({PART_OF}) is {}: install the chart",
            namespace.map_or("in this cluster".to_owned(), |name| format!(
                "in the namespace {name}"
            ))
        ),
        _ => bail!(
            "there are several balancers in this cluster ({}): name one with --namespace",
            names.join(", ")
        ),
    }
}

async fn daemons(
    client: &Client,
    namespace: &str,
    set: &DaemonSet,
) -> Result<BTreeMap<String, SurveyedDaemon>> {
    let labels = set
        .spec
        .as_ref()
        .and_then(|spec| spec.selector.match_labels.clone());
    let labels: Vec<_> = (labels.into_iter().flatten())
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let pods = pods
        .list(&ListParams::default().labels(&labels.join(",")))
        .await;
    let pods =
        pods.with_context(|| format!("cannot list the pods of the namespace {namespace}"))?;
    let of_node = |pod: Pod| {
        let name = pod.name_any();
        let spec = pod.spec?;
        let image = spec
            .containers
            .first()
            .and_then(|container| container.image.clone());
        let conditions = pod
            .status
            .and_then(|status| status.conditions)
            .unwrap_or_default();
        let ready = conditions
            .iter()
            .any(|one| one.type_ == "Ready" && one.status == "True");
        let daemon = SurveyedDaemon {
            pod: name,
            image: image.unwrap_or_default(),
            ready,
        };
        Some((spec.node_name?, daemon))
    };
    Ok(pods.items.into_iter().filter_map(of_node).collect())
}

async fn reports(client: &Client, namespace: &str) -> Result<BTreeMap<String, SurveyedReport>> {
    let labels = LABELS
        .map(|(key, value)| format!("{key}={value}"))
        .join(",");
    let maps = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let maps = maps.list(&ListParams::default().labels(&labels)).await;
    let maps = maps.with_context(|| format!("cannot list the ConfigMaps of {namespace}"))?;
    let of_node = |map: ConfigMap| {
        let name = map.name_any();
        let node = name.strip_prefix("balancer-").unwrap_or(&name).to_owned();
        let text = map.data.as_ref().and_then(|data| data.get(KEY));
        let report = text.map_or_else(
            || Err("it is empty".to_owned()),
            |text| parse_text(text, &name),
        );
        let written = map
            .managed_fields()
            .iter()
            .filter_map(|fields| fields.time.as_ref());
        let age = written.map(|time| time.0).max().map(age_of);
        (node, SurveyedReport { age, report })
    };
    Ok(maps.items.into_iter().map(of_node).collect())
}

/// A clock that is behind the server's shows no age below 0.
fn age_of(time: Timestamp) -> Duration {
    let age = Timestamp::now().duration_since(time);
    Duration::try_from(age).unwrap_or_default()
}

/// The file that the daemons of a namespace have, from the chart's Secret.
///
/// # Errors
/// When it can't be read.
pub async fn installed_config(connection: &Connection, namespace: &str) -> Result<String> {
    let secrets = Api::<Secret>::namespaced(connection.client.clone(), namespace);
    let secrets = secrets.list(&ListParams::default().labels(PART_OF)).await;
    let secrets = secrets.with_context(|| format!("cannot list the Secrets of {namespace}"))?;
    let mut files = secrets
        .items
        .into_iter()
        .filter_map(|secret| secret.data?.remove(FILE));
    let file = files.next();
    let file = file.with_context(|| format!("no Secret of {namespace} has the key {FILE}"))?;
    String::from_utf8(file.0).context("the daemons' file is not UTF-8")
}
