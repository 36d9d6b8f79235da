//! The cluster while the daemon runs.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::{Connection, connection};
use super::daemon_set::OwnDaemonSet;
use super::health::{Health, Notifier, ProblemLog, Problems, Target};
use super::identity::Identity;
use super::model::{NodeReport, View};
use super::report_writer::{Outbox, ReportWriter};
use super::watch::watches::Watches;
use crate::config::Kubernetes;

/// The least time between two notes of a change.
const PACE: Duration = Duration::from_millis(100);

/// Watches a cluster and publishes to it. Dropping it ends its tasks.
pub struct Cluster {
    known: Arc<Known>,
    notifier: watch::Receiver<u64>,
    /// The last note of a change: its number, and when it was given.
    noted: (u64, Instant),
    outbox: watch::Sender<Outbox>,
    _tasks: JoinSet<()>,
}

/// What the tasks know together.
struct Known {
    watches: Mutex<Watches>,
    daemon_set: Arc<OwnDaemonSet>,
    /// How writing the node report fares.
    writing: Arc<Health>,
}

impl Known {
    fn watches<T>(&self, work: impl FnOnce(&mut Watches) -> T) -> T {
        work(&mut self.watches.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn view(&self) -> (View, Problems) {
        let others = self.daemon_set.healths().into_iter();
        self.watches(|watches| watches.view(others.chain([&*self.writing])))
    }

    /// Lets the watches follow the Services that are found, and logs what goes wrong.
    async fn supervise(self: Arc<Self>, mut notifier: watch::Receiver<u64>) {
        let mut log = ProblemLog::default();
        while notifier.changed().await.is_ok() {
            log.note(self.view().1);
            tokio::time::sleep(PACE).await;
        }
    }
}

impl Cluster {
    /// Makes the client and starts to watch. The API server need not answer: what it does not say
    /// is missing in the view. It has to be called within a runtime.
    ///
    /// # Errors
    /// If no client can be made: see [`connection`].
    pub fn connect(config: &Kubernetes, identity: Identity) -> Result<Self> {
        Ok(Self::over(connection()?, config, identity))
    }

    /// Starts to watch with a client that is there.
    pub fn over(connection: Connection, config: &Kubernetes, identity: Identity) -> Self {
        let Connection { client, server } = connection;
        let namespace = &identity.namespace;
        let notifier = Notifier::new();
        let listener = notifier.listen();
        let daemon_set = OwnDaemonSet::new(namespace, &notifier);
        let target = Target::new("configmaps", Some(namespace));
        let writing = Arc::new(Health::new(target, &notifier));
        let watches = Watches::new(client.clone(), server, notifier, namespace, config);
        let outbox = watch::Sender::new(Outbox {
            report: None,
            every: config.publish_every,
        });
        let writer = ReportWriter {
            identity: identity.clone(),
            daemon_set: Arc::clone(&daemon_set),
            known: watches.node_reports(),
            health: Arc::clone(&writing),
            outbox: outbox.subscribe(),
        };
        let known = Arc::new(Known {
            watches: Mutex::new(watches),
            daemon_set: Arc::clone(&daemon_set),
            writing,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(daemon_set.run(client.clone(), identity));
        tasks.spawn(writer.run(client));
        tasks.spawn(Arc::clone(&known).supervise(listener.clone()));
        Self {
            known,
            notifier: listener,
            noted: (0, Instant::now()),
            outbox,
            _tasks: tasks,
        }
    }

    /// Returns when the view has changed since the last time, at most ten times a second. It may be
    /// cancelled.
    pub async fn changed(&mut self) {
        let (before, at) = self.noted;
        let change = self.notifier.wait_for(|count| *count != before);
        if change.await.is_err() {
            // Nobody is left who could change anything.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep_until(at + PACE).await;
        self.noted = (*self.notifier.borrow(), Instant::now());
    }

    /// What is known now. It has to be called within a runtime.
    pub fn view(&self) -> View {
        self.known.view().0
    }

    /// Has a report written for the other daemons, in a while; the latest counts. An empty report
    /// takes away what was written before.
    pub fn publish(&self, report: NodeReport) {
        self.outbox
            .send_modify(|outbox| outbox.report = Some(report));
    }

    /// Takes over a configuration. The view is incomplete until what is new in it has been listed.
    pub fn reconfigure(&mut self, config: &Kubernetes) {
        let every = config.publish_every;
        self.outbox.send_modify(|outbox| outbox.every = every);
        self.known.watches(|watches| watches.reconfigure(config));
    }

    /// Whether the `DaemonSet` of this daemon was seen and is gone, or is being deleted: the
    /// balancer is being uninstalled.
    pub fn is_uninstalled(&self) -> bool {
        self.known.daemon_set.is_gone()
    }
}
