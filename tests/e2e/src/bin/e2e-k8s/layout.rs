//! What is where, and how much of it.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::Product;

/// The nodes. The way from outside to Services leads through the first one, which therefore stays.
pub const NODES: [&str; 3] = ["node1", "node2", "node3"];
/// The node that is killed.
pub const VICTIM: &str = "node3";

/// The addresses that a node sends from to its own pods.
pub fn addresses(node: &str) -> Vec<IpAddr> {
    let place = NODES.iter().position(|other| *other == node);
    let number = u8::try_from(place.unwrap_or(NODES.len()) + 1).unwrap_or(u8::MAX);
    let of_pods = Ipv4Addr::new(10, 244, number, 1);
    vec![of_pods.into(), Ipv4Addr::new(10, 89, 0, 10 + number).into()]
}

/// Where the OAPs are.
pub const OAPS: &str = "skywalking";
/// Where the clients are.
pub const WORKLOADS: &str = "workloads";
/// Where the balancer is.
pub const SYSTEM: &str = "balancer-system";
/// What helm calls it.
pub const RELEASE: &str = "balancer";
/// The entry of the configuration.
pub const ENTRY: &str = "agents";

/// The port of OAPs.
pub const PORT: u16 = 11800;
/// The address of their Service.
pub const SERVICE: &str = "10.96.118.0";
/// Where clients tell what they have seen.
pub const ANSWERS: u16 = 9000;

/// The image of OAPs and clients.
pub const STANDINS: &str = "localhost/standins:1";

pub const REPLICAS: u32 = 4;
pub const CLIENT_PODS: u32 = 8;
pub const CONNECTIONS: u32 = 40;
/// Clients outside of the cluster.
pub const OUTSIDE: u32 = 80;

/// What is added to the observed number of connections, in percent.
pub const HEADROOM: u32 = 15;
/// What is added to the connections that follow from pods, in percent: so little that some clients
/// are refused.
pub const TIGHT_HEADROOM: u32 = 5;

/// How old inputs may be in the step in which the API server is down: half as old as they get.
pub const HOLD_FOR: Duration = Duration::from_secs(30);
/// How long the API server is down.
pub const API_DOWN: Duration = Duration::from_secs(60);

/// No client may be without a connection for longer. Clients pause for at most 3 s between two
/// connects, and where two of three OAPs are full the Service sends them to a full one twenty times
/// in a row about three times in ten thousand.
pub const WITHOUT_CONNECTION: Duration = Duration::from_secs(60);

/// The OAPs as `SkyWalking`'s Helm chart labels them, release `skywalking`.
pub fn oaps(replicas: u32) -> Value {
    let labels = json!({"app": "skywalking", "release": "skywalking", "component": "oap"});
    let mut with_chart = labels.clone();
    with_chart["chart"] = json!("skywalking-4.8.0");
    with_chart["heritage"] = json!("Helm");
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"namespace": OAPS, "name": "skywalking-oap", "labels": with_chart},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {"metadata": {"labels": labels}, "spec": {
                "terminationGracePeriodSeconds": 5,
                "topologySpreadConstraints": [over_nodes(&labels)],
                "containers": [{
                    "name": "oap",
                    "image": STANDINS,
                    "imagePullPolicy": "Never",
                    "command": ["standin-oap"],
                    "ports": [{"name": "grpc", "containerPort": PORT}],
                    "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
                }],
            }},
        },
    });
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": OAPS, "name": "skywalking-oap", "labels": with_chart},
        "spec": {
            "clusterIP": SERVICE,
            "selector": labels,
            "ports": [{"name": "grpc", "port": PORT}],
        },
    });
    json!({"apiVersion": "v1", "kind": "List", "items": [service, deployment]})
}

/// Pods of these labels go to different nodes, where they can.
pub fn over_nodes(labels: &Value) -> Value {
    json!({
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels},
    })
}

/// Pods with clients, which are monitored workloads.
pub fn clients() -> Value {
    let labels = json!({"app": "workload", "agent": "java"});
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"namespace": WORKLOADS, "name": "workload"},
        "spec": {
            "replicas": CLIENT_PODS,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "workload",
                    "image": STANDINS,
                    "imagePullPolicy": "Never",
                    "command": [
                        "standin-client",
                        format!("--to={SERVICE}:{PORT}"),
                        format!("--connections={CONNECTIONS}"),
                    ],
                }],
            }},
        },
    })
}

/// The chart's values while the total is what is observed.
pub fn by_observation(product: &Product) -> Value {
    let quota = json!({"observed": "10m", "headroom": format!("{HEADROOM}%")});
    values(product, "observation", &quota, Duration::from_secs(300))
}

/// The chart's values while the total follows from pods.
pub fn by_pods(product: &Product) -> Value {
    let class =
        json!({"selector": "agent=java", "namespace": WORKLOADS, "connections": CONNECTIONS});
    let quota = json!({"pods": [class], "headroom": format!("{TIGHT_HEADROOM}%")});
    values(product, "pods", &quota, HOLD_FOR)
}

/// The chart's values with everybody placed, or nobody, while the total is what is observed.
pub fn placing(product: &Product, place: &str) -> Value {
    let quota = json!({"observed": "10m", "headroom": format!("{HEADROOM}%")});
    let mut values = values(
        product,
        &format!("place-{place}"),
        &quota,
        Duration::from_secs(300),
    );
    values["config"]["place"] = json!(place);
    values
}

fn values(product: &Product, annotation: &str, quota: &Value, hold_for: Duration) -> Value {
    let mut values = product.values(&json!({
        // Which Services is left to the default: those of SkyWalking's chart.
        "services": {ENTRY: {"port": "grpc", "quota": quota}},
        "holdFor": format!("{}s", hold_for.as_secs()),
        // What quotas alone do, until the step that places.
        "place": "off",
    }));
    values["podAnnotations"] = json!({"scenario": annotation});
    values
}
