//! A backend group at one moment, and the connections of its backends.

use std::collections::BTreeMap;
use std::time::Duration;

use balancer_common::abi::{HealthState, ticks};

use super::super::super::moves::{Departures, is_drained};
use super::super::super::quotas::Server;
use super::pod_resolver::PodResolver;
use crate::config::{ClusterService, Kubernetes};
use crate::dataplane::SlotView;
use crate::kubernetes::{Endpoint, GroupId, ReportedBackend, View};
use crate::quota::{ReadyBackend, plausible};
use crate::rebalance::{Fitness, Published};
use crate::sys::clock;

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
    /// Whether it serves.
    fitness: Fitness,
    /// The most connections that it should hold; `None`: as many as come.
    limit: Option<u32>,
    /// How many of the established ones are being moved.
    moving: u32,
    /// Connections whose move began within the last seconds, gone or not.
    returning: u32,
    /// It is taken out by hand.
    drained: bool,
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
        departures: &Departures,
    ) -> Self {
        let all = loads(id, view, &own, departures);
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

    /// The pods of this node that are ready, without those that are drained.
    pub fn own_ready(&self) -> Vec<(&'a Endpoint, Server<'a>)> {
        let mut pods = self.own_pods();
        pods.retain(|(endpoint, server)| endpoint.ready && !server.is_drained());
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

    /// The pods of all nodes, with what is known of their connections.
    pub fn pods(&self) -> impl Iterator<Item = (&'a Endpoint, Option<Load>)> {
        self.all.iter().copied()
    }

    /// The ready pods, without those that are drained, with what is known of their connections.
    pub fn ready(&self) -> impl Iterator<Item = (&'a Endpoint, Option<Load>)> {
        self.pods().filter(takes_new)
    }

    /// The connections of each pod that somebody has counted and that are not being moved, and how
    /// long ago that was.
    pub fn staying(&self) -> impl Iterator<Item = (&'a Endpoint, u32, Duration)> {
        let counted = |(endpoint, load): (_, Option<Load>)| {
            let load = load?;
            Some((endpoint, load.established - load.moving, load.age))
        };
        self.pods().filter_map(counted)
    }

    /// The pods that are drained by hand.
    pub fn drained(&self) -> impl Iterator<Item = &'a Endpoint> {
        let drained = self.pods().filter(|(_, load)| is_taken_out(*load));
        drained.map(|(endpoint, _)| endpoint)
    }

    /// The connections of backends that get no new ones. Those of a pod that is being ended are not
    /// among them: its clients are moving, and would be counted here and there.
    pub fn established_elsewhere(&self) -> u64 {
        self.pods()
            .filter(|pod| !takes_new(pod) && !pod.0.terminating)
            .filter_map(|(_, load)| load)
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

/// The groups that service entries select, with what is known of the connections of their pods.
pub fn groups<'a>(
    config: &'a Kubernetes,
    view: &'a View,
    resolver: &'a PodResolver,
    slots: &'a [SlotView],
    departures: &'a Departures,
) -> impl Iterator<Item = Group<'a>> {
    view.groups.keys().filter_map(move |id| {
        let mut entries = config.services.iter();
        let entry = entries.find(|entry| entry.name == id.entry)?;
        let own = resolver.backends(id, slots, &view.groups);
        Some(Group::new(id, entry, view, own, departures))
    })
}

/// Whether the pod should get its share of new connections.
fn takes_new((endpoint, load): &(&Endpoint, Option<Load>)) -> bool {
    endpoint.ready && !is_taken_out(*load)
}

fn is_taken_out(load: Option<Load>) -> bool {
    load.is_some_and(|load| load.drained)
}

impl Load {
    fn of(slot: &SlotView, departures: &Departures) -> Self {
        let established = slot.counted();
        let departing = departures.of(slot.id());
        let unhealthy = slot.unhealthy(ticks(clock::monotonic_ns()));
        Self {
            established,
            age: Duration::ZERO,
            room: slot.room(),
            // Not looked at: what is computed for this node's pods follows from their slots.
            unhealthy_for: None,
            fitness: unhealthy.map_or(Fitness::Serves, |(state, _)| state.into()),
            limit: slot.limit(),
            moving: departing.moving.min(established),
            returning: departing.returning,
            drained: is_drained(slot),
        }
    }

    fn reported(backend: &ReportedBackend, age: Duration) -> Self {
        let established = backend.established.saturating_sub(backend.exempt);
        let health = backend.health.as_ref();
        Self {
            established,
            fitness: fitness(health.map(|health| health.state.as_str())),
            limit: backend.quota,
            moving: backend.moving.min(established),
            returning: backend.returning,
            drained: backend.drained,
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
            moving: self.moving.min(established),
            ..self
        }
    }

    /// What the plan of evening out takes of it, where others hold so many.
    pub fn published(self, others: u64) -> Published {
        Published {
            held: (self.established - self.moving).into(),
            moving: u64::from(self.returning).min(plausible::at_most(others)),
            age: self.age,
            ..Published::default()
        }
    }

    /// A pod with several listeners is one backend to its group.
    fn and(self, other: Self) -> Self {
        let room = self.room.zip(other.room);
        let limit = self.limit.zip(other.limit);
        Self {
            established: self.established.saturating_add(other.established),
            age: self.age.max(other.age),
            room: room.map(|(one, other)| one.saturating_add(other)),
            unhealthy_for: self.unhealthy_for.min(other.unhealthy_for),
            fitness: match self.fitness {
                Fitness::Serves => Fitness::Serves,
                _ => other.fitness,
            },
            limit: limit.map(|(one, other)| one.saturating_add(other)),
            moving: self.moving.saturating_add(other.moving),
            returning: self.returning.saturating_add(other.returning),
            drained: self.drained || other.drained,
        }
    }

    /// Whether the pod is taken out by hand.
    pub const fn is_drained(self) -> bool {
        self.drained
    }

    /// Whether the pod serves.
    pub const fn fitness(self) -> Fitness {
        self.fitness
    }

    /// The most connections that it should hold; `None`: as many as come.
    pub const fn limit(self) -> Option<u32> {
        self.limit
    }
}

/// By the name of the state of a pod that doesn't serve.
fn fitness(state: Option<&str>) -> Fitness {
    match state {
        None => Fitness::Serves,
        Some(state) if state == HealthState::Failing.name() => Fitness::Failing,
        // Another version of the balancer may know other states.
        Some(_) => Fitness::Stalled,
    }
}

/// The pods of a group with what is known of their connections: those of this node by what is
/// counted here, the others by what the daemons of their own nodes reported lately, as far as that
/// is [plausible].
fn loads<'a>(
    id: &GroupId,
    view: &'a View,
    own: &[(&SlotView, &Endpoint)],
    departures: &Departures,
) -> Vec<(&'a Endpoint, Option<Load>)> {
    let counted = |endpoint: &Endpoint| {
        let slots = own.iter().filter(|(_, other)| other.uid == endpoint.uid);
        let loads = slots.map(|(slot, _)| Load::of(slot, departures));
        loads.reduce(Load::and)
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
