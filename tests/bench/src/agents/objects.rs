//! The objects of the cluster that is measured, and what its daemons report.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use balancer::kubernetes::{GroupId, NodeReport, ObjectName, Peak, ReportedBackend, SCHEMA};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use testkit::kubernetes::objects;

/// The namespace of the daemons.
pub const SYSTEM: &str = "balancer-system";
/// The namespace of the OAPs.
pub const OAPS: &str = "skywalking";
/// The label by which the `DaemonSet` knows its pods.
pub const OF_SET: (&str, &str) = ("app.kubernetes.io/name", "balancer");
const PORT: u16 = 11_800;

fn read<T: DeserializeOwned>(object: Value) -> Result<T> {
    serde_json::from_value(object).context("an object of the measurement is none of Kubernetes")
}

/// What a node is called.
fn node_name(number: usize) -> String {
    format!("node-{number:04}")
}

/// The last node: it has no OAP, and the daemon itself runs there.
pub fn measured_node(nodes: usize) -> String {
    node_name(nodes.saturating_sub(1))
}

/// Whether a node has one of so many OAPs.
pub fn has_oap(node: &str, oaps: usize) -> bool {
    (0..oaps).any(|number| node_name(number) == node)
}

/// A node that is ready.
pub fn node(number: usize) -> Result<Node> {
    read(objects::node(&node_name(number)))
}

/// The OAPs' Service, as `SkyWalking`'s chart makes it.
pub fn service() -> Result<Service> {
    let mut service = objects::service(OAPS, "oap", &[("grpc", PORT)]);
    service["spec"]["selector"] = json!({"app": "oap"});
    read(objects::labelled(
        service,
        &[
            ("app", "skywalking"),
            ("chart", "skywalking-4.9.0"),
            ("component", "oap"),
            ("heritage", "Helm"),
            ("release", "skywalking"),
        ],
    ))
}

/// The OAP of a node; the kubelet gives it its address.
pub fn oap(number: usize) -> Result<Pod> {
    let name = format!("oap-{number}");
    let mut pod = objects::pod(OAPS, &name, &node_name(number), &[]);
    pod["metadata"]["labels"] = json!({"app": "oap"});
    pod["status"] = json!({"phase": "Pending"});
    read(pod)
}

/// The daemons' own, rolled out as by the chart.
pub fn daemon_set() -> Result<DaemonSet> {
    let (key, value) = OF_SET;
    read(json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"namespace": SYSTEM, "name": "balancer"},
        "spec": {
            "selector": {"matchLabels": {key: value}},
            "updateStrategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxUnavailable": "10%"},
            },
            "template": {
                "metadata": {"labels": {key: value}},
                "spec": {
                    "serviceAccountName": "balancer",
                    "tolerations": [{"operator": "Exists"}],
                    "containers": [{"name": "balancer", "image": "none"}],
                },
            },
        },
    }))
}

/// Who the daemons are, with the rights that the chart gives them.
pub fn account() -> Value {
    let account = (SYSTEM, "balancer");
    let mut all = vec![
        objects::namespace(SYSTEM),
        objects::namespace(OAPS),
        objects::service_account(SYSTEM, "balancer"),
    ];
    let cluster: [(&str, &str, &[&str]); 4] = [
        ("", "services", &["list", "watch"]),
        ("", "pods", &["list", "watch"]),
        ("", "nodes", &["get"]),
        ("discovery.k8s.io", "endpointslices", &["list", "watch"]),
    ];
    let home: [(&str, &str, &[&str]); 4] = [
        (
            "",
            "configmaps",
            &["list", "watch", "create", "patch", "delete"],
        ),
        ("apps", "daemonsets", &["list"]),
        ("", "pods", &["get"]),
        ("", "namespaces", &["get"]),
    ];
    for (name, rules) in [("balancer", cluster), ("balancer-home", home)] {
        let role = objects::cluster_role(name, account, &rules);
        all.extend(role["items"].as_array().into_iter().flatten().cloned());
    }
    objects::list(&all)
}

/// The daemons' file: what the chart writes without any value.
pub const FILE: &str = "kubernetes:
  services:
    - name: agents
      port: 11800
      quota: {observed: 10m, headroom: 15%}
  publish_every: 2s
  hold_for: 5m
  place: on
fail_open_after: 60s
";

/// What the daemon of a node reports, where its OAP, if it has one, has so many connections.
pub fn report(node: &str, established: Option<u32>) -> NodeReport {
    let name = |name: &str| ObjectName {
        namespace: OAPS.to_owned(),
        name: name.to_owned(),
    };
    let group = GroupId {
        entry: "agents".to_owned(),
        service: name("oap"),
        port: PORT,
    };
    let backend = |established| ReportedBackend {
        group: group.clone(),
        pod: name(&format!("oap-of-{node}")),
        uid: "3c1f6a52-0a35-4c5c-9f0c-5d2f7f1d8c11".to_owned(),
        slot: 0,
        address: IpAddr::V4(Ipv4Addr::new(10, 244, 1, 1)),
        state: "active".to_owned(),
        established,
        exempt: 0,
        pending: Some(0),
        quota: Some(4_000),
        room: Some(4_000_u32.saturating_sub(established)),
        health: None,
        moving: 0,
        returning: 0,
        drained: false,
    };
    let peak = Peak {
        group: group.clone(),
        connections: 6_000,
        seconds_ago: 0,
    };
    NodeReport {
        schema: SCHEMA,
        node: node.to_owned(),
        backends: established.map(backend).into_iter().collect(),
        peaks: established.map(|_| peak).into_iter().collect(),
        ..NodeReport::default()
    }
}
