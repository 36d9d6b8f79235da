//! The cluster while the daemon runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{Connection, connection};
use super::owner::Owner;
use super::pool::Pool;
use super::publication::Writer;
use super::trouble::{Bell, Health, Journal};
use super::watch::Task;
use super::{Identity, Publication, View};
use crate::config::Kubernetes;

/// Changes are told at most this often.
const PACE: Duration = Duration::from_millis(100);

/// Watches a cluster and publishes to it. Dropping it ends its tasks.
#[derive(Debug)]
pub struct Cluster {
    pool: Arc<Mutex<Pool>>,
    owner: Arc<Owner>,
    writing: Arc<Health>,
    bell: watch::Receiver<u64>,
    /// The ring that was told last, and when.
    told: (u64, Instant),
    outbox: watch::Sender<Option<Publication>>,
    every: watch::Sender<Duration>,
    _tasks: [Task; 3],
}

impl Cluster {
    /// Makes the client and starts to watch. The API server need not answer: what it does not say is missing in the view. It has to be
    /// called within a runtime.
    ///
    /// # Errors
    /// If no client can be made: see [`connection`].
    pub fn connect(config: &Kubernetes, identity: Identity) -> Result<Self> {
        Ok(Self::over(connection()?, config, identity))
    }

    /// The same with a client that is there.
    pub fn over(connection: Connection, config: &Kubernetes, identity: Identity) -> Self {
        let Connection { client, server } = connection;
        let bell = Bell::new();
        let listener = bell.listen();
        let owner = Owner::new(&identity.namespace, &bell);
        let writing = Arc::new(Health::new("configmaps", Some(&identity.namespace), &bell));
        let pool = Pool::new(client.clone(), server, bell, &identity, config);
        let outbox = watch::Sender::new(None);
        let every = watch::Sender::new(config.publish_every);
        let writer = Writer {
            identity: identity.clone(),
            owner: Arc::clone(&owner),
            known: pool.publications(),
            health: Arc::clone(&writing),
            outbox: outbox.subscribe(),
            every: every.subscribe(),
        };
        let pool = Arc::new(Mutex::new(pool));
        let supervisor = supervise(
            Arc::clone(&pool),
            Arc::clone(&owner),
            Arc::clone(&writing),
            listener.clone(),
        );
        let tasks = [
            Task::spawn(Arc::clone(&owner).run(client.clone(), identity)),
            Task::spawn(writer.run(client)),
            Task::spawn(supervisor),
        ];
        Self {
            pool,
            owner,
            writing,
            bell: listener,
            told: (0, Instant::now()),
            outbox,
            every,
            _tasks: tasks,
        }
    }

    /// Returns when the view has changed since the last time, at most ten times a second. It may be cancelled.
    pub async fn changed(&mut self) {
        let (before, at) = self.told;
        if self.bell.wait_for(|count| *count != before).await.is_err() {
            // Nobody is left who could change anything.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep_until(at + PACE).await;
        self.told = (*self.bell.borrow(), Instant::now());
    }

    /// What is known now.
    pub fn view(&self) -> View {
        look(&self.pool, &self.owner, &self.writing).0
    }

    /// Tells the other agents, in a while; the latest counts. An empty one takes away what was told before.
    pub fn publish(&self, publication: Publication) {
        self.outbox.send_replace(Some(publication));
    }

    /// From now on this is the configuration. The view is incomplete until what is new in it has been listed.
    pub fn reconfigure(&mut self, config: &Kubernetes) {
        self.every.send_replace(config.publish_every);
        lock(&self.pool).reconfigure(config);
    }

    /// The `DaemonSet` of this agent was seen and is gone, or is being deleted: the balancer is being uninstalled.
    pub fn dismissed(&self) -> bool {
        self.owner.is_gone()
    }
}

/// Lets the watches follow the Services that are found, and logs what goes wrong.
async fn supervise(
    pool: Arc<Mutex<Pool>>,
    owner: Arc<Owner>,
    writing: Arc<Health>,
    mut bell: watch::Receiver<u64>,
) {
    let mut journal = Journal::default();
    while bell.changed().await.is_ok() {
        lock(&pool).adjust();
        journal.note(look(&pool, &owner, &writing).1);
        tokio::time::sleep(PACE).await;
    }
}

fn look(pool: &Mutex<Pool>, owner: &Owner, writing: &Health) -> (View, super::trouble::Problems) {
    lock(pool).view(owner.healths().into_iter().chain([writing]))
}

fn lock(pool: &Mutex<Pool>) -> MutexGuard<'_, Pool> {
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}
