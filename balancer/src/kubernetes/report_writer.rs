//! The writer of this node's report.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{observed, pause};
use super::daemon_set::OwnDaemonSet;
use super::echo::Echo;
use super::health::{ApiError, Health};
use super::identity::Identity;
use super::model::{NodeReport, ObjectName, Peak, RefusedSource, ReportedBackend};
use super::watch::Store;
use super::watch::node_reports::{KEY, LABELS, MOST_BYTES, StoredReport, WRITTEN, name_of};

/// The name of the balancer as a field manager, for the API server.
const MANAGER: &str = "balancer";
/// A report is written again after so long, although nothing has changed.
const RENEW: Duration = Duration::from_secs(30);
/// Ages of refused sources that differ by no more than this are equal, in seconds.
const SAME_AGE: u64 = 10;

/// What is to be written.
#[derive(Clone)]
pub(crate) struct Outbox {
    /// The latest report; `None`: the daemon has none yet.
    pub(crate) report: Option<NodeReport>,
    /// The least time between two writes of changes.
    pub(crate) every: Duration,
}

/// What is to be done about the `ConfigMap` of this node.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    Write,
    Delete,
    /// Nothing, for so long.
    Wait(Duration),
}

/// The last report that was written, and when.
struct LastWrite {
    report: NodeReport,
    at: Instant,
}

/// `exists`: whether this node has a `ConfigMap`, as far as is known; `idle`: the time since the
/// last request that changed it.
fn next_action(
    wanted: Option<&NodeReport>,
    last: Option<&LastWrite>,
    exists: Option<bool>,
    idle: Duration,
    every: Duration,
) -> Action {
    let due = |action, every: Duration| match every.saturating_sub(idle) {
        Duration::ZERO => action,
        rest => Action::Wait(rest),
    };
    match (wanted, last) {
        (None, _) => Action::Wait(RENEW),
        (Some(wanted), last) if wanted.is_empty() => {
            if last.is_some() || exists == Some(true) {
                due(Action::Delete, every)
            } else {
                Action::Wait(RENEW)
            }
        }
        (Some(wanted), Some(last)) if !differs(&last.report, wanted, last.at.elapsed()) => {
            due(Action::Write, RENEW.max(every))
        }
        (Some(_), _) => due(Action::Write, every),
    }
}

/// Whether more has changed than time has passed. (The ages in a report are those of its write.)
fn differs(old: &NodeReport, new: &NodeReport, since: Duration) -> bool {
    let same_age =
        |old: u64, new: u64| old.saturating_add(since.as_secs()).abs_diff(new) <= SAME_AGE;
    let same_source = |(old, new): (&RefusedSource, &RefusedSource)| {
        (&old.group, old.source) == (&new.group, new.source)
            && same_age(old.first_seconds_ago, new.first_seconds_ago)
            && same_age(old.last_seconds_ago, new.last_seconds_ago)
    };
    // The age of a peak that is reached again and again is renewed with the rest.
    let same_peak =
        |(old, new): (&Peak, &Peak)| (&old.group, old.connections) == (&new.group, new.connections);
    let same_backend = |(old, new): (&ReportedBackend, &ReportedBackend)| {
        let since = |backend: &ReportedBackend| backend.health.as_ref().map(|it| it.seconds);
        let same_since = match (since(old), since(new)) {
            (Some(old), Some(new)) => same_age(old, new),
            (old, new) => old == new,
        };
        let mut as_old = new.clone();
        if let (Some(as_old), Some(old)) = (&mut as_old.health, &old.health) {
            as_old.seconds = old.seconds;
        }
        same_since && *old == as_old
    };
    let lengths = |of: &NodeReport| (of.backends.len(), of.peaks.len(), of.refused.len());
    (old.schema, &old.node, lengths(old)) != (new.schema, &new.node, lengths(new))
        || !old.backends.iter().zip(&new.backends).all(same_backend)
        || !old.peaks.iter().zip(&new.peaks).all(same_peak)
        || !old.refused.iter().zip(&new.refused).all(same_source)
}

/// Writes the reports of the outbox; see [`ReportWriter::run`].
pub(crate) struct ReportWriter {
    pub(crate) identity: Identity,
    pub(crate) daemon_set: Arc<OwnDaemonSet>,
    /// The reports of all daemons, this one's own among them.
    pub(crate) known: Arc<Store<StoredReport>>,
    pub(crate) health: Arc<Health>,
    pub(crate) echo: Arc<Echo>,
    pub(crate) outbox: watch::Receiver<Outbox>,
}

impl ReportWriter {
    /// For ever: writes the latest report on change, at most every so often, and renews it. An
    /// empty report is taken away.
    pub(crate) async fn run(mut self, client: Client) {
        let client = observed(&client, &self.health);
        let api = Api::<ConfigMap>::namespaced(client, &self.identity.namespace);
        let mut last = None::<LastWrite>;
        let mut changed = None::<Instant>;
        let mut failures = 0;
        loop {
            let Outbox { report, every } = self.outbox.borrow_and_update().clone();
            // What the DaemonSet owned is being collected: written now, it would be left over.
            let wanted = report.filter(|_| !self.daemon_set.is_gone());
            let idle = changed.map_or(Duration::MAX, |changed| changed.elapsed());
            let action = next_action(wanted.as_ref(), last.as_ref(), self.exists(), idle, every);
            let done = match (action, wanted) {
                (Action::Write, Some(report)) => self.write(&api, report).await.map(Some),
                (Action::Delete, _) => self.delete(&api).await.map(|()| None),
                (Action::Wait(time), _) => {
                    self.wait(time).await;
                    continue;
                }
                (Action::Write, None) => continue,
            };
            changed = Some(Instant::now());
            match done {
                Ok(written) => {
                    last = written;
                    failures = 0;
                    self.health.succeeded();
                }
                Err(error) => {
                    self.health.failed(error);
                    tokio::time::sleep(pause(failures)).await;
                    failures += 1;
                }
            }
        }
    }

    /// Waits for a change of the outbox, but no longer than this.
    async fn wait(&mut self, time: Duration) {
        if let Ok(Err(_)) = tokio::time::timeout(time, self.outbox.changed()).await {
            // The outbox is gone: this task ends with it.
            std::future::pending::<()>().await;
        }
    }

    /// Whether this node has a `ConfigMap`; `None`: not known yet.
    fn exists(&self) -> Option<bool> {
        let listing = self.known.listing();
        let name = ObjectName {
            namespace: self.identity.namespace.clone(),
            name: name_of(&self.identity.node),
        };
        listing.complete.then(|| listing.items.contains_key(&name))
    }

    async fn write(&self, api: &Api<ConfigMap>, report: NodeReport) -> Result<LastWrite, ApiError> {
        let at = Instant::now();
        let text = serde_json::to_string(&report)
            .map_err(|error| ApiError::Unwritten(error.to_string()))?;
        if text.len() > MOST_BYTES {
            let bytes = text.len();
            let why = format!("it has {bytes} bytes, and a ConfigMap takes {MOST_BYTES}");
            return Err(ApiError::Unwritten(why));
        }
        let name = name_of(&self.identity.node);
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": name,
                "labels": LABELS.into_iter().collect::<BTreeMap<_, _>>(),
                "annotations": {WRITTEN: self.echo.stamp().to_string()},
                "ownerReferences": self.daemon_set.references(),
            },
            "data": {KEY: text},
        });
        // Nobody else has a right to these fields: what was changed by hand is put back.
        let how = PatchParams::apply(MANAGER).force();
        match api.patch(&name, &how, &Patch::Apply(map)).await {
            Ok(_) => Ok(LastWrite { report, at }),
            Err(error) => Err(self.error(&error, "patch")),
        }
    }

    async fn delete(&self, api: &Api<ConfigMap>) -> Result<(), ApiError> {
        let name = name_of(&self.identity.node);
        match api.delete(&name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => (),
            Err(error) => return Err(self.error(&error, "delete")),
            Ok(_) => (),
        }
        self.echo.forget();
        Ok(())
    }

    fn error(&self, error: &kube::Error, verb: &'static str) -> ApiError {
        ApiError::of(error, verb, &self.health.target)
            .unwrap_or_else(|| ApiError::Unwritten(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::model::{GroupId, ReportedHealth, SCHEMA};

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
                    longest_pause_seconds: 0,
                    before_seconds_ago: None,
                })
                .collect(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_written_on_change_at_most_so_often_and_renewed() {
        let every = Duration::from_secs(2);
        let ago = Duration::from_secs;
        let report = node_report(7, &[(100, 3)]);
        let written = LastWrite {
            report: report.clone(),
            at: Instant::now(),
        };
        let action = |wanted: &NodeReport, written, idle| {
            next_action(Some(wanted), written, Some(true), idle, every)
        };
        assert_eq!(action(&report, None, Duration::MAX), Action::Write);
        tokio::time::advance(ago(1)).await;
        let more = node_report(8, &[(101, 4)]);
        assert_eq!(action(&more, Some(&written), ago(1)), Action::Wait(ago(1)));
        tokio::time::advance(ago(4)).await;
        assert_eq!(action(&more, Some(&written), ago(5)), Action::Write);
        let older = node_report(7, &[(105, 8)]);
        assert_eq!(
            action(&older, Some(&written), ago(5)),
            Action::Wait(ago(25))
        );
        let refused_again = node_report(7, &[(105, 0)]);
        assert_eq!(
            action(&refused_again, Some(&written), ago(5)),
            Action::Wait(ago(25)),
            "not yet: by less than ten seconds"
        );
        tokio::time::advance(ago(10)).await;
        assert_eq!(
            action(&node_report(7, &[(115, 0)]), Some(&written), ago(15)),
            Action::Write
        );
        assert_eq!(
            action(&node_report(7, &[(115, 18)]), Some(&written), ago(30)),
            Action::Write
        );
    }

    #[tokio::test(start_paused = true)]
    async fn that_a_backend_does_not_serve_is_news_and_that_it_goes_on_is_none() {
        let with = |health: Option<(&str, u64)>| NodeReport {
            backends: vec![ReportedBackend {
                group: group(),
                pod: group().service,
                uid: String::new(),
                slot: 0,
                address: "10.0.0.1".parse().unwrap(),
                state: "active".to_owned(),
                established: 7,
                exempt: 0,
                pending: None,
                quota: None,
                room: None,
                health: health.map(|(state, seconds)| ReportedHealth {
                    state: state.to_owned(),
                    seconds,
                }),
            }],
            ..node_report(7, &[])
        };
        let ago = Duration::from_secs;
        let hung = with(Some(("hung", 3)));
        assert!(differs(&with(None), &hung, ago(1)));
        assert!(!differs(&hung, &with(Some(("hung", 23))), ago(20)));
        assert!(differs(&hung, &with(Some(("hung", 1))), ago(20)), "again");
        assert!(differs(&hung, &with(Some(("stalled", 23))), ago(20)));
        assert!(differs(&hung, &with(None), ago(20)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_one_is_never_written_and_takes_away_what_is_there() {
        let every = Duration::from_secs(2);
        let empty = NodeReport::default();
        let written = LastWrite {
            report: node_report(7, &[]),
            at: Instant::now(),
        };
        let action =
            |written, exists| next_action(Some(&empty), written, exists, Duration::MAX, every);
        assert_eq!(action(None, None), Action::Wait(RENEW), "not known yet");
        assert_eq!(action(None, Some(false)), Action::Wait(RENEW));
        assert_eq!(
            action(None, Some(true)),
            Action::Delete,
            "of an earlier life"
        );
        assert_eq!(action(Some(&written), Some(false)), Action::Delete);
    }
}
