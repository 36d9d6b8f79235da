//! `status --cluster` where no daemon is asked: from any machine with a kubeconfig.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::{Instant, timeout_at};

use super::group_quotas::GroupQuotas;
use super::report::why_not_placing;
use super::{report, view};
use crate::config::Config;
use crate::kubernetes::{
    Cluster, ClusterStatus, Identity, NodeReport, connection_of_user, installed_config, survey,
};

/// How long the API server may take to tell everything.
const WITHIN: Duration = Duration::from_secs(15);
/// What this machine is called where a node is named.
const HERE: &str = "outside";

/// The cluster as the API server and the node reports tell it, with the file of its daemons. Why
/// quotas are as they are only a daemon knows.
///
/// # Errors
/// When the API server does not answer or allow it, or there is no balancer in the cluster.
pub async fn status_from_outside(namespace: Option<&str>) -> Result<ClusterStatus> {
    let connection = connection_of_user()?;
    let namespace = survey(&connection, namespace).await?.daemon_set.namespace;
    let file = installed_config(&connection, &namespace).await?;
    let config = Config::parse(&file).context("the daemons' file is of another version")?;
    let effect = config.effect;
    let config = config
        .kubernetes
        .context("the daemons' file has no section `kubernetes`")?;
    let identity = Identity {
        node: HERE.to_owned(),
        pod: HERE.to_owned(),
        namespace,
        node_ips: Vec::new(),
    };
    let mut api = Cluster::over(connection, &config, identity);
    let until = Instant::now() + WITHIN;
    while !view(&api).complete {
        let told = timeout_at(until, api.changed()).await;
        ensure!(
            told.is_ok(),
            "the API server has not told everything within {} s: {}",
            WITHIN.as_secs(),
            view(&api).problems.join("; ")
        );
    }
    let own = NodeReport {
        node: HERE.to_owned(),
        ..NodeReport::default()
    };
    let why_not = why_not_placing(config.place, effect, None);
    let mut status = report::cluster_status(&view(&api), &own, &GroupQuotas::new(), why_not);
    for group in &mut status.groups {
        "only a daemon knows: `kubectl exec` into one, and run `balancer quota show`"
            .clone_into(&mut group.sentence);
    }
    Ok(status)
}
