//! The section `kubernetes`: what is balanced in a cluster.

use std::{fmt, time::Duration};

use balancer_common::Policy;
use balancer_common::abi::Keepalive;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Effect, MoveRule, write_shared};

/// The Kubernetes Services of SkyWalking's OAP, by the labels that they get; a selector can't say
/// "or".
///
/// The first is for the Helm chart (`apache/skywalking-helm`,
/// `chart/skywalking/templates/oap-svc.yaml`). Its `app` and `release` are the name of the release:
/// that all four labels are there tells it from a stranger's `component=oap`. The second is for the
/// operator (`apache/skywalking-swck`,
/// `operator/pkg/operator/manifests/oapserver/templates/service.yaml`). Neither selects the UI, the
/// Satellite or `BanyanDB`.
pub const DEFAULT_SELECTORS: [&str; 2] = [
    "component=oap,app,chart,heritage,release",
    "app=oap,operator.skywalking.apache.org/application=oapserver,operator.skywalking.apache.org/component=service",
];
/// The port of a Kubernetes Service where the file gives none: the one for gRPC.
pub const DEFAULT_PORT: u16 = 11800;
/// `publish_every` where the file gives none.
pub const DEFAULT_PUBLISH_EVERY: Duration = Duration::from_secs(2);
/// `hold_for` where the file gives none.
pub const DEFAULT_HOLD_FOR: Duration = Duration::from_secs(300);
/// The most classes of pods that one quota may count.
pub const MAX_POD_CLASSES: usize = 64;

/// What is balanced in a Kubernetes cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubernetes {
    /// The service entries: between 1 and [`MAX_SERVICES`](super::MAX_SERVICES), in their order.
    pub services: Vec<ClusterService>,
    /// At most this often a daemon writes its node report: half a second to a minute.
    pub publish_every: Duration,
    /// Quotas open when what they are computed from is older than this: 10 seconds to a day.
    pub hold_for: Duration,
    /// Whether connects of this node to the Services go to the pod that should have them.
    pub place: bool,
}

/// A service entry: a port of the pods behind one or several Kubernetes Services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterService {
    /// Unique; like the name of a [`Service`](super::Service).
    pub name: String,
    /// Which Kubernetes Services.
    pub of: ServiceChoice,
    /// Which of their ports.
    pub port: PortChoice,
    /// Which connects go to the pod that should have them.
    pub matching: Match,
    /// How a backend is chosen where a pod has several listeners on the port.
    pub policy: Policy,
    /// How many connections a backend may hold.
    pub quota: ClusterQuota,
    /// Sources that are never refused and never counted against the quota, besides those that are
    /// found.
    pub exempt: Vec<IpNet>,
    /// Whether backends that don't serve are avoided.
    pub health: bool,
    /// When a client that has vanished is given up; `None`: the server sees to that.
    pub keepalive: Option<Keepalive>,
    /// How established connections are moved.
    pub moving: MoveRule,
    /// Whether they are moved so that the pods are even.
    pub rebalance: bool,
}

impl ClusterService {
    /// Whether the file names the Kubernetes Service: it is meant, whoever else has its labels.
    pub const fn is_named(&self) -> bool {
        matches!(self.of, ServiceChoice::Named { .. })
    }

    /// What a mode leaves of it.
    pub(super) fn within(self, effect: Effect) -> Self {
        Self {
            quota: match effect {
                Effect::Count => ClusterQuota::Unlimited,
                Effect::DryRun | Effect::On => self.quota,
            },
            keepalive: self.keepalive.filter(|_| effect == Effect::On),
            ..self
        }
    }
}

/// Which Kubernetes Services a service entry means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceChoice {
    /// The one of this name.
    Named {
        /// The Kubernetes namespace of the Service.
        namespace: String,
        /// The name of the Service.
        name: String,
    },
    /// Every one with certain labels.
    Selected {
        /// In this namespace; `None`: in all.
        namespace: Option<String>,
        /// Label selectors that [`selector`](super::selector()) reads, of which one must select it:
        /// one of the file, or [`DEFAULT_SELECTORS`].
        selectors: Vec<String>,
    },
}

/// Which port of a Kubernetes Service is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortChoice {
    /// The port's number; not 0.
    Number(u16),
    /// The port's name, a DNS label.
    Name(String),
}

/// Which connects of this node are those of a service entry's clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Match {
    /// Those to the cluster addresses of its Kubernetes Services.
    #[default]
    Service,
    /// Those to the own addresses of their pods as well.
    Endpoints,
}

impl Match {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Service, Self::Endpoints];

    /// The name in the file and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Endpoints => "endpoints",
        }
    }
}

/// How the quotas of a backend group come about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterQuota {
    /// None: counting only.
    Unlimited,
    /// This many connections each, weight or not; not 0.
    Fixed(u32),
    /// Shared out among the backends of the whole cluster that are ready.
    Shared {
        /// What is shared out.
        input: ClusterInput,
        /// What to add for clients that reconnect or come on top, in percent.
        headroom_percent: u32,
        /// No backend's quota goes below this.
        min_quota: u32,
    },
}

impl fmt::Display for ClusterQuota {
    /// The rule in words, on one line and in less than 128 bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => f.write_str("none: counting only"),
            Self::Fixed(limit) => write!(f, "{limit} for each backend"),
            Self::Shared {
                input,
                headroom_percent,
                min_quota,
            } => write_shared(f, input, *headroom_percent, *min_quota),
        }
    }
}

/// Where the number of connections comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterInput {
    /// From the file.
    Clients {
        /// How many clients there are; not 0.
        clients: u32,
        /// How many connections each of them keeps.
        connections_per_client: u32,
    },
    /// From the pods that are running; never empty.
    Pods(Vec<PodClass>),
    /// From what all daemons counted.
    Observed {
        /// The most within this time counts; between a minute and a day.
        window: Duration,
    },
}

impl fmt::Display for ClusterInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clients {
                clients,
                connections_per_client,
            } => write!(f, "{clients} clients × {connections_per_client}"),
            Self::Pods(classes) if classes.len() == 1 => f.write_str("pods of one class"),
            Self::Pods(classes) => write!(f, "pods of {} classes", classes.len()),
            Self::Observed { window } => {
                write!(f, "the most observed in {} seconds", window.as_secs())
            }
        }
    }
}

/// Pods that keep the same number of connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodClass {
    /// Only in this namespace; `None`: in all.
    pub namespace: Option<String>,
    /// A label selector that [`selector`](super::selector()) reads.
    pub selector: String,
    /// How many connections each pod keeps; not 0, and 1 where the file gives none.
    pub connections: u32,
}
