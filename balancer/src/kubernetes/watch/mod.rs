//! A watch: what it has listed, kept up to date, and begun again when it fails.

mod contested;
pub(crate) mod node_reports;
pub(crate) mod pods;
mod services;
pub(crate) mod slices;
pub(crate) mod watches;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt as _;
use k8s_openapi::NamespaceResourceScope;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant};

use super::client::{observed, pause, watch_seconds};
use super::health::{ApiError, Health, Notifier, Target};
use super::model::ObjectName;

/// A watch that lasted for so long begins with the shortest pause again when it fails.
const LASTED: Duration = Duration::from_secs(30);

/// What is kept of an object that is watched.
pub(crate) trait Facts: PartialEq + Sized + Send + 'static {
    /// The type of the object.
    type Object: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + 'static;

    /// The plural with its API group, as `kubectl` takes it.
    const RESOURCE: &'static str;

    /// How much of them is kept.
    const MOST: Bounds;

    /// Objects in one answer to a list; more come in several answers. An answer is in memory as a
    /// whole, as text and as objects, and anybody may write 256 KiB of annotations on each.
    const PAGE: u32 = 100;

    /// What is of interest, given what was known before; `None` leaves the object out.
    fn digest(object: &Self::Object, before: Option<&Self>, heard: Heard) -> Option<Self>;

    /// How much of the bounds it takes.
    fn weight(&self) -> usize {
        1
    }
}

/// How an object came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It was in a list: it may have been as it is for any time.
    Listed,
    /// A watch told it: it has changed just now.
    Watched,
}

/// How much a watch keeps, as a sum of weights. Anybody may make many objects in a namespace of
/// theirs: those of other namespaces still have room.
pub(crate) struct Bounds {
    pub(crate) of_namespace: usize,
    pub(crate) in_all: usize,
}

/// The objects of a type that a watch is about.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Selection {
    /// `None`: all namespaces.
    pub(crate) namespace: Option<String>,
    /// A label selector, in kubectl's syntax.
    pub(crate) labels: Option<String>,
    /// A field selector.
    pub(crate) fields: Option<String>,
}

impl Selection {
    /// The object of this name.
    pub(crate) fn named(namespace: &str, name: &str) -> Self {
        Self {
            namespace: Some(namespace.to_owned()),
            labels: None,
            fields: Some(format!("metadata.name={name}")),
        }
    }

    /// The objects with these labels.
    pub(crate) fn labelled(namespace: Option<String>, labels: impl Into<String>) -> Self {
        Self {
            namespace,
            labels: Some(labels.into()),
            fields: None,
        }
    }

    fn config(&self, page: u32) -> watcher::Config {
        watcher::Config {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            ..watcher::Config::default()
        }
        .page_size(page)
        .timeout(watch_seconds())
    }
}

/// What a watch has found.
pub(crate) struct Store<V> {
    pub(crate) health: Arc<Health>,
    listing: Mutex<Listing<V>>,
    notifier: Notifier,
}

/// The objects of a watch.
pub(crate) struct Listing<V> {
    /// All have been listed once. It stays so while the watch fails: the items are old then.
    pub(crate) complete: bool,
    pub(crate) items: BTreeMap<ObjectName, V>,
    /// There were more since the last list than are kept.
    pub(crate) overflows: bool,
    /// The weights of all items, by namespace.
    weights: BTreeMap<String, usize>,
}

impl<V: Facts> Listing<V> {
    const fn new() -> Self {
        Self {
            complete: false,
            items: BTreeMap::new(),
            overflows: false,
            weights: BTreeMap::new(),
        }
    }

    /// Takes an object, or a newer version of one, if it is within the bounds.
    fn insert(&mut self, name: ObjectName, facts: V) {
        self.remove(&name);
        let in_all: usize = self.weights.values().sum();
        let weight = facts.weight();
        let of_namespace = self.weights.entry(name.namespace.clone()).or_default();
        if in_all + weight > V::MOST.in_all || *of_namespace + weight > V::MOST.of_namespace {
            self.overflows = true;
        } else {
            *of_namespace += weight;
            self.items.insert(name, facts);
        }
    }

    fn remove(&mut self, name: &ObjectName) {
        let Some(facts) = self.items.remove(name) else {
            return;
        };
        if let Some(of_namespace) = self.weights.get_mut(&name.namespace) {
            *of_namespace -= facts.weight();
        }
        self.weights.retain(|_, weight| *weight > 0);
    }
}

impl<V: Facts> Store<V> {
    pub(crate) fn new(namespace: Option<&str>, notifier: &Notifier) -> Arc<Self> {
        let target = Target::new(V::RESOURCE, namespace);
        Arc::new(Self {
            health: Arc::new(Health::new(target, notifier)),
            listing: Mutex::new(Listing::new()),
            notifier: notifier.clone(),
        })
    }

    pub(crate) fn listing(&self) -> MutexGuard<'_, Listing<V>> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.listing().complete
    }

    /// What there is more of than is kept.
    pub(crate) fn overflow(&self) -> Option<&Target> {
        let overflows = self.listing().overflows;
        overflows.then_some(&self.health.target)
    }

    fn replace(&self, listed: Listing<V>) {
        let mut listing = self.listing();
        let changed = !listing.complete || listing.items != listed.items;
        *listing = Listing {
            complete: true,
            ..listed
        };
        drop(listing);
        if changed {
            self.notifier.notify();
        }
    }

    /// `None`: the object is gone, or is of no interest.
    fn set(&self, name: ObjectName, facts: Option<V>) {
        let mut listing = self.listing();
        let changed = listing.items.get(&name) != facts.as_ref();
        match facts {
            Some(facts) => listing.insert(name, facts),
            None => listing.remove(&name),
        }
        drop(listing);
        if changed {
            self.notifier.notify();
        }
    }

    fn digest(&self, object: &V::Object, heard: Heard) -> (ObjectName, Option<V>) {
        let name = ObjectName::of(object);
        let facts = V::digest(object, self.listing().items.get(&name), heard);
        (name, facts)
    }

    /// Watches for ever.
    ///
    /// After a failure a watch begins with a list, not with the last resource version. A server
    /// that was restored from a backup has lower versions, for which a watch would wait in silence,
    /// and one that has forgotten the version (410) would say so again and again.
    pub(crate) async fn follow(&self, client: &Client, selection: &Selection) {
        let client = observed(client, &self.health);
        let api = match &selection.namespace {
            Some(namespace) => Api::namespaced(client, namespace),
            None => Api::all(client),
        };
        let mut failures = 0;
        loop {
            let begun = Instant::now();
            let error = self.watch_once(&api, selection.config(V::PAGE)).await;
            let error = error.and_then(|error| api_error(&error, &self.health.target));
            if let Some(error) = error {
                self.health.failed(error);
            }
            if begun.elapsed() >= LASTED {
                failures = 0;
            }
            tokio::time::sleep(pause(failures)).await;
            failures += 1;
        }
    }

    /// Lists and watches until an error.
    async fn watch_once(
        &self,
        api: &Api<V::Object>,
        config: watcher::Config,
    ) -> Option<watcher::Error> {
        let mut events = pin!(watcher(api.clone(), config));
        let mut listed = Listing::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed = Listing::new(),
                Ok(Event::InitApply(object)) => {
                    if let (name, Some(facts)) = self.digest(&object, Heard::Listed) {
                        listed.insert(name, facts);
                    }
                }
                Ok(Event::InitDone) => self.replace(std::mem::replace(&mut listed, Listing::new())),
                Ok(Event::Apply(object)) => {
                    let (name, facts) = self.digest(&object, Heard::Watched);
                    self.set(name, facts);
                }
                Ok(Event::Delete(object)) => self.set(ObjectName::of(&object), None),
                Err(error) => return Some(error),
            }
        }
        None
    }
}

fn api_error(error: &watcher::Error, target: &Target) -> Option<ApiError> {
    match error {
        watcher::Error::InitialListFailed(error) => ApiError::of(error, "list", target),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            ApiError::of(error, "watch", target)
        }
        watcher::Error::WatchError(status) => ApiError::of_status(status, "watch", target),
        watcher::Error::NoResourceVersion => Some(ApiError::Unreachable(
            "its answer has no resource version: is it an API server?".to_owned(),
        )),
    }
}

/// A watch that runs until this is dropped.
pub(crate) struct Watch<V> {
    pub(crate) store: Arc<Store<V>>,
    _task: JoinSet<()>,
}

impl<V: Facts> Watch<V> {
    pub(crate) fn start(client: &Client, notifier: &Notifier, selection: Selection) -> Self {
        let store = Store::new(selection.namespace.as_deref(), notifier);
        let (client, following) = (client.clone(), Arc::clone(&store));
        let mut task = JoinSet::new();
        task.spawn(async move { following.follow(&client, &selection).await });
        Self { store, _task: task }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;

    #[derive(PartialEq)]
    struct Heavy(usize);

    impl Facts for Heavy {
        type Object = ConfigMap;
        const RESOURCE: &'static str = "configmaps";
        const MOST: Bounds = Bounds {
            of_namespace: 10,
            in_all: 25,
        };

        fn digest(_: &ConfigMap, _: Option<&Self>, _: Heard) -> Option<Self> {
            None
        }

        fn weight(&self) -> usize {
            self.0
        }
    }

    fn name(namespace: &str, name: &str) -> ObjectName {
        ObjectName {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    #[test]
    fn one_namespace_takes_no_room_from_the_others() {
        let mut listing = Listing::new();
        for number in 0..100 {
            listing.insert(name("tenant", &number.to_string()), Heavy(3));
        }
        assert_eq!(listing.items.len(), 3);
        assert!(listing.overflows);
        listing.insert(name("sw", "oap"), Heavy(10));
        assert!(listing.items.contains_key(&name("sw", "oap")));
        listing.insert(name("other", "large"), Heavy(7));
        assert_eq!(listing.items.len(), 4, "no room is left in all");
        listing.insert(name("tenant", "0"), Heavy(1));
        listing.remove(&name("tenant", "1"));
        listing.insert(name("other", "large"), Heavy(7));
        assert_eq!(
            listing.items.len(),
            4,
            "what has gone or shrunk leaves room"
        );
        for number in 0..100 {
            listing.remove(&name("tenant", &number.to_string()));
        }
        assert!(!listing.weights.contains_key("tenant"));
    }
}
