//! The Kubernetes cluster of a configuration: whether its API server answers, and what it would
//! refuse.

use anyhow::{Context as _, Result};

use super::{Check, listing};
use crate::{
    config::Kubernetes,
    dataplane::{BackendSnapshot, Snapshot},
    kubernetes::{self, ApiRequest, ClusterStatus, Connection, Identity},
};

/// More exempt connections than this are not only those of peers and probes: address translation
/// gives clients the address of a node.
const FEW: u32 = 32;

/// Whether the daemon would learn of its cluster.
pub(super) fn checks(config: &Kubernetes) -> Vec<Check> {
    match look(config) {
        Ok(checks) => checks,
        Err(error) => vec![unreachable(&error)],
    }
}

fn look(config: &Kubernetes) -> Result<Vec<Check>> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start a runtime")?
        .block_on(ask(config))
}

async fn ask(config: &Kubernetes) -> Result<Vec<Check>> {
    let identity = Identity::from_env()?;
    let connection = kubernetes::connection()?;
    let version = kubernetes::reachable(&connection).await?;
    let reached = Check::ok(
        "API server",
        format!("{} answers, {version}", connection.server),
        "the daemon learns of Services, pods and the other nodes",
    );
    Ok(vec![
        reached,
        permissions(&connection, config, &identity).await,
    ])
}

async fn permissions(connection: &Connection, config: &Kubernetes, identity: &Identity) -> Check {
    const NAME: &str = "permissions";
    match kubernetes::permissions(connection, config, identity).await {
        Ok(missing) if missing.is_empty() => Check::ok(
            NAME,
            "everything that the daemon asks of the API server is allowed",
            "it can see the cluster and tell the other nodes what it counts",
        ),
        Ok(missing) => {
            let missing: Vec<String> = missing.iter().map(ApiRequest::refusal).collect();
            Check::fail(
                NAME,
                missing.join("; "),
                "connections are counted, but quotas hold and then open where what they are computed from can't be seen",
                "install the chart's roles again (`helm upgrade`), or see docs/kubernetes.md for what each permission is for; \
                 `kubectl auth can-i --list --as system:serviceaccount:NAMESPACE:NAME` shows what is allowed",
            )
        }
        Err(error) => unreachable(&error),
    }
}

fn unreachable(error: &anyhow::Error) -> Check {
    Check::fail(
        "API server",
        format!("{error:#}"),
        "connections are counted and steered, but quotas hold and then open, and nothing is known of the other nodes",
        "run this in the daemon's pod (kubectl exec), which knows the API server and has its account; there, see whether the node reaches it",
    )
}

/// What the daemon of this node says is wrong with the cluster.
pub(super) fn problems(cluster: &ClusterStatus) -> Check {
    let backends = cluster.groups.iter().flat_map(|group| &group.backends);
    let well = format!(
        "the daemon of node {} finds nothing wrong with the {} pods that it knows",
        cluster.node,
        backends.count()
    );
    Check::warn_of(
        "cluster",
        &cluster.problems,
        (
            &well,
            "every pod that is ready is told of by the daemon of its node",
        ),
        "quotas are computed from what is known",
        "each says what to do; `balancer status --cluster` shows the pods",
    )
}

/// Whether clients seem to be exempt because address translation gives them the node's address.
pub(super) fn translated(snapshot: &Snapshot) -> Option<Check> {
    let suspicious = |backend: &BackendSnapshot| backend.exempt > FEW;
    let backends: Vec<String> = snapshot
        .services
        .iter()
        .flat_map(|service| {
            service
                .backends
                .iter()
                .map(move |backend| (service, backend))
        })
        .filter(|(_, backend)| suspicious(backend))
        .map(|(service, backend)| {
            format!(
                "{} slot {}: {} of {}",
                service.name, backend.slot, backend.exempt, backend.established
            )
        })
        .collect();
    (!backends.is_empty()).then(|| {
        Check::warn(
            "exempt connections",
            listing(&backends),
            "many connections come from sources that are never refused: the other servers and this node's own probes are few. Clients that come through \
             a NodePort or a load balancer have the address of a node where address translation hides theirs, and so have pods of the node's own \
             network: quotas do not hold for them",
            "let clients connect to the Service's own address, or set `externalTrafficPolicy: Local` on it",
        )
    })
}
