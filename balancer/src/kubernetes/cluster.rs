//! The cluster while the daemon runs.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use kube::Client;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::{Connection, connection};
use super::daemon_set::OwnDaemonSet;
use super::echo::Echo;
use super::fleet::Fleet;
use super::health::{Health, Notifier, ProblemLog, Problems, Target};
use super::identity::Identity;
use super::model::{NodeReport, ObjectName, View};
use super::own_node::OwnNode;
use super::report_writer::{Outbox, ReportWriter};
use super::successor::none_follows;
use super::watch::node_reports::name_of;
use super::watch::watches::Watches;
use crate::config::Kubernetes;

/// The least time between two notes of a change.
const PACE: Duration = Duration::from_millis(100);

/// The longest time between two looks at problems.
const LOOK: Duration = Duration::from_secs(5);

/// The problem that nothing new comes.
const NOT_BACK: &str = "the API server answers, but this node's report has not come back from it: \
     what it tells is old, and quotas hold and then open. See whether its database (etcd) runs, and \
     whether the service account may write the ConfigMaps of the balancer's namespace";

/// Watches a cluster and publishes to it. Dropping it ends its tasks.
pub struct Cluster {
    client: Client,
    identity: Identity,
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
    own_node: Arc<OwnNode>,
    fleet: Arc<Fleet>,
    /// How writing the node report fares.
    writing: Arc<Health>,
    /// Whether the node report comes back.
    echo: Arc<Echo>,
    /// The name of this node's report.
    own_report: ObjectName,
}

impl Known {
    fn watches<T>(&self, work: impl FnOnce(&mut Watches) -> T) -> T {
        work(&mut self.watches.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn view(&self) -> (View, Problems) {
        let others = self.daemon_set.healths().into_iter();
        let others = others.chain([&*self.writing, &*self.own_node.asking]);
        let ((mut view, mut problems), written) = self.watches(|watches| {
            let view = watches.view(others);
            let reports = watches.node_reports();
            let own = reports.listing();
            let own = own.items.get(&self.own_report);
            (view, own.and_then(|own| own.written))
        });
        if view.ports.iter().any(|port| port.traffic.near) {
            view.zone = self.own_node.zone();
        }
        view.rank = self.fleet.rank();
        view.daemons = self.fleet.daemons();
        let overdue = self.echo.overdue(written);
        if !overdue.is_zero() {
            view.silent_for = view.silent_for.max(overdue);
            problems.add(NOT_BACK.to_owned());
            view.problems = problems.sentences();
        }
        (view, problems)
    }

    /// Lets the watches follow the Services that are found, and logs what goes wrong.
    async fn supervise(self: Arc<Self>, mut notifier: watch::Receiver<u64>) {
        let mut log = ProblemLog::default();
        loop {
            // That nothing comes is no change, and is to be noticed.
            let change = tokio::time::timeout(LOOK, notifier.changed()).await;
            if matches!(change, Ok(Err(_))) {
                return;
            }
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
        let own_node = OwnNode::new(&notifier);
        let fleet = Fleet::new(&identity.node);
        let watches = Watches::new(client.clone(), server, notifier, &identity, config);
        let outbox = watch::Sender::new(Outbox {
            report: None,
            every: config.publish_every,
        });
        let echo = Arc::new(Echo::default());
        let own_report = ObjectName {
            namespace: namespace.clone(),
            name: name_of(&identity.node),
        };
        let writer = ReportWriter {
            identity: identity.clone(),
            daemon_set: Arc::clone(&daemon_set),
            known: watches.node_reports(),
            health: Arc::clone(&writing),
            echo: Arc::clone(&echo),
            fleet: Arc::clone(&fleet),
            outbox: outbox.subscribe(),
        };
        let known = Arc::new(Known {
            watches: Mutex::new(watches),
            daemon_set: Arc::clone(&daemon_set),
            own_node: Arc::clone(&own_node),
            fleet: Arc::clone(&fleet),
            writing,
            echo,
            own_report,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(own_node.run(client.clone(), identity.node.clone()));
        let set = Arc::clone(&daemon_set);
        tasks.spawn(fleet.run(client.clone(), identity.clone(), set));
        tasks.spawn(daemon_set.run(client.clone(), identity.clone()));
        tasks.spawn(writer.run(client.clone()));
        tasks.spawn(Arc::clone(&known).supervise(listener.clone()));
        Self {
            client,
            identity,
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

    /// Whether the `DaemonSet` of this daemon was gone, or being deleted, when it was asked for
    /// last, minutes ago at most: the balancer is being uninstalled.
    pub fn is_uninstalled(&self) -> bool {
        self.known.daemon_set.is_gone()
    }

    /// Why no daemon follows this one on its node, which is told to end; `None`: one does, or it
    /// is not known. It asks the API server, for a quarter of a minute at most.
    pub async fn none_follows(&self) -> Option<String> {
        // Three requests at a time make a large future, which every turn of the daemon would hold.
        Box::pin(none_follows(
            &self.client,
            &self.identity,
            &self.known.daemon_set,
        ))
        .await
    }
}
