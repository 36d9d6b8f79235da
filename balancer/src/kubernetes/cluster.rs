//! The cluster while the daemon runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{Connection, connection};
use super::daemon_set::OwnDaemonSet;
use super::health::{Health, Notifier, ProblemLog};
use super::node_report::Writer;
use super::watch::Task;
use super::watch::watches::Watches;
use super::{Identity, NodeReport, View};
use crate::config::Kubernetes;

/// Changes are told at most this often.
const PACE: Duration = Duration::from_millis(100);

/// Watches a cluster and publishes to it. Dropping it ends its tasks.
#[derive(Debug)]
pub struct Cluster {
    watches: Arc<Mutex<Watches>>,
    daemon_set: Arc<OwnDaemonSet>,
    writing: Arc<Health>,
    notifier: watch::Receiver<u64>,
    /// The ring that was told last, and when.
    told: (u64, Instant),
    outbox: watch::Sender<Option<NodeReport>>,
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
        let notifier = Notifier::new();
        let listener = notifier.listen();
        let daemon_set = OwnDaemonSet::new(&identity.namespace, &notifier);
        let writing = Arc::new(Health::new(
            "configmaps",
            Some(&identity.namespace),
            &notifier,
        ));
        let watches = Watches::new(client.clone(), server, notifier, &identity, config);
        let outbox = watch::Sender::new(None);
        let every = watch::Sender::new(config.publish_every);
        let writer = Writer {
            identity: identity.clone(),
            daemon_set: Arc::clone(&daemon_set),
            known: watches.node_reports(),
            health: Arc::clone(&writing),
            outbox: outbox.subscribe(),
            every: every.subscribe(),
        };
        let watches = Arc::new(Mutex::new(watches));
        let supervisor = supervise(
            Arc::clone(&watches),
            Arc::clone(&daemon_set),
            Arc::clone(&writing),
            listener.clone(),
        );
        let tasks = [
            Task::spawn(Arc::clone(&daemon_set).run(client.clone(), identity)),
            Task::spawn(writer.run(client)),
            Task::spawn(supervisor),
        ];
        Self {
            watches,
            daemon_set,
            writing,
            notifier: listener,
            told: (0, Instant::now()),
            outbox,
            every,
            _tasks: tasks,
        }
    }

    /// Returns when the view has changed since the last time, at most ten times a second. It may be cancelled.
    pub async fn changed(&mut self) {
        let (before, at) = self.told;
        if self
            .notifier
            .wait_for(|count| *count != before)
            .await
            .is_err()
        {
            // Nobody is left who could change anything.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep_until(at + PACE).await;
        self.told = (*self.notifier.borrow(), Instant::now());
    }

    /// What is known now.
    pub fn view(&self) -> View {
        look(&self.watches, &self.daemon_set, &self.writing).0
    }

    /// Tells the other agents, in a while; the latest counts. An empty one takes away what was told before.
    pub fn publish(&self, node_report: NodeReport) {
        self.outbox.send_replace(Some(node_report));
    }

    /// From now on this is the configuration. The view is incomplete until what is new in it has been listed.
    pub fn reconfigure(&mut self, config: &Kubernetes) {
        self.every.send_replace(config.publish_every);
        lock(&self.watches).reconfigure(config);
    }

    /// The `DaemonSet` of this agent was seen and is gone, or is being deleted: the balancer is being uninstalled.
    pub fn dismissed(&self) -> bool {
        self.daemon_set.is_gone()
    }
}

/// Lets the watches follow the Services that are found, and logs what goes wrong.
async fn supervise(
    watches: Arc<Mutex<Watches>>,
    daemon_set: Arc<OwnDaemonSet>,
    writing: Arc<Health>,
    mut notifier: watch::Receiver<u64>,
) {
    let mut problem_log = ProblemLog::default();
    while notifier.changed().await.is_ok() {
        lock(&watches).adjust();
        problem_log.note(look(&watches, &daemon_set, &writing).1);
        tokio::time::sleep(PACE).await;
    }
}

fn look(
    watches: &Mutex<Watches>,
    daemon_set: &OwnDaemonSet,
    writing: &Health,
) -> (View, super::health::Problems) {
    lock(watches).view(daemon_set.healths().into_iter().chain([writing]))
}

fn lock(watches: &Mutex<Watches>) -> MutexGuard<'_, Watches> {
    watches.lock().unwrap_or_else(PoisonError::into_inner)
}
