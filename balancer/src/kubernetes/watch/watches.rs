//! All watches: which of them there have to be, and what they say together.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use kube::Client;

use super::node_reports::{self, StoredReport};
use super::pods::{self, Counted, LeftAlone, PodFacts};
use super::services::{self, ServiceFacts};
use super::slices::{self, SliceFacts, SliceSet};
use super::{Facts, Listing, Selection, Store, Watch, contested};
use crate::config::{ClusterService, Kubernetes, MAX_WEIGHT, PortChoice, ServiceChoice};
use crate::kubernetes::health::{Health, Notifier, Problems, Target, place};
use crate::kubernetes::identity::Identity;
use crate::kubernetes::model::{Demand, Endpoint, GroupId, ObjectName, ServicePort, View};

/// A report that has not been renewed for so long is named: nobody may come to renew it.
const ABANDONED: Duration = Duration::from_secs(600);

/// Watches of one kind, by what they are about. Service entries that mean the same share one.
struct WatchSet<K, V> {
    running: BTreeMap<K, Watch<V>>,
    needed: BTreeSet<K>,
}

impl<K: Ord + Clone, V: Facts> WatchSet<K, V> {
    const EMPTY: Self = Self {
        running: BTreeMap::new(),
        needed: BTreeSet::new(),
    };

    /// Starts what is needed and does not run.
    fn need(&mut self, needed: BTreeSet<K>, start: impl Fn(&K) -> Watch<V>) {
        for key in &needed {
            let watch = self.running.entry(key.clone());
            watch.or_insert_with(|| start(key));
        }
        self.needed = needed;
    }

    fn end_others(&mut self) {
        self.running.retain(|key, _| self.needed.contains(key));
    }

    fn get(&self, key: &K) -> Option<&Store<V>> {
        self.running.get(key).map(|watch| &*watch.store)
    }

    fn stores(&self) -> impl Iterator<Item = &Store<V>> {
        self.needed.iter().filter_map(|key| self.get(key))
    }

    fn is_listed(&self) -> bool {
        self.stores().all(Store::is_complete)
    }

    fn healths(&self) -> impl Iterator<Item = &Health> {
        self.stores().map(|store| &*store.health)
    }

    /// What there is more of than is kept.
    fn overflows(&self) -> impl Iterator<Item = &Target> {
        self.stores().filter_map(Store::overflow)
    }
}

/// The watches of a configuration.
pub(crate) struct Watches {
    client: Client,
    /// The URL of the API server, for messages.
    server: String,
    notifier: Notifier,
    config: Kubernetes,
    services: WatchSet<Selection, ServiceFacts>,
    slices: WatchSet<SliceSet, SliceFacts>,
    /// The pods that Kubernetes Services mean.
    pods: WatchSet<Selection, PodFacts>,
    /// The pods that quotas follow from.
    counted: WatchSet<Selection, Counted>,
    node_reports: Watch<StoredReport>,
    /// The name of this node.
    node: String,
    /// The pods of this node whose connects are left alone; `None`: nothing is placed.
    left_alone: Option<Watch<LeftAlone>>,
    /// Everything has been listed once since the configuration was read.
    complete: bool,
}

impl Watches {
    pub(crate) fn new(
        client: Client,
        server: String,
        notifier: Notifier,
        identity: &Identity,
        config: &Kubernetes,
    ) -> Self {
        let reports = node_reports::selection(&identity.namespace);
        let node_reports = Watch::start(&client, &notifier, reports);
        let mut watches = Self {
            client,
            server,
            notifier,
            config: config.clone(),
            services: WatchSet::EMPTY,
            slices: WatchSet::EMPTY,
            pods: WatchSet::EMPTY,
            counted: WatchSet::EMPTY,
            node_reports,
            node: identity.node.clone(),
            left_alone: None,
            complete: false,
        };
        watches.adjust();
        watches
    }

    /// Takes over a configuration. Watches that it has in common with the old one go on.
    pub(crate) fn reconfigure(&mut self, config: &Kubernetes) {
        self.config = config.clone();
        self.complete = false;
        self.adjust();
    }

    pub(crate) fn node_reports(&self) -> Arc<Store<StoredReport>> {
        Arc::clone(&self.node_reports.store)
    }

    /// Starts the watches that the configuration and the Services found so far need. What is not
    /// needed any more ends once the new ones have listed everything: until then the old answer.
    fn adjust(&mut self) {
        let (client, notifier) = (&self.client, &self.notifier);
        let entries = &self.config.services;
        let services = entries.iter().map(|entry| &entry.of);
        let services = services.flat_map(services::selections).collect();
        self.services.need(services, |services| {
            Watch::start(client, notifier, services.clone())
        });
        let (mut slices, mut pods) = (BTreeSet::new(), BTreeSet::new());
        for store in self.services.stores() {
            let listing = store.listing();
            let (followed, _) = services::followed(&listing.items);
            slices.extend(SliceSet::of(followed.iter().map(|(name, _)| *name)));
            pods.extend(followed.into_iter().map(pods_of));
        }
        self.slices.need(slices, |set| {
            Watch::start(client, notifier, set.selection())
        });
        self.pods
            .need(pods, |pods| Watch::start(client, notifier, pods.clone()));
        let classes = entries.iter().flat_map(pods::classes);
        let classes = classes.map(pods::of_class).collect();
        self.counted.need(classes, |class| {
            Watch::start(client, notifier, class.clone())
        });
        if self.config.place && self.left_alone.is_none() {
            let of_node = pods::of_node(&self.node);
            self.left_alone = Some(Watch::start(client, notifier, of_node));
        } else if !self.config.place {
            self.left_alone = None;
        }
        if self.is_listed() {
            self.complete = true;
            self.services.end_others();
            self.slices.end_others();
            self.pods.end_others();
            self.counted.end_others();
        }
    }

    fn is_listed(&self) -> bool {
        self.services.is_listed()
            && self.slices.is_listed()
            && self.pods.is_listed()
            && self.counted.is_listed()
            && self.node_reports.store.is_complete()
    }

    /// The requests that a quota may need.
    fn healths(&self) -> impl Iterator<Item = &Health> {
        let listed = self.services.healths().chain(self.slices.healths());
        let pods = self.pods.healths().chain(self.counted.healths());
        let reports = [&*self.node_reports.store.health];
        listed.chain(pods).chain(reports)
    }

    /// What is known, after an adjustment to the Services that were found. `others` are requests
    /// whose problems are reported, and which no quota needs.
    pub(crate) fn view<'a>(
        &mut self,
        others: impl IntoIterator<Item = &'a Health>,
    ) -> (View, Problems) {
        self.adjust();
        let mut problems = Problems::default();
        let mut view = View {
            complete: self.complete,
            ..View::default()
        };
        for health in self.healths() {
            view.silent_for = view.silent_for.max(health.failing_for());
            health.add_to(&mut problems, &self.server);
        }
        if let Some(watch) = &self.left_alone {
            let pods = watch.store.listing();
            let named = pods.items.iter();
            let named = named.map(|(name, pod)| (name.clone(), pod.uid.clone()));
            view.left_alone = named.collect();
            watch.store.health.add_to(&mut problems, &self.server);
        }
        for health in others {
            health.add_to(&mut problems, &self.server);
        }
        self.add_overflows(&mut problems);
        for entry in &self.config.services {
            self.add_groups(entry, &mut view, &mut problems);
            if let Some(demand) = self.demand(entry) {
                view.demands.insert(entry.name.clone(), demand);
            }
        }
        let entries = &self.config.services;
        let named = |id: &GroupId| {
            let entry = entries.iter().find(|entry| entry.name == id.entry);
            entry.is_some_and(ClusterService::is_named)
        };
        view.precedence.sort_by_key(|id| !named(id));
        let named = |entry: &str| {
            entries
                .iter()
                .any(|one| one.name == entry && one.is_named())
        };
        view.ports.sort_by_key(|port| !named(&port.entry));
        contested::drop_contested(&mut view.groups, &mut problems);
        self.add_node_reports(&mut view, &mut problems);
        view.problems = problems.sentences();
        (view, problems)
    }

    fn add_node_reports(&self, view: &mut View, problems: &mut Problems) {
        let store = &self.node_reports.store;
        for (name, stored) in &store.listing().items {
            match stored.received(&store.health.clock) {
                Ok(received) => {
                    if received.age >= ABANDONED {
                        problems.add(abandoned(name, &received.node_report.node));
                    }
                    let node = received.node_report.node.clone();
                    view.nodes.insert(node, received);
                }
                Err(problem) => problems.add(problem),
            }
        }
    }

    /// What there is more of than is kept.
    fn add_overflows(&self, problems: &mut Problems) {
        let services = self.services.overflows().chain(self.slices.overflows());
        let pods = self.pods.overflows().chain(self.counted.overflows());
        let reports = self.node_reports.store.overflow();
        for target in services.chain(pods).chain(reports) {
            problems.add(too_many(target));
        }
    }

    fn add_groups(&self, entry: &ClusterService, view: &mut View, problems: &mut Problems) {
        let selections = services::selections(&entry.of);
        let stores = selections.iter().filter_map(|key| self.services.get(key));
        let listings: Vec<_> = stores.map(Store::listing).collect();
        let is_empty =
            |listing: &MutexGuard<'_, Listing<_>>| listing.complete && listing.items.is_empty();
        if listings.iter().all(is_empty) {
            problems.add(none_found(entry));
        }
        for listing in &listings {
            let (followed, left_out) = services::followed(&listing.items);
            for sentence in left_out {
                problems.add(sentence);
            }
            for (service, facts) in followed {
                self.add_groups_of(entry, (service, facts), view, problems);
            }
        }
    }

    fn add_groups_of(
        &self,
        entry: &ClusterService,
        (service, facts): (&ObjectName, &ServiceFacts),
        view: &mut View,
        problems: &mut Problems,
    ) {
        let Some(port) = facts.port(&entry.port) else {
            problems.add(no_port(entry, service, facts));
            return;
        };
        let Some((mut found, has_others)) = self.behind(service, &port.name) else {
            return;
        };
        // A Service that has no pods now is a group as well, where its port is known.
        if let (true, Some(target)) = (found.is_empty(), port.target) {
            found.insert(target, Vec::new());
        }
        let mut as_seen = ServicePort {
            entry: entry.name.clone(),
            service: service.clone(),
            frontends: facts.frontends(port),
            matching: entry.matching,
            endpoints: Vec::new(),
            has_others,
            traffic: facts.traffic.clone(),
        };
        for (port, pods) in found {
            let Some(endpoints) = self.endpoints((service, facts), pods, problems) else {
                continue;
            };
            let id = GroupId {
                entry: entry.name.clone(),
                service: service.clone(),
                port,
            };
            let with_port = endpoints.iter().map(|pod| (pod.clone(), port));
            as_seen.endpoints.extend(with_port);
            view.precedence.push(id.clone());
            view.groups.insert(id, endpoints);
        }
        as_seen.endpoints.sort_by(|(one, port), (other, others)| {
            (&one.pod, &one.uid, port).cmp(&(&other.pod, &other.uid, others))
        });
        view.ports.push(as_seen);
    }

    /// The pods of a Service by target port, and whether somebody else serves it as well; `None`:
    /// its slices have not been listed yet.
    fn behind(
        &self,
        service: &ObjectName,
        port: &str,
    ) -> Option<(BTreeMap<u16, Vec<Endpoint>>, bool)> {
        let running = self.slices.running.iter();
        let covering = running.filter(|(slices, _)| slices.covers(service));
        for (_, watch) in covering {
            let listing = watch.store.listing();
            if listing.complete {
                let items = &listing.items;
                let has_others = slices::has_others(items, service, port);
                return Some((slices::behind(items, service, port), has_others));
            }
        }
        None
    }

    /// The pods as the pods themselves have it, wherever an `EndpointSlice` says something else;
    /// `None`: they are about to be listed.
    fn endpoints(
        &self,
        (service, facts): (&ObjectName, &ServiceFacts),
        found: Vec<Endpoint>,
        problems: &mut Problems,
    ) -> Option<Vec<Endpoint>> {
        let store = self.pods.get(&pods_of((service, facts)))?;
        // They may not be listed at all: then nobody knows better than the slices.
        let unknown = !store.is_complete() && store.health.is_failing();
        let listing = store.listing();
        if !listing.complete && !unknown {
            return None;
        }
        let serves = |mut pod: Endpoint| {
            let known = listing.items.get(&pod.pod);
            match known.filter(|known| known.uid == pod.uid) {
                Some(known) if known.job => return None,
                Some(known) => {
                    at_its_own_place(&mut pod, known, service, problems);
                    if pod.addresses.is_empty() {
                        return None;
                    }
                    match &known.weight {
                        Ok(weight) => pod.weight = *weight,
                        Err(text) => problems.add(wrong_weight(&pod.pod, text)),
                    }
                }
                // Its slice is ahead of the pods, or the Service's selector does not mean it.
                None if !unknown => return None,
                None => (),
            }
            Some(pod)
        };
        Some(found.into_iter().filter_map(serves).collect())
    }

    /// `None`: it does not follow from pods, or they have not been listed yet, or are too many.
    fn demand(&self, entry: &ClusterService) -> Option<Demand> {
        let classes = pods::classes(entry).iter();
        let counts = classes.map(|class| {
            let listing = self.counted.get(&pods::of_class(class))?.listing();
            let count = (listing.items.len(), class.connections);
            (listing.complete && !listing.overflows).then_some(count)
        });
        let counts = counts.collect::<Option<Vec<_>>>()?;
        (!counts.is_empty()).then(|| pods::demand(&counts))
    }
}

fn pods_of((service, facts): (&ObjectName, &ServiceFacts)) -> Selection {
    pods::of_service(service, facts.pods.as_ref())
}

/// The pod at those of its addresses that it has, on the node that it runs on, in the way it says.
fn at_its_own_place(
    pod: &mut Endpoint,
    known: &PodFacts,
    service: &ObjectName,
    problems: &mut Problems,
) {
    let (own, others) = std::mem::take(&mut pod.addresses)
        .into_iter()
        .partition(|address| known.addresses.contains(address));
    pod.addresses = own;
    pod.confirmed = true;
    pod.node.clone_from(&known.node);
    pod.host_network = known.host_network;
    pod.runtime_class.clone_from(&known.runtime_class);
    // A pod that has none yet, or has just ended, is no reason to complain.
    if !known.addresses.is_empty() {
        let others: Vec<IpAddr> = others;
        for address in others.iter().take(1) {
            problems.add(wrong_address(service, *address, &pod.pod));
        }
    }
}

fn too_many(target: &Target) -> String {
    format!(
        "there are more {target} than the balancer keeps: some of them are not looked at. Let the \
         entries of the configuration name a Service or a namespace"
    )
}

fn abandoned(report: &ObjectName, node: &str) -> String {
    let ObjectName { namespace, name } = report;
    format!(
        "the node report {report} has not been renewed for ten minutes: no daemon runs on the node \
         {node}, or it does not reach the API server. The report counts for nothing. Where the \
         node is gone, or needs no daemon: `kubectl delete configmap --namespace {namespace} {name}`"
    )
}

fn wrong_address(service: &ObjectName, address: IpAddr, pod: &ObjectName) -> String {
    format!(
        "an EndpointSlice of the Service {service} names the address {address} for the pod {pod}, \
         which has another one: nothing is balanced there. See who wrote it: `kubectl get \
         endpointslices --namespace {} --selector kubernetes.io/service-name={} -o yaml`",
        service.namespace, service.name
    )
}

fn none_found(entry: &ClusterService) -> String {
    let name = &entry.name;
    match &entry.of {
        ServiceChoice::Named {
            namespace,
            name: service,
        } => format!(
            "there is no Service {namespace}/{service}: {name} balances nothing until it is made. \
             `kubectl get services --namespace {namespace}` lists those that are there"
        ),
        ServiceChoice::Selected {
            namespace,
            selectors,
        } => format!(
            "no Service has the labels {} {}: {name} balances nothing until one does. \
             `kubectl get services --all-namespaces --show-labels` lists them",
            selectors.join(" or "),
            place(namespace.as_deref())
        ),
    }
}

fn no_port(entry: &ClusterService, service: &ObjectName, facts: &ServiceFacts) -> String {
    let port = match &entry.port {
        PortChoice::Number(number) => number.to_string(),
        PortChoice::Name(name) => format!("called {name:?}"),
    };
    format!(
        "the Service {service} has no TCP port {port} (it has: {}): {} does not balance it. \
         `port:` takes the number or the name of the Service's port, not of the pods'",
        facts.ports_in_words(),
        entry.name
    )
}

fn wrong_weight(pod: &ObjectName, text: &str) -> String {
    format!(
        "the annotation {} of the pod {pod} is {text:?}: a weight is a number from 1 to \
         {MAX_WEIGHT}; until it is one, 1 is taken",
        pods::WEIGHT
    )
}
