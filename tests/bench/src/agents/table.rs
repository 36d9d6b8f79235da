//! What was measured as a table, and what follows from it for more nodes.

use serde_json::json;

use super::Measured;
use super::control_plane::Cost;
use crate::report::{Goal, Rows, Section};

/// How many nodes it is computed for.
const MANY: f64 = 5_000.0;
/// What a daemon on a node without an OAP may take, in MB and in percent of a processor.
const MOST_MEMORY: f64 = 20.0;
const MOST_PROCESSOR: f64 = 0.3;

/// A row of the table: rates by the second, processors in percent.
struct Line {
    nodes: f64,
    what: &'static str,
    api_server: f64,
    /// Not computed for more nodes.
    etcd: Option<f64>,
    requests: f64,
    events: f64,
    kilobytes: f64,
    watches: f64,
    megabytes: f64,
}

impl Line {
    fn measured(nodes: f64, what: &'static str, cost: &Cost) -> Self {
        Self {
            nodes,
            what,
            api_server: cost.rate(|cost| cost.api_server) * 100.0,
            etcd: Some(cost.rate(|cost| cost.etcd) * 100.0),
            requests: cost.rate(|cost| cost.requests),
            events: cost.rate(|cost| cost.events),
            kilobytes: cost.rate(|cost| cost.bytes) / 1e3,
            watches: cost.watches,
            megabytes: cost.api_server_megabytes,
        }
    }

    /// What the daemons alone cause, beside a control plane that has none.
    fn beside(self, alone: &Self) -> Self {
        Self {
            api_server: self.api_server - alone.api_server,
            etcd: None,
            requests: self.requests - alone.requests,
            events: self.events - alone.events,
            kilobytes: self.kilobytes - alone.kilobytes,
            watches: self.watches - alone.watches,
            megabytes: self.megabytes - alone.megabytes,
            ..self
        }
    }

    /// The same with so many nodes, where everything grows with their number.
    fn with(self, nodes: f64) -> Self {
        let more = nodes / self.nodes;
        Self {
            nodes,
            api_server: self.api_server * more,
            requests: self.requests * more,
            events: self.events * more,
            kilobytes: self.kilobytes * more,
            watches: self.watches * more,
            megabytes: self.megabytes * more,
            ..self
        }
    }

    /// `self` and so much of what comes on top of it in `other`.
    fn and(self, other: &Self, factor: f64) -> Self {
        let more = |own: f64, others: f64| own + (others - own) * factor;
        Self {
            api_server: more(self.api_server, other.api_server),
            requests: more(self.requests, other.requests),
            events: more(self.events, other.events),
            kilobytes: more(self.kilobytes, other.kilobytes),
            megabytes: more(self.megabytes, other.megabytes),
            ..self
        }
    }

    fn add_to(&self, table: &mut Rows) {
        table.add([
            format!("{:.0}", self.nodes),
            self.what.to_owned(),
            format!("{:.1}", self.api_server),
            self.etcd
                .map_or_else(String::new, |etcd| format!("{etcd:.1}")),
            format!("{:.0}", self.requests),
            format!("{:.0}", self.events),
            format!("{:.0}", self.kilobytes),
            format!("{:.0}", self.watches),
            format!("{:.0}", self.megabytes),
        ]);
    }
}

/// The time between two writes of a report whose numbers change, in seconds, as the daemons have
/// it.
fn period(nodes: f64) -> f64 {
    (2.0 + 8.0 / 900.0 * (nodes - 100.0).max(0.0)).min(15.0)
}

fn lines(measured: &Measured) -> Vec<Line> {
    let nodes = f64::from(u32::try_from(measured.nodes).unwrap_or(u32::MAX));
    let line = |what, cost| Line::measured(nodes, what, cost);
    let alone = || line("no daemons, at rest", &measured.alone);
    let alone_rollout = || line("no daemons, rollout", &measured.alone_rollout);
    let added = |what, cost, alone: &Line| line(what, cost).beside(alone).with(MANY);
    let rest = || added("at rest (computed)", &measured.rest, &alone());
    let storm = added("storm (computed)", &measured.storm, &alone());
    // A rollout takes longer where daemons run. Without them the rest of the time is idle.
    let longer = measured.rollout.seconds - measured.alone_rollout.seconds;
    let without = (measured.alone_rollout).followed_by(&measured.alone, longer);
    let without = line("no daemons", &without);
    let rollout = added("rollout (computed)", &measured.rollout, &without);
    // Reports are written less often the more nodes listen.
    let storm = Line {
        what: storm.what,
        ..rest().and(&storm, period(nodes) / period(MANY))
    };
    vec![
        alone(),
        alone_rollout(),
        line("all daemons start", &measured.start),
        line("at rest", &measured.rest),
        line("storm", &measured.storm),
        line("rollout", &measured.rollout),
        rest(),
        storm,
        rollout,
    ]
}

fn at_most(what: &str, bound: f64, unit: &str, seen: f64) -> Goal {
    Goal {
        claim: format!("{what} ≤ {bound} {unit}"),
        seen: format!("{seen:.2} {unit}"),
        met: seen <= bound,
    }
}

/// Everything for people and for the JSON.
pub fn section(measured: &Measured) -> Section {
    let mut table = Rows::new(
        2,
        &[
            "nodes",
            "what",
            "API server, %",
            "etcd, %",
            "requests/s",
            "events/s",
            "kB/s",
            "watches",
            "API server, MB",
        ],
    );
    for line in lines(measured) {
        line.add_to(&mut table);
    }
    let (rest, storm) = (&measured.daemon_at_rest, &measured.daemon_in_storm);
    let daemon = "a daemon on a node without an OAP";
    Section {
        key: "agents",
        title: "Cost in the API server",
        rows: json!(measured),
        table,
        goals: vec![
            at_most(
                &format!("{daemon}, at rest, PSS"),
                MOST_MEMORY,
                "MB",
                rest.proportional,
            ),
            at_most(
                &format!("{daemon}, at rest, of a processor"),
                MOST_PROCESSOR,
                "%",
                rest.processor,
            ),
            at_most(
                &format!("{daemon}, during a storm, of a processor"),
                1.0,
                "%",
                storm.processor,
            ),
        ],
        chart: None,
    }
}
