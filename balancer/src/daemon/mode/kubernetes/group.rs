//! A backend group at one moment, and the connections of its backends.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::super::quotas::Server;
use crate::config::ClusterService;
use crate::dataplane::SlotView;
use crate::kubernetes::{Endpoint, GroupId, ReportedBackend, View};
use crate::quota::{ReadyBackend, plausible};

/// A pod that is not ready, on a node that is about to be given up for dead, has clients that have
/// moved long since: its connections count only for a little longer than a report is renewed after.
const RENEWED_WITHIN: Duration = Duration::from_secs(35);

/// The connections of a backend.
#[derive(Clone, Copy)]
pub struct Load {
    /// Connections in ESTABLISHED that count against the quota.
    established: u32,
    /// How long ago these numbers were reported; zero for the backends of this node.
    age: Duration,
    /// How many more connections the backend takes; `None`: as many as come.
    room: Option<u32>,
    /// For how long the pod has not served; `None`: it serves.
    unhealthy_for: Option<Duration>,
}

/// The connections of a group.
pub struct GroupLoad {
    /// The connections that this node counts or others have reported.
    pub reported: u64,
    /// The reported ones, and for each ready backend that nobody has reported as many as the others
    /// have on average.
    pub estimated: u64,
}

/// The backends of one group.
pub struct Group<'a> {
    /// The Kubernetes Service and port that make the group.
    pub id: &'a GroupId,
    /// The service entry that selects the group.
    pub entry: &'a ClusterService,
    /// The backends of this node that listen, whether their pods are ready or not.
    pub own: Vec<(&'a SlotView, &'a Endpoint)>,
    /// The pods of all nodes, with what is known of their connections.
    all: Vec<(&'a Endpoint, Option<Load>)>,
}

impl<'a> Group<'a> {
    /// Puts a group together: `own` are its backends of this node that listen, the others are those
    /// that were reported.
    pub fn new(
        id: &'a GroupId,
        entry: &'a ClusterService,
        view: &'a View,
        own: Vec<(&'a SlotView, &'a Endpoint)>,
    ) -> Self {
        let all = loads(id, view, &own);
        Self {
            id,
            entry,
            own,
            all,
        }
    }

    /// The backends that quotas are computed for: first the ready ones of [`Self::own`], then those
    /// of other nodes.
    pub fn ready_backends(&self) -> Vec<ReadyBackend> {
        let own = self.own_ready();
        let others = self
            .ready()
            .filter(|(endpoint, _)| !own.iter().any(|(own, _)| own.uid == endpoint.uid))
            .map(|(endpoint, load)| ReadyBackend {
                weight: endpoint.weight,
                established: load.map_or(0, |load| load.established),
                previous: None,
                full: load.is_some_and(|load| load.room == Some(0)),
                unhealthy_for: load.and_then(|load| load.unhealthy_for),
                wants_trial: false,
            });
        let own = own.iter().map(|(_, server)| server.ready_backend());
        own.chain(others).collect()
    }

    /// The pods of this node that are ready.
    pub fn own_ready(&self) -> Vec<(&'a Endpoint, Server<'a>)> {
        let mut pods = self.own_pods();
        pods.retain(|(endpoint, _)| endpoint.ready);
        pods
    }

    /// The pods of this node that listen.
    pub fn own_pods(&self) -> Vec<(&'a Endpoint, Server<'a>)> {
        let mut pods: Vec<(&Endpoint, Server<'_>)> = Vec::new();
        for (slot, endpoint) in &self.own {
            match pods.iter_mut().find(|(pod, _)| pod.uid == endpoint.uid) {
                Some((_, server)) => server.listeners.push(slot),
                None => pods.push((
                    endpoint,
                    Server {
                        listeners: vec![slot],
                        weight: endpoint.weight,
                    },
                )),
            }
        }
        pods
    }

    /// The ready pods, with what is known of their connections.
    pub fn ready(&self) -> impl Iterator<Item = (&'a Endpoint, Option<Load>)> {
        let all = self.all.iter().copied();
        all.filter(|(endpoint, _)| endpoint.ready)
    }

    /// The connections of each pod that somebody has counted, and how long ago that was.
    pub fn counted(&self) -> impl Iterator<Item = (&'a Endpoint, u32, Duration)> {
        let all = self.all.iter();
        all.filter_map(|(endpoint, load)| load.map(|load| (*endpoint, load.established, load.age)))
    }

    /// The connections of backends that are not ready. Those of a pod that is being ended are not
    /// among them: its clients are moving, and would be counted here and there.
    pub fn established_elsewhere(&self) -> u64 {
        self.all
            .iter()
            .filter(|(endpoint, _)| !endpoint.ready && !endpoint.terminating)
            .filter_map(|(_, load)| *load)
            .filter(|load| load.age < RENEWED_WITHIN)
            .map(|load| u64::from(load.established))
            .sum()
    }

    /// The connections that are counted elsewhere than on this node.
    pub fn counted_without(&self, node: &str) -> u64 {
        let others = self.all.iter().filter(|(endpoint, _)| {
            let of = endpoint.node.as_deref();
            of != Some(node)
        });
        let loads = others.filter_map(|(_, load)| *load);
        loads.map(|load| u64::from(load.established)).sum()
    }

    /// Whether a pod of the group is on this node.
    pub fn is_on(&self, node: &str) -> bool {
        let mut all = self.all.iter();
        all.any(|(endpoint, _)| endpoint.node.as_deref() == Some(node))
    }

    /// All connections of the group; `None`: nobody has reported any ready backend.
    pub fn load(&self) -> Option<GroupLoad> {
        let (mut ready, mut known, mut sum) = (0, 0, 0);
        for (_, load) in self.ready() {
            ready += 1;
            if let Some(load) = load {
                known += 1;
                sum += u64::from(load.established);
            }
        }
        let elsewhere = self.established_elsewhere();
        (known > 0).then(|| GroupLoad {
            reported: sum + elsewhere,
            estimated: (sum * ready).div_ceil(known) + elsewhere,
        })
    }
}

impl Load {
    fn of(slot: &SlotView) -> Self {
        Self {
            established: slot.counted(),
            age: Duration::ZERO,
            room: slot.room(),
            // Not looked at: what is computed for this node's pods follows from their slots.
            unhealthy_for: None,
        }
    }

    fn reported(backend: &ReportedBackend, age: Duration) -> Self {
        Self {
            established: backend.established.saturating_sub(backend.exempt),
            age,
            room: backend.room,
            unhealthy_for: backend
                .health
                .as_ref()
                .map(|health| age.saturating_add(Duration::from_secs(health.seconds))),
        }
    }

    /// Of what is believed of its node, this load takes its part.
    fn cut_to(self, left: &mut u64) -> Self {
        let most = u32::try_from(*left).unwrap_or(u32::MAX);
        let established = self.established.min(most);
        *left -= u64::from(established);
        Self {
            established,
            ..self
        }
    }

    /// A pod with several listeners is one backend to its group.
    fn and(self, other: Self) -> Self {
        let room = self.room.zip(other.room);
        Self {
            established: self.established.saturating_add(other.established),
            age: self.age.max(other.age),
            room: room.map(|(one, other)| one.saturating_add(other)),
            unhealthy_for: self.unhealthy_for.min(other.unhealthy_for),
        }
    }
}

/// The pods of a group with what is known of their connections: those of this node by what is
/// counted here, the others by what the daemons of their own nodes reported lately, as far as that
/// is [plausible].
fn loads<'a>(
    id: &GroupId,
    view: &'a View,
    own: &[(&SlotView, &Endpoint)],
) -> Vec<(&'a Endpoint, Option<Load>)> {
    let counted = |endpoint: &Endpoint| {
        let slots = own.iter().filter(|(_, other)| other.uid == endpoint.uid);
        slots.map(|(slot, _)| Load::of(slot)).reduce(Load::and)
    };
    let mut here: Option<u64> = None;
    let mut by_node: BTreeMap<&str, u64> = BTreeMap::new();
    let mut loads: Vec<(&Endpoint, Option<Load>, Option<&str>)> = Vec::new();
    for endpoint in &view.groups[id] {
        if let Some(load) = counted(endpoint) {
            let sum = here.get_or_insert_default();
            *sum = sum.saturating_add(load.established.into());
            loads.push((endpoint, Some(load), None));
        } else {
            let reported = reported(id, endpoint, view);
            if let Some((node, load)) = reported {
                let sum = by_node.entry(node).or_default();
                *sum = sum.saturating_add(load.established.into());
            }
            let (node, load) = reported.unzip();
            loads.push((endpoint, load, node));
        }
    }
    let mut believed = plausible::believed(here, by_node);
    let cut = |(endpoint, load, node): (&'a Endpoint, Option<Load>, Option<&str>)| {
        let left = node.and_then(|node| believed.get_mut(node));
        let load = load.map(|load| match left {
            Some(left) => load.cut_to(left),
            None => load,
        });
        (endpoint, load)
    };
    loads.into_iter().map(cut).collect()
}

/// What the daemon of a pod's own node reported lately of the pod, and that node.
fn reported<'a>(id: &GroupId, endpoint: &Endpoint, view: &'a View) -> Option<(&'a str, Load)> {
    let (node, received) = view.nodes.get_key_value(endpoint.node.as_ref()?)?;
    if !received.is_recent() {
        return None;
    }
    let told = received.node_report.pod(id, &endpoint.uid)?;
    Some((node, Load::reported(&told, received.age)))
}
