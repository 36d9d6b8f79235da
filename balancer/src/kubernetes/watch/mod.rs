//! A watch: what it has listed, kept up to date, and begun again when it fails.

pub(crate) mod node_reports;
pub(crate) mod pods;
mod services;
mod slices;
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

/// Objects in one answer to a list; more come in several answers.
const PAGE: u32 = 250;
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

    /// What is of interest, given what was known before; `None` leaves the object out.
    fn digest(object: &Self::Object, before: Option<&Self>) -> Option<Self>;
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

    fn config(&self) -> watcher::Config {
        watcher::Config {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            ..watcher::Config::default()
        }
        .page_size(PAGE)
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
    /// There was an object once.
    pub(crate) seen: bool,
    pub(crate) items: BTreeMap<ObjectName, V>,
}

impl<V: Facts> Store<V> {
    pub(crate) fn new(namespace: Option<&str>, notifier: &Notifier) -> Arc<Self> {
        let target = Target::new(V::RESOURCE, namespace);
        Arc::new(Self {
            health: Arc::new(Health::new(target, notifier)),
            listing: Mutex::new(Listing {
                complete: false,
                seen: false,
                items: BTreeMap::new(),
            }),
            notifier: notifier.clone(),
        })
    }

    pub(crate) fn listing(&self) -> MutexGuard<'_, Listing<V>> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.listing().complete
    }

    fn replace(&self, items: BTreeMap<ObjectName, V>) {
        let mut listing = self.listing();
        let changed = !listing.complete || listing.items != items;
        listing.complete = true;
        listing.seen |= !items.is_empty();
        listing.items = items;
        drop(listing);
        if changed {
            self.notifier.notify();
        }
    }

    /// `None`: the object is gone, or is of no interest.
    fn set(&self, name: ObjectName, facts: Option<V>) {
        let mut listing = self.listing();
        let changed = listing.items.get(&name) != facts.as_ref();
        listing.seen |= facts.is_some();
        match facts {
            Some(facts) => _ = listing.items.insert(name, facts),
            None => _ = listing.items.remove(&name),
        }
        drop(listing);
        if changed {
            self.notifier.notify();
        }
    }

    fn digest(&self, object: &V::Object) -> (ObjectName, Option<V>) {
        let name = ObjectName::of(object);
        let facts = V::digest(object, self.listing().items.get(&name));
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
            let error = self.watch_once(&api, selection.config()).await;
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
        let mut listed = BTreeMap::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::InitApply(object)) => {
                    if let (name, Some(facts)) = self.digest(&object) {
                        listed.insert(name, facts);
                    }
                }
                Ok(Event::InitDone) => self.replace(std::mem::take(&mut listed)),
                Ok(Event::Apply(object)) => {
                    let (name, facts) = self.digest(&object);
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
