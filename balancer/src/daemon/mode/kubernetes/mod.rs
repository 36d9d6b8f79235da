//! On a node of a Kubernetes cluster: ports and sources from the API server, quotas with the other
//! daemons.

mod complaints;
mod even;
mod excluded;
pub mod fuzzing;
mod group;
mod group_quotas;
mod outside;
mod placing;
mod plan;
mod pod_resolver;
mod report;
mod rule;
mod unfit;
mod untold;

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use balancer_common::BackendState;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info, warn};

use self::complaints::Complaints;
use self::even::{Around, backend_group};
use self::excluded::{Excluded, LeftAlone};
use self::group::Group;
use self::group_quotas::GroupQuotas;
pub use self::outside::status_from_outside;
use self::placing::{Client, Totals};
use self::plan::{Here, PortNames};
use self::pod_resolver::PodResolver;
pub use self::unfit::UnfitMode;
use self::untold::Untold;
use super::super::attach::GuardedNetns;
use super::super::down::Named;
use super::super::moves::Departures;
use super::super::quotas::{Server, explain, put_in_force};
use super::super::rebalancing::BackendGroup;
use crate::config::{ClusterQuota, Effect, Kubernetes};
use crate::dataplane::{PlacingNotes, Plan, RefusedSource, SlotView, Writer, services};
use crate::discover::{OpenNetns, source_towards};
use crate::kubernetes::{Cluster, ClusterStatus, Endpoint, GroupId, Identity, NodeReport, View};
use crate::place::{PlacePlan, PublishedTotal};
use crate::quota::{InForce, Quota, QuotaSource};
use crate::sys::netns;

/// How long a start waits for the API server. Without it the daemon goes on with what is in the
/// kernel.
const FIRST_VIEW: Duration = Duration::from_secs(5);

/// The daemon's part in its cluster.
pub struct KubernetesMode {
    config: Kubernetes,
    api: Cluster,
    started: Instant,
    identity: Identity,
    view: View,
    /// The `DaemonSet` of this daemon is gone, or about to go.
    uninstalled: bool,
    /// What of this node can't be guarded; `None`: all of it is.
    unfit: Option<String>,
    port_names: PortNames,
    untold: Untold,
    excluded: Excluded,
    complaints: Complaints,
    pod_resolver: PodResolver,
    quotas: GroupQuotas,
    departures: Departures,
}

impl KubernetesMode {
    /// Begins to watch the cluster, and waits a while for the first answer.
    ///
    /// # Errors
    /// When it is not known where in which cluster this is.
    pub async fn start(config: Kubernetes) -> Result<Self> {
        let identity = Identity::from_env()?;
        let pod_resolver = PodResolver::new(identity.node.clone())
            .context("cannot read the cookie of the node's network namespace")?;
        let mut api = Cluster::connect(&config, identity.clone())?;
        let view = first_view(&mut api).await;
        Ok(Self {
            config,
            api,
            started: Instant::now(),
            identity,
            view,
            uninstalled: false,
            unfit: None,
            port_names: PortNames::default(),
            untold: Untold::default(),
            excluded: Excluded::default(),
            complaints: Complaints::default(),
            pod_resolver,
            quotas: GroupQuotas::new(),
            departures: Departures::default(),
        })
    }

    /// Follows a new configuration.
    pub fn reconfigure(&mut self, config: Kubernetes) {
        self.api.reconfigure(&config);
        self.quotas.reconfigure();
        self.config = config;
    }

    /// Waits until something in the cluster has changed. Cancel safe.
    pub async fn changed(&mut self) {
        self.api.changed().await;
    }

    /// Takes in what is known now.
    pub fn refresh(&mut self) {
        if self.api.is_uninstalled() != self.uninstalled {
            self.uninstalled = !self.uninstalled;
            info!(
                "{}",
                if self.uninstalled {
                    "the DaemonSet of this daemon is gone, or about to go: at TERM everything is \
                     taken out of the kernel"
                } else {
                    "there is a DaemonSet of this daemon again: at TERM the data plane stays for \
                     the next one"
                }
            );
        }
        let mut view = view(&self.api);
        // What was known is better than a list that is not complete yet.
        if !view.complete && self.view.complete {
            view.complete = true;
            view.groups = std::mem::take(&mut self.view.groups);
            view.precedence = std::mem::take(&mut self.view.precedence);
            view.ports = std::mem::take(&mut self.view.ports);
            view.demands = std::mem::take(&mut self.view.demands);
        }
        self.view = view;
    }

    /// Goes on with the names that an earlier daemon gave to ports.
    ///
    /// # Errors
    /// When the services can't be read.
    pub fn resume(&mut self, writer: &Writer) -> Result<()> {
        for (name, port) in services::ports(&writer.tables)? {
            self.port_names.keep(&self.config, &name, port);
        }
        Ok(())
    }

    /// What the maps should hold; `None`: that is not known yet.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn plan(&mut self, writer: &Writer) -> Result<Option<Plan>> {
        if !self.view.complete {
            return Ok(None);
        }
        let slots = writer.tables.slots()?;
        let busy: HashSet<u16> = slots.iter().map(|slot| slot.member.backend.port).collect();
        let left_out = self.port_names.update(&self.config, &self.view, &busy);
        self.complaints.set("ports", left_out);
        let on_hosts = plan::peers_of_host_networks(&self.config, &self.view);
        self.complaints.set("peers", on_hosts);
        let here = Here {
            node: &self.identity.node,
            addresses: self.node_addresses(),
        };
        Ok(Some(self.port_names.plan(&self.config, &self.view, &here)))
    }

    /// What this node should place where; `None`: that is not known yet.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn place_plan(&mut self, writer: &Writer) -> Result<Option<PlacePlan>> {
        if !self.config.place {
            return Ok(Some(PlacePlan::default()));
        }
        if !self.view.complete {
            return Ok(None);
        }
        let left_alone = LeftAlone {
            annotated: self.view.left_alone.clone(),
            peers: placing::peers(&self.view.ports, &self.identity.node),
        };
        let (root, host) = (writer.audit.cgroup(), self.pod_resolver.host());
        let excluded = self.excluded.netns(&left_alone, root, host);
        self.complaints.set("excluded", excluded.problems);
        let (totals, drained) = self.totals(&writer.tables.slots()?);
        let client = Client {
            node: &self.identity.node,
            zone: self.view.zone.as_deref(),
            rank: self.view.rank,
            heard: self.view.silent_for,
            unknown_peers: &excluded.unknown_peers,
            drained: &drained,
        };
        Ok(Some(PlacePlan {
            groups: placing::groups(&self.view.ports, &totals, client),
            excluded_netns: excluded.netns,
            dry_run: false,
        }))
    }

    /// The connections of all pods that somebody has counted, and which pods are drained by hand.
    fn totals(&self, slots: &[SlotView]) -> (Totals, BTreeSet<(String, u16)>) {
        let (mut totals, mut drained) = (Totals::new(), BTreeSet::new());
        for group in self.groups(slots) {
            for (endpoint, connections, age) in group.staying() {
                let total = PublishedTotal {
                    connections: connections.into(),
                    age,
                };
                totals.insert((endpoint.uid.clone(), group.id.port), total);
            }
            let port = group.id.port;
            drained.extend(group.drained().map(|pod| (pod.uid.clone(), port)));
        }
        (totals, drained)
    }

    /// The backend groups with what is known of the connections of their pods.
    fn groups<'a>(&'a self, slots: &'a [SlotView]) -> impl Iterator<Item = Group<'a>> {
        group::groups(
            &self.config,
            &self.view,
            &self.pod_resolver,
            slots,
            &self.departures,
        )
    }

    /// The addresses that this node's own processes, its kubelet among them, send from to its pods.
    fn node_addresses(&self) -> BTreeSet<IpAddr> {
        let sources = self
            .pod_resolver
            .local_endpoints(&self.view.groups)
            .filter(|(_, endpoint)| endpoint.node.is_some())
            .flat_map(|(_, endpoint)| &endpoint.addresses)
            .filter_map(|address| match source_towards(*address) {
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

    /// Tells the audit whose listeners always get a slot.
    pub fn look_at_cgroups(&mut self, writer: &mut Writer) {
        let root = writer.audit.cgroup().to_owned();
        let known = self.pod_resolver.look_at_cgroups(&root, &self.view.groups);
        writer.audit.know(known);
    }

    /// Finds the pods of the listeners that are there, and returns those of their network
    /// namespaces that `steer` is not attached to yet.
    ///
    /// # Errors
    /// When slots or network namespaces can't be read.
    pub fn find_pods(
        &mut self,
        guarded: &mut GuardedNetns,
        writer: &mut Writer,
    ) -> Result<Vec<OpenNetns>> {
        let (resolver, groups) = (&mut self.pod_resolver, &self.view.groups);
        let slots = writer.tables.slots()?;
        resolver.update(writer.audit.cgroup(), &slots);
        let of_pods = resolver.netns_of_pods(&slots, groups);
        let wanted = |cookie| resolver.is_worth_a_look(cookie, &of_pods);
        let mut found = guarded.find_unguarded(writer, wanted)?;
        for netns in &found {
            resolver.read_addresses(netns);
        }
        let of_pods = resolver.netns_of_pods(&writer.tables.slots()?, groups);
        found.retain(|netns| of_pods.contains(&netns.cookie));
        let host = resolver.host();
        if of_pods.contains(&host) && !writer.loader.guards(host) {
            let file = netns::current().context("cannot open the node's own network namespace")?;
            found.push(OpenNetns { cookie: host, file });
        }
        guarded.restrict_to(of_pods);
        Ok(found)
    }

    /// Computes quotas, puts them in force, and reports to the other daemons.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn apply_quotas(&mut self, writer: &mut Writer) -> Result<()> {
        if self.view.complete {
            self.quotas.apply(
                &self.config,
                &self.view,
                &self.pod_resolver,
                &self.departures,
                writer,
            )?;
            let own = self.node_report(&writer.tables.slots()?);
            self.complaints
                .set("untold", self.untold.look(&self.view, &own));
            if !self.uninstalled {
                self.api.publish(own);
            }
        } else if self.started.elapsed() > self.config.hold_for {
            self.open(writer)?;
        }
        Ok(())
    }

    /// Opens computed quotas: what an earlier daemon computed them from is too old, and this one
    /// has not been told anything.
    fn open(&self, writer: &mut Writer) -> Result<()> {
        let why = format!(
            "unlimited: the API server has told nothing since this daemon started, {} s ago at \
             least",
            self.config.hold_for.as_secs()
        );
        let unlimited = InForce {
            quota: Quota::Unlimited,
            source: QuotaSource::Rule,
        };
        for slot in &writer.tables.slots()? {
            let backend = &slot.member.backend;
            let entry = self.port_names.entry(backend.port, &self.config);
            let computed =
                entry.is_some_and(|entry| matches!(entry.quota, ClusterQuota::Shared { .. }));
            if computed && slot.slot_state().is(BackendState::Active) {
                let weight = writer.rules.weight_of(backend);
                let server = Server {
                    listeners: vec![slot],
                    weight,
                };
                put_in_force(writer, &server, unlimited, weight, &why)?;
                explain(writer, backend.service, &why)?;
            }
        }
        Ok(())
    }

    /// The pods of this node that the cluster calls ready, and that listen nowhere.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn down(&self, writer: &Writer) -> Result<BTreeSet<Named>> {
        let slots = writer.tables.slots()?;
        let groups = &self.view.groups;
        let mut down = BTreeSet::new();
        for (id, endpoints) in groups {
            let Some(service) = self.port_names.service(id.port) else {
                continue;
            };
            let own = self.pod_resolver.backends(id, &slots, groups);
            let listens = |pod: &Endpoint| own.iter().any(|(_, other)| other.uid == pod.uid);
            let here = endpoints.iter().filter(|pod| {
                pod.node.as_deref() == Some(&*self.identity.node) && pod.ready && !listens(pod)
            });
            down.extend(here.filter_map(|pod| {
                let address = SocketAddr::new(*pod.addresses.first()?, id.port);
                Some((service.to_owned(), address))
            }));
        }
        Ok(down)
    }

    /// Notes refusals of a source on a port.
    pub fn on_refusals(&mut self, port: u16, refused: &RefusedSource) {
        let groups = &self.view.groups;
        if let Some(group) = self.pod_resolver.group(refused.netns, port, groups) {
            let RefusedSource {
                source,
                first,
                last,
                ..
            } = *refused;
            self.quotas.on_refusals(group, source, first, last);
        }
    }

    /// Why no daemon will follow this one, which is told to end; `None`: one will, or it is not
    /// known.
    pub async fn none_follows(&self) -> Option<String> {
        self.api.none_follows().await
    }

    /// Notes what of this node can't be guarded, a sentence each.
    pub fn note_unfit(&mut self, problems: &[String]) {
        let lines = problems.iter().filter_map(|problem| problem.lines().next());
        let all = lines.collect::<Vec<_>>().join("; ");
        self.unfit = (!all.is_empty()).then(|| unfit::shortened(&all));
    }

    /// The backend groups between whose pods connections may be moved, as far as this node has any.
    pub fn backend_groups(&self, slots: &[SlotView]) -> Vec<BackendGroup> {
        let around = Around {
            view: &self.view,
            node: &self.identity.node,
            resolver: &self.pod_resolver,
            slots,
        };
        let of_group = |group: Group<'_>| {
            let service = self.port_names.service(group.id.port)?;
            let are_refused = self.quotas.are_refused(group.id, &self.view);
            backend_group(&group, service, are_refused, around)
        };
        self.groups(slots).filter_map(of_group).collect()
    }

    /// Notes how many connections of this node's backends are being moved.
    pub fn note_departures(&mut self, departures: Departures) {
        self.departures = departures;
    }

    /// What `status --cluster` shows; `effect` and `notes` say how this node places.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn status(
        &self,
        writer: &Writer,
        effect: Effect,
        notes: PlacingNotes,
    ) -> Result<ClusterStatus> {
        let own = self.node_report(&writer.tables.slots()?);
        let why_not = report::why_not_placing(self.config.place, effect, notes.refused.as_deref());
        let mut status = report::cluster_status(&self.view, &own, &self.quotas, why_not);
        status.problems.extend(self.complaints.sentences().cloned());
        status.problems.extend(notes.left_out);
        Ok(status)
    }

    fn node_report(&self, slots: &[SlotView]) -> NodeReport {
        let (resolver, groups) = (&self.pod_resolver, &self.view.groups);
        let node = &self.identity.node;
        let report = report::node_report(
            node,
            slots,
            resolver,
            groups,
            &self.quotas,
            &self.departures,
        );
        NodeReport {
            unfit: self.unfit.clone(),
            ..report
        }
    }
}

async fn first_view(api: &mut Cluster) -> View {
    let until = Instant::now() + FIRST_VIEW;
    loop {
        let view = view(api);
        if view.complete {
            info!(
                "the API server has told of {} groups of backends",
                view.groups.len()
            );
            return view;
        }
        if timeout_at(until, api.changed()).await.is_err() {
            warn!(
                "the API server has not told everything within {} s: going on with what is in the \
                 kernel until it has",
                FIRST_VIEW.as_secs()
            );
            return view;
        }
    }
}

/// What is known now, without the groups whose pods another Service of their entry serves on their
/// port as well (a headless one beside the ordinary one): no connection tells through which of them
/// it came.
fn view(api: &Cluster) -> View {
    let mut view = api.view();
    let uids = |endpoints: &[Endpoint]| -> BTreeSet<String> {
        let uids = endpoints.iter().map(|endpoint| endpoint.uid.clone());
        uids.collect()
    };
    let sets: Vec<(GroupId, BTreeSet<String>)> = view
        .groups
        .iter()
        .map(|(id, endpoints)| (id.clone(), uids(endpoints)))
        .collect();
    let is_covered = |id: &GroupId, pods: &BTreeSet<String>| {
        !pods.is_empty()
            && sets.iter().any(|(other, others)| {
                (other.entry == id.entry && other.port == id.port && other != id)
                    && other.service.namespace == id.service.namespace
                    && pods.is_subset(others)
                    && (pods.len() < others.len() || other < id)
            })
    };
    view.groups
        .retain(|id, endpoints| !is_covered(id, &uids(endpoints)));
    view
}
