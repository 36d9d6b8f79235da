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

use super::client::{jitter, observed, pause};
use super::daemon_set::OwnDaemonSet;
use super::echo::Echo;
use super::fleet::Fleet;
use super::health::{ApiError, Health};
use super::identity::Identity;
use super::model::{NodeReport, ObjectName, Peak, RefusedSource, ReportedBackend};
use super::watch::Store;
use super::watch::node_reports::{KEY, LABELS, MOST_BYTES, StoredReport, WRITTEN, name_of};

/// The name of the balancer as a field manager, for the API server.
const MANAGER: &str = "balancer";
/// A report is written again after so long, although nothing has changed.
const RENEW: Duration = Duration::from_secs(30);
/// By how many percent the times between two writes are spread, so that daemons don't write all at
/// once.
const JITTER_PERCENT: u32 = 20;
/// Ages of refused sources that differ by no more than this are equal, in seconds.
const SAME_AGE: u64 = 10;

/// What is to be written.
#[derive(Clone)]
pub(crate) struct Outbox {
    /// The latest report; `None`: the daemon has none yet.
    pub(crate) report: Option<NodeReport>,
    /// The least time between two writes of changes, as the file has it.
    pub(crate) every: Duration,
}

/// The least time between two writes of changes.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Of what a backend is: that it is there, ready to take more, or does not serve.
    of_state: Duration,
    /// Of how many connections there are.
    of_counts: Duration,
}

/// Up to so many nodes numbers of connections are told as often as anything else.
const FEW_NODES: u32 = 100;
/// The time between two such writes, and by how much it grows for each further node: 10 s with
/// 1,000 nodes.
const WITH_FEW: Duration = Duration::from_secs(2);
const FOR_EACH: Duration = Duration::from_nanos(8_888_889);
/// The longest such time. The choice bears numbers that old, and quotas find a node silent later.
const LONGEST: Duration = Duration::from_secs(15);

/// How often numbers of connections are told where so many nodes listen: each write is an event for
/// each of them.
fn period(nodes: u32) -> Duration {
    let more = FOR_EACH.saturating_mul(nodes.saturating_sub(FEW_NODES));
    WITH_FEW.saturating_add(more).min(LONGEST)
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
    pace: Pace,
) -> Action {
    let due = |action, every: Duration| match every.saturating_sub(idle) {
        Duration::ZERO => action,
        rest => Action::Wait(rest),
    };
    match (wanted, last) {
        (None, _) => Action::Wait(RENEW),
        (Some(wanted), last) if wanted.is_empty() => {
            if last.is_some() || exists == Some(true) {
                due(Action::Delete, pace.of_state)
            } else {
                Action::Wait(RENEW)
            }
        }
        (Some(wanted), Some(last)) => {
            let since = last.at.elapsed();
            let every = match difference(&last.report, wanted, since) {
                Some(Difference::State) => pace.of_state,
                Some(Difference::Counts) => pace.of_counts,
                None => RENEW.max(pace.of_state),
            };
            due(Action::Write, every)
        }
        (Some(_), None) => due(Action::Write, pace.of_state),
    }
}

/// What has changed beside the time that has passed. (The ages in a report are those of its write.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Difference {
    /// What the backends are, or who is refused.
    State,
    /// How many connections there are.
    Counts,
}

fn difference(old: &NodeReport, new: &NodeReport, since: Duration) -> Option<Difference> {
    if differs(&without_counts(old), &without_counts(new), since) {
        Some(Difference::State)
    } else {
        differs(old, new, since).then_some(Difference::Counts)
    }
}

/// The report with all numbers of connections 0; only whether there is room is left of them.
fn without_counts(report: &NodeReport) -> NodeReport {
    let mut report = report.clone();
    for backend in &mut report.backends {
        (backend.established, backend.exempt) = (0, 0);
        (backend.moving, backend.returning) = (0, 0);
        backend.pending = backend.pending.map(|_| 0);
        backend.quota = backend.quota.map(|_| 0);
        backend.room = backend.room.map(|room| room.min(1));
    }
    report
        .peaks
        .iter_mut()
        .for_each(|peak| peak.connections = 0);
    report
}

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
    (old.schema, &old.node, &old.unfit, lengths(old))
        != (new.schema, &new.node, &new.unfit, lengths(new))
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
    /// Who listens.
    pub(crate) fleet: Arc<Fleet>,
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
        let mut counts_ahead = 0;
        loop {
            let Outbox { report, every } = self.outbox.borrow_and_update().clone();
            // What the DaemonSet owned is being collected: written now, it would be left over.
            let wanted = report.filter(|_| !self.daemon_set.is_gone());
            let idle = changed.map_or(Duration::MAX, |changed| changed.elapsed());
            let pace = self.pace(every, counts_ahead);
            let action = next_action(wanted.as_ref(), last.as_ref(), self.exists(), idle, pace);
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
            counts_ahead = jitter(JITTER_PERCENT);
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

    /// `ahead`: by how many percent counts are told sooner this time.
    fn pace(&self, every: Duration, ahead: u32) -> Pace {
        let period = period(self.fleet.nodes());
        Pace {
            of_state: every,
            of_counts: (period * (100 - ahead) / 100).max(every),
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
            unfit: None,
        }
    }

    fn pace(seconds: u64) -> Pace {
        Pace {
            of_state: Duration::from_secs(2),
            of_counts: Duration::from_secs(seconds),
        }
    }

    #[test]
    fn the_more_nodes_listen_the_seldomer_numbers_are_told() {
        for (nodes, millis) in [
            (0, 2_000),
            (3, 2_000),
            (100, 2_000),
            (550, 6_000),
            (1_000, 10_000),
            (5_000, 15_000),
            (u32::MAX, 15_000),
        ] {
            let off = period(nodes).abs_diff(Duration::from_millis(millis));
            assert!(
                off < Duration::from_millis(1),
                "{nodes}: {:?}",
                period(nodes)
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn that_a_backend_comes_or_is_full_is_told_at_once_and_its_numbers_later() {
        let with = |backends: &[(u32, Option<u32>)]| NodeReport {
            backends: backends
                .iter()
                .map(|&(established, room)| ReportedBackend {
                    group: group(),
                    pod: group().service,
                    uid: String::new(),
                    slot: 0,
                    address: "10.0.0.1".parse().unwrap(),
                    state: "active".to_owned(),
                    established,
                    exempt: 0,
                    pending: Some(established),
                    quota: Some(99),
                    room,
                    health: None,
                    moving: 0,
                    returning: 0,
                    drained: false,
                })
                .collect(),
            ..node_report(u64::from(backends[0].0), &[])
        };
        let last = LastWrite {
            report: with(&[(7, Some(9))]),
            at: Instant::now(),
        };
        let action = |wanted: &NodeReport, idle| {
            let idle = Duration::from_secs(idle);
            next_action(Some(wanted), Some(&last), Some(true), idle, pace(10))
        };
        let wait = |seconds| Action::Wait(Duration::from_secs(seconds));
        assert_eq!(action(&with(&[(70, Some(3))]), 3), wait(7));
        assert_eq!(action(&with(&[(70, Some(3))]), 10), Action::Write);
        assert_eq!(action(&with(&[(7, Some(0))]), 3), Action::Write);
        assert_eq!(action(&with(&[(7, Some(9)), (0, None)]), 3), Action::Write);
        assert_eq!(action(&last.report.clone(), 3), wait(27));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_written_on_change_at_most_so_often_and_renewed() {
        let every = pace(2);
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
                moving: 0,
                returning: 0,
                drained: false,
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
        let unfit = NodeReport {
            unfit: Some("too old".to_owned()),
            ..with(None)
        };
        assert!(differs(&with(None), &unfit, ago(1)));
        assert!(!unfit.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_one_is_never_written_and_takes_away_what_is_there() {
        let every = pace(2);
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
