//! What is where, and how much of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::Product;

/// The nodes. The way from outside to Services leads through the first one, which therefore stays.
pub const NODES: [&str; 3] = ["node1", "node2", "node3"];
/// The node that is killed.
pub const VICTIM: &str = "node3";
/// The node whose daemon is taken away,
pub const WITHOUT_DAEMON: &str = "node2";
/// by this label, which is `off` then.
pub const SWITCH: &str = "balancer";

/// The addresses that a node sends from to its own pods.
pub fn addresses(node: &str) -> Vec<IpAddr> {
    let place = NODES.iter().position(|other| *other == node);
    let number = u8::try_from(place.unwrap_or(NODES.len()) + 1).unwrap_or(u8::MAX);
    let wide = u16::from(number);
    vec![
        Ipv4Addr::new(10, 244, number, 1).into(),
        Ipv4Addr::new(10, 89, 0, 10 + number).into(),
        Ipv6Addr::new(0xfd00, 0x244, wide, 0, 0, 0, 0, 1).into(),
        Ipv6Addr::new(0xfd00, 0x89, 0, 0, 0, 0, 0, 0x10 + wide).into(),
    ]
}

/// Where the OAPs are.
pub const OAPS: &str = "skywalking";
/// What the chart calls them, and their Service.
pub const OAP: &str = "skywalking-oap";
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
/// Its IPv6 address, while it has one.
pub const SERVICE6: &str = "fd00:96::118";
/// The clients of the IPv4 address, and those of the IPv6 address.
pub const WORKLOAD: &str = "workload";
pub const WORKLOAD6: &str = "workload6";
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

/// When a node without a daemon stops placing, in the step that takes one away.
pub const FAIL_OPEN_AFTER: Duration = Duration::from_secs(15);

/// No client may be without a connection for longer. Clients pause for at most 3 s between two
/// connects, and where two of three OAPs are full the Service sends them to a full one twenty times
/// in a row about three times in ten thousand.
pub const WITHOUT_CONNECTION: Duration = Duration::from_secs(60);

/// The OAPs as `SkyWalking`'s Helm chart labels them, release `skywalking`.
pub fn oaps(replicas: u32) -> Value {
    let labels = labels();
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"namespace": OAPS, "name": OAP, "labels": labels_of_chart()},
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
    let service = service(&[("IPv4", SERVICE)]);
    json!({"apiVersion": "v1", "kind": "List", "items": [service, deployment]})
}

/// The Service of the OAPs, with an address of each of these families.
pub fn service(addresses: &[(&str, &str)]) -> Value {
    let (families, addresses): (Vec<_>, Vec<_>) = addresses.iter().copied().unzip();
    let dual = addresses.len() > 1;
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": OAPS, "name": OAP, "labels": labels_of_chart()},
        "spec": {
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ipFamilies": families,
            "ipFamilyPolicy": if dual { "RequireDualStack" } else { "SingleStack" },
            "selector": labels(),
            "ports": [{"name": "grpc", "port": PORT}],
        },
    })
}

/// Those of OAP pods.
fn labels() -> Value {
    json!({"app": "skywalking", "release": "skywalking", "component": "oap"})
}

fn labels_of_chart() -> Value {
    let mut labels = labels();
    labels["chart"] = json!("skywalking-4.8.0");
    labels["heritage"] = json!("Helm");
    labels
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

/// So many pods with clients of an address, which are monitored workloads.
pub fn clients(name: &str, to: IpAddr, pods: u32) -> Value {
    let labels = json!({"app": name, "agent": "java"});
    let to = SocketAddr::new(to, PORT);
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"namespace": WORKLOADS, "name": name},
        "spec": {
            "replicas": pods,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "workload",
                    "image": STANDINS,
                    "imagePullPolicy": "Never",
                    "command": [
                        "standin-client",
                        format!("--to={to}"),
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
    values["config"]["services"][ENTRY]["rebalance"] = json!(place);
    values
}

/// The same with everybody placed, but for nodes that are labelled: these get no daemon.
pub fn placing_unless_labelled(product: &Product) -> Value {
    let mut values = placing(product, "on");
    let unless = json!({"key": SWITCH, "operator": "NotIn", "values": ["off"]});
    let terms = json!({"nodeSelectorTerms": [{"matchExpressions": [unless]}]});
    values["affinity"] =
        json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}});
    values["config"]["failOpenAfter"] = json!(format!("{}s", FAIL_OPEN_AFTER.as_secs()));
    values["podAnnotations"]["scenario"] = json!("unless-labelled");
    values
}

fn values(product: &Product, annotation: &str, quota: &Value, hold_for: Duration) -> Value {
    let mut values = product.values(&json!({
        // Which Services is left to the default: those of SkyWalking's chart.
        "services": {ENTRY: {"port": "grpc", "quota": quota, "rebalance": "off"}},
        "holdFor": format!("{}s", hold_for.as_secs()),
        // What quotas alone do, until the step that places and moves.
        "place": "off",
    }));
    values["podAnnotations"] = json!({"scenario": annotation});
    values
}
