//! Placing in `status`, for people.

use balancer_common::place::PlaceReason;

use crate::{
    cli::output::{Column, span, table, wrapped},
    dataplane::{EndpointGroupSnapshot, EndpointSnapshot, PlacingNotes},
};

/// The columns that a narrow terminal does without first.
const LEAST: [&str; 4] = ["FAILED", "WEIGHT", "IN FLIGHT", "OTHERS"];

/// What keeps connects from being placed; nothing where nothing does.
pub(in crate::cli) fn trouble(notes: &PlacingNotes) -> String {
    let refused = notes.refused.iter().map(|why| {
        let words = format!("OFF: connects of this node go where clients send them: {why}");
        wrapped("Placing: ", &words)
    });
    let left_out = notes.left_out.iter();
    refused
        .chain(left_out.map(|what| wrapped("Placing: ", what)))
        .collect()
}

/// What there is to say of an endpoint group.
pub(in crate::cli) fn group(group: &EndpointGroupSnapshot, notes: &PlacingNotes) -> String {
    let mut text = heading(group);
    let how = match notes.refused {
        Some(_) if !group.is_removed() => "off, as said above".to_owned(),
        _ => how(group),
    };
    text += &wrapped("  Placing: ", &how);
    if !group.endpoints.is_empty() {
        text += &endpoints(group);
    }
    for endpoint in &group.endpoints {
        if let Some(words) = note(endpoint) {
            text += &wrapped("  - ", &words);
        }
    }
    text + &verdicts(group)
}

fn heading(group: &EndpointGroupSnapshot) -> String {
    let mut to: Vec<_> = group.frontends.iter().map(ToString::to_string).collect();
    if group.is_removed() {
        to.push("nothing any more".to_owned());
    } else if !group.own_addresses.is_empty() {
        to.push("the endpoints' own addresses".to_owned());
    }
    let to = to.join(", ");
    wrapped(&format!("{}: ", group.name), &format!("connects to {to}"))
}

/// How connects are placed.
fn how(group: &EndpointGroupSnapshot) -> String {
    let known = group.known_for.is_none_or(|left| !left.is_zero());
    let how = if group.is_removed() {
        "removed; connections that were placed are counted until they end"
    } else if !known {
        "off: nothing fresh is known of the endpoints, and connects are left as they are"
    } else if group.dry_run {
        "dry-run: endpoints are chosen and counted, and connects are left as they are"
    } else if group.knows_others {
        "by the connections of all nodes"
    } else if group.has_lost_most {
        "by the connections of this node alone: it has just lost most of them"
    } else {
        "by the connections of this node alone"
    };
    match group.rank {
        Some((rank, nodes)) if !group.is_removed() => {
            format!("{how}; this is node {} of {nodes}", rank.saturating_add(1))
        }
        _ => how.to_owned(),
    }
}

fn endpoints(group: &EndpointGroupSnapshot) -> String {
    let column = |heading, cell: &dyn Fn(&EndpointSnapshot) -> String| Column {
        heading,
        cells: group.endpoints.iter().map(cell).collect(),
    };
    let any = |is_so: &dyn Fn(&EndpointSnapshot) -> bool| group.endpoints.iter().any(is_so);
    let mut columns = vec![
        column("ENDPOINT", &|one| shown_name(one)),
        column("STATE", &|one| state(one).to_owned()),
        column(">PLACED", &|one| one.established.to_string()),
        column(">IN FLIGHT", &|one| one.in_flight.to_string()),
    ];
    if any(&|one| one.published.is_some()) {
        columns.push(column(">OTHERS", &|one| one.others.to_string()));
        columns.push(column(">PUBLISHED", &published));
    }
    if any(&|one| one.weight != 1) {
        columns.push(column(">WEIGHT", &|one| one.weight.to_string()));
    }
    if any(&|one| one.failed > 0) {
        columns.push(column(">FAILED", &|one| one.failed.to_string()));
    }
    table(columns, &LEAST)
}

/// Long names of pods end with what tells them apart.
fn shown_name(endpoint: &EndpointSnapshot) -> String {
    const LONGEST: usize = 40;
    let name = &endpoint.name;
    let length = name.chars().count();
    if length <= LONGEST {
        return name.clone();
    }
    let end: String = name.chars().skip(length + 1 - LONGEST).collect();
    format!("…{end}")
}

fn state(endpoint: &EndpointSnapshot) -> &'static str {
    if endpoint.leaving {
        "leaving"
    } else if endpoint.avoided.is_some() {
        "avoided"
    } else if endpoint.weight == 0 {
        "drained"
    } else {
        "active"
    }
}

fn published(endpoint: &EndpointSnapshot) -> String {
    match endpoint.published {
        None => "?".to_owned(),
        Some((connections, age)) => format!("{connections}, {} ago", span(age)),
    }
}

/// What the table has no room for.
fn note(endpoint: &EndpointSnapshot) -> Option<String> {
    if let Some((since, left)) = endpoint.avoided {
        return Some(format!(
            "{} is avoided for {}, and for {} more: {}; {} of {} have failed",
            endpoint.name,
            span(since),
            span(left),
            EndpointSnapshot::WHY_AVOIDED,
            endpoint.failed,
            endpoint.total
        ));
    }
    endpoint.leaving.then(|| {
        format!(
            "{} is removed: it gets no new connections, and those that it has are counted until \
             they end",
            endpoint.name
        )
    })
}

fn verdicts(group: &EndpointGroupSnapshot) -> String {
    let given = group.verdicts.iter().filter(|(_, count)| *count > 0);
    let given: Vec<&(PlaceReason, u64)> = given.collect();
    if given.is_empty() {
        return "  No connect has been placed yet.\n".to_owned();
    }
    let names = given.iter().map(|(reason, _)| reason.name().len());
    let widest = names.max().unwrap_or(0).max("REASON".len());
    let line = |count: &str, reason: &str, meaning: &str| {
        wrapped(&format!("  {count:>8}  {reason:<widest$}  "), meaning)
    };
    let mut text = "\n".to_owned();
    text += &line("CONNECTS", "REASON", "MEANING");
    for (reason, count) in given {
        text += &line(&count.to_string(), reason.name(), reason.meaning());
    }
    text
}
