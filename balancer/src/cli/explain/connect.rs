//! How the explanation of a connect is shown.

use std::net::SocketAddr;

use serde::Serialize;

use super::ends::Client;
use crate::cli::output::{Column, or, table, wrapped};
use crate::cli::status::JsonEndpoint;
use crate::dataplane::{ConnectExplanation, EndpointGroupSnapshot, EndpointSnapshot};

#[derive(Serialize)]
pub(in crate::cli) struct Json<'a> {
    schema: u32,
    from: String,
    to: SocketAddr,
    netns: Option<u64>,
    group: Option<&'a str>,
    reason: Option<&'static str>,
    endpoint: Option<JsonChosen<'a>>,
    /// The load up to which endpoints are filled; null where nothing is known of other nodes.
    level: Option<f64>,
    candidates: Vec<JsonCandidate<'a>>,
    sentence: &'a str,
}

#[derive(Serialize)]
struct JsonChosen<'a> {
    name: &'a str,
    address: Option<SocketAddr>,
}

#[derive(Serialize)]
struct JsonCandidate<'a> {
    #[serde(flatten)]
    endpoint: JsonEndpoint<'a>,
    load: f64,
    room: Option<f64>,
}

impl<'a> Json<'a> {
    pub(in crate::cli) fn new(
        from: &Client,
        to: SocketAddr,
        explanation: &'a ConnectExplanation,
    ) -> Self {
        let group = explanation.group.as_ref();
        let candidate =
            |group: &EndpointGroupSnapshot, endpoint: &'a EndpointSnapshot| JsonCandidate {
                endpoint: JsonEndpoint::new(endpoint),
                load: endpoint.load(),
                room: room(group, endpoint),
            };
        let candidates = group.into_iter().flat_map(|group| {
            let candidates = group.candidates(to.is_ipv4());
            candidates.map(|endpoint| candidate(group, endpoint))
        });
        Self {
            schema: 1,
            from: from.to_string(),
            to,
            netns: explanation.netns,
            group: group.map(|group| group.name.as_str()),
            reason: explanation
                .reason
                .map(balancer_common::place::PlaceReason::name),
            endpoint: explanation.endpoint.as_ref().map(|endpoint| JsonChosen {
                name: &endpoint.name,
                address: endpoint.address(to.is_ipv4()),
            }),
            level: group
                .filter(|one| one.knows_others)
                .map(EndpointGroupSnapshot::level),
            candidates: candidates.collect(),
            sentence: &explanation.sentence,
        }
    }
}

/// How many more connections an endpoint gets until it is filled; `None`: there is no level.
fn room(group: &EndpointGroupSnapshot, endpoint: &EndpointSnapshot) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let weight = endpoint.weight as f64;
    let room = (group.level() - endpoint.load()).max(0.0) * weight;
    group.knows_others.then_some(room)
}

pub(in crate::cli) fn text(
    from: &Client,
    to: SocketAddr,
    explanation: &ConnectExplanation,
) -> String {
    let mut text = wrapped(&format!("{from} -> {to}: "), &explanation.sentence);
    let Some(group) = &explanation.group else {
        return text;
    };
    text += &wrapped("  group    ", &group.name);
    text += &wrapped("  netns    ", &or(explanation.netns, "not known"));
    if let Some(reason) = explanation.reason {
        let words = format!("{}: {}", reason.name(), reason.meaning());
        text += &wrapped("  reason   ", &words);
    }
    if let Some(endpoint) = &explanation.endpoint {
        text += &wrapped("  endpoint ", &endpoint.name);
    }
    if group.knows_others {
        text += &wrapped("  level    ", &format!("{:.2}", group.level()));
    }
    text + &candidates(group, to)
}

fn candidates(group: &EndpointGroupSnapshot, to: SocketAddr) -> String {
    let all: Vec<&EndpointSnapshot> = group.candidates(to.is_ipv4()).collect();
    if all.is_empty() {
        return String::new();
    }
    let column = |heading, cell: &dyn Fn(&EndpointSnapshot) -> String| Column {
        heading,
        cells: all.iter().map(|one| cell(one)).collect(),
    };
    let own = |one: &EndpointSnapshot| (one.established + one.in_flight).to_string();
    let mut columns = vec![
        column("CANDIDATE", &|one| one.name.clone()),
        column(">OWN", &own),
    ];
    if group.knows_others {
        columns.push(column(">OTHERS", &|one| one.others.to_string()));
    }
    columns.push(column(">WEIGHT", &|one| one.weight.to_string()));
    columns.push(column(">LOAD", &|one| format!("{:.2}", one.load())));
    if group.knows_others {
        let room = |one: &EndpointSnapshot| room(group, one).unwrap_or_default();
        columns.push(column(">ROOM", &|one| format!("{:.2}", room(one))));
    }
    if all.iter().any(|one| one.avoided.is_some()) {
        columns.push(column("STATE", &|one| {
            let is_avoided = one.avoided.is_some();
            if is_avoided { "avoided" } else { "active" }.to_owned()
        }));
    }
    table(columns, &["WEIGHT", "OTHERS"])
}
