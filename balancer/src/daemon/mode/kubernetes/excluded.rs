//! The pods of this node whose connects are left alone, and their netns.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::debug;

use crate::discover::pod_netns;
use crate::kubernetes::ObjectName;

/// A pod whose netns is not known is looked for again after so long.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// Where all are known, they are looked for anew after so long: a pod whose sandbox was made again
/// has another netns.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// What is known of them.
#[derive(Debug, Default)]
pub struct Excluded {
    /// The cookies of their netns, by the pods' uids.
    found: BTreeMap<String, u64>,
    /// The uids that were looked for, and when.
    looked: Option<(BTreeSet<String>, Instant)>,
}

impl Excluded {
    /// The cookies of the netns of these pods, and a sentence for each that shares the node's own,
    /// whose cookie is `host`. The cgroups of pods are below `root`.
    pub fn netns(
        &mut self,
        pods: &BTreeMap<ObjectName, String>,
        root: &Path,
        host: u64,
    ) -> (BTreeSet<u64>, Vec<String>) {
        let uids: BTreeSet<String> = pods.values().cloned().collect();
        if self.is_due(&uids) {
            match pod_netns(root, &uids) {
                Ok(found) => self.found = found,
                Err(error) => debug!("cannot look for the processes of pods: {error}"),
            }
            self.looked = Some((uids, Instant::now()));
        }
        let cookie = |uid: &String| self.found.get(uid).copied();
        let on_host = pods.iter().filter(|(_, uid)| cookie(uid) == Some(host));
        let sentences = on_host.map(|(pod, _)| is_on_host(pod)).collect();
        let mut cookies: BTreeSet<u64> = pods.values().filter_map(cookie).collect();
        cookies.remove(&host);
        (cookies, sentences)
    }

    fn is_due(&self, uids: &BTreeSet<String>) -> bool {
        let Some((looked_for, at)) = &self.looked else {
            return !uids.is_empty();
        };
        let all_found = uids.iter().all(|uid| self.found.contains_key(uid));
        let rest = if all_found { LOOK_EVERY } else { RETRY_AFTER };
        looked_for != uids || (!uids.is_empty() && at.elapsed() >= rest)
    }
}

fn is_on_host(pod: &ObjectName) -> String {
    format!(
        "the pod {pod} is annotated not to be placed, and uses the node's network: its connects can't \
         be told from those of other pods there, and are placed. Annotate the Service instead, or \
         let it connect to a pod's own address"
    )
}
