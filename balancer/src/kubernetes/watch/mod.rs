//! One watch: what it has listed, kept up to date, and started again when it fails.

pub(in crate::kubernetes) mod pods;
pub(in crate::kubernetes) mod services;
pub(in crate::kubernetes) mod slices;
pub(in crate::kubernetes) mod watches;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant};

use crate::kubernetes::ObjectName;
use crate::kubernetes::client::{WATCH_SECONDS, WATCH_SPREAD_SECONDS, jitter, observed, pause};
use crate::kubernetes::health::{ApiError, Health, Notifier};

/// Objects an answer to a list; more come in several answers.
const PAGE: u32 = 250;
/// A watch that lasted for so long begins a new series of pauses when it fails.
const LASTED: Duration = Duration::from_secs(30);

/// A task that ends with its handle.
#[derive(Debug)]
pub(in crate::kubernetes) struct Task(JoinHandle<()>);

impl Task {
    pub(in crate::kubernetes) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a watch has found: a few facts for each object.
#[derive(Debug)]
pub(in crate::kubernetes) struct Store<V> {
    pub(in crate::kubernetes) health: Arc<Health>,
    listing: Mutex<Listing<V>>,
    notifier: Notifier,
}

/// The objects of a watch.
#[derive(Debug)]
pub(in crate::kubernetes) struct Listing<V> {
    /// All have been listed once. It stays so while the watch fails: then they are what they were.
    pub(in crate::kubernetes) complete: bool,
    pub(in crate::kubernetes) items: BTreeMap<ObjectName, V>,
}

impl<V> Store<V> {
    pub(in crate::kubernetes) fn new(
        resource: &'static str,
        namespace: Option<&str>,
        notifier: &Notifier,
    ) -> Arc<Self> {
        Arc::new(Self {
            health: Arc::new(Health::new(resource, namespace, notifier)),
            listing: Mutex::new(Listing {
                complete: false,
                items: BTreeMap::new(),
            }),
            notifier: notifier.clone(),
        })
    }

    pub(in crate::kubernetes) fn listing(&self) -> MutexGuard<'_, Listing<V>> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::kubernetes) fn is_complete(&self) -> bool {
        self.listing().complete
    }
}

impl<V: PartialEq> Store<V> {
    fn replace(&self, items: BTreeMap<ObjectName, V>) {
        let mut listing = self.listing();
        let changed = !listing.complete || listing.items != items;
        listing.complete = true;
        listing.items = items;
        drop(listing);
        if changed {
            self.notifier.notify();
        }
    }

    /// `None`: it is gone, or is of no interest.
    fn set(&self, name: ObjectName, facts: Option<V>) {
        let mut listing = self.listing();
        let changed = listing.items.get(&name) != facts.as_ref();
        match facts {
            Some(facts) => _ = listing.items.insert(name, facts),
            None => _ = listing.items.remove(&name),
        }
        drop(listing);
        if changed {
            self.notifier.notify();
        }
    }
}

/// A watch that runs until this is dropped.
#[derive(Debug)]
pub(in crate::kubernetes) struct Watch<V> {
    pub(in crate::kubernetes) store: Arc<Store<V>>,
    _task: Task,
}

/// Starts to watch. `digest` takes from an object what is of interest, given what was known of it before; `None`: leave it out.
pub(in crate::kubernetes) fn start<K, V>(
    client: &Client,
    api: impl FnOnce(Client) -> Api<K>,
    config: watcher::Config,
    store: &Arc<Store<V>>,
    digest: impl Fn(&K, Option<&V>) -> Option<V> + Send + Sync + 'static,
) -> Watch<V>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    V: PartialEq + Send + 'static,
{
    let api = api(observed(client, &store.health));
    let task = Task::spawn(follow(api, config, Arc::clone(store), digest));
    Watch {
        store: Arc::clone(store),
        _task: task,
    }
}

/// Watches for ever. After any failure it begins with a list again, not with the last resource version: a server that comes back from a
/// backup has lower ones, for which a watch would wait in silence, and an HTTP 410 would be answered with the same version without end.
pub(in crate::kubernetes) async fn follow<K, V>(
    api: Api<K>,
    config: watcher::Config,
    store: Arc<Store<V>>,
    digest: impl Fn(&K, Option<&V>) -> Option<V> + Send + Sync,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    V: PartialEq + Send,
{
    let mut failures = 0;
    loop {
        let config = config
            .clone()
            .page_size(PAGE)
            .timeout(WATCH_SECONDS + jitter(WATCH_SPREAD_SECONDS));
        let begun = Instant::now();
        let error = until_error(&api, config, &store, &digest).await;
        if let Some(error) = error
            .as_ref()
            .and_then(|error| api_error(error, &store.health))
        {
            store.health.failed(error);
        }
        if begun.elapsed() >= LASTED {
            failures = 0;
        }
        tokio::time::sleep(pause(failures)).await;
        failures += 1;
    }
}

async fn until_error<K, V>(
    api: &Api<K>,
    config: watcher::Config,
    store: &Store<V>,
    digest: &impl Fn(&K, Option<&V>) -> Option<V>,
) -> Option<watcher::Error>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    V: PartialEq,
{
    let mut events = pin!(watcher(api.clone(), config));
    let mut listed = BTreeMap::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(object)) => {
                let name = named(&object);
                let facts = digest(&object, store.listing().items.get(&name));
                if let Some(facts) = facts {
                    listed.insert(name, facts);
                }
            }
            Ok(Event::InitDone) => store.replace(std::mem::take(&mut listed)),
            Ok(Event::Apply(object)) => {
                let name = named(&object);
                let facts = digest(&object, store.listing().items.get(&name));
                store.set(name, facts);
            }
            Ok(Event::Delete(object)) => store.set(named(&object), None),
            Err(error) => return Some(error),
        }
    }
    None
}

fn named(object: &impl Resource) -> ObjectName {
    let meta = object.meta();
    ObjectName {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}

fn api_error(error: &watcher::Error, health: &Health) -> Option<ApiError> {
    match error {
        watcher::Error::InitialListFailed(error) => ApiError::of(error, "list", &health.target),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            ApiError::of(error, "watch", &health.target)
        }
        watcher::Error::WatchError(status) => ApiError::of_status(status, "watch", &health.target),
        watcher::Error::NoResourceVersion => Some(ApiError::Unreachable(
            "its answer has no resource version: is it an API server?".to_owned(),
        )),
    }
}
