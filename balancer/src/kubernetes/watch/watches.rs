//! All watches: which of them there have to be, and what they say together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kube::Client;

use super::{Store, Watch};
use super::{pods, services, slices};
use crate::config::{
    ClusterInput, ClusterQuota, ClusterService, Kubernetes, PortChoice, ServiceChoice,
};
use crate::kubernetes::health::{Health, Notifier, Problems, place};
use crate::kubernetes::node_report;
use crate::kubernetes::node_report::StoredReport;
use crate::kubernetes::{Demand, Endpoint, GroupId, Identity, ObjectName, View};

/// The watches of a configuration. Entries that mean the same share one.
#[derive(Debug)]
pub(in crate::kubernetes) struct Watches {
    client: Watcher,
    config: Kubernetes,
    services: BTreeMap<services::Key, Watch<services::Facts>>,
    slices: BTreeMap<slices::Key, Watch<slices::Facts>>,
    pods: BTreeMap<pods::Key, Watch<pods::Facts>>,
    counted: BTreeMap<pods::Key, Watch<()>>,
    node_reports: Watch<StoredReport>,
    /// Everything has been listed once since the configuration was read.
    complete: bool,
}

/// What starts watches.
struct Watcher {
    client: Client,
    server: String,
    notifier: Notifier,
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.server)
    }
}

/// The watches that there have to be.
#[derive(Default)]
struct Needed {
    services: BTreeSet<services::Key>,
    slices: BTreeSet<slices::Key>,
    pods: BTreeSet<pods::Key>,
    counted: BTreeSet<pods::Key>,
}

impl Watches {
    pub(in crate::kubernetes) fn new(
        client: Client,
        server: String,
        notifier: Notifier,
        identity: &Identity,
        config: &Kubernetes,
    ) -> Self {
        let node_reports = node_report::watch(&client, &identity.namespace, &notifier);
        let mut watches = Self {
            client: Watcher {
                client,
                server,
                notifier,
            },
            config: config.clone(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            pods: BTreeMap::new(),
            counted: BTreeMap::new(),
            node_reports,
            complete: false,
        };
        watches.adjust();
        watches
    }

    /// From now on these are the entries. Watches that they have in common with the old ones go on.
    pub(in crate::kubernetes) fn reconfigure(&mut self, config: &Kubernetes) {
        self.config = config.clone();
        self.complete = false;
        self.adjust();
    }

    pub(in crate::kubernetes) fn node_reports(&self) -> Arc<Store<StoredReport>> {
        Arc::clone(&self.node_reports.store)
    }

    /// Starts what is needed and does not run, and ends what is not needed any more, once the new ones have listed everything: until then
    /// the old ones answer.
    pub(in crate::kubernetes) fn adjust(&mut self) {
        let needed = self.needed();
        let Watcher {
            client, notifier, ..
        } = &self.client;
        begin(&mut self.services, &needed.services, |key| {
            services::watch(client, key, notifier)
        });
        begin(&mut self.slices, &needed.slices, |key| {
            slices::watch(client, key, notifier)
        });
        begin(&mut self.pods, &needed.pods, |key| {
            pods::watch(client, key, notifier)
        });
        begin(&mut self.counted, &needed.counted, |key| {
            pods::count(client, key, notifier)
        });
        if self.has_listed(&needed) {
            self.complete = true;
            self.services.retain(|key, _| needed.services.contains(key));
            self.slices.retain(|key, _| needed.slices.contains(key));
            self.pods.retain(|key, _| needed.pods.contains(key));
            self.counted.retain(|key, _| needed.counted.contains(key));
        }
    }

    fn needed(&self) -> Needed {
        let mut needed = Needed::default();
        for entry in &self.config.services {
            for key in services::Key::of(&entry.of) {
                if let Some(running) = self.services.get(&key) {
                    let listing = running.store.listing();
                    let found = listing.items.iter();
                    needed
                        .pods
                        .extend(found.filter_map(|(name, facts)| pods_of(name, facts)));
                    needed.slices.extend(slices::Key::of(listing.items.keys()));
                }
                needed.services.insert(key);
            }
            for class in classes(entry) {
                needed.counted.insert(pods::Key::from(class));
            }
        }
        needed
    }

    fn has_listed(&self, needed: &Needed) -> bool {
        listed(&self.services, &needed.services)
            && listed(&self.slices, &needed.slices)
            && listed(&self.pods, &needed.pods)
            && listed(&self.counted, &needed.counted)
            && self.node_reports.store.is_complete()
    }

    /// The requests that a quota may need.
    fn healths<'a>(&'a self, needed: &'a Needed) -> impl Iterator<Item = &'a Health> {
        healths(&self.services, &needed.services)
            .chain(healths(&self.slices, &needed.slices))
            .chain(healths(&self.pods, &needed.pods))
            .chain(healths(&self.counted, &needed.counted))
            .chain([&*self.node_reports.store.health])
    }

    /// What is known; `others` are requests that are told about and that no quota needs.
    pub(in crate::kubernetes) fn view<'a>(
        &self,
        others: impl IntoIterator<Item = &'a Health>,
    ) -> (View, Problems) {
        let needed = self.needed();
        let mut problems = Problems::default();
        let mut view = View {
            complete: self.complete || self.has_listed(&needed),
            ..View::default()
        };
        for health in self.healths(&needed) {
            view.silent_for = view.silent_for.max(health.failing_for());
            health.tell(&self.client.server, &mut problems);
        }
        for health in others {
            health.tell(&self.client.server, &mut problems);
        }
        for entry in &self.config.services {
            self.add_groups(entry, &mut view.groups, &mut problems);
            if let Some(demand) = self.demand(entry) {
                view.demands.insert(entry.name.clone(), demand);
            }
        }
        for arrived in self.node_reports.store.listing().items.values() {
            match &arrived.said {
                Ok(node_report) => view.nodes.extend(
                    arrived
                        .heard()
                        .map(|heard| (node_report.node.clone(), heard)),
                ),
                Err(sentence) => problems.add(sentence.clone()),
            }
        }
        view.problems = problems.sentences();
        (view, problems)
    }

    fn add_groups(
        &self,
        entry: &ClusterService,
        groups: &mut BTreeMap<GroupId, Vec<Endpoint>>,
        problems: &mut Problems,
    ) {
        let keys = services::Key::of(&entry.of);
        let listings: Vec<_> = keys
            .iter()
            .filter_map(|key| self.services.get(key))
            .map(|running| running.store.listing())
            .collect();
        if listings.len() == keys.len()
            && listings
                .iter()
                .all(|listing| listing.complete && listing.items.is_empty())
        {
            problems.add(none_found(entry));
        }
        for (service, facts) in listings.iter().flat_map(|listing| &listing.items) {
            let Some(port) = facts.port(&entry.port) else {
                problems.add(no_port(entry, service, facts));
                continue;
            };
            let Some(mut found) = self.behind(service, &port.name) else {
                continue;
            };
            // A Service that has no pods now is a group as well, where its port is known.
            if let (true, Some(target)) = (found.is_empty(), port.target) {
                found.insert(target, Vec::new());
            }
            for (port, pods) in found {
                let Some(endpoints) = self.endpoints(service, facts, pods, problems) else {
                    continue;
                };
                let id = GroupId {
                    entry: entry.name.clone(),
                    service: service.clone(),
                    port,
                };
                groups.insert(id, endpoints);
            }
        }
    }

    /// `None`: its slices have not been listed yet.
    fn behind(&self, service: &ObjectName, port: &str) -> Option<BTreeMap<u16, Vec<slices::Pod>>> {
        let covering = self.slices.iter().filter(|(key, _)| key.covers(service));
        for (_, running) in covering {
            let listing = running.store.listing();
            if listing.complete {
                return Some(slices::behind(&listing.items, service, port));
            }
        }
        None
    }

    /// The pods with what their metadata says; `None`: that is about to be listed.
    fn endpoints(
        &self,
        service: &ObjectName,
        facts: &services::Facts,
        found: Vec<slices::Pod>,
        problems: &mut Problems,
    ) -> Option<Vec<Endpoint>> {
        let watch = pods_of(service, facts).and_then(|key| self.pods.get(&key));
        let Some(running) = watch else {
            // No selector: nobody says which pods it means but its slices.
            return facts
                .pods
                .is_none()
                .then(|| found.into_iter().map(|pod| endpoint(pod, 1)).collect());
        };
        let failing = running.store.health.is_failing();
        let listing = running.store.listing();
        if !listing.complete && !failing {
            return None;
        }
        let mut endpoints = Vec::with_capacity(found.len());
        for pod in found {
            let known = listing
                .items
                .get(&pod.name)
                .filter(|known| known.uid == pod.uid);
            let weight = match known {
                Some(known) if known.job => continue,
                Some(known) => known.weight.clone().unwrap_or_else(|text| {
                    problems.add(wrong_weight(&pod.name, &text));
                    1
                }),
                // Its slice is ahead of its metadata, or it is not what the Service's selector means.
                None if !failing => continue,
                None => 1,
            };
            endpoints.push(endpoint(pod, weight));
        }
        Some(endpoints)
    }

    /// `None`: it does not follow from pods, or they have not been listed yet.
    fn demand(&self, entry: &ClusterService) -> Option<Demand> {
        let classes = classes(entry);
        if classes.is_empty() {
            return None;
        }
        let mut counts = Vec::with_capacity(classes.len());
        for class in classes {
            let listing = self.counted.get(&pods::Key::from(class))?.store.listing();
            if !listing.complete {
                return None;
            }
            counts.push((listing.items.len(), class.connections));
        }
        Some(pods::demand(&counts))
    }
}

fn begin<K: Ord + Clone, V>(
    running: &mut BTreeMap<K, Watch<V>>,
    needed: &BTreeSet<K>,
    start: impl Fn(&K) -> Watch<V>,
) {
    for key in needed {
        if !running.contains_key(key) {
            running.insert(key.clone(), start(key));
        }
    }
}

fn listed<K: Ord, V>(running: &BTreeMap<K, Watch<V>>, needed: &BTreeSet<K>) -> bool {
    needed.iter().all(|key| {
        running
            .get(key)
            .is_some_and(|running| running.store.is_complete())
    })
}

fn healths<'a, K: Ord, V>(
    running: &'a BTreeMap<K, Watch<V>>,
    needed: &'a BTreeSet<K>,
) -> impl Iterator<Item = &'a Health> {
    needed
        .iter()
        .filter_map(|key| running.get(key))
        .map(|running| &*running.store.health)
}

fn pods_of(service: &ObjectName, facts: &services::Facts) -> Option<pods::Key> {
    let labels = facts.pods.as_ref()?;
    Some(pods::Key::of_service(service, labels))
}

fn classes(entry: &ClusterService) -> &[crate::config::PodClass] {
    match &entry.quota {
        ClusterQuota::Shared {
            input: ClusterInput::Pods(classes),
            ..
        } => classes,
        _ => &[],
    }
}

fn endpoint(pod: slices::Pod, weight: u32) -> Endpoint {
    Endpoint {
        pod: pod.name,
        uid: pod.uid,
        addresses: pod.addresses,
        node: pod.node,
        ready: pod.ready,
        terminating: pod.terminating,
        weight,
    }
}

fn none_found(entry: &ClusterService) -> String {
    let name = &entry.name;
    match &entry.of {
        ServiceChoice::Named {
            namespace,
            name: service,
        } => format!(
            "there is no Service {namespace}/{service}: {name} balances nothing until it is made. `kubectl get services --namespace \
             {namespace}` lists those that are there"
        ),
        ServiceChoice::Selected {
            namespace,
            selectors,
        } => format!(
            "no Service has the labels {} {}: {name} balances nothing until one does. `kubectl get services --all-namespaces \
             --show-labels` lists them",
            selectors.join(" or "),
            place(namespace.as_deref())
        ),
    }
}

fn no_port(entry: &ClusterService, service: &ObjectName, facts: &services::Facts) -> String {
    let port = match &entry.port {
        PortChoice::Number(number) => number.to_string(),
        PortChoice::Name(name) => format!("called {name:?}"),
    };
    format!(
        "the Service {service} has no TCP port {port} (it has: {}): {} does not balance it. `port:` takes the number or the name of the \
         Service's port, not of the pods'",
        facts.ports_in_words(),
        entry.name
    )
}

fn wrong_weight(pod: &ObjectName, text: &str) -> String {
    format!(
        "the annotation {} of the pod {pod} is {text:?}: a weight is a number from 1 to {}; until it is one, 1 is taken",
        pods::WEIGHT,
        crate::config::MAX_WEIGHT
    )
}
