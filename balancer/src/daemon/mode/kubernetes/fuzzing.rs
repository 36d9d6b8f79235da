//! What the fuzz targets go through.

use std::time::Duration;

use balancer_common::Policy;
use serde_json::json;

use super::group::Group;
use super::group_quotas::GroupQuotas;
use crate::config::{ClusterInput, ClusterQuota, ClusterService, PortChoice, ServiceChoice};
use crate::kubernetes::{
    Endpoint, GroupId, NodeReport, ObjectName, ReceivedReport, View, parse_report,
};
use crate::quota::Quota;

/// The quota of a pod, where its group has one pod on each of the nodes `a`, `b` and `c`. `a` and
/// `c` report so many connections each, `b` this text; headroom is 0.
///
/// # Errors
/// What is wrong with the text; it is not looked at then.
pub fn quota_beside_report(text: &str, connections: u32) -> Result<Quota, String> {
    let group = group();
    let mut view = View {
        complete: true,
        ..View::default()
    };
    let endpoints = ["a", "b", "c"].map(endpoint);
    let lying = parse_report(text, "balancer-b")?;
    let honest = ["a", "c"].map(|node| report(&group, node, connections));
    for node_report in honest.into_iter().chain([lying]) {
        let age = Duration::from_secs(1);
        let node = node_report.node.clone();
        view.nodes.insert(node, ReceivedReport { age, node_report });
    }
    view.groups.insert(group.clone(), endpoints.to_vec());
    let entry = entry();
    let mut quotas = GroupQuotas::new();
    let outcome = quotas.compute(
        &Group::new(&group, &entry, &view, Vec::new()),
        &view,
        Duration::MAX,
    );
    Ok(outcome.quotas[0])
}

fn group() -> GroupId {
    GroupId {
        entry: "agents".into(),
        service: object("oap"),
        port: 11800,
    }
}

fn object(name: &str) -> ObjectName {
    ObjectName {
        namespace: "sw".into(),
        name: name.into(),
    }
}

fn entry() -> ClusterService {
    ClusterService {
        name: "agents".into(),
        of: ServiceChoice::Named {
            namespace: "sw".into(),
            name: "oap".into(),
        },
        port: PortChoice::Number(11800),
        policy: Policy::LeastConnections,
        quota: ClusterQuota::Shared {
            input: ClusterInput::Observed {
                window: Duration::from_secs(600),
            },
            headroom_percent: 0,
            min_quota: 1,
        },
        exempt: Vec::new(),
    }
}

fn endpoint(node: &str) -> Endpoint {
    Endpoint {
        pod: object(node),
        uid: node.into(),
        addresses: Vec::new(),
        node: Some(node.into()),
        ready: true,
        terminating: false,
        weight: 1,
    }
}

fn report(group: &GroupId, node: &str, connections: u32) -> NodeReport {
    let backend = json!({
        "group": group, "pod": object(node), "uid": node, "slot": 0, "address": "10.0.0.1",
        "state": "active", "established": connections, "exempt": 0, "pending": 0, "quota": null,
        "room": null,
    });
    serde_json::from_value(json!({
        "schema": 1, "node": node, "backends": [backend], "peaks": [], "refused": [],
    }))
    .unwrap_or_default()
}
