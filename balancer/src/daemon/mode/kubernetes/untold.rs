//! Pods that are ready and that no daemon tells of: nobody counts or limits their connections.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::kubernetes::{Endpoint, GroupId, NodeReport, View};

/// For so long a ready pod may go without a report: a daemon that is replaced is back by then.
const PATIENCE: Duration = Duration::from_secs(60);

/// The most pods that a sentence names.
const MOST_NAMED: usize = 8;

/// Since when ready pods have not been told of.
#[derive(Debug, Default)]
pub struct Untold(BTreeMap<(GroupId, String), Instant>);

/// Why no daemon tells of a pod, as far as can be known from here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    /// It asks for a runtime that gives it a kernel of its own, or may.
    Sandboxed(String),
    /// A daemon runs on its node and does not see it listen.
    Unseen,
    /// No report of its node is there.
    NoDaemon,
}

impl Untold {
    /// Looks at all ready pods; `own`: the report of this node. A sentence for those of each node
    /// that have not been told of for long.
    pub fn look(&mut self, view: &View, own: &NodeReport) -> Vec<String> {
        // What others write does not arrive.
        if !view.complete || !view.silent_for.is_zero() {
            self.0.clear();
            return Vec::new();
        }
        let now = Instant::now();
        let since = std::mem::take(&mut self.0);
        let mut found: BTreeMap<(Option<&str>, Cause, u16), Vec<&Endpoint>> = BTreeMap::new();
        for (id, endpoint) in ready(view) {
            if is_told(view, own, id, endpoint) {
                continue;
            }
            let key = (id.clone(), endpoint.uid.clone());
            let since = since.get(&key).copied().unwrap_or(now);
            self.0.insert(key, since);
            if now.duration_since(since) >= PATIENCE {
                let cause = cause(view, own, endpoint);
                let pods = found.entry((endpoint.node.as_deref(), cause, id.port));
                pods.or_default().push(endpoint);
            }
        }
        let found = found.into_iter();
        found
            .map(|((node, cause, port), pods)| sentence(node, &cause, port, &pods))
            .collect()
    }
}

fn ready(view: &View) -> impl Iterator<Item = (&GroupId, &Endpoint)> {
    let all = view.groups.iter();
    all.flat_map(|(id, endpoints)| endpoints.iter().map(move |endpoint| (id, endpoint)))
        .filter(|(_, endpoint)| endpoint.ready)
}

/// The report of the daemon on the pod's node.
fn report<'a>(view: &'a View, own: &'a NodeReport, endpoint: &Endpoint) -> Option<&'a NodeReport> {
    let node = endpoint.node.as_ref()?;
    if *node == own.node {
        return Some(own);
    }
    let received = view.nodes.get(node)?;
    received.is_recent().then_some(&*received.node_report)
}

fn is_told(view: &View, own: &NodeReport, id: &GroupId, endpoint: &Endpoint) -> bool {
    let report = report(view, own, endpoint);
    report.is_some_and(|report| report.pod(id, &endpoint.uid).is_some())
}

fn cause(view: &View, own: &NodeReport, endpoint: &Endpoint) -> Cause {
    if let Some(class) = &endpoint.runtime_class {
        return Cause::Sandboxed(class.clone());
    }
    match report(view, own, endpoint) {
        Some(_) => Cause::Unseen,
        None => Cause::NoDaemon,
    }
}

fn sentence(node: Option<&str>, cause: &Cause, port: u16, pods: &[&Endpoint]) -> String {
    let (which, verb) = if let [pod] = pods {
        (format!("the pod {}", pod.pod), "is")
    } else {
        let names = pods.iter().take(MOST_NAMED);
        let names: Vec<String> = names.map(|endpoint| endpoint.pod.to_string()).collect();
        let more = pods.len().saturating_sub(MOST_NAMED);
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        (format!("the pods {}{more}", names.join(", ")), "are")
    };
    let node = node.unwrap_or("(none)");
    let why = match cause {
        Cause::Sandboxed(class) => format!(
            "the runtime class {class} may give it a kernel of its own (gVisor, Kata), which the \
             balancer can't reach. Run the pod without it, or leave its Service out of the \
             configuration"
        ),
        Cause::Unseen => format!(
            "the daemon there sees nobody listen on port {port} in it. See whether the server \
             listens on that port of the pod's address (`ss -ltn` in the pod), whether its runtime \
             gives it a kernel of its own (gVisor, Kata), and `balancer doctor` on that node"
        ),
        Cause::NoDaemon => "no daemon on its node has told anything for a minute. See whether one \
             runs there: `kubectl get pods --all-namespaces --selector app.kubernetes.io/name=balancer \
             --output wide` (the chart's `nodeSelector` and `tolerations`), and what its log says; \
             a daemon that tells nothing sees none of its pods listen (gVisor, Kata)"
            .to_owned(),
    };
    format!(
        "{which} on node {node} {verb} ready, and no daemon tells of it: its connections are neither \
         counted nor limited, and quotas take it to hold as many as others. {}",
        capitalised(&why)
    )
}

fn capitalised(sentence: &str) -> String {
    let mut characters = sentence.chars();
    let first = characters.next().map(|first| first.to_ascii_uppercase());
    first.into_iter().chain(characters).collect()
}

#[cfg(test)]
mod tests {
    use super::super::fuzzing::{endpoint, group, report as report_of};
    use super::*;
    use crate::kubernetes::ReceivedReport;

    /// A ready pod on each of three nodes, with reports of so many seconds ago, seen from node `a`.
    fn view(reports: &[(&str, u64)]) -> View {
        let mut view = View {
            complete: true,
            ..View::default()
        };
        let endpoints = ["a", "b", "c"].map(endpoint);
        view.groups.insert(group(), endpoints.to_vec());
        for (node, age) in reports {
            let received = ReceivedReport {
                age: Duration::from_secs(*age),
                node_report: report_of(&group(), node, 7).into(),
            };
            view.nodes.insert((*node).to_owned(), received);
        }
        view
    }

    /// What is said after a time in which nothing changes.
    fn after(seconds: u64, view: &View, own: &NodeReport) -> Vec<String> {
        let mut untold = Untold::default();
        assert_eq!(untold.look(view, own), Vec::<String>::new());
        let back = Duration::from_secs(seconds);
        untold.0.values_mut().for_each(|since| *since -= back);
        untold.look(view, own)
    }

    #[test]
    fn pods_that_nobody_tells_of_are_named_with_node_and_cause() {
        let own = report_of(&group(), "a", 7);
        let all = view(&[("b", 1), ("c", 59)]);
        assert_eq!(after(61, &all, &own), Vec::<String>::new());
        let without_c = view(&[("b", 1), ("c", 60)]);
        assert_eq!(after(59, &without_c, &own), Vec::<String>::new());
        let said = after(61, &without_c, &own);
        assert_eq!(said.len(), 1, "{said:?}");
        for words in ["the pod sw/c on node c is ready", "No daemon on its node"] {
            assert!(said[0].contains(words), "{words}: {said:?}");
        }
        let nothing = NodeReport {
            node: "a".into(),
            ..NodeReport::default()
        };
        let said = after(61, &all, &nothing);
        assert!(
            said[0].contains("sees nobody listen on port 11800"),
            "{said:?}"
        );
        let mut sandboxed = without_c;
        sandboxed
            .groups
            .values_mut()
            .flatten()
            .last()
            .unwrap()
            .runtime_class = Some("kata".into());
        let said = after(61, &sandboxed, &own);
        assert!(said[0].contains("The runtime class kata"), "{said:?}");
    }

    #[test]
    fn a_daemon_that_is_back_ends_the_wait_and_silence_of_the_api_server_is_no_reason() {
        let own = report_of(&group(), "a", 7);
        let mut without_c = view(&[("b", 1)]);
        let mut untold = Untold::default();
        untold.look(&without_c, &own);
        untold.look(&view(&[("b", 1), ("c", 1)]), &own);
        assert!(untold.0.is_empty());
        without_c.silent_for = Duration::from_secs(1);
        assert_eq!(after(61, &without_c, &own), Vec::<String>::new());
        without_c.silent_for = Duration::ZERO;
        without_c
            .groups
            .values_mut()
            .flatten()
            .for_each(|pod| pod.ready = false);
        assert_eq!(after(61, &without_c, &own), Vec::<String>::new());
    }
}
