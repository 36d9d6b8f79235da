//! What the daemon does in a Kubernetes cluster: ports and sources from the API server, quotas with the other agents.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use balancer_common::BackendState;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info, warn};

use super::super::attach::{GuardedNetns, Open};
use super::super::group_quotas::Shares;
use super::super::plan::{self, Ports};
use super::super::pod_resolver::{Groups, PodResolver};
use super::super::quotas::Quotas;
use crate::config::{ClusterQuota, Kubernetes};
use crate::dataplane::{Plan, SlotView, Writer};
use crate::discover::source_towards;
use crate::kubernetes::{
    BackendStatus, Cluster, ClusterStatus, Endpoint, GroupId, GroupStatus, Identity, NodeReport,
    ReportedBackend, SCHEMA, View,
};
use crate::sys::netns;

/// How long a start waits for the API server. Without it the daemon goes on with what is in the kernel.
const FIRST_VIEW: Duration = Duration::from_secs(5);

/// The daemon's part in its cluster.
pub struct KubernetesMode {
    api: Cluster,
    joined: Instant,
    identity: Identity,
    view: View,
    dismissed: bool,
    ports: Ports,
    pod_resolver: PodResolver,
    shares: Shares,
}

impl KubernetesMode {
    /// Begins to watch the cluster, and waits a while for the first answer.
    ///
    /// # Errors
    /// When it is not known where in which cluster this is.
    pub async fn join(config: &Kubernetes) -> Result<Self> {
        let identity = Identity::from_env()?;
        let pod_resolver = PodResolver::new(identity.node.clone())
            .context("cannot read the cookie of the node's network namespace")?;
        let mut api = Cluster::connect(config, identity.clone())?;
        let view = first_view(&mut api).await;
        Ok(Self {
            api,
            joined: Instant::now(),
            identity,
            view,
            dismissed: false,
            ports: Ports::default(),
            pod_resolver,
            shares: Shares::new(),
        })
    }

    /// Waits until something in the cluster has changed. Cancel safe.
    pub async fn changed(&mut self) {
        self.api.changed().await;
    }

    /// Takes in what is known now.
    pub fn refresh(&mut self) {
        if self.api.dismissed() != self.dismissed {
            self.dismissed = !self.dismissed;
            self.tell_dismissal();
        }
        let mut view = self.api.view();
        view.groups = distinct(view.groups);
        // What was known is better than a list that is not complete yet.
        if view.complete || !self.view.complete {
            self.view = view;
        } else {
            self.view.silent_for = view.silent_for;
            self.view.problems = view.problems;
            self.view.nodes = view.nodes;
        }
    }

    fn tell_dismissal(&self) {
        if self.dismissed {
            info!(
                "the DaemonSet of this daemon is gone, or about to go: at TERM everything is taken out of the kernel"
            );
        } else {
            info!(
                "there is a DaemonSet of this daemon again: at TERM the data plane stays for the next one"
            );
        }
    }

    /// What the maps should hold; `None`: that is not known yet.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn plan(&mut self, config: &Kubernetes, writer: &Writer) -> Result<Option<Plan>> {
        if !self.view.complete {
            return Ok(None);
        }
        let slots = writer.tables.slots()?;
        let busy: HashSet<u16> = slots.iter().map(|view| view.member.backend.port).collect();
        self.ports.follow(config, &self.view.groups, &busy);
        let node = self.node_addresses();
        Ok(Some(plan::of_cluster(
            &self.ports,
            config,
            &self.view.groups,
            &node,
        )))
    }

    /// Goes on with the names that an earlier daemon gave to ports.
    pub fn inherit(
        &mut self,
        config: &Kubernetes,
        services: impl IntoIterator<Item = (String, u16)>,
    ) {
        for (name, port) in services {
            self.ports.inherit(config, &name, port);
        }
    }

    /// The addresses that this node's own processes, its kubelet among them, send from to its pods.
    fn node_addresses(&self) -> BTreeSet<IpAddr> {
        let local = self
            .view
            .groups
            .values()
            .flatten()
            .filter(|endpoint| endpoint.node.as_ref() == Some(&self.identity.node))
            .flat_map(|endpoint| &endpoint.addresses);
        let sources = local.filter_map(|address| match source_towards(*address) {
            Ok(source) => Some(source),
            Err(error) => {
                debug!("cannot tell from which address this node sends to {address}: {error}");
                None
            }
        });
        sources
            .chain(self.identity.node_ips.iter().copied())
            .collect()
    }

    /// Finds the pods of the listeners that are there.
    ///
    /// # Errors
    /// When slots or namespaces can't be read.
    pub fn tie(&mut self, guarded: &mut GuardedNetns, writer: &mut Writer) -> Result<()> {
        self.newcomers(guarded, writer).map(drop)
    }

    /// Attaches `steer` to the namespaces of pods that it is not attached to yet.
    ///
    /// # Errors
    /// When slots or namespaces can't be read.
    pub fn guard(&mut self, guarded: &mut GuardedNetns, writer: &mut Writer) -> Result<()> {
        let newcomers = self.newcomers(guarded, writer)?;
        guarded.guard(&newcomers, writer);
        Ok(())
    }

    /// The namespaces of pods that `steer` is not attached to yet.
    fn newcomers(&mut self, guarded: &mut GuardedNetns, writer: &mut Writer) -> Result<Vec<Open>> {
        let (pod_resolver, groups) = (&mut self.pod_resolver, &self.view.groups);
        pod_resolver.look_at_host(&writer.tables.slots()?);
        let mut newcomers =
            guarded.strangers(writer, |cookie| pod_resolver.wants(cookie, groups))?;
        newcomers.retain(|(cookie, file)| pod_resolver.look(*cookie, file, groups));
        let namespaces = pod_resolver.namespaces(&writer.tables.slots()?, groups);
        if namespaces.contains(&pod_resolver.host()) && !writer.loader.guards(pod_resolver.host()) {
            let host = netns::current().context("cannot open the node's own network namespace")?;
            newcomers.push((pod_resolver.host(), host));
        }
        guarded.restrict_to(namespaces);
        Ok(newcomers)
    }

    /// Computes quotas, puts them in force, and tells the others.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn share(
        &mut self,
        config: &Kubernetes,
        quotas: &mut Quotas,
        writer: &mut Writer,
    ) -> Result<()> {
        if self.view.complete {
            self.shares
                .apply(config, &self.view, &self.pod_resolver, quotas, writer)?;
        }
        if self.view.complete {
            if !self.dismissed {
                let slots = writer.tables.slots()?;
                self.api.publish(self.node_report(&slots));
            }
            return Ok(());
        }
        if self.joined.elapsed() > config.hold_for {
            self.open(config, writer)?;
        }
        Ok(())
    }

    /// What an earlier daemon computed is too old, and this one has not been told anything.
    fn open(&self, config: &Kubernetes, writer: &mut Writer) -> Result<()> {
        let computed = |slot: &&SlotView| {
            let entry = self.ports.entry(slot.member.backend.port, config);
            slot.slot_state().is(BackendState::Active)
                && entry.is_some_and(|entry| matches!(entry.quota, ClusterQuota::Shared { .. }))
        };
        let slots = writer.tables.slots()?;
        let slots: Vec<&SlotView> = slots.iter().filter(computed).collect();
        let why = format!(
            "unlimited: the API server has told nothing since this daemon started, {} s ago at least",
            config.hold_for.as_secs()
        );
        Shares::open(&slots, writer, &why)
    }

    /// Notes that a source was refused in a namespace, on a port.
    pub fn refused(&mut self, netns: u64, port: u16, source: IpAddr) {
        if let Some(group) = self.pod_resolver.group(netns, port, &self.view.groups) {
            self.shares.refused(group, source);
        }
    }

    /// Follows a new configuration.
    pub fn reconfigure(&mut self, config: &Kubernetes) {
        self.api.reconfigure(config);
        self.shares.reconfigure();
    }

    /// Whether this daemon was told to go for good: its `DaemonSet` is gone.
    pub fn dismissed(&self) -> bool {
        self.api.dismissed()
    }

    fn node_report(&self, slots: &[SlotView]) -> NodeReport {
        let backends: Vec<ReportedBackend> = slots
            .iter()
            .filter_map(|slot| self.published(slot))
            .collect();
        if backends.is_empty() {
            // What was counted together is told by those who count.
            return NodeReport {
                schema: SCHEMA,
                node: self.identity.node.clone(),
                ..NodeReport::default()
            };
        }
        NodeReport {
            schema: SCHEMA,
            node: self.identity.node.clone(),
            backends,
            peaks: self.shares.publish_peaks(),
            refused: self.shares.publish_refused(),
        }
    }

    fn published(&self, slot: &SlotView) -> Option<ReportedBackend> {
        let (group, endpoint) = self.pod_resolver.pod(slot, &self.view.groups)?;
        let counts = &slot.member.counts;
        Some(ReportedBackend {
            group: group.clone(),
            pod: endpoint.pod.clone(),
            uid: endpoint.uid.clone(),
            slot: slot.slot(),
            address: endpoint.addresses.first().copied()?,
            state: slot.state().name().to_owned(),
            established: counts.established(),
            exempt: counts.exempt(),
            pending: Some(slot.expected()),
            quota: slot.limit(),
            room: slot.room(),
        })
    }

    /// What `status --cluster` shows.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn report(&self, writer: &Writer) -> Result<ClusterStatus> {
        let slots = writer.tables.slots()?;
        let own = self.node_report(&slots);
        let groups = self.view.groups.iter().map(|(id, endpoints)| GroupStatus {
            id: id.clone(),
            sentence: self.sentence(id),
            starved: self.shares.starved(id, &self.view).sources,
            backends: endpoints
                .iter()
                .map(|endpoint| self.backend(id, endpoint, &own))
                .collect(),
        });
        Ok(ClusterStatus {
            schema: 1,
            node: self.identity.node.clone(),
            complete: self.view.complete,
            silent_seconds: self.view.silent_for.as_secs(),
            problems: self.view.problems.clone(),
            groups: groups.collect(),
        })
    }

    fn sentence(&self, id: &GroupId) -> String {
        match self.shares.sentence(id) {
            "" => "not computed yet".to_owned(),
            sentence => sentence.to_owned(),
        }
    }

    fn backend(&self, id: &GroupId, endpoint: &Endpoint, own: &NodeReport) -> BackendStatus {
        let of_pod = |node_report: &NodeReport| {
            let mut backends = node_report.backends.iter();
            backends
                .find(|backend| backend.group == *id && backend.uid == endpoint.uid)
                .cloned()
        };
        let heard = || {
            self.view.nodes.values().find_map(|heard| {
                of_pod(&heard.node_report).map(|backend| (backend, heard.age.as_secs()))
            })
        };
        let told = of_pod(own).map(|backend| (backend, 0)).or_else(heard);
        let (told, seconds_ago) = told.unzip();
        let told = told.as_ref();
        BackendStatus {
            pod: endpoint.pod.clone(),
            node: endpoint.node.clone(),
            address: endpoint.addresses.first().copied(),
            ready: endpoint.ready,
            terminating: endpoint.terminating,
            weight: endpoint.weight,
            state: told.map(|told| told.state.clone()),
            established: told.map(|told| told.established),
            exempt: told.map(|told| told.exempt),
            pending: told.and_then(|told| told.pending),
            quota: told.and_then(|told| told.quota),
            room: told.and_then(|told| told.room),
            seconds_ago,
        }
    }
}

async fn first_view(api: &mut Cluster) -> View {
    let until = Instant::now() + FIRST_VIEW;
    loop {
        let view = api.view();
        if view.complete {
            info!(
                "the API server has told of {} groups of backends",
                view.groups.len()
            );
            return View {
                groups: distinct(view.groups),
                ..view
            };
        }
        if timeout_at(until, api.changed()).await.is_err() {
            warn!(
                "the API server has not told everything within {} s: going on with what is in the kernel until it has",
                FIRST_VIEW.as_secs()
            );
            return view;
        }
    }
}

/// Without the groups whose pods another Service of the same entry serves on the same port as well (a headless one beside the ordinary one): no
/// connection tells through which of them it came.
fn distinct(groups: Groups) -> Groups {
    let uids = |endpoints: &[Endpoint]| -> BTreeSet<String> {
        endpoints
            .iter()
            .map(|endpoint| endpoint.uid.clone())
            .collect()
    };
    let sets: Vec<(GroupId, BTreeSet<String>)> = groups
        .iter()
        .map(|(id, endpoints)| (id.clone(), uids(endpoints)))
        .collect();
    let covered = |id: &GroupId, pods: &BTreeSet<String>| {
        !pods.is_empty()
            && sets.iter().any(|(other, others)| {
                (other.entry == id.entry && other.port == id.port && other != id)
                    && pods.is_subset(others)
                    && (pods.len() < others.len() || other < id)
            })
    };
    groups
        .into_iter()
        .filter(|(id, endpoints)| !covered(id, &uids(endpoints)))
        .collect()
}
