//! The section `kubernetes`: what is balanced in a cluster.

use std::time::Duration;

use balancer_common::Policy;
use ipnet::IpNet;

/// What is balanced in a Kubernetes cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubernetes {
    /// Between 1 and [`MAX_SERVICES`](super::MAX_SERVICES), in the order of the file.
    pub services: Vec<ClusterService>,
    /// At most this often an agent writes what it counts; between half a second and a minute.
    pub publish_every: Duration,
    /// Quotas open when what they are computed from is older than this; between 10 seconds and a day.
    pub hold_for: Duration,
}

/// A port of the pods behind one or several Services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterService {
    /// Unique; like the name of a [`Service`](super::Service).
    pub name: String,
    /// Which Services.
    pub of: ServiceChoice,
    /// Which of their ports.
    pub port: PortChoice,
    /// How a backend is chosen where a pod has several listeners on the port.
    pub policy: Policy,
    /// How many connections a backend may hold.
    pub quota: ClusterQuota,
    /// Sources that are never refused and never counted against the quota, besides those that are found.
    pub exempt: Vec<IpNet>,
}

/// Which Services of the cluster are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceChoice {
    /// This one.
    Named {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Every one with these labels.
    Selected {
        /// In this namespace; `None`: in all.
        namespace: Option<String>,
        /// A label selector in the form that `kubectl -l` takes.
        selector: String,
    },
}

/// Which port of a Service is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortChoice {
    /// The number of the Service's port; not 0.
    Number(u16),
    /// Its name.
    Name(String),
}

/// How the quotas of the backends of a Service come about.
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
    /// From what all agents counted.
    Observed {
        /// The most within this time counts; between a minute and a day.
        window: Duration,
    },
}

/// Pods that keep the same number of connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodClass {
    /// Only in this namespace; `None`: in all.
    pub namespace: Option<String>,
    /// A label selector in the form that `kubectl -l` takes.
    pub selector: String,
    /// How many connections each pod keeps; not 0.
    pub connections: u32,
}
