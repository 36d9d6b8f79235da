//! Which pod a listener belongs to.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use balancer_common::BackendState;
use balancer_common::abi::BackendId;
use tracing::debug;

use crate::dataplane::SlotView;
use crate::discover::{Listener, OpenNetns, addresses, listeners, pod_of_process};
use crate::kubernetes::{Endpoint, GroupId};
use crate::sys::netns;

/// A listener that belongs to no pod of a group is looked at again only after so long.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// For so long `steer` stays where somebody listens on a port of ours and no pod is known yet: the
/// listener is there before its pod's address has gone from the kubelet through the API server into
/// an `EndpointSlice`.
const POD_EXPECTED_FOR: Duration = Duration::from_secs(60);

/// The backend groups of the cluster with their pods.
pub type Groups = BTreeMap<GroupId, Vec<Endpoint>>;

/// What was found out about listeners on this node.
#[derive(Debug)]
pub struct PodResolver {
    /// This node, as pods name it.
    node: String,
    /// The cookie of the node's own network namespace, which pods may use too: the daemon lives in
    /// it.
    host: u64,
    /// The addresses of other network namespaces, by their cookies.
    netns: HashMap<u64, NetnsAddresses>,
    /// The pods of listeners in the node's own network namespace.
    host_pods: HashMap<BackendId, HostPod>,
}

#[derive(Debug)]
struct NetnsAddresses {
    addresses: HashSet<IpAddr>,
    first_read: Instant,
    last_read: Instant,
}

#[derive(Debug)]
struct HostPod {
    /// The uid of the pod; `None`: the listener is in no pod.
    uid: Option<String>,
    looked_up: Instant,
}

impl PodResolver {
    /// A resolver that has looked at nothing yet. Must be called in the node's own network
    /// namespace.
    ///
    /// # Errors
    /// When the cookie of the network namespace can't be read.
    pub fn new(node: String) -> std::io::Result<Self> {
        Ok(Self {
            node,
            host: netns::cookie()?,
            netns: HashMap::new(),
            host_pods: HashMap::new(),
        })
    }

    /// The cookie of the node's own network namespace.
    pub const fn host(&self) -> u64 {
        self.host
    }

    /// The pods of this node.
    pub fn local_endpoints<'a>(
        &self,
        groups: &'a Groups,
    ) -> impl Iterator<Item = (&'a GroupId, &'a Endpoint)> {
        groups
            .iter()
            .flat_map(|(group, endpoints)| endpoints.iter().map(move |endpoint| (group, endpoint)))
            .filter(|(_, endpoint)| endpoint.node.as_ref().is_none_or(|node| *node == self.node))
    }

    /// The pod of a listener.
    pub fn pod<'a>(
        &self,
        slot: &SlotView,
        groups: &'a Groups,
    ) -> Option<(&'a GroupId, &'a Endpoint)> {
        let backend = &slot.member.backend;
        let mut of_port = self
            .local_endpoints(groups)
            .filter(|(group, _)| group.port == backend.port);
        if backend.netns == self.host {
            let uid = self.host_pods.get(&slot.id())?.uid.as_deref()?;
            of_port.find(|(_, endpoint)| endpoint.uid == uid)
        } else {
            let netns = self.netns.get(&backend.netns)?;
            of_port.find(|(_, endpoint)| netns.has(endpoint))
        }
    }

    /// The backends of a group that listen on this node, with their pods.
    pub fn backends<'a>(
        &self,
        group: &GroupId,
        slots: &'a [SlotView],
        groups: &'a Groups,
    ) -> Vec<(&'a SlotView, &'a Endpoint)> {
        let listening = slots
            .iter()
            .filter(|slot| slot.slot_state().is(BackendState::Active));
        let with_pods = listening.filter_map(|slot| Some((slot, self.pod(slot, groups)?)));
        with_pods
            .filter(|(_, (of, _))| *of == group)
            .map(|(slot, (_, endpoint))| (slot, endpoint))
            .collect()
    }

    /// The backend group that a port of a network namespace belongs to.
    pub fn group<'a>(&self, cookie: u64, port: u16, groups: &'a Groups) -> Option<&'a GroupId> {
        let netns = self.netns.get(&cookie);
        let is_there = |endpoint: &Endpoint| match netns {
            Some(netns) => netns.has(endpoint),
            None => cookie == self.host,
        };
        self.local_endpoints(groups)
            .find(|(group, endpoint)| group.port == port && is_there(endpoint))
            .map(|(group, _)| group)
    }

    /// Whether the addresses of a network namespace are to be read: a pod of a group may be there.
    pub fn is_worth_a_look(&self, cookie: u64, groups: &Groups) -> bool {
        cookie != self.host
            && self.netns.get(&cookie).is_none_or(|netns| {
                netns.last_read.elapsed() >= RETRY_AFTER || self.is_pod(netns, groups)
            })
    }

    /// Reads the addresses of a network namespace. True: a pod of a group has it, or may turn out
    /// to.
    pub fn may_be_a_pod(&mut self, open: &OpenNetns, groups: &Groups) -> bool {
        let cookie = open.cookie;
        let addresses = addresses(&open.file).unwrap_or_else(|error| {
            debug!(
                "cannot list the addresses of the network namespace with cookie {cookie}: {error}"
            );
            HashSet::new()
        });
        let now = Instant::now();
        let before = self.netns.get(&cookie);
        let netns = NetnsAddresses {
            addresses,
            first_read: before.map_or(now, |netns| netns.first_read),
            last_read: now,
        };
        let may_be = self.is_pod(&netns, groups);
        self.netns.insert(cookie, netns);
        may_be
    }

    /// Whether a network namespace is a pod's, or too young to tell.
    fn is_pod(&self, netns: &NetnsAddresses, groups: &Groups) -> bool {
        netns.is_young()
            || self
                .local_endpoints(groups)
                .any(|(_, endpoint)| netns.has(endpoint))
    }

    /// Looks for the pods of listeners in the node's own network namespace, and forgets what is
    /// gone.
    pub fn update_host(&mut self, slots: &[SlotView]) {
        let listened_in: HashSet<u64> =
            slots.iter().map(|slot| slot.member.backend.netns).collect();
        self.netns.retain(|cookie, _| listened_in.contains(cookie));
        let ids: HashSet<BackendId> = slots.iter().map(SlotView::id).collect();
        self.host_pods.retain(|id, _| ids.contains(id));
        let is_due = |slot: &&SlotView| {
            slot.member.backend.netns == self.host
                && slot.slot_state().is(BackendState::Active)
                && self
                    .host_pods
                    .get(&slot.id())
                    .is_none_or(|pod| pod.uid.is_none() && pod.looked_up.elapsed() >= RETRY_AFTER)
        };
        let due: Vec<&SlotView> = slots.iter().filter(is_due).collect();
        if due.is_empty() {
            return;
        }
        let pods = pods_by_port();
        for slot in due {
            let uid = pods.get(&slot.member.backend.port).cloned();
            let looked_up = Instant::now();
            self.host_pods.insert(slot.id(), HostPod { uid, looked_up });
        }
    }

    /// The network namespaces of the listeners that belong to pods, or may turn out to.
    pub fn netns_of_pods(&self, slots: &[SlotView], groups: &Groups) -> HashSet<u64> {
        let is_young = |cookie: u64| {
            self.netns
                .get(&cookie)
                .is_some_and(NetnsAddresses::is_young)
        };
        slots
            .iter()
            .map(|slot| (slot, slot.member.backend.netns))
            .filter(|(slot, cookie)| is_young(*cookie) || self.pod(slot, groups).is_some())
            .map(|(_, cookie)| cookie)
            .collect()
    }
}

impl NetnsAddresses {
    fn is_young(&self) -> bool {
        self.first_read.elapsed() < POD_EXPECTED_FOR
    }

    fn has(&self, endpoint: &Endpoint) -> bool {
        let mut addresses = endpoint.addresses.iter();
        addresses.any(|address| self.addresses.contains(address))
    }
}

/// The pods of the processes that listen in this thread's network namespace. Process numbers that
/// the kernel half saw are not used: they are those of the first process namespace, and this daemon
/// may live in another one.
fn pods_by_port() -> HashMap<u16, String> {
    let listeners = netns::current()
        .and_then(listeners)
        .unwrap_or_else(|error| {
            debug!("cannot list the listeners of the node's own network namespace: {error}");
            Vec::new()
        });
    let pod = |listener: &Listener| {
        let mut owners = listener.owners.iter();
        owners.find_map(|owner| pod_of_process(owner.pid))
    };
    listeners
        .iter()
        .filter_map(|listener| Some((listener.socket.local.port(), pod(listener)?)))
        .collect()
}
