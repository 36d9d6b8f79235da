//! Which pod a listener belongs to.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use balancer_common::BackendState;
use tracing::debug;

use crate::dataplane::SlotView;
use crate::discover::{Listener, addresses, listeners, pod_of_process};
use crate::kubernetes::{Endpoint, GroupId};
use crate::sys::netns;

/// A listener that belongs to no pod that is looked for is looked at again only after so long.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// For so long `steer` stays where somebody listens on a port of ours and no pod is known yet: the listener is there before its pod's address has
/// gone from the kubelet through the API server into an `EndpointSlice`.
const BELIEVED_FOR: Duration = Duration::from_secs(60);

/// The groups of the cluster with their pods.
pub type Groups = BTreeMap<GroupId, Vec<Endpoint>>;

/// What was found out about listeners on this node.
#[derive(Debug)]
pub struct PodResolver {
    /// This node, as pods name it.
    node: String,
    /// The cookie of the node's own network namespace, which pods may use too: the daemon lives in it.
    host: u64,
    /// Other namespaces by cookie.
    seen: HashMap<u64, Seen>,
    /// The pods of listeners in the node's own namespace, by slot and generation.
    owners: HashMap<(u32, u32), Owner>,
}

#[derive(Debug)]
struct Seen {
    addresses: HashSet<IpAddr>,
    at: Instant,
    first: Instant,
}

#[derive(Debug)]
struct Owner {
    /// The uid of its pod; `None`: it is in none.
    pod: Option<String>,
    at: Instant,
}

impl PodResolver {
    /// Nothing is known yet. Must be called in the node's own network namespace.
    ///
    /// # Errors
    /// When the namespace's cookie can't be read.
    pub fn new(node: String) -> std::io::Result<Self> {
        Ok(Self {
            node,
            host: netns::cookie()?,
            seen: HashMap::new(),
            owners: HashMap::new(),
        })
    }

    /// The cookie of the node's own network namespace.
    pub const fn host(&self) -> u64 {
        self.host
    }

    /// The pod of a listener.
    pub fn pod<'a>(
        &self,
        view: &SlotView,
        groups: &'a Groups,
    ) -> Option<(&'a GroupId, &'a Endpoint)> {
        let backend = &view.member.backend;
        if backend.netns == self.host {
            let owner = self.owners.get(&key(view))?.pod.as_deref()?;
            return self
                .local(groups)
                .find(|(group, endpoint)| group.port == backend.port && endpoint.uid == owner);
        }
        let seen = self.seen.get(&backend.netns)?;
        self.local(groups)
            .find(|(group, endpoint)| group.port == backend.port && seen.is_of(endpoint))
    }

    /// The group that a port of a namespace belongs to.
    pub fn group<'a>(&self, cookie: u64, port: u16, groups: &'a Groups) -> Option<&'a GroupId> {
        let seen = self.seen.get(&cookie);
        let is_there = |endpoint: &Endpoint| match seen {
            Some(seen) => seen.is_of(endpoint),
            None => cookie == self.host,
        };
        self.local(groups)
            .find(|(group, endpoint)| group.port == port && is_there(endpoint))
            .map(|(group, _)| group)
    }

    /// Whether a namespace is worth being looked at: a pod that is looked for may be there.
    pub fn wants(&self, cookie: u64, groups: &Groups) -> bool {
        if cookie == self.host {
            return false;
        }
        self.seen.get(&cookie).is_none_or(|seen| {
            seen.is_young() || seen.at.elapsed() >= LOOK_AGAIN_AFTER || self.is_pod(seen, groups)
        })
    }

    /// Looks at the addresses of a namespace. True: a pod that is looked for has it, or may turn out to.
    pub fn look(&mut self, cookie: u64, file: &OwnedFd, groups: &Groups) -> bool {
        let addresses = match addresses(file) {
            Ok(addresses) => addresses,
            Err(error) => {
                debug!("cannot list the addresses of the namespace with cookie {cookie}: {error}");
                HashSet::new()
            }
        };
        let now = Instant::now();
        let before = self.seen.get(&cookie);
        let seen = Seen {
            addresses,
            at: now,
            first: before.map_or(now, |seen| seen.first),
        };
        let wanted = seen.is_young() || self.is_pod(&seen, groups);
        self.seen.insert(cookie, seen);
        wanted
    }

    fn is_pod(&self, seen: &Seen, groups: &Groups) -> bool {
        self.local(groups).any(|(_, endpoint)| seen.is_of(endpoint))
    }

    /// Looks for the pods of listeners in the node's own namespace, and forgets what is gone.
    pub fn look_at_host(&mut self, slots: &[SlotView]) {
        let there: HashSet<u64> = slots.iter().map(|view| view.member.backend.netns).collect();
        self.seen.retain(|cookie, _| there.contains(cookie));
        let host = self.host;
        let own: Vec<&SlotView> = slots
            .iter()
            .filter(|view| view.member.backend.netns == host)
            .filter(|view| view.slot_state().is(BackendState::Active))
            .collect();
        let keys: HashSet<_> = slots.iter().map(key).collect();
        self.owners.retain(|key, _| keys.contains(key));
        let due = |owner: Option<&Owner>| {
            owner.is_none_or(|owner| owner.pod.is_none() && owner.at.elapsed() >= LOOK_AGAIN_AFTER)
        };
        let unknown: Vec<&SlotView> = own
            .into_iter()
            .filter(|view| due(self.owners.get(&key(view))))
            .collect();
        if unknown.is_empty() {
            return;
        }
        let pods = pods_by_port();
        for view in unknown {
            let pod = pods.get(&view.member.backend.port).cloned();
            let at = Instant::now();
            self.owners.insert(key(view), Owner { pod, at });
        }
    }

    /// The namespaces of the listeners that belong to pods, or may turn out to.
    pub fn namespaces(&self, slots: &[SlotView], groups: &Groups) -> HashSet<u64> {
        let of_slots = slots.iter().map(|view| (view, view.member.backend.netns));
        let young = |cookie: u64| self.seen.get(&cookie).is_some_and(Seen::is_young);
        of_slots
            .filter(|(view, cookie)| young(*cookie) || self.pod(view, groups).is_some())
            .map(|(_, cookie)| cookie)
            .collect()
    }

    /// The pods of this node.
    fn local<'a>(&self, groups: &'a Groups) -> impl Iterator<Item = (&'a GroupId, &'a Endpoint)> {
        let all = groups
            .iter()
            .flat_map(|(group, endpoints)| endpoints.iter().map(move |endpoint| (group, endpoint)));
        all.filter(|(_, endpoint)| endpoint.node.as_ref().is_none_or(|node| *node == self.node))
    }
}

impl Seen {
    fn is_young(&self) -> bool {
        self.first.elapsed() < BELIEVED_FOR
    }

    fn is_of(&self, endpoint: &Endpoint) -> bool {
        let mut addresses = endpoint.addresses.iter();
        addresses.any(|address| self.addresses.contains(address))
    }
}

fn key(view: &SlotView) -> (u32, u32) {
    (view.slot(), view.slot_state().generation())
}

/// The pods of the processes that listen in this thread's namespace. Process numbers that the kernel half saw are not used: they are those of the
/// first process namespace, and this daemon may live in another one.
fn pods_by_port() -> HashMap<u16, String> {
    let listed = netns::current().and_then(listeners);
    let listeners = match listed {
        Ok(listeners) => listeners,
        Err(error) => {
            debug!("cannot list the listeners of the node's own namespace: {error}");
            return HashMap::new();
        }
    };
    let pod = |listener: &Listener| {
        let mut owners = listener.owners.iter();
        owners.find_map(|owner| pod_of_process(owner.pid))
    };
    listeners
        .iter()
        .filter_map(|listener| Some((listener.socket.local.port(), pod(listener)?)))
        .collect()
}
