//! The pods of this node whose connects are left alone, and their netns.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use balancer_common::abi;
use tracing::debug;

use crate::discover::pod_netns;
use crate::kubernetes::ObjectName;

/// A pod whose netns is not known is looked for again after so long.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// Where all are known, they are looked for anew after so long: a pod whose sandbox was made again
/// has another netns.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Pods that mean the very pod where they connect to a pod's own address, each with its uid and
/// its addresses.
pub type Peers = BTreeMap<ObjectName, (String, Vec<IpAddr>)>;

/// The pods of this node whose connects are left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftAlone {
    /// Those that are annotated so, with their uids.
    pub annotated: BTreeMap<ObjectName, String>,
    /// Those whose connects to pods' own addresses are; `None`: no pod's own address is a
    /// frontend.
    pub peers: Option<Peers>,
}

impl LeftAlone {
    fn uids(&self) -> BTreeSet<String> {
        let peers = self.peers.iter().flatten().map(|(_, (uid, _))| uid);
        self.annotated.values().chain(peers).cloned().collect()
    }
}

/// What is known of them.
#[derive(Debug, Default)]
pub struct Excluded {
    /// The cookies of their netns, by the pods' uids.
    found: BTreeMap<String, u64>,
    /// Who was looked for last, and when.
    looked: Option<(LeftAlone, Instant)>,
}

/// Where their connects are left alone.
#[derive(Debug, PartialEq, Eq)]
pub struct ExcludedNetns {
    /// The cookies of their netns, and of the node's own, whose kubelet probes pods.
    pub netns: BTreeMap<u64, abi::Excluded>,
    /// The peers that can't be told from clients.
    pub unknown_peers: BTreeSet<ObjectName>,
    /// What is wrong, a sentence each.
    pub problems: Vec<String>,
}

impl Excluded {
    /// The netns of these pods. The node's own has the cookie `host`; the cgroups of pods are below
    /// `root`.
    pub fn netns(&mut self, pods: &LeftAlone, root: &Path, host: u64) -> ExcludedNetns {
        self.look(pods, root);
        let cookie = |uid: &String| self.found.get(uid).copied();
        let mut netns = BTreeMap::new();
        if let Some(peers) = &pods.peers {
            let peers = peers.values().filter_map(|(uid, _)| cookie(uid));
            netns.extend(
                peers
                    .chain([host])
                    .map(|cookie| (cookie, abi::Excluded::OwnAddresses)),
            );
        }
        let (on_host, annotated): (Vec<_>, Vec<_>) = pods
            .annotated
            .iter()
            .partition(|(_, uid)| cookie(uid) == Some(host));
        let annotated = annotated.into_iter().filter_map(|(_, uid)| cookie(uid));
        netns.extend(annotated.map(|cookie| (cookie, abi::Excluded::Everywhere)));
        let mut problems: Vec<String> = on_host.iter().map(|(pod, _)| is_on_host(pod)).collect();
        let peers = pods.peers.iter().flatten();
        let unknown = peers.filter(|(_, (uid, _))| cookie(uid).is_none());
        let unknown: BTreeSet<_> = unknown.map(|(pod, _)| pod.clone()).collect();
        problems.extend(unknown.iter().map(is_unknown));
        ExcludedNetns {
            netns,
            unknown_peers: unknown,
            problems,
        }
    }

    /// Looks for their netns where it is time. One that was found stays known while its pod is
    /// there: a pod that ends has no process any more.
    fn look(&mut self, pods: &LeftAlone, root: &Path) {
        let uids = pods.uids();
        if !self.is_due(pods, &uids) {
            return;
        }
        self.found.retain(|uid, _| uids.contains(uid));
        match pod_netns(root, &uids) {
            Ok(found) => self.found.extend(found),
            Err(error) => debug!("cannot look for the processes of pods: {error}"),
        }
        self.looked = Some((pods.clone(), Instant::now()));
    }

    fn is_due(&self, pods: &LeftAlone, uids: &BTreeSet<String>) -> bool {
        let Some((looked_for, at)) = &self.looked else {
            return !uids.is_empty();
        };
        let all_found = uids.iter().all(|uid| self.found.contains_key(uid));
        let rest = if all_found { LOOK_EVERY } else { RETRY_AFTER };
        looked_for != pods || (!uids.is_empty() && at.elapsed() >= rest)
    }
}

fn is_on_host(pod: &ObjectName) -> String {
    format!(
        "the pod {pod} is annotated not to be placed, and uses the node's network: its connects can't \
         be told from those of other pods there, and are placed. Annotate the Service instead, or \
         let it connect to a pod's own address"
    )
}

fn is_unknown(pod: &ObjectName) -> String {
    format!(
        "`match: endpoints` is not in force on this node for Services of the pod {pod}: no process \
         is found in a cgroup of it, so its connects to other pods of a Service can't be told from \
         those of clients. This passes when the pod has started. It stays with static pods, and \
         where the kubelet uses cgroup v1 or the daemon does not see the node's cgroups"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;

    const HOST: u64 = 7;

    fn uid(digit: u8) -> String {
        format!("{digit}b6e1f6c-52f2-4e65-9c0a-7a3f0a8d9d01")
    }

    fn pod(digit: u8) -> ObjectName {
        ObjectName {
            namespace: "sw".to_owned(),
            name: format!("oap-{digit}"),
        }
    }

    /// Pods, each with its uid.
    fn pods(annotated: &[u8], peers: Option<&[u8]>) -> LeftAlone {
        let peer = |digit: &u8| (pod(*digit), (uid(*digit), vec![[10, 0, 0, *digit].into()]));
        LeftAlone {
            annotated: annotated
                .iter()
                .map(|digit| (pod(*digit), uid(*digit)))
                .collect(),
            peers: peers.map(|peers| peers.iter().map(peer).collect()),
        }
    }

    /// Cgroups of pods that this process lives in.
    fn cgroups(of: &[u8]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for digit in of {
            let cgroup = root.path().join(format!("kubepods/pod{}", uid(*digit)));
            std::fs::create_dir_all(&cgroup).expect("made");
            let own = std::process::id().to_string();
            std::fs::write(cgroup.join("cgroup.procs"), own).expect("written");
        }
        root
    }

    #[test]
    fn annotated_pods_are_left_alone_everywhere_peers_and_the_node_at_own_addresses() {
        let own = netns::cookie().expect("known");
        let root = cgroups(&[1]);
        let netns = |pods: LeftAlone| Excluded::default().netns(&pods, root.path(), HOST).netns;
        assert_eq!(netns(pods(&[], None)), [].into());
        assert_eq!(
            netns(pods(&[1], None)),
            [(own, abi::Excluded::Everywhere)].into()
        );
        let host = (HOST, abi::Excluded::OwnAddresses);
        assert_eq!(netns(pods(&[], Some(&[]))), [host].into());
        let peer = (own, abi::Excluded::OwnAddresses);
        assert_eq!(netns(pods(&[], Some(&[1]))), [host, peer].into());
        let both = (own, abi::Excluded::Everywhere);
        assert_eq!(netns(pods(&[1], Some(&[1]))), [host, both].into());
    }

    #[test]
    fn an_annotated_pod_of_the_nodes_own_network_is_named() {
        let own = netns::cookie().expect("known");
        let root = cgroups(&[1]);
        let found = Excluded::default().netns(&pods(&[1], Some(&[1])), root.path(), own);
        assert_eq!(found.netns, [(own, abi::Excluded::OwnAddresses)].into());
        assert_eq!(found.unknown_peers, [].into());
        let [problem] = &found.problems[..] else {
            panic!("{found:?}");
        };
        assert!(problem.contains("sw/oap-1 is annotated"), "{problem}");
    }

    #[test]
    fn a_peer_that_is_not_found_is_no_client_and_one_that_was_found_stays_known() {
        let root = cgroups(&[1]);
        let mut excluded = Excluded::default();
        let found = excluded.netns(&pods(&[], Some(&[1, 2])), root.path(), HOST);
        assert_eq!(found.unknown_peers, [pod(2)].into());
        assert!(found.problems[0].contains("the pod sw/oap-2"), "{found:?}");
        let found = excluded.netns(&pods(&[], Some(&[1])), root.path(), HOST);
        assert_eq!(found.unknown_peers, [].into());
        drop(root);
        let mut moved = pods(&[], Some(&[1]));
        moved
            .peers
            .iter_mut()
            .flatten()
            .for_each(|(_, (_, addresses))| addresses.clear());
        let nowhere = cgroups(&[]);
        let found = excluded.netns(&moved, nowhere.path(), HOST);
        assert_eq!(found.unknown_peers, [].into());
    }
}
