//! What `status --cluster` shows: the cluster as one daemon knows it.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{GroupId, ObjectName};
use crate::config::Match;

/// The cluster as the daemon of one node knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterStatus {
    /// The version of this JSON; 1.
    pub schema: u32,
    /// The node whose daemon was asked.
    pub node: String,
    /// Everything has been listed at least once.
    pub complete: bool,
    /// How long the API server has been silent; 0 while it answers.
    pub silent_seconds: u64,
    /// What is wrong, a sentence each.
    pub problems: Vec<String>,
    /// The backend groups.
    pub groups: Vec<GroupStatus>,
    /// How connects to the Services are placed.
    pub placing: PlacingStatus,
}

/// How connects to the Services are placed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacingStatus {
    /// Whether the asked node places.
    pub on: bool,
    /// Why it does not; `null`: it does.
    pub why_not: Option<String>,
    /// The zone of the asked node; `null`: not known, or no Service prefers near pods.
    pub zone: Option<String>,
    /// The daemons of the `DaemonSet`; `null`: not known.
    pub daemons: Option<DaemonsStatus>,
    /// The Services' ports.
    pub services: Vec<PlacedService>,
}

/// How many nodes have a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DaemonsStatus {
    /// Nodes that the `DaemonSet` selects.
    pub wanted: u32,
    /// Those whose daemon is ready.
    pub ready: u32,
    /// How long ago that was asked, in seconds.
    pub seconds_ago: u64,
}

/// A Service's port as its clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacedService {
    /// The service entry.
    pub entry: String,
    /// The Kubernetes Service.
    pub service: ObjectName,
    /// What clients connect to, but for the pods' own addresses.
    pub frontends: Vec<SocketAddr>,
    /// Whether connects to the pods' own addresses are placed as well.
    #[serde(rename = "match")]
    pub matching: Match,
    /// Whether connects to these are placed on the asked node.
    pub placed: bool,
    /// What keeps its clients from being placed, or from all of its pods.
    pub restrictions: Vec<Restriction>,
    /// What is to be known of it, a sentence each.
    pub notes: Vec<String>,
}

/// What keeps clients of a Service from being placed, or from all of its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restriction {
    /// It has no cluster address.
    Headless,
    /// Its annotation says so.
    SwitchedOff,
    /// A client is to get the same pod again (`sessionAffinity`).
    SessionAffinity,
    /// It has an endpoint that is no pod of its namespace.
    ForeignEndpoints,
    /// Its clients only get pods of their own node (`internalTrafficPolicy`).
    OwnNode,
    /// Its clients get near pods first (`trafficDistribution`).
    NearFirst,
    /// It has node ports, a load balancer or external addresses, whose clients are not placed.
    Outside,
}

/// A backend group: its quotas, and its pods on all nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupStatus {
    /// The group's service entry, Kubernetes Service and target port.
    #[serde(flatten)]
    pub id: GroupId,
    /// Why the quotas of this node's backends are as they are.
    pub sentence: String,
    /// How many sources are starved: refused again and again, and served by no backend. So many
    /// clients at least: there may be several behind one source.
    pub starved: u32,
    /// The group's pods on all nodes.
    pub backends: Vec<BackendStatus>,
}

/// One pod. What a node report says of it is `null` until the first report has arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendStatus {
    /// The pod.
    pub pod: ObjectName,
    /// The node that it runs on.
    pub node: Option<String>,
    /// The pod's first address.
    pub address: Option<IpAddr>,
    /// The Service sends it new connections.
    pub ready: bool,
    /// The pod is being ended.
    pub terminating: bool,
    /// The pod's share relative to the others.
    pub weight: u32,
    /// The backend's slot on its node.
    pub slot: Option<u32>,
    /// The backend's state, as in `status`.
    pub state: Option<String>,
    /// Connections in ESTABLISHED, the exempt ones among them.
    pub established: Option<u32>,
    /// The exempt ones of them.
    pub exempt: Option<u32>,
    /// SYNs sent to it in the last 1.1 s that have not become established.
    pub pending: Option<u32>,
    /// The most connections that it should hold; unlimited: `null` with a `state`.
    pub quota: Option<u32>,
    /// How many more it would take; unlimited: `null` with a `state`.
    pub room: Option<u32>,
    /// Why it does not serve; `null`: it serves.
    pub health: Option<PodHealth>,
    /// Whether it is taken out by hand.
    pub drained: Option<bool>,
    /// Established connections that are being moved.
    pub moving: Option<u32>,
    /// The age of its node report, in seconds; 0 for pods of the asked node.
    pub seconds_ago: Option<u64>,
}

/// A pod that does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodHealth {
    /// `stalled`, `hung`, `failing`, as in `status`.
    pub state: String,
    /// For how long, in seconds.
    pub seconds: u64,
    /// Whether it has its share of a computed quota all the same.
    pub has_share: bool,
}
