//! What the API server of a Kubernetes cluster says, and what daemons tell each other through it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use kube::Resource;
use serde::{Deserialize, Serialize};

use super::status::DaemonsStatus;
use crate::config::Match;

/// The name of an object with its namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectName {
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl ObjectName {
    pub(crate) fn of(object: &impl Resource) -> Self {
        let meta = object.meta();
        Self {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A backend group: the pods behind one Kubernetes Service and target port, by one service entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupId {
    /// The name of the service entry.
    pub entry: String,
    /// The Kubernetes Service.
    pub service: ObjectName,
    /// The target port, which the pods listen on.
    pub port: u16,
}

/// A pod of a backend group.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is said of a pod by itself, and any of them go together"
)]
pub struct Endpoint {
    /// The pod's name and namespace.
    pub pod: ObjectName,
    /// The pod's uid, which its cgroup is named after.
    pub uid: String,
    /// The pod's addresses, of either family; the node's where it uses the node's network.
    pub addresses: Vec<IpAddr>,
    /// The node that it runs on.
    pub node: Option<String>,
    /// The Service sends it new connections.
    pub ready: bool,
    /// The pod is being ended.
    pub terminating: bool,
    /// The pod's share relative to the others, 1 to `MAX_WEIGHT`.
    pub weight: u32,
    /// The pod itself says that these are its addresses: until that is known, only its
    /// `EndpointSlice` does.
    pub confirmed: bool,
    /// The pod uses its node's network: its address is that of everybody there.
    pub host_network: bool,
    /// The runtime class that the pod asks for. It may give it a kernel of its own.
    pub runtime_class: Option<String>,
    /// What kube-proxy is told of it.
    pub offered: Offered,
}

/// What an `EndpointSlice` tells kube-proxy of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offered {
    /// New connections may go to it, as the Service has it: also to a pod that is not ready, or is
    /// being ended, where the Service publishes such addresses.
    pub ready: bool,
    /// It serves, maybe while it is being ended.
    pub serving: bool,
    /// The zones that should use it; empty: no hint.
    pub for_zones: BTreeSet<String>,
    /// The nodes that should use it; empty: no hint.
    pub for_nodes: BTreeSet<String>,
}

/// A port of a Kubernetes Service as its clients see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The name of the service entry.
    pub entry: String,
    /// The Kubernetes Service.
    pub service: ObjectName,
    /// What clients connect to: its cluster addresses of both families, with its port. Empty where
    /// kube-proxy leaves it alone: headless, of type `ExternalName`, somebody else's.
    pub frontends: Vec<SocketAddr>,
    /// Whether clients' connects to the pods' own addresses are placed as well.
    pub matching: Match,
    /// The pods behind it, each with its target port, in the order of names.
    pub endpoints: Vec<(Endpoint, u16)>,
    /// Somebody serves it who is no pod of its namespace: an address that was written by hand.
    pub has_others: bool,
    /// How its traffic is to go.
    pub traffic: Traffic,
}

/// What a Kubernetes Service says of how its traffic is to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a setting of a Service, and any of them go together"
)]
pub struct Traffic {
    /// Only to pods of the client's own node (`internalTrafficPolicy: Local`).
    pub own_node_only: bool,
    /// Always to the same pod (`sessionAffinity: ClientIP`).
    pub affinity: bool,
    /// As kube-proxy has it: the annotation `balancer.skywalking.apache.org/place: "off"`.
    pub left_alone: bool,
    /// Preferably to near pods (`trafficDistribution`, or the annotation for topology).
    pub near: bool,
    /// It can be reached from outside as well: node ports, load balancers, external addresses.
    pub outside: bool,
    /// Somebody else than kube-proxy carries it on (the label
    /// `service.kubernetes.io/service-proxy-name`).
    pub other_proxy: bool,
}

/// The connections that pods keep, for one service entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// How many connections they keep together.
    pub connections: u64,
    /// The sum in words, as in `180 pods × 1 + 11 pods × 3`.
    pub words: String,
}

/// What is known of the cluster at one moment.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Everything has been listed at least once. Before that, what is missing means nothing.
    pub complete: bool,
    /// For how long the API server has not answered, has refused something that is needed, or has
    /// told nothing new: what this daemon wrote has not come back. Zero while all is well.
    pub silent_for: Duration,
    /// What is wrong, a sentence each, for the log, `status --cluster` and `doctor`.
    pub problems: Vec<String>,
    /// The backend groups with their pods.
    pub groups: BTreeMap<GroupId, Vec<Endpoint>>,
    /// The Services' ports that clients connect to, in the order of the groups' precedence.
    pub ports: Vec<ServicePort>,
    /// Which of the groups comes first where not all can have what they want: those of Services
    /// that the file names, then those of the oldest Services. Some may not be in `groups`.
    pub precedence: Vec<GroupId>,
    /// By service entry, where its quota follows from pods.
    pub demands: BTreeMap<String, Demand>,
    /// The pods of this node whose connects are left alone, with their uids.
    pub left_alone: BTreeMap<ObjectName, String>,
    /// The zone of this node, where it is known and a Service prefers near pods.
    pub zone: Option<String>,
    /// The rank of this node among those with a daemon, from 0, and how many they are.
    pub rank: (u32, u32),
    /// How many nodes should have a daemon and have one, as far as is known.
    pub daemons: Option<DaemonsStatus>,
    /// The last report of each node, this node's own among them.
    pub nodes: BTreeMap<String, ReceivedReport>,
}

/// What a daemon reported longer ago than this says nothing about now. A report is renewed each 30
/// seconds: this one's daemon has ended, or can't reach the API server.
pub const STALE: Duration = Duration::from_secs(60);

/// A node report with its age.
#[derive(Clone, Debug, PartialEq)]
pub struct ReceivedReport {
    /// How long ago it was written: the time since a watch told of it, or, where it was there
    /// before, its age by the API server's own clock. (Clocks of nodes are not compared.)
    pub age: Duration,
    /// The last report that arrived.
    pub node_report: Arc<NodeReport>,
}

impl ReceivedReport {
    /// Whether it says anything about now.
    pub fn is_recent(&self) -> bool {
        self.age < STALE
    }
}

/// What a daemon tells the others. Daemons of other builds read it: a field that gets another name
/// or meaning needs another [`SCHEMA`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The version of this JSON: [`SCHEMA`]. Another one is not read.
    pub schema: u32,
    /// The node it is about.
    pub node: String,
    /// The backends on that node.
    pub backends: Vec<ReportedBackend>,
    /// The most connections of each group that this daemon knows of, by when that was.
    pub peaks: Vec<Peak>,
    /// Sources that were refused of late.
    pub refused: Vec<RefusedSource>,
    /// Why the node can't be guarded, or not all of it; absent: it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfit: Option<String>,
}

impl NodeReport {
    /// Whether the report says nothing.
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty()
            && self.peaks.is_empty()
            && self.refused.is_empty()
            && self.unfit.is_none()
    }

    /// What it tells of a pod of a group, all that listen there together; what has ended counts
    /// only where nothing listens.
    pub fn pod(&self, group: &GroupId, uid: &str) -> Option<ReportedBackend> {
        let backends = self.backends.iter();
        let of_pod = backends.filter(|told| told.uid == uid && told.group == *group);
        let (ended, listening): (Vec<_>, Vec<_>) = of_pod.partition(|told| told.state == "closed");
        let told = if listening.is_empty() {
            ended
        } else {
            listening
        };
        let mut told = told.into_iter();
        let first = told.next()?.clone();
        Some(told.fold(first, ReportedBackend::and))
    }
}

/// The version of the JSON of a [`NodeReport`].
pub const SCHEMA: u32 = 1;

/// A backend as the daemon of its node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedBackend {
    /// The group that it belongs to.
    pub group: GroupId,
    /// The pod's name and namespace.
    pub pod: ObjectName,
    /// The pod's uid.
    pub uid: String,
    /// The backend's slot: its index in the maps of that node.
    pub slot: u32,
    /// The pod's address.
    pub address: IpAddr,
    /// `active`, `candidate`, `closed`, as in `status`.
    pub state: String,
    /// Connections in ESTABLISHED, the exempt ones among them.
    pub established: u32,
    /// The exempt ones of them.
    pub exempt: u32,
    /// SYNs sent to it in the last 1.1 s that have not become established; `null`: can't be read.
    pub pending: Option<u32>,
    /// The most connections that it should hold; `null`: unlimited.
    pub quota: Option<u32>,
    /// How many more it would take now; `null`: unlimited.
    pub room: Option<u32>,
    /// Why it does not serve; absent: it serves, or its health is not regarded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<ReportedHealth>,
    /// Established connections that are being moved: they are about to go.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub moving: u32,
    /// Connections whose move began within the last seconds, gone or not: their clients are about
    /// to come back to some pod.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub returning: u32,
    /// It is taken out by hand: it gets no new connections.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drained: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A backend that does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportedHealth {
    /// `stalled`, `hung`, `failing`, as in `status`.
    pub state: String,
    /// For how long, in seconds, when the report was written.
    pub seconds: u64,
}

impl ReportedBackend {
    /// Two listeners of one pod, which is one backend to its group.
    fn and(self, other: &Self) -> Self {
        let sum = |one: Option<u32>, other: Option<u32>| Some(one?.saturating_add(other?));
        Self {
            established: self.established.saturating_add(other.established),
            exempt: self.exempt.saturating_add(other.exempt),
            pending: sum(self.pending, other.pending),
            quota: sum(self.quota, other.quota),
            room: sum(self.room, other.room),
            // The pod serves for as long as one of them does.
            health: self.health.zip(other.health.as_ref()).map(|(one, other)| {
                if one.seconds <= other.seconds {
                    one
                } else {
                    other.clone()
                }
            }),
            moving: self.moving.saturating_add(other.moving),
            returning: self.returning.saturating_add(other.returning),
            drained: self.drained || other.drained,
            ..self
        }
    }
}

/// The most connections that a group had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peak {
    /// The group.
    pub group: GroupId,
    /// How many connections.
    pub connections: u64,
    /// How long ago that was, in seconds, when the report was written.
    pub seconds_ago: u64,
}

/// A source that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedSource {
    /// The group that refuses it.
    pub group: GroupId,
    /// The source's address.
    pub source: IpAddr,
    /// How long ago it was refused first, in seconds, when the report was written.
    pub first_seconds_ago: u64,
    /// How long ago it was refused last, in seconds, when the report was written.
    pub last_seconds_ago: u64,
    /// The longest pause between two of these refusals, in seconds.
    #[serde(default)]
    pub longest_pause_seconds: u64,
    /// How long ago it was refused last before the first time, in seconds, where that is known.
    #[serde(default)]
    pub before_seconds_ago: Option<u64>,
}
