//! What the agents tell each other: a `ConfigMap` for each node, in the balancer's own namespace.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{observed, pause};
use super::daemon_set::OwnDaemonSet;
use super::health::{ApiError, Health, Notifier};
use super::watch::{Store, Watch, start};
use super::{Identity, NodeReport, ObjectName, ReceivedReport, SCHEMA};

/// Who changes the `ConfigMap`, for the API server.
const MANAGER: &str = "balancer";
/// Which `ConfigMap`s are publications.
const LABELS: &str = "app.kubernetes.io/name=balancer,app.kubernetes.io/component=publication";
const KEY: &str = "publication.json";
/// When it was written, in seconds since 1970. It is what makes a renewal a change, which the others hear of; nobody compares it with a clock.
const WRITTEN: &str = "balancer.skywalking.apache.org/written";
/// Publications are renewed so often although nothing has changed.
pub(super) const RENEW: Duration = Duration::from_secs(30);
/// More bytes than this are neither written nor read: a `ConfigMap` may have a mebibyte together.
const MOST_BYTES: usize = 900 * 1024;
/// Ages of sources that drift apart by no more than this are the same, in seconds.
const SAME_AGE: u64 = 10;

/// What arrived of a node.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StoredReport {
    /// The version of its `ConfigMap`: as long as it stays the same nothing has arrived, though it is listed again.
    version: Option<String>,
    at: Instant,
    pub(super) said: Result<NodeReport, String>,
}

impl StoredReport {
    fn of(map: &ConfigMap, before: Option<&Self>) -> Self {
        let version = map.resource_version();
        match before {
            Some(before) if version.is_some() && before.version == version => before.clone(),
            _ => Self {
                version,
                at: Instant::now(),
                said: parse(map),
            },
        }
    }

    pub(super) fn heard(&self) -> Option<ReceivedReport> {
        let node_report = self.said.as_ref().ok()?.clone();
        Some(ReceivedReport {
            age: self.at.elapsed(),
            node_report,
        })
    }
}

/// The name of a node's `ConfigMap`.
fn name_of(node: &str) -> String {
    format!("balancer-{node}")
}

/// What every layout of a publication has.
#[derive(serde::Deserialize)]
struct Layout {
    schema: u32,
}

/// Others wrote it, perhaps of another version, or by hand.
fn parse(map: &ConfigMap) -> Result<NodeReport, String> {
    let name = map.name_any();
    let whole = ObjectName {
        namespace: map.namespace().unwrap_or_default(),
        name: name.clone(),
    };
    let wrong = |why: &str| {
        format!(
            "the ConfigMap {whole} is not a node_report of an agent ({why}): what that node counts is not known here. If nobody but the \
             balancer wrote it, its agents are of different versions; else delete it"
        )
    };
    let data = map.data.as_ref().and_then(|data| data.get(KEY));
    let text = data.ok_or_else(|| wrong(&format!("it has no {KEY}")))?;
    if text.len() > MOST_BYTES {
        return Err(wrong(&format!("it has {} bytes", text.len())));
    }
    let layout = serde_json::from_str::<Layout>(text).map_err(|error| wrong(&error.to_string()))?;
    if layout.schema != SCHEMA {
        return Err(wrong(&format!(
            "its schema is {}, and this agent reads {SCHEMA}",
            layout.schema
        )));
    }
    let node_report =
        serde_json::from_str::<NodeReport>(text).map_err(|error| wrong(&error.to_string()))?;
    if name_of(&node_report.node) != name {
        let node = node_report.node.chars().take(80).collect::<String>();
        return Err(wrong(&format!("it is about the node {node:?}")));
    }
    Ok(node_report)
}

pub(super) fn watch(client: &Client, namespace: &str, notifier: &Notifier) -> Watch<StoredReport> {
    let store = Store::new("configmaps", Some(namespace), notifier);
    let config = watcher::Config::default().labels(LABELS);
    start(
        client,
        |client| Api::<ConfigMap>::namespaced(client, namespace),
        config,
        &store,
        |map, before| Some(StoredReport::of(map, before)),
    )
}

/// What is to be done about one's own `ConfigMap`.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Write,
    Delete,
    /// Nothing, for so long.
    Wait(Duration),
}

/// What was written last, and when.
struct Written {
    node_report: NodeReport,
    at: Instant,
}

/// `there`: one's own `ConfigMap` exists, as far as is known; `idle`: since the last request that changed it.
fn step(
    wanted: Option<&NodeReport>,
    written: Option<&Written>,
    there: Option<bool>,
    idle: Duration,
    every: Duration,
) -> Step {
    let Some(wanted) = wanted else {
        return Step::Wait(RENEW);
    };
    let due = |step, every: Duration| match every.checked_sub(idle) {
        None | Some(Duration::ZERO) => step,
        Some(rest) => Step::Wait(rest),
    };
    if wanted.is_empty() {
        return match (written, there) {
            (Some(_), _) | (None, Some(true)) => due(Step::Delete, every),
            (None, Some(false) | None) => Step::Wait(RENEW),
        };
    }
    match written {
        None => due(Step::Write, every),
        Some(written) if differs(&written.node_report, wanted, written.at.elapsed()) => {
            due(Step::Write, every)
        }
        Some(_) => due(Step::Write, RENEW.max(every)),
    }
}

/// Something besides the passing of time has changed. (Ages are of when it was written: they grow by themselves.)
fn differs(old: &NodeReport, new: &NodeReport, since: Duration) -> bool {
    let since = since.as_secs();
    let moved = |old: u64, new: u64| (old.saturating_add(since)).abs_diff(new) > SAME_AGE;
    (old.schema, &old.node, &old.backends) != (new.schema, &new.node, &new.backends)
        || old.peaks.len() != new.peaks.len()
        || old.refused.len() != new.refused.len()
        || old.peaks.iter().zip(&new.peaks).any(|(old, new)| {
            // A peak that is reached again and again is renewed with the rest.
            (&old.group, old.connections) != (&new.group, new.connections)
        })
        || old.refused.iter().zip(&new.refused).any(|(old, new)| {
            (&old.group, old.source) != (&new.group, new.source)
                || moved(old.first_seconds_ago, new.first_seconds_ago)
                || moved(old.last_seconds_ago, new.last_seconds_ago)
        })
}

impl NodeReport {
    /// It says nothing.
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty() && self.peaks.is_empty() && self.refused.is_empty()
    }
}

/// Writes what it is told to; see [`Writer::run`].
pub(super) struct Writer {
    pub(super) identity: Identity,
    pub(super) daemon_set: Arc<OwnDaemonSet>,
    /// What all agents wrote, this one's own among it.
    pub(super) known: Arc<Store<StoredReport>>,
    pub(super) health: Arc<Health>,
    pub(super) outbox: watch::Receiver<Option<NodeReport>>,
    pub(super) every: watch::Receiver<Duration>,
}

impl Writer {
    /// For ever: the latest publication is written on change, at most every so often, and renewed; an empty one is taken away.
    pub(super) async fn run(mut self, client: Client) {
        let client = observed(&client, &self.health);
        let api = Api::<ConfigMap>::namespaced(client, &self.identity.namespace);
        let mut written = None::<Written>;
        let mut last = None::<Instant>;
        let mut failures = 0;
        loop {
            // What belonged to it is being collected: written now, it would be left over.
            let wanted = self.outbox.borrow_and_update().clone();
            let wanted = wanted.filter(|_| !self.daemon_set.is_gone());
            let every = *self.every.borrow_and_update();
            let idle = last.map_or(Duration::MAX, |last| last.elapsed());
            let step = step(wanted.as_ref(), written.as_ref(), self.there(), idle, every);
            let done = match (&step, wanted) {
                (Step::Write, Some(node_report)) => self.write(&api, node_report).await.map(Some),
                (Step::Delete, _) => self.delete(&api).await.map(|()| None),
                (Step::Wait(time), _) => {
                    self.wait(*time).await;
                    continue;
                }
                (Step::Write, None) => continue,
            };
            last = Some(Instant::now());
            match done {
                Ok(now) => {
                    written = now;
                    failures = 0;
                    self.health.fine();
                }
                Err(error) => {
                    self.health.failed(error);
                    tokio::time::sleep(pause(failures)).await;
                    failures += 1;
                }
            }
        }
    }

    async fn wait(&mut self, time: Duration) {
        let gone = tokio::select! {
            told = self.outbox.changed() => told.is_err(),
            told = self.every.changed() => told.is_err(),
            () = tokio::time::sleep(time) => false,
        };
        if gone {
            // This task ends with the other end.
            std::future::pending::<()>().await;
        }
    }

    /// `None`: not known yet.
    fn there(&self) -> Option<bool> {
        let listing = self.known.listing();
        let name = ObjectName {
            namespace: self.identity.namespace.clone(),
            name: name_of(&self.identity.node),
        };
        listing.complete.then(|| listing.items.contains_key(&name))
    }

    async fn write(
        &self,
        api: &Api<ConfigMap>,
        node_report: NodeReport,
    ) -> Result<Written, ApiError> {
        let at = Instant::now();
        let text = serde_json::to_string(&node_report)
            .map_err(|error| ApiError::Unwritten(error.to_string()))?;
        if text.len() > MOST_BYTES {
            let why = format!(
                "it has {} bytes, and a ConfigMap takes {MOST_BYTES}",
                text.len()
            );
            return Err(ApiError::Unwritten(why));
        }
        let name = name_of(&self.identity.node);
        let seconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": name,
                "labels": {"app.kubernetes.io/name": "balancer", "app.kubernetes.io/component": "publication"},
                "annotations": {WRITTEN: seconds.to_string()},
                "ownerReferences": self.daemon_set.references(),
            },
            "data": {KEY: text},
        });
        // Nobody else has a right to these fields: what was changed by hand is put back.
        let how = PatchParams::apply(MANAGER).force();
        match api.patch(&name, &how, &Patch::Apply(map)).await {
            Ok(_) => Ok(Written { node_report, at }),
            Err(error) => Err(self.error(&error, "patch")),
        }
    }

    async fn delete(&self, api: &Api<ConfigMap>) -> Result<(), ApiError> {
        let name = name_of(&self.identity.node);
        match api.delete(&name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(self.error(&error, "delete")),
            Ok(_) => Ok(()),
        }
    }

    fn error(&self, error: &kube::Error, verb: &'static str) -> ApiError {
        ApiError::of(error, verb, &self.health.target)
            .unwrap_or_else(|| ApiError::Unwritten(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::{GroupId, Peak, RefusedSource};

    fn map(name: &str, data: &[(&str, &str)]) -> ConfigMap {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "balancer", "resourceVersion": "7"},
            "data": data.iter().copied().collect::<std::collections::BTreeMap<_, _>>(),
        }))
        .unwrap()
    }

    fn group() -> GroupId {
        let service = ObjectName {
            namespace: "sw".to_owned(),
            name: "oap".to_owned(),
        };
        GroupId {
            entry: "agents".to_owned(),
            service,
            port: 11800,
        }
    }

    fn node_report(connections: u64, refused: &[(u64, u64)]) -> NodeReport {
        NodeReport {
            schema: SCHEMA,
            node: "node-a".to_owned(),
            backends: Vec::new(),
            peaks: vec![Peak {
                group: group(),
                connections,
                seconds_ago: 0,
            }],
            refused: refused
                .iter()
                .map(|&(first_seconds_ago, last_seconds_ago)| RefusedSource {
                    group: group(),
                    source: "10.0.0.9".parse().unwrap(),
                    first_seconds_ago,
                    last_seconds_ago,
                })
                .collect(),
        }
    }

    #[test]
    fn what_an_agent_wrote_is_read_back() {
        let said = node_report(7, &[(100, 3)]);
        let text = serde_json::to_string(&said).unwrap();
        assert_eq!(parse(&map("balancer-node-a", &[(KEY, &text)])), Ok(said));
    }

    #[test]
    fn garbage_becomes_a_sentence_that_names_the_config_map() {
        let good = serde_json::to_string(&node_report(7, &[])).unwrap();
        let other = good.replace("\"schema\":1", "\"schema\":2");
        let deep = "[".repeat(100_000);
        let long = format!("{{\"schema\":1,\"node\":\"{}\"}}", "x".repeat(MOST_BYTES));
        for (name, data, why) in [
            ("balancer-node-a", &[][..], "it has no publication.json"),
            ("balancer-node-a", &[(KEY, "")], "EOF"),
            (
                "balancer-node-a",
                &[(KEY, "{\"schema\":1}")],
                "missing field",
            ),
            (
                "balancer-node-a",
                &[(KEY, "{\"schema\":2,\"later\":true}")],
                "its schema is 2",
            ),
            ("balancer-node-a", &[(KEY, &other)], "its schema is 2"),
            ("balancer-node-a", &[(KEY, &deep)], "line 1"),
            ("balancer-node-a", &[(KEY, &long)], "bytes"),
            (
                "balancer-node-b",
                &[(KEY, &good)],
                "it is about the node \"node-a\"",
            ),
        ] {
            let error = parse(&map(name, data)).unwrap_err();
            assert!(error.contains(&format!("balancer/{name}")), "{error}");
            assert!(error.contains(why) && error.len() < 500, "{why}: {error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_listed_again_has_not_arrived_again() {
        let mut object = map("balancer-node-a", &[]);
        let first = StoredReport::of(&object, None);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(StoredReport::of(&object, Some(&first)), first);
        object.metadata.resource_version = Some("8".to_owned());
        assert_eq!(StoredReport::of(&object, Some(&first)).at, Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_written_on_change_at_most_so_often_and_renewed() {
        let every = Duration::from_secs(2);
        let ago = Duration::from_secs;
        let said = node_report(7, &[(100, 3)]);
        let written = Written {
            node_report: said.clone(),
            at: Instant::now(),
        };
        let step = |wanted: &NodeReport, written, idle| {
            step(Some(wanted), written, Some(true), idle, every)
        };
        assert_eq!(step(&said, None, Duration::MAX), Step::Write);
        tokio::time::advance(ago(1)).await;
        let more = node_report(8, &[(101, 4)]);
        assert_eq!(step(&more, Some(&written), ago(1)), Step::Wait(ago(1)));
        tokio::time::advance(ago(4)).await;
        assert_eq!(step(&more, Some(&written), ago(5)), Step::Write);
        let older = node_report(7, &[(105, 8)]);
        assert_eq!(step(&older, Some(&written), ago(5)), Step::Wait(ago(25)));
        let refused_again = node_report(7, &[(105, 0)]);
        assert_eq!(
            step(&refused_again, Some(&written), ago(5)),
            Step::Wait(ago(25)),
            "not yet: by less than ten seconds"
        );
        tokio::time::advance(ago(10)).await;
        assert_eq!(
            step(&node_report(7, &[(115, 0)]), Some(&written), ago(15)),
            Step::Write
        );
        assert_eq!(
            step(&node_report(7, &[(115, 18)]), Some(&written), ago(30)),
            Step::Write
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_one_is_never_written_and_takes_away_what_is_there() {
        let every = Duration::from_secs(2);
        let empty = NodeReport::default();
        let written = Written {
            node_report: node_report(7, &[]),
            at: Instant::now(),
        };
        let step = |written, there| step(Some(&empty), written, there, Duration::MAX, every);
        assert_eq!(step(None, None), Step::Wait(RENEW), "not known yet");
        assert_eq!(step(None, Some(false)), Step::Wait(RENEW));
        assert_eq!(step(None, Some(true)), Step::Delete, "of an earlier life");
        assert_eq!(step(Some(&written), Some(false)), Step::Delete);
    }
}
