//! What the fuzz targets go through.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use balancer_common::Policy;
use balancer_common::abi::Keepalive;
use serde_json::json;

use super::super::super::moves::Departures;
use super::group::Group;
use super::group_quotas::GroupQuotas;
use super::plan::{Here, PortNames};
use crate::config::{
    ClusterInput, ClusterQuota, ClusterService, Kubernetes, Match, MoveRule, PortChoice,
    ServiceChoice,
};
use crate::dataplane::Plan;
use crate::kubernetes::{
    Endpoint, GroupId, NodeReport, ObjectName, Offered, ReceivedReport, View, groups_beside_slice,
    parse_report,
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
        let node_report = node_report.into();
        view.nodes.insert(node, ReceivedReport { age, node_report });
    }
    view.groups.insert(group.clone(), endpoints.to_vec());
    let entry = entry();
    let mut quotas = GroupQuotas::new();
    let outcome = quotas.compute(
        &Group::new(&group, &entry, &view, Vec::new(), &Departures::default()),
        &view,
        true,
        Duration::MAX,
    );
    Ok(outcome.quotas[0])
}

/// What the maps should hold on the node `a`, where one pod of an OAP is, and somebody wrote this
/// `EndpointSlice` (JSON). The first service is the OAP's.
///
/// # Errors
/// When the text is no `EndpointSlice` of a Service.
pub fn plan_beside_slice(text: &str) -> Result<Plan, String> {
    let group = group();
    let mut own = endpoint("a");
    own.addresses = vec![OAP];
    let groups = [(group.clone(), vec![own])].into();
    let groups = groups_beside_slice(text, &group.entry, groups)?;
    let mut precedence = vec![group.clone()];
    precedence.extend(groups.keys().filter(|id| **id != group).cloned());
    let view = View {
        complete: true,
        groups,
        precedence,
        ..View::default()
    };
    let config = Kubernetes {
        services: vec![ClusterService {
            of: ServiceChoice::Selected {
                namespace: None,
                selectors: vec!["app=oap".into()],
            },
            ..entry()
        }],
        publish_every: Duration::from_secs(2),
        hold_for: Duration::from_secs(300),
        place: true,
    };
    let here = Here {
        node: "a",
        addresses: BTreeSet::new(),
    };
    let mut ports = PortNames::default();
    ports.keep(&config, &group.entry, group.port);
    ports.update(&config, &view, &HashSet::from([group.port]));
    Ok(ports.plan(&config, &view, &here))
}

/// The address of the OAP of [`plan_beside_slice`].
pub const OAP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

/// The backend group of an OAP.
pub(super) fn group() -> GroupId {
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

/// The service entry of [`group`]: what was observed within ten minutes, and nothing added.
pub(super) fn entry() -> ClusterService {
    ClusterService {
        name: "agents".into(),
        of: ServiceChoice::Named {
            namespace: "sw".into(),
            name: "oap".into(),
        },
        port: PortChoice::Number(11800),
        matching: Match::Service,
        policy: Policy::LeastConnections,
        quota: ClusterQuota::Shared {
            input: ClusterInput::Observed {
                window: Duration::from_secs(600),
            },
            headroom_percent: 0,
            min_quota: 1,
        },
        exempt: Vec::new(),
        health: true,
        keepalive: Some(Keepalive::DEFAULT),
        moving: MoveRule::Graceful,
        rebalance: true,
    }
}

pub(super) fn endpoint(node: &str) -> Endpoint {
    Endpoint {
        pod: object(node),
        uid: node.into(),
        addresses: Vec::new(),
        node: Some(node.into()),
        ready: true,
        terminating: false,
        weight: 1,
        confirmed: true,
        host_network: false,
        runtime_class: None,
        offered: Offered {
            ready: true,
            serving: true,
            ..Offered::default()
        },
    }
}

pub(super) fn report(group: &GroupId, node: &str, connections: u32) -> NodeReport {
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
