//! Which pod a listener belongs to.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use balancer_common::BackendState;
use balancer_common::abi::{Backend, BackendId};
use tracing::{debug, warn};

use crate::dataplane::{Known, SlotView};
use crate::discover::{Listener, OpenNetns, addresses, listeners, pod_cgroups, pod_of_process};
use crate::kubernetes::{Endpoint, GroupId};
use crate::sys::netns;

/// A listener that belongs to no pod of a group is looked at again only after so long.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// For so long `steer` stays where somebody listens on a port of ours and no pod is known yet: the
/// listener is there before its pod's address has gone from the kubelet through the API server into
/// an `EndpointSlice`.
const POD_EXPECTED_FOR: Duration = Duration::from_secs(60);

/// Looking for the cgroups of pods takes one in this many parts of the time at the most.
const CGROUPS_SHARE: u32 = 50;
/// The shortest time between two such looks.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

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
    /// The cgroups of pods.
    cgroups: PodCgroups,
    /// The pods of listeners in the node's own network namespace, where cgroups don't tell.
    host_pods: HashMap<BackendId, HostPod>,
}

/// The pods of this node by their cgroups, which nobody but root and the kubelet makes.
#[derive(Debug, Default)]
struct PodCgroups {
    /// The uid of the pod of each cgroup, by the cgroup's id. Empty: this node does not tell, or
    /// has no pod.
    pods: HashMap<u64, String>,
    /// The ids of cgroups of listeners that are no pod's.
    others: HashSet<u64>,
    /// The next look is not due before; `None`: there was none yet.
    next: Option<Instant>,
    /// The last look has failed: a pod may be missing.
    unread: bool,
}

impl PodCgroups {
    /// Looks at the cgroups below `root`.
    fn look(&mut self, root: &Path) {
        let begin = Instant::now();
        match pod_cgroups(root) {
            // A node that has told of pods once goes on to: its cgroups are not mounted now.
            Ok(found) => {
                self.unread = false;
                if !found.is_empty() {
                    self.pods = found;
                }
            }
            Err(error) => {
                self.unread = true;
                warn!(
                    "cannot read the cgroups of pods below {}: {error}. What is known of them stays, \
                     and they are read again later",
                    root.display()
                );
            }
        }
        let now = Instant::now();
        let pause = now.duration_since(begin) * CGROUPS_SHARE;
        self.next = Some(now + pause.max(SHORTEST_PAUSE));
    }

    /// Looks again where a listener is in a cgroup that has not been seen.
    fn update(&mut self, root: &Path, slots: &[SlotView]) {
        let listening = slots
            .iter()
            .filter(|slot| slot.slot_state().is(BackendState::Active));
        let cgroups: HashSet<u64> = listening.map(|slot| slot.member.backend.cgroup).collect();
        let is_unknown = |id: &u64| !self.pods.contains_key(id) && !self.others.contains(id);
        let is_due = self.next.is_none_or(|next| next <= Instant::now());
        if is_due && cgroups.iter().any(is_unknown) {
            self.look(root);
            self.others = cgroups;
            self.others.retain(|id| !self.pods.contains_key(id));
        }
    }

    /// Whether the cgroup is that pod's, or it can't be told: the node tells of no pod (its kubelet
    /// uses cgroup v1), or the pod is a static one, which has another uid there.
    fn may_be(&self, cgroup: u64, endpoint: &Endpoint) -> bool {
        match self.pods.get(&cgroup) {
            Some(uid) => *uid == endpoint.uid || is_static(uid),
            None => self.pods.is_empty() && !self.unread,
        }
    }
}

/// Whether that is the uid of a static pod: a hash of its file, without dashes
/// (`pkg/kubelet/config/common.go`).
fn is_static(uid: &str) -> bool {
    !uid.contains('-')
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
            cgroups: PodCgroups::default(),
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
            let uid = self.host_pod(slot.id(), backend)?;
            of_port.find(|(_, endpoint)| endpoint.uid == uid)
        } else {
            let netns = self.netns.get(&backend.netns)?;
            of_port.find(|(_, endpoint)| {
                netns.has(endpoint) && self.cgroups.may_be(backend.cgroup, endpoint)
            })
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

    /// The uid of the pod of a listener in the node's own network namespace.
    fn host_pod(&self, id: BackendId, backend: &Backend) -> Option<&str> {
        if self.cgroups.pods.is_empty() {
            self.host_pods.get(&id)?.uid.as_deref()
        } else {
            let uid = self.cgroups.pods.get(&backend.cgroup);
            uid.map(String::as_str)
        }
    }

    /// Looks at all cgroups below `root`, and tells whose listeners are pods' of a group.
    pub fn look_at_cgroups(&mut self, root: &Path, groups: &Groups) -> Known {
        self.cgroups.look(root);
        let uids: HashSet<&str> = self
            .local_endpoints(groups)
            .map(|(_, endpoint)| endpoint.uid.as_str())
            .collect();
        let pods = self.cgroups.pods.iter();
        let of_groups = pods.filter(|(_, uid)| uids.contains(uid.as_str()) || is_static(uid));
        Known::Cgroups(of_groups.map(|(id, _)| *id).collect())
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

    /// Whether the addresses of a network namespace are to be read: it is among `of_pods`, as far
    /// as is known, or it is time to look again.
    pub fn is_worth_a_look(&self, cookie: u64, of_pods: &HashSet<u64>) -> bool {
        cookie != self.host
            && self.netns.get(&cookie).is_none_or(|netns| {
                netns.last_read.elapsed() >= RETRY_AFTER || of_pods.contains(&cookie)
            })
    }

    /// Reads the addresses of a network namespace.
    pub fn read_addresses(&mut self, open: &OpenNetns) {
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
        self.netns.insert(cookie, netns);
    }

    /// Looks for the pods of listeners by their cgroups, below `root`, and in the node's own
    /// network namespace, and forgets what is gone.
    pub fn update(&mut self, root: &Path, slots: &[SlotView]) {
        self.cgroups.update(root, slots);
        let listened_in: HashSet<u64> =
            slots.iter().map(|slot| slot.member.backend.netns).collect();
        self.netns.retain(|cookie, _| listened_in.contains(cookie));
        let ids: HashSet<BackendId> = slots.iter().map(SlotView::id).collect();
        self.host_pods.retain(|id, _| ids.contains(id));
        let is_due = |slot: &&SlotView| {
            self.cgroups.pods.is_empty()
                && slot.member.backend.netns == self.host
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
        .and_then(|netns| listeners(netns, &[]))
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

#[cfg(test)]
mod tests {
    use super::super::fuzzing;
    use super::*;

    fn endpoint(uid: &str) -> Endpoint {
        Endpoint {
            pod: crate::kubernetes::ObjectName {
                namespace: "sw".into(),
                name: "oap".into(),
            },
            uid: uid.to_owned(),
            node: None,
            ..fuzzing::endpoint("")
        }
    }

    /// A daemon that can open nothing does not take strangers for pods, nor pods for strangers.
    #[test]
    fn cgroups_that_cannot_be_read_tell_nothing() {
        let uid = "0b6e1f6c-52f2-4e65-9c0a-7a3f0a8d9d01";
        let unreadable = "/x".repeat(5_000);
        let mut cgroups = PodCgroups::default();
        assert!(cgroups.may_be(7, &endpoint(uid)), "this node does not tell");
        cgroups.look(Path::new(&unreadable));
        assert!(!cgroups.may_be(7, &endpoint(uid)), "nobody knows");
        cgroups.pods.insert(7, uid.to_owned());
        cgroups.look(Path::new(&unreadable));
        assert!(cgroups.may_be(7, &endpoint(uid)), "it was seen");
        assert!(!cgroups.may_be(8, &endpoint(uid)));
    }
}
