//! The role of a fleet: nodes without machines, and on each of them what a daemon asks of the API
//! server. The watches and the writer are the product's own; the kernel is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use balancer::config::{Config, Kubernetes};
use balancer::kubernetes::{Cluster, Identity};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::{Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};

use super::kubelet::Kubelet;
use super::objects::{self, OAPS, SYSTEM};
use crate::children;

/// How long anything may take: a rollout through all nodes is the longest.
const PATIENCE: Duration = Duration::from_secs(900);
/// Between two looks at what is waited for.
const LOOK: Duration = Duration::from_millis(500);
/// How often a daemon counts, and offers its report.
const TICK: Duration = Duration::from_secs(1);
/// How many connections an OAP has at first.
const FIRST_COUNT: u32 = 500;

/// What the role is told. Who the daemons are is in the environment (`KUBECONFIG`).
#[derive(clap::Args)]
pub struct Arguments {
    /// The kubeconfig of who may do everything.
    #[arg(long)]
    admin: PathBuf,
    #[arg(long)]
    nodes: usize,
    /// So many of the nodes have an OAP.
    #[arg(long)]
    oaps: usize,
    /// The daemons' file.
    #[arg(long)]
    config: String,
}

/// Makes the nodes and the `DaemonSet`, says how many pods it has, and answers until standard input
/// ends.
///
/// # Errors
/// When the API server refuses something, or something takes too long.
pub fn run(arguments: &Arguments) -> Result<()> {
    children::raise_open_files()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no runtime can be made")?;
    let fleet = runtime.block_on(Fleet::start(arguments))?;
    println!("{}", arguments.nodes);
    for line in std::io::stdin().lines() {
        let line = line.context("cannot read standard input")?;
        println!("{}", runtime.block_on(fleet.answer(&line))?);
    }
    Ok(())
}

/// The daemons of all nodes, as far as the API server sees them.
pub struct Daemons {
    config: Kubernetes,
    /// So many nodes have an OAP.
    oaps: usize,
    /// Clients move: the numbers of all reports change.
    storm: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whether daemons run at all.
    on: bool,
    /// The pods of the `DaemonSet` that are ready, by node.
    pods: BTreeMap<String, String>,
    running: BTreeMap<String, JoinSet<()>>,
    /// The nodes whose daemon knows all it asked for, and has nothing to complain about.
    content: BTreeSet<String>,
}

impl Daemons {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod of a node is ready: its daemon runs from now on.
    pub fn pod_is_ready(self: &Arc<Self>, node: &str, pod: &str) {
        let mut state = self.state();
        state.pods.insert(node.to_owned(), pod.to_owned());
        if state.on {
            let daemon = self.daemon(node, pod);
            state.running.insert(node.to_owned(), daemon);
        }
    }

    /// The pod of a node is told to end.
    pub fn pod_ends(&self, node: &str) {
        let mut state = self.state();
        state.pods.remove(node);
        state.running.remove(node);
        state.content.remove(node);
    }

    /// Has the daemons of all nodes run but this one.
    fn switch_on(self: &Arc<Self>, all_but: &str) {
        let mut state = self.state();
        state.on = true;
        let started = state
            .pods
            .iter()
            .filter(|(node, _)| *node != all_but)
            .map(|(node, pod)| (node.clone(), self.daemon(node, pod)))
            .collect();
        state.running = started;
    }

    fn running(&self) -> usize {
        self.state().running.len()
    }

    fn content(&self) -> usize {
        self.state().content.len()
    }

    fn daemon(self: &Arc<Self>, node: &str, pod: &str) -> JoinSet<()> {
        let identity = Identity {
            node: node.to_owned(),
            pod: pod.to_owned(),
            namespace: SYSTEM.to_owned(),
            node_ips: Vec::new(),
        };
        let mut task = JoinSet::new();
        let daemons = Arc::clone(self);
        task.spawn(async move {
            let node = identity.node.clone();
            if let Err(error) = daemons.daemon_of(identity).await {
                eprintln!("the daemon of {node}: {error:#}");
            }
        });
        task
    }

    async fn daemon_of(&self, identity: Identity) -> Result<()> {
        let node = identity.node.clone();
        let mut cluster = Cluster::connect(&self.config, identity)?;
        let mut counted = objects::has_oap(&node, self.oaps).then_some(FIRST_COUNT);
        let mut tick = interval(TICK);
        loop {
            tokio::select! {
                () = cluster.changed() => self.note(&node, &cluster),
                _ = tick.tick() => {
                    if self.storm.load(Ordering::Relaxed) {
                        counted = counted.map(|counted| counted + 1);
                    }
                    cluster.publish(objects::report(&node, counted));
                }
            }
        }
    }

    fn note(&self, node: &str, cluster: &Cluster) {
        let view = cluster.view();
        let mut state = self.state();
        if view.complete && !view.ports.is_empty() && view.problems.is_empty() {
            state.content.insert(node.to_owned());
        } else {
            state.content.remove(node);
        }
    }
}

struct Fleet {
    sets: Api<DaemonSet>,
    nodes: usize,
    daemons: Arc<Daemons>,
    _kubelet: JoinSet<()>,
}

impl Fleet {
    async fn start(arguments: &Arguments) -> Result<Self> {
        let client = admin(&arguments.admin).await?;
        let config = Config::parse(&arguments.config)?;
        let daemons = Arc::new(Daemons {
            config: config.kubernetes.context("the file is for Kubernetes")?,
            oaps: arguments.oaps,
            storm: AtomicBool::new(false),
            state: Mutex::default(),
        });
        let kubelet = Kubelet::start(client.clone(), Arc::clone(&daemons));
        make(&client, arguments).await?;
        let fleet = Self {
            sets: Api::namespaced(client, SYSTEM),
            nodes: arguments.nodes,
            daemons,
            _kubelet: kubelet,
        };
        fleet.wait_until_all_are_new().await?;
        Ok(fleet)
    }

    async fn answer(&self, question: &str) -> Result<usize> {
        match question {
            "start" => self.start_daemons().await,
            "storm" => {
                self.daemons.storm.store(true, Ordering::Relaxed);
                Ok(0)
            }
            "calm" => {
                self.daemons.storm.store(false, Ordering::Relaxed);
                Ok(0)
            }
            "content" => Ok(self.daemons.content()),
            "running" => Ok(self.daemons.running()),
            "rollout" => self.roll_out().await,
            other => bail!("{other:?} is no question"),
        }
    }

    /// All but that of the last node, which is the caller's. Milliseconds until they know
    /// everything.
    async fn start_daemons(&self) -> Result<usize> {
        let begun = Instant::now();
        self.daemons.switch_on(&objects::measured_node(self.nodes));
        let running = self.daemons.running();
        while self.daemons.content() < running {
            let content = self.daemons.content();
            ensure!(
                begun.elapsed() < PATIENCE,
                "{content} daemons of {running} know everything"
            );
            sleep(LOOK).await;
        }
        Ok(usize::try_from(begun.elapsed().as_millis())?)
    }

    /// Replaces all pods. Milliseconds until all are new.
    async fn roll_out(&self) -> Result<usize> {
        let begun = Instant::now();
        let stamp = format!("{begun:?}");
        let template = json!({"metadata": {"annotations": {"rollout": stamp}}});
        let patch = json!({"spec": {"template": template}});
        let how = PatchParams::default();
        self.sets
            .patch("balancer", &how, &Patch::Merge(patch))
            .await?;
        self.wait_until_all_are_new().await?;
        Ok(usize::try_from(begun.elapsed().as_millis())?)
    }

    async fn wait_until_all_are_new(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            let set = self.sets.get("balancer").await?;
            let generation = set.metadata.generation;
            let status = set.status.unwrap_or_default();
            let ready = usize::try_from(status.number_ready)?;
            let new = usize::try_from(status.updated_number_scheduled.unwrap_or_default())?;
            if status.observed_generation == generation && ready.min(new) == self.nodes {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "{ready} pods are ready, {new} new"
            );
            sleep(LOOK).await;
        }
    }
}

async fn admin(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config =
        kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Nodes, the OAPs' Service and pods, and the `DaemonSet`.
async fn make(client: &Client, arguments: &Arguments) -> Result<()> {
    let post = PostParams::default();
    let nodes = Api::all(client.clone());
    for number in 0..arguments.nodes {
        nodes.create(&post, &objects::node(number)?).await?;
    }
    let services = Api::namespaced(client.clone(), OAPS);
    services.create(&post, &objects::service()?).await?;
    let pods = Api::namespaced(client.clone(), OAPS);
    for number in 0..arguments.oaps {
        pods.create(&post, &objects::oap(number)?).await?;
    }
    let sets = Api::namespaced(client.clone(), SYSTEM);
    sets.create(&post, &objects::daemon_set()?).await?;
    Ok(())
}
