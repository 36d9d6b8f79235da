//! The quotas of backend groups: each group's total, shared among its pods that are ready.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::super::super::moves::Departures;
use super::super::super::quotas::{LoweringClocks, explain, put_in_force};
use super::super::super::rebalancing::AFTER_REFUSAL;
use super::group::{Group, groups};
use super::placing::is_placed;
use super::pod_resolver::{Groups, PodResolver};
use crate::config::{ClusterInput, ClusterQuota, Kubernetes, MAX_CONNECTIONS};
use crate::dataplane::{SlotView, Writer};
use crate::kubernetes::{
    GroupId, MOST_REFUSED, MOST_SECONDS_AGO, Peak, ReceivedReport, RefusedSource, ServicePort, View,
};
use crate::quota::starved::{self, Refusals, Refused, Starved};
use crate::quota::window::Window;
use crate::quota::{InForce, Known, Outcome, QuotaSource, Total, compute_cluster, plausible};

/// For so long a report of a pod that has become ready is waited for. Then its node has no daemon,
/// or one that is not well.
const REPORTED_WITHIN: Duration = Duration::from_secs(20);

/// The most refused sources of a group in a node report.
const MAX_REPORTED_SOURCES: usize = 64;

/// What is remembered for the quotas of groups from one computation to the next.
#[derive(Debug)]
pub struct GroupQuotas {
    /// The start of the times in `windows` and `refusals`.
    started: Instant,
    /// The clocks of quotas that go down, by group.
    clocks: LoweringClocks<GroupId>,
    /// The numbers of connections seen in groups whose quotas follow from them.
    windows: BTreeMap<GroupId, Window>,
    /// The sources that this node has refused, by group.
    refusals: Refusals<GroupId>,
    /// The sentences that explain the quotas, by group.
    sentences: BTreeMap<GroupId, String>,
    /// Pods that no daemon has reported yet, by uid, and since when they have been ready.
    unreported: BTreeMap<String, Instant>,
}

impl GroupQuotas {
    /// A state in which nothing is known yet.
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            clocks: LoweringClocks::default(),
            windows: BTreeMap::new(),
            refusals: Refusals::default(),
            sentences: BTreeMap::new(),
            unreported: BTreeMap::new(),
        }
    }

    /// Notes refusals of a source, the first and the last so long ago.
    pub fn on_refusals(
        &mut self,
        group: &GroupId,
        source: IpAddr,
        first: Duration,
        last: Duration,
    ) {
        let now = self.started.elapsed();
        for ago in [first, last] {
            self.refusals
                .refused(group, source, now.saturating_sub(ago));
        }
    }

    /// Windows may have other lengths from now on; what was observed comes back with the others'
    /// reports.
    pub fn reconfigure(&mut self) {
        self.windows.clear();
    }

    /// Why the quotas of a group are as they are; `None`: not computed yet.
    pub fn sentence(&self, group: &GroupId) -> Option<&str> {
        self.sentences.get(group).map(String::as_str)
    }

    /// How many sources are starved, by the reports of all daemons that have a pod of the group.
    pub fn starved(&self, group: &GroupId, view: &View) -> Starved {
        starved::count(self.refused(group, view))
    }

    /// Whether anybody was refused within the last seconds, by the same reports.
    pub fn are_refused(&self, group: &GroupId, view: &View) -> bool {
        let refused = self.refused(group, view);
        refused.iter().any(|refused| refused.last < AFTER_REFUSAL)
    }

    /// The sources that were refused of late, by the reports of all daemons that have a pod of the
    /// group.
    fn refused(&self, group: &GroupId, view: &View) -> Vec<Refused> {
        let endpoints = view.groups.get(group).into_iter().flatten();
        let nodes: BTreeSet<&String> = endpoints.filter_map(|pod| pod.node.as_ref()).collect();
        let received = nodes.into_iter().filter_map(|node| view.nodes.get(node));
        let recent = received.filter(|received| received.is_recent());
        let reported = recent.flat_map(|received| {
            let refused = received.node_report.refused.iter();
            let ago = |seconds| received.age.saturating_add(Duration::from_secs(seconds));
            refused
                .filter(|refused| refused.group == *group)
                .take(MAX_REPORTED_SOURCES)
                .map(move |refused| Refused {
                    source: refused.source,
                    before: refused.before_seconds_ago.map(ago),
                    first: ago(refused.first_seconds_ago),
                    last: ago(refused.last_seconds_ago),
                    longest_pause: Duration::from_secs(refused.longest_pause_seconds),
                })
        });
        let own = self.refusals.of(group, self.started.elapsed());
        own.into_iter().chain(reported).collect()
    }

    /// What the others should know of the sources that this node has refused of late.
    pub fn refused_sources(&self) -> Vec<RefusedSource> {
        let now = self.started.elapsed();
        let of_group = |group: &GroupId| {
            let mut refused = self.refusals.of(group, now);
            refused.sort_by_key(|refused| Reverse((refused.certainly_for(), refused.first)));
            refused.truncate(MAX_REPORTED_SOURCES);
            let reported = refused.into_iter().map(|refused| RefusedSource {
                group: group.clone(),
                source: refused.source,
                first_seconds_ago: refused.first.as_secs().min(MOST_SECONDS_AGO),
                last_seconds_ago: seconds_up(refused.last),
                longest_pause_seconds: seconds_up(refused.longest_pause),
                before_seconds_ago: refused.before.map(|before| before.as_secs()),
            });
            reported.collect::<Vec<_>>()
        };
        let all = self.refusals.groups().flat_map(of_group);
        all.take(MOST_REFUSED).collect()
    }

    /// What the others should know of the most connections that there were: what this daemon itself
    /// added up. What others say of peaks is not passed on, or it would outlive them.
    pub fn peaks(&self) -> Vec<Peak> {
        let now = self.started.elapsed();
        let peak = |(group, window): (&GroupId, &Window)| {
            let (connections, age) = window.peak(now)?;
            Some(Peak {
                group: group.clone(),
                connections: connections.min(MAX_CONNECTIONS.into()),
                seconds_ago: seconds_up(age),
            })
        };
        self.windows.iter().filter_map(peak).collect()
    }

    /// Computes the quotas of every group and puts those of this node in force at the next SYN.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn apply(
        &mut self,
        config: &Kubernetes,
        view: &View,
        resolver: &PodResolver,
        departures: &Departures,
        writer: &mut Writer,
    ) -> Result<()> {
        let slots = writer.tables.slots()?;
        self.forget_others(&view.groups);
        for group in groups(config, view, resolver, &slots, departures) {
            let id = group.id;
            let of_group =
                |port: &&ServicePort| port.entry == id.entry && port.service == id.service;
            let placed = config.place && view.ports.iter().filter(of_group).any(is_placed);
            let outcome = self.compute(&group, view, placed, config.hold_for);
            put_group_in_force(&group, &outcome, writer)?;
            self.sentences.insert(id.clone(), outcome.sentence);
        }
        self.explain_services(&slots, view, resolver, writer)
    }

    fn forget_others(&mut self, groups: &Groups) {
        let uids: HashSet<&str> = groups
            .values()
            .flatten()
            .map(|endpoint| endpoint.uid.as_str())
            .collect();
        self.unreported.retain(|uid, _| uids.contains(uid.as_str()));
        self.refusals
            .tidy(self.started.elapsed(), |id| groups.contains_key(id));
        self.windows.retain(|id, _| groups.contains_key(id));
        self.sentences.retain(|id, _| groups.contains_key(id));
        self.clocks.retain(|id| groups.contains_key(id));
    }

    /// Computes the quotas of one group; `placed`: whether its clients' nodes place them.
    pub fn compute(
        &mut self,
        group: &Group<'_>,
        view: &View,
        placed: bool,
        hold_for: Duration,
    ) -> Outcome {
        let starved = self.starved(group.id, view);
        let known = Known {
            total: self.total(group, view, starved),
            established_elsewhere: group.established_elsewhere(),
            placed,
            refused_for_long: starved.long,
            unreported: self.unreported(group),
            silent_for: view.silent_for,
            hold_for,
        };
        let ready = group.ready_backends();
        self.clocks.compute(group.id, |waited| {
            compute_cluster(&group.entry.quota, &known, &ready, waited)
        })
    }

    /// How many pods that are ready no daemon has reported yet, where what they hold matters.
    fn unreported(&mut self, group: &Group<'_>) -> usize {
        if !matches!(
            group.entry.quota,
            ClusterQuota::Shared {
                input: ClusterInput::Observed { .. },
                ..
            }
        ) {
            return 0;
        }
        let mut unreported = 0;
        for (endpoint, load) in group.ready() {
            if load.is_some() {
                self.unreported.remove(&endpoint.uid);
                continue;
            }
            let since = self.unreported.entry(endpoint.uid.clone());
            if since.or_insert_with(Instant::now).elapsed() < REPORTED_WITHIN {
                unreported += 1;
            }
        }
        unreported
    }

    /// The connections to make room for.
    fn total(&mut self, group: &Group<'_>, view: &View, starved: Starved) -> Option<Total> {
        let ClusterQuota::Shared { input, .. } = &group.entry.quota else {
            return None;
        };
        match input {
            // The rule itself says it.
            ClusterInput::Clients { .. } => None,
            ClusterInput::Pods(_) => view.demands.get(&group.id.entry).map(|demand| Total {
                connections: demand.connections,
                words: demand.words.clone(),
            }),
            ClusterInput::Observed { window } => {
                let observed = self.observed(group, *window, view, starved);
                observed.map(|connections| Total {
                    connections,
                    words: "observed".to_owned(),
                })
            }
        }
    }

    /// The most that all daemons together have counted within a time, starved sources included.
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
        let load = group.load();
        if let Some(load) = &load {
            window.add(now, load.reported + starved);
        }
        let own = window.peak(now).map(|(connections, _)| connections);
        let now = load.map(|load| load.estimated + starved);
        own.max(now).max(reported_peak(group, length, view))
    }

    /// A service of the kernel may have several groups: its sentence is all of theirs.
    fn explain_services(
        &self,
        slots: &[SlotView],
        view: &View,
        resolver: &PodResolver,
        writer: &mut Writer,
    ) -> Result<()> {
        let mut groups: BTreeMap<u16, BTreeMap<&GroupId, &str>> = BTreeMap::new();
        for slot in slots {
            if let Some((group, _)) = resolver.pod(slot, &view.groups) {
                let of_service = groups.entry(slot.member.backend.service).or_default();
                of_service.insert(group, self.sentence(group).unwrap_or_default());
            }
        }
        for (service, of_service) in groups {
            let alone = of_service.len() == 1;
            let words = of_service.into_iter().map(|(group, sentence)| {
                if alone {
                    sentence.to_owned()
                } else {
                    format!("{}: {sentence}", group.service)
                }
            });
            explain(writer, service, &words.collect::<Vec<_>>().join("; "))?;
        }
        Ok(())
    }
}

/// The largest peak within the window that the daemon of a node with a pod of the group reports, as
/// far as that is [plausible] beside what the other nodes count.
fn reported_peak(group: &Group<'_>, window: Duration, view: &View) -> Option<u64> {
    let of_node = |(node, received): (&String, &ReceivedReport)| {
        let peaks = received.node_report.peaks.iter();
        let most = peaks
            .filter(|peak| peak.group == *group.id)
            .filter(|peak| {
                let age = Duration::from_secs(peak.seconds_ago);
                received.age.saturating_add(age) <= window
            })
            .map(|peak| peak.connections)
            .max()?;
        Some(most.min(plausible::at_most(group.counted_without(node))))
    };
    let nodes = view.nodes.iter();
    let nodes = nodes.filter(|(node, received)| received.is_recent() && group.is_on(node));
    nodes.filter_map(of_node).max()
}

/// Puts the quotas of this node's backends in force: the ready ones come first in the outcome.
fn put_group_in_force(group: &Group<'_>, outcome: &Outcome, writer: &Writer) -> Result<()> {
    let source = QuotaSource::Rule;
    for ((_, server), quota) in group.own_ready().iter().zip(&outcome.quotas) {
        let quota = *quota;
        let rule = InForce { quota, source };
        put_in_force(writer, server, rule, server.weight, &outcome.sentence)?;
    }
    // Nobody is sent to a pod that is not ready: who comes all the same means it.
    let quota = group.entry.quota.uncomputed();
    for (_, server) in group.own_pods().iter().filter(|(pod, _)| !pod.ready) {
        let rule = InForce { quota, source };
        put_in_force(writer, server, rule, server.weight, "its pod is not ready")?;
    }
    Ok(())
}

/// Whole seconds, rounded up.
fn seconds_up(age: Duration) -> u64 {
    let seconds = age.as_millis().div_ceil(1000);
    seconds.try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
