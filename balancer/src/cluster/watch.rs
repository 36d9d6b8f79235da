//! One watch: what it has listed, kept up to date, and started again when it fails.

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

use super::Named;
use super::client::{WATCH_SECONDS, WATCH_SPREAD_SECONDS, jitter, observed, pause};
use super::trouble::{Bell, Health, Trouble};

/// Objects an answer to a list; more come in several answers.
const PAGE: u32 = 250;
/// A watch that lasted for so long begins a new series of pauses when it fails.
const LASTED: Duration = Duration::from_secs(30);

/// A task that ends with its handle.
#[derive(Debug)]
pub(super) struct Task(JoinHandle<()>);

impl Task {
    pub(super) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
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
pub(super) struct Feed<V> {
    pub(super) health: Arc<Health>,
    listing: Mutex<Listing<V>>,
    bell: Bell,
}

/// The objects of a watch.
#[derive(Debug)]
pub(super) struct Listing<V> {
    /// All have been listed once. It stays so while the watch fails: then they are what they were.
    pub(super) complete: bool,
    pub(super) items: BTreeMap<Named, V>,
}

impl<V> Feed<V> {
    pub(super) fn new(resource: &'static str, namespace: Option<&str>, bell: &Bell) -> Arc<Self> {
        Arc::new(Self {
            health: Arc::new(Health::new(resource, namespace, bell)),
            listing: Mutex::new(Listing {
                complete: false,
                items: BTreeMap::new(),
            }),
            bell: bell.clone(),
        })
    }

    pub(super) fn listing(&self) -> MutexGuard<'_, Listing<V>> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.listing().complete
    }
}

impl<V: PartialEq> Feed<V> {
    fn replace(&self, items: BTreeMap<Named, V>) {
        let mut listing = self.listing();
        let changed = !listing.complete || listing.items != items;
        listing.complete = true;
        listing.items = items;
        drop(listing);
        if changed {
            self.bell.ring();
        }
    }

    /// `None`: it is gone, or is of no interest.
    fn set(&self, name: Named, facts: Option<V>) {
        let mut listing = self.listing();
        let changed = listing.items.get(&name) != facts.as_ref();
        match facts {
            Some(facts) => _ = listing.items.insert(name, facts),
            None => _ = listing.items.remove(&name),
        }
        drop(listing);
        if changed {
            self.bell.ring();
        }
    }
}

/// A watch that runs until this is dropped.
#[derive(Debug)]
pub(super) struct Running<V> {
    pub(super) feed: Arc<Feed<V>>,
    _task: Task,
}

/// Starts to watch. `digest` takes from an object what is of interest, given what was known of it before; `None`: leave it out.
pub(super) fn start<K, V>(
    client: &Client,
    api: impl FnOnce(Client) -> Api<K>,
    config: watcher::Config,
    feed: &Arc<Feed<V>>,
    digest: impl Fn(&K, Option<&V>) -> Option<V> + Send + Sync + 'static,
) -> Running<V>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    V: PartialEq + Send + 'static,
{
    let api = api(observed(client, &feed.health));
    let task = Task::spawn(follow(api, config, Arc::clone(feed), digest));
    Running {
        feed: Arc::clone(feed),
        _task: task,
    }
}

/// Watches for ever. After any failure it begins with a list again, not with the last resource version: a server that comes back from a
/// backup has lower ones, for which a watch would wait in silence, and an HTTP 410 would be answered with the same version without end.
pub(super) async fn follow<K, V>(
    api: Api<K>,
    config: watcher::Config,
    feed: Arc<Feed<V>>,
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
        let error = until_error(&api, config, &feed, &digest).await;
        if let Some(trouble) = error
            .as_ref()
            .and_then(|error| trouble(error, &feed.health))
        {
            feed.health.failed(trouble);
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
    feed: &Feed<V>,
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
                let facts = digest(&object, feed.listing().items.get(&name));
                if let Some(facts) = facts {
                    listed.insert(name, facts);
                }
            }
            Ok(Event::InitDone) => feed.replace(std::mem::take(&mut listed)),
            Ok(Event::Apply(object)) => {
                let name = named(&object);
                let facts = digest(&object, feed.listing().items.get(&name));
                feed.set(name, facts);
            }
            Ok(Event::Delete(object)) => feed.set(named(&object), None),
            Err(error) => return Some(error),
        }
    }
    None
}

fn named(object: &impl Resource) -> Named {
    let meta = object.meta();
    Named {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}

fn trouble(error: &watcher::Error, health: &Health) -> Option<Trouble> {
    match error {
        watcher::Error::InitialListFailed(error) => Trouble::of(error, "list", &health.target),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            Trouble::of(error, "watch", &health.target)
        }
        watcher::Error::WatchError(status) => Trouble::of_status(status, "watch", &health.target),
        watcher::Error::NoResourceVersion => Some(Trouble::Unreachable(
            "its answer has no resource version: is it an API server?".to_owned(),
        )),
    }
}
