//! The quotas of the backends of a cluster: each group's total, shared out among its pods that are ready.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::BackendState;

use super::pod_resolver::{Groups, PodResolver};
use super::quotas::{Quotas, Waits, settle};
use crate::config::{ClusterInput, ClusterQuota, ClusterService, Kubernetes};
use crate::dataplane::{QuotaSource, SlotView, Writer, services};
use crate::kubernetes::{Endpoint, GroupId, Peak, RefusedSource, ReportedBackend, View};
use crate::quota::starved::{self, Refusals, Refused, Starved};
use crate::quota::window::Window;
use crate::quota::{Known, Outcome, Quota, Ready, Total, compute_cluster};

/// What an agent published longer ago than this says nothing about now.
pub const STALE: Duration = Duration::from_secs(60);

/// For so long it is waited for the word of the agent of a pod that has become ready. Then it has none, or that one is not well.
const TELLS_WITHIN: Duration = Duration::from_secs(20);

/// The most sources of a group that are told to the others.
const MOST_PUBLISHED: usize = 64;

/// A pod that is not ready, on a node that is about to be given up for dead, has clients that have moved long since: what was told of it counts only
/// for a little longer than it takes to be told again.
const TOLD_AGAIN_WITHIN: Duration = Duration::from_secs(35);

/// What is known of the shares, and since when.
#[derive(Debug)]
pub struct Shares {
    started: Instant,
    waits: Waits<GroupId>,
    /// Where the total is what was observed.
    windows: BTreeMap<GroupId, Window>,
    refusals: Refusals<GroupId>,
    /// Why the quotas are as they are.
    sentences: BTreeMap<GroupId, String>,
    /// Pods of which no agent has told yet, by uid, and since when they have been ready.
    awaited: BTreeMap<String, Instant>,
}

/// The backends of one group at one moment.
struct Group<'a> {
    id: &'a GroupId,
    entry: &'a ClusterService,
    /// Those of this node that listen, ready or not.
    own: Vec<(&'a SlotView, &'a Endpoint)>,
    /// All of its pods, with what is known of their connections.
    all: Vec<(&'a Endpoint, Option<Count>)>,
}

/// The connections of a backend.
#[derive(Clone, Copy)]
struct Count {
    /// Those that count against the quota.
    established: u32,
    /// How long ago it was told; zero for those of this node.
    age: Duration,
    /// How many more it takes; `None`: as many as come.
    room: Option<u32>,
}

impl Shares {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            waits: Waits::default(),
            windows: BTreeMap::new(),
            refusals: Refusals::default(),
            sentences: BTreeMap::new(),
            awaited: BTreeMap::new(),
        }
    }

    /// Notes that a source was refused.
    pub fn refused(&mut self, group: &GroupId, source: IpAddr) {
        let now = self.started.elapsed();
        self.refusals.refused(group, source, now);
    }

    /// Windows may have other lengths from now on; what was observed comes back with the others' publications.
    pub fn reconfigure(&mut self) {
        self.windows.clear();
    }

    /// Why the quotas of a group are as they are.
    pub fn sentence(&self, group: &GroupId) -> &str {
        self.sentences.get(group).map_or("", String::as_str)
    }

    /// How many sources are served by nobody, by all agents' word.
    pub fn starved(&self, group: &GroupId, view: &View) -> Starved {
        let now = self.started.elapsed();
        let told = view.nodes.values().filter(|heard| heard.age < STALE);
        let told = told.flat_map(|heard| {
            let all = heard.node_report.refused.iter();
            let of_group = all.filter(|refused| refused.group == *group);
            of_group.map(|refused| Refused {
                source: refused.source,
                first: heard.age + Duration::from_secs(refused.first_seconds_ago),
                last: heard.age + Duration::from_secs(refused.last_seconds_ago),
            })
        });
        starved::count(self.refusals.of(group, now).into_iter().chain(told))
    }

    /// What the others should know of the sources that this node has refused of late.
    pub fn publish_refused(&self) -> Vec<RefusedSource> {
        let now = self.started.elapsed();
        let mut published = Vec::new();
        for group in self.refusals.groups() {
            let mut refused = self.refusals.of(group, now);
            // Those that are served by nobody were refused first the longest time ago.
            refused.sort_by_key(|refused| Reverse(refused.first));
            published.extend(
                refused
                    .iter()
                    .take(MOST_PUBLISHED)
                    .map(|refused| RefusedSource {
                        group: group.clone(),
                        source: refused.source,
                        first_seconds_ago: refused.first.as_secs(),
                        last_seconds_ago: seconds_up(refused.last),
                    }),
            );
        }
        published
    }

    /// What the others should know of the most connections that there were.
    pub fn publish_peaks(&self) -> Vec<Peak> {
        let now = self.started.elapsed();
        self.windows
            .iter()
            .filter_map(|(group, window)| {
                let (connections, age) = window.peak(now)?;
                Some(Peak {
                    group: group.clone(),
                    connections,
                    // Up: agents that tell each other of a peak must not make it younger each time.
                    seconds_ago: seconds_up(age),
                })
            })
            .collect()
    }

    /// Computes the quotas of every group and puts those of this node in force at the next SYN.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn apply(
        &mut self,
        config: &Kubernetes,
        view: &View,
        pod_resolver: &PodResolver,
        quotas: &mut Quotas,
        writer: &mut Writer,
    ) -> Result<()> {
        let slots = writer.tables.slots()?;
        self.forget(&view.groups);
        for id in view.groups.keys() {
            let Some(entry) = config.services.iter().find(|entry| entry.name == id.entry) else {
                continue;
            };
            let group = Group::new(id, entry, view, pod_resolver, &slots);
            self.apply_group(&group, config, view, quotas, writer)?;
        }
        self.write_sentences(&slots, view, pod_resolver, writer)
    }

    fn forget(&mut self, groups: &Groups) {
        let now = self.started.elapsed();
        self.refusals.tidy(now, |id| groups.contains_key(id));
        let uids: HashSet<&str> = groups
            .values()
            .flatten()
            .map(|endpoint| endpoint.uid.as_str())
            .collect();
        self.awaited.retain(|uid, _| uids.contains(uid.as_str()));
        self.windows.retain(|id, _| groups.contains_key(id));
        self.sentences.retain(|id, _| groups.contains_key(id));
        self.waits.retain(|id| groups.contains_key(id));
    }

    fn apply_group(
        &mut self,
        group: &Group<'_>,
        config: &Kubernetes,
        view: &View,
        quotas: &mut Quotas,
        writer: &mut Writer,
    ) -> Result<()> {
        let ready: Vec<(&SlotView, &Endpoint)> = group.own_ready().collect();
        let inputs = group.inputs(&ready, quotas);
        let starved = self.starved(group.id, view);
        let known = Known {
            total: self.total(group, view, starved),
            established_elsewhere: group.established_elsewhere(),
            refused_for_long: starved.long,
            all_full: group.all_full(),
            silent_for: view.silent_for,
            hold_for: config.hold_for,
        };
        let waited = self.waits.waited(group.id);
        let outcome = match self.awaited(group) {
            0 => compute_cluster(&group.entry.quota, &known, &inputs, waited),
            awaited => as_before(&inputs, awaited),
        };
        self.waits.on_events(group.id, &outcome);
        group.settle(&ready, &outcome, writer)?;
        self.sentences.insert(group.id.clone(), outcome.sentence);
        Ok(())
    }

    /// How many pods that are ready nobody has told of yet, where what they hold matters.
    fn awaited(&mut self, group: &Group<'_>) -> usize {
        let observed = matches!(
            group.entry.quota,
            ClusterQuota::Shared {
                input: ClusterInput::Observed { .. },
                ..
            }
        );
        if !observed {
            return 0;
        }
        let mut awaited = 0;
        for (endpoint, count) in group.ready() {
            if count.is_some() {
                self.awaited.remove(&endpoint.uid);
                continue;
            }
            let since = self.awaited.entry(endpoint.uid.clone());
            if since.or_insert_with(Instant::now).elapsed() < TELLS_WITHIN {
                awaited += 1;
            }
        }
        awaited
    }

    /// The connections to make room for.
    fn total(&mut self, group: &Group<'_>, view: &View, starved: Starved) -> Option<Total> {
        let ClusterQuota::Shared { input, .. } = &group.entry.quota else {
            return None;
        };
        let (expected, words) = match input {
            // The rule itself says it.
            ClusterInput::Clients { .. } => return None,
            ClusterInput::Pods(_) => match view.demands.get(&group.id.entry) {
                Some(demand) => (Some(demand.connections), demand.words.clone()),
                None => (None, String::new()),
            },
            ClusterInput::Observed { window } => (
                self.observed(group, *window, view, starved),
                "observed".to_owned(),
            ),
        };
        Some(Total {
            connections: expected?,
            words,
        })
    }

    /// The most that all agents together have counted within a time, those that nobody serves included.
    fn observed(
        &mut self,
        group: &Group<'_>,
        length: Duration,
        view: &View,
        starved: Starved,
    ) -> Option<u64> {
        let now = self.started.elapsed();
        let starved = u64::from(starved.sources);
        let window = self
            .windows
            .entry(group.id.clone())
            .or_insert_with(|| Window::new(length));
        for heard in view.nodes.values() {
            for peak in &heard.node_report.peaks {
                if peak.group == *group.id {
                    let age = heard.age + Duration::from_secs(peak.seconds_ago);
                    window.add_old(now, peak.connections, age);
                }
            }
        }
        let counted = group.counted();
        if let Some(counted) = &counted {
            window.add(now, counted.told + starved);
        }
        let peak = window.peak(now).map(|(connections, _)| connections);
        peak.max(counted.map(|counted| counted.estimated + starved))
    }

    /// Nobody has a quota that was computed: too long nothing was heard that it could be computed from.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn open(slots: &[&SlotView], writer: &mut Writer, why: &str) -> Result<()> {
        for slot in slots {
            let weight = writer.rules.weight_of(&slot.member.backend);
            settle(
                writer,
                slot,
                Quota::Unlimited,
                QuotaSource::Rule,
                weight,
                why,
            )?;
            services::write_sentence(&mut writer.tables, slot.member.backend.service, why)?;
        }
        Ok(())
    }

    /// A service of the kernel may have several groups: its sentence is all of theirs.
    fn write_sentences(
        &self,
        slots: &[SlotView],
        view: &View,
        pod_resolver: &PodResolver,
        writer: &mut Writer,
    ) -> Result<()> {
        let mut of_service: BTreeMap<u16, BTreeMap<&GroupId, &str>> = BTreeMap::new();
        for slot in slots {
            if let Some((group, _)) = pod_resolver.pod(slot, &view.groups) {
                let sentences = of_service.entry(slot.member.backend.service).or_default();
                sentences.insert(group, self.sentence(group));
            }
        }
        for (service, sentences) in of_service {
            let words = match services::quota_by_hand(&writer.tables, service)? {
                Some(quota) => format!("set by hand: {quota} for each backend"),
                None => joined(&sentences),
            };
            services::write_sentence(&mut writer.tables, service, &words)?;
        }
        Ok(())
    }
}

/// Quotas stay, where there are any, until all agents have told what there is to be shared out.
fn as_before(ready: &[Ready], awaited: usize) -> Outcome {
    Outcome {
        quotas: ready
            .iter()
            .map(|ready| ready.previous.unwrap_or(Quota::Unlimited))
            .collect(),
        sentence: format!(
            "as before: the agents of {awaited} of {} ready pods have not told yet",
            ready.len()
        ),
        lowering: false,
    }
}

fn seconds_up(age: Duration) -> u64 {
    age.as_millis()
        .div_ceil(1000)
        .try_into()
        .unwrap_or(u64::MAX)
}

fn joined(sentences: &BTreeMap<&GroupId, &str>) -> String {
    if let [sentence] = sentences.values().collect::<Vec<_>>()[..] {
        return (*sentence).to_owned();
    }
    let sentences: Vec<String> = sentences
        .iter()
        .map(|(group, sentence)| format!("{}: {sentence}", group.service))
        .collect();
    sentences.join("; ")
}

/// What a backend may hold whose pod is not ready.
const fn unready(rule: &ClusterQuota) -> Quota {
    match rule {
        ClusterQuota::Fixed(limit) => Quota::Limited(*limit),
        ClusterQuota::Unlimited | ClusterQuota::Shared { .. } => Quota::Unlimited,
    }
}

impl<'a> Group<'a> {
    fn new(
        id: &'a GroupId,
        entry: &'a ClusterService,
        view: &'a View,
        pod_resolver: &PodResolver,
        slots: &'a [SlotView],
    ) -> Self {
        let endpoints = &view.groups[id];
        let mut own = Vec::new();
        for slot in slots
            .iter()
            .filter(|slot| slot.slot_state().is(BackendState::Active))
        {
            if let Some((group, endpoint)) = pod_resolver.pod(slot, &view.groups)
                && group == id
            {
                own.push((slot, endpoint));
            }
        }
        let told = heard(id, view);
        let count = |endpoint: &Endpoint| {
            let own = own.iter().filter(|(_, other)| other.uid == endpoint.uid);
            let own = own.map(|(slot, _)| Count::of(slot)).reduce(Count::and);
            own.or_else(|| told.get(endpoint.uid.as_str()).copied())
        };
        let all = endpoints
            .iter()
            .map(|endpoint| (endpoint, count(endpoint)))
            .collect();
        Self {
            id,
            entry,
            own,
            all,
        }
    }

    fn own_ready(&self) -> impl Iterator<Item = (&'a SlotView, &'a Endpoint)> {
        let own = self.own.iter().copied();
        own.filter(|(_, endpoint)| endpoint.ready)
    }

    /// Puts the quotas of this node's backends in force, of which those of `ready` come first in the outcome.
    fn settle(
        &self,
        ready: &[(&SlotView, &Endpoint)],
        outcome: &Outcome,
        writer: &Writer,
    ) -> Result<()> {
        for (slot, endpoint) in &self.own {
            let mut places = ready.iter();
            let place = places.position(|(other, _)| other.slot() == slot.slot());
            // Nobody is sent to a pod that is not ready: who comes all the same means it.
            let (quota, why) = match place.and_then(|place| outcome.quotas.get(place)) {
                Some(quota) => (*quota, outcome.sentence.as_str()),
                None => (unready(&self.entry.quota), "its pod is not ready"),
            };
            settle(writer, slot, quota, QuotaSource::Rule, endpoint.weight, why)?;
        }
        Ok(())
    }

    /// This node's backends first.
    fn inputs(&self, own: &[(&SlotView, &Endpoint)], quotas: &mut Quotas) -> Vec<Ready> {
        let mine = own
            .iter()
            .map(|(slot, endpoint)| quotas.input(slot, endpoint.weight));
        let others = self
            .ready()
            .filter(|(endpoint, _)| !own.iter().any(|(_, mine)| mine.uid == endpoint.uid))
            .map(|(endpoint, count)| Ready {
                weight: endpoint.weight,
                established: count.map_or(0, |count| count.established),
                previous: None,
            });
        mine.chain(others).collect()
    }

    fn ready(&self) -> impl Iterator<Item = (&'a Endpoint, Option<Count>)> {
        let all = self.all.iter().copied();
        all.filter(|(endpoint, _)| endpoint.ready)
    }

    /// Those of a pod that is being ended are not among them: its clients are moving, and would be counted here and there.
    fn established_elsewhere(&self) -> u64 {
        self.all
            .iter()
            .filter(|(endpoint, _)| !endpoint.ready && !endpoint.terminating)
            .filter_map(|(_, count)| *count)
            .filter(|count| count.age < TOLD_AGAIN_WITHIN)
            .map(|count| u64::from(count.established))
            .sum()
    }

    /// Nobody could take a refused client.
    fn all_full(&self) -> bool {
        let full = |count: Option<Count>| count.is_some_and(|count| count.room == Some(0));
        self.ready().next().is_some() && self.ready().all(|(_, count)| full(count))
    }

    /// All connections of the group; `None`: nobody has told anything.
    fn counted(&self) -> Option<Counted> {
        let ready = self.ready().count() as u64;
        let known: Vec<u64> = self
            .ready()
            .filter_map(|(_, count)| count.map(|count| u64::from(count.established)))
            .collect();
        if known.is_empty() {
            return None;
        }
        let sum: u64 = known.iter().sum();
        let elsewhere = self.established_elsewhere();
        Some(Counted {
            told: sum + elsewhere,
            estimated: (sum * ready).div_ceil(known.len() as u64) + elsewhere,
        })
    }
}

/// The connections of a group.
struct Counted {
    /// Those that somebody told of.
    told: u64,
    /// The same, with as many for each ready backend that nobody told of as the others have on average.
    estimated: u64,
}

impl Count {
    fn of(slot: &SlotView) -> Self {
        Self {
            established: slot.counted(),
            age: Duration::ZERO,
            room: slot.room(),
        }
    }

    fn told(published: &ReportedBackend, age: Duration) -> Self {
        Self {
            established: published.established.saturating_sub(published.exempt),
            age,
            room: published.room,
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

/// What the agents of other nodes told lately, by the uid of the pod.
fn heard<'a>(id: &GroupId, view: &'a View) -> BTreeMap<&'a str, Count> {
    let mut told: BTreeMap<&str, Count> = BTreeMap::new();
    for heard in view.nodes.values().filter(|heard| heard.age < STALE) {
        for published in heard
            .node_report
            .backends
            .iter()
            .filter(|published| published.group == *id)
        {
            let count = Count::told(published, heard.age);
            told.entry(&published.uid)
                .and_modify(|known| *known = known.and(count))
                .or_insert(count);
        }
    }
    told
}
