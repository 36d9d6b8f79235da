//! What is where, and how much of it.

use std::time::Duration;

use e2e::oap::image;
use serde_json::{Value, json};

use crate::cluster::Product;
use crate::layout::{ENTRY, OAPS, PORT, SERVICE, WORKLOADS, over_nodes};

pub const NODES: usize = 2;
pub const REPLICAS: u32 = 2;
/// Pods with a Java agent, each of which has one connection.
pub const AGENTS: u32 = 6;
/// What each OAP may have: there is no headroom.
pub const QUOTA: u32 = AGENTS / REPLICAS;

/// The image of OAPs and agents.
pub const IMAGE: &str = "localhost/skywalking:1";
/// Where an OAP answers queries.
pub const REST_PORT: u16 = 12800;
/// Where an OAP tells of itself.
pub const METRICS_PORT: u16 = 1234;

/// No agent may be without a connection for longer. What gRPC pauses after several refusals grows
/// to half of that.
pub const WITHOUT_CONNECTION: Duration = Duration::from_secs(60);

/// The OAPs as `SkyWalking`'s Helm chart makes them, release `skywalking`, but that everything is
/// in memory.
pub fn oaps() -> Value {
    let labels = json!({"app": "skywalking", "release": "skywalking", "component": "oap"});
    let mut with_chart = labels.clone();
    with_chart["chart"] = json!("skywalking-4.8.0");
    with_chart["heritage"] = json!("Helm");
    let named = json!({"namespace": OAPS, "name": "skywalking-oap", "labels": with_chart});
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": named,
        "spec": {
            "replicas": REPLICAS,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": oap(&labels)},
        },
    });
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": named,
        "spec": {
            "clusterIP": SERVICE,
            "selector": labels,
            "ports": [{"name": "grpc", "port": PORT}, {"name": "rest", "port": REST_PORT}],
        },
    });
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named});
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": named,
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "watch", "list"]}],
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": named,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "skywalking-oap"},
        "subjects": [{"kind": "ServiceAccount", "namespace": OAPS, "name": "skywalking-oap"}],
    });
    json!({"apiVersion": "v1", "kind": "List", "items": [account, role, binding, service, deployment]})
}

/// A pod. All its probes are at the port that is guarded.
fn oap(labels: &Value) -> Value {
    let mut command = java(512);
    command.extend(image::OAP.map(str::to_owned));
    let probe = |period: u32, failures: u32| {
        json!({
            "tcpSocket": {"port": PORT},
            "periodSeconds": period,
            "timeoutSeconds": 5,
            "failureThreshold": failures,
        })
    };
    json!({
        "serviceAccountName": "skywalking-oap",
        "terminationGracePeriodSeconds": 10,
        "topologySpreadConstraints": [over_nodes(labels)],
        "containers": [{
            "name": "oap",
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "command": command,
            "ports": [
                {"name": "grpc", "containerPort": PORT},
                {"name": "rest", "containerPort": REST_PORT},
            ],
            "env": [
                variable("SW_CLUSTER", "kubernetes"),
                variable("SW_CLUSTER_K8S_NAMESPACE", OAPS),
                variable("SW_CLUSTER_K8S_LABEL", "app=skywalking,release=skywalking,component=oap"),
                from_field("SKYWALKING_COLLECTOR_UID", "metadata.uid"),
                variable("SW_CORE_GRPC_HOST", "0.0.0.0"),
                variable("SW_CORE_GRPC_PORT", &PORT.to_string()),
                variable("SW_CORE_REST_HOST", "0.0.0.0"),
                variable("SW_CORE_REST_PORT", &REST_PORT.to_string()),
                variable("SW_ALS_GRPC_HOST", "0.0.0.0"),
                variable("SW_ALS_GRPC_PORT", "11802"),
                variable("SW_TELEMETRY", "prometheus"),
                variable("SW_TELEMETRY_PROMETHEUS_PORT", &METRICS_PORT.to_string()),
            ],
            "startupProbe": probe(1, 300),
            "readinessProbe": probe(2, 3),
            "livenessProbe": probe(5, 3),
        }],
    })
}

/// Pods of an application with the agent. Of a `StatefulSet`, so that a new one is not made before
/// the old one is gone: their number is the quotas' input.
pub fn agents() -> Value {
    let labels = json!({"app": "workload", "agent": "java"});
    let mut command = java(64);
    // Each pod has its own service: its segments are told from those of its predecessor.
    command.extend([
        "-Dskywalking.agent.service_name=$(POD_NAME).$(POD_UID)".to_owned(),
        "-Dskywalking.agent.instance_name=$(POD_NAME)".to_owned(),
        format!("-Dskywalking.collector.backend_service={SERVICE}:{PORT}"),
    ]);
    command.extend(image::APPLICATION.map(str::to_owned));
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"namespace": WORKLOADS, "name": "workload"},
        "spec": {
            "replicas": AGENTS,
            "serviceName": "workload",
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {
                "terminationGracePeriodSeconds": 2,
                "containers": [{
                    "name": "workload",
                    "image": IMAGE,
                    "imagePullPolicy": "Never",
                    "command": command,
                    "env": [
                        from_field("POD_NAME", "metadata.name"),
                        from_field("POD_UID", "metadata.uid"),
                    ],
                }],
            }},
        },
    })
}

/// The chart's values. The total follows from the pods, and nothing is added.
pub fn values(product: &Product) -> Value {
    let class = json!({"selector": "agent=java", "namespace": WORKLOADS, "connections": 1});
    let quota = json!({"pods": [class], "headroom": "0%", "min_quota": 1});
    // Which Services is left to the default: those of SkyWalking's chart.
    product.values(&json!({"services": {ENTRY: {"port": "grpc", "quota": quota}}}))
}

/// A small JVM: the second compiler would only make the start longer.
fn java(heap_megabytes: u32) -> Vec<String> {
    vec![
        image::JAVA.to_owned(),
        format!("-Xmx{heap_megabytes}m"),
        "-XX:+UseSerialGC".to_owned(),
        "-XX:TieredStopAtLevel=1".to_owned(),
    ]
}

fn variable(name: &str, value: &str) -> Value {
    json!({"name": name, "value": value})
}

fn from_field(name: &str, field: &str) -> Value {
    json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}})
}
