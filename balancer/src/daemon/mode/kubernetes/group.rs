//! A backend group at one moment, and the connections of its backends.

use std::collections::BTreeMap;
use std::time::Duration;

use balancer_common::BackendState;

use super::super::super::quotas::ready_backend;
use super::pod_resolver::PodResolver;
use crate::config::ClusterService;
use crate::dataplane::SlotView;
use crate::kubernetes::{Endpoint, GroupId, ReportedBackend, View};
use crate::quota::ReadyBackend;

/// What a daemon reported longer ago than this says nothing about now.
pub const STALE: Duration = Duration::from_secs(60);

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
    /// Puts a group together: the backends of this node from the slots, the others from what was
    /// reported of them.
    pub fn new(
        id: &'a GroupId,
        entry: &'a ClusterService,
        view: &'a View,
        resolver: &PodResolver,
        slots: &'a [SlotView],
    ) -> Self {
        let own: Vec<_> = slots
            .iter()
            .filter(|slot| slot.slot_state().is(BackendState::Active))
            .filter_map(|slot| Some((slot, resolver.pod(slot, &view.groups)?)))
            .filter(|(_, (group, _))| *group == id)
            .map(|(slot, (_, endpoint))| (slot, endpoint))
            .collect();
        let reported = reported_loads(id, view);
        let load = |endpoint: &Endpoint| {
            own.iter()
                .filter(|(_, other)| other.uid == endpoint.uid)
                .map(|(slot, _)| Load::of(slot))
                .reduce(Load::and)
                .or_else(|| reported.get(endpoint.uid.as_str()).copied())
        };
        let endpoints = view.groups[id].iter();
        let all = endpoints.map(|endpoint| (endpoint, load(endpoint)));
        Self {
            id,
            entry,
            all: all.collect(),
            own,
        }
    }

    /// The backends that quotas are computed for: first the ready ones of [`Self::own`], then those
    /// of other nodes.
    pub fn ready_backends(&self) -> Vec<ReadyBackend> {
        let own = || self.own.iter().filter(|(_, endpoint)| endpoint.ready);
        let others = self
            .ready()
            .filter(|(endpoint, _)| !own().any(|(_, own)| own.uid == endpoint.uid))
            .map(|(endpoint, load)| ReadyBackend {
                weight: endpoint.weight,
                established: load.map_or(0, |load| load.established),
                previous: None,
            });
        own()
            .map(|(slot, endpoint)| ready_backend(slot, endpoint.weight))
            .chain(others)
            .collect()
    }

    /// The ready pods, with what is known of their connections.
    pub fn ready(&self) -> impl Iterator<Item = (&'a Endpoint, Option<Load>)> {
        let all = self.all.iter().copied();
        all.filter(|(endpoint, _)| endpoint.ready)
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

    /// Whether no ready backend could take a refused client.
    pub fn all_full(&self) -> bool {
        let is_full = |load: Option<Load>| load.is_some_and(|load| load.room == Some(0));
        self.ready().next().is_some() && self.ready().all(|(_, load)| is_full(load))
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
        }
    }

    const fn reported(backend: &ReportedBackend, age: Duration) -> Self {
        Self {
            established: backend.established.saturating_sub(backend.exempt),
            age,
            room: backend.room,
        }
    }

    /// A pod with several listeners is one backend to the others.
    fn and(self, other: Self) -> Self {
        let room = self.room.zip(other.room);
        Self {
            established: self.established.saturating_add(other.established),
            age: self.age.max(other.age),
            room: room.map(|(one, other)| one.saturating_add(other)),
        }
    }
}

/// What the daemons of other nodes reported lately, by the uid of the pod.
fn reported_loads<'a>(id: &GroupId, view: &'a View) -> BTreeMap<&'a str, Load> {
    let mut loads: BTreeMap<&str, Load> = BTreeMap::new();
    for received in view.nodes.values().filter(|received| received.age < STALE) {
        let backends = received.node_report.backends.iter();
        for backend in backends.filter(|backend| backend.group == *id) {
            let load = Load::reported(backend, received.age);
            loads
                .entry(&backend.uid)
                .and_modify(|known| *known = known.and(load))
                .or_insert(load);
        }
    }
    loads
}
