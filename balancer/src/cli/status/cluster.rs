//! `status --cluster` for people.

use std::time::Duration;

use balancer_common::abi::HealthState;

use crate::{
    cli::output::{Column, or, span, table, wrapped},
    config::Match,
    health::in_words,
    kubernetes::{
        BackendStatus, ClusterStatus, GroupStatus, PlacedService, PlacingStatus, PodHealth,
    },
};

/// An older node report is marked, in seconds: its daemon or its node may be gone.
const OLD: u64 = 60;

pub(super) fn text(status: &ClusterStatus) -> String {
    let mut text = wrapped("Cluster: ", &api(status));
    for problem in &status.problems {
        text += &wrapped("  ! ", problem);
    }
    for group in &status.groups {
        text += "\n";
        text += &group_text(group);
    }
    if !status.placing.services.is_empty() {
        text += "\n";
        text += &placing_text(&status.placing);
    }
    if status.complete && status.groups.is_empty() {
        text += "\nNo Service is found that the configuration asks for: see `kubectl get services -A --show-labels`.\n";
    }
    text
}

fn api(status: &ClusterStatus) -> String {
    let seen = format!("as node {} knows it", status.node);
    if !status.complete {
        return format!(
            "{seen}; the API server has not told everything yet, quotas stay as they were"
        );
    }
    match status.silent_seconds {
        0 => seen,
        seconds => format!(
            "{seen}; the API server has been silent for {}, quotas hold and then open",
            span(Duration::from_secs(seconds))
        ),
    }
}

/// Where connects of clients go, and who sees to that.
fn placing_text(placing: &PlacingStatus) -> String {
    let words = match &placing.why_not {
        Some(why) => format!("off on this node: {why}"),
        None => "on for the clients of this node".to_owned(),
    };
    let daemons = placing.daemons.map_or_else(String::new, |daemons| {
        let ago = span(Duration::from_secs(daemons.seconds_ago));
        format!(
            "; {} of the {} nodes that the DaemonSet selects had a daemon that is ready {ago} ago",
            daemons.ready, daemons.wanted
        )
    });
    let mut text = wrapped("Placing: ", &format!("{words}{daemons}"));
    for service in &placing.services {
        for note in &service.notes {
            text += &wrapped("  - ", &format!("{}: {note}", service.service));
        }
    }
    let column = |heading, cell: &dyn Fn(&PlacedService) -> String| Column {
        heading,
        cells: placing.services.iter().map(cell).collect(),
    };
    let frontends = |service: &PlacedService| {
        let frontends = service.frontends.iter().map(ToString::to_string);
        let pods = (service.matching == Match::Endpoints).then(|| "its pods".to_owned());
        match &frontends.chain(pods).collect::<Vec<_>>()[..] {
            [] => "-".to_owned(),
            all => all.join(", "),
        }
    };
    let placed = |service: &PlacedService| if service.placed { "yes" } else { "no" }.to_owned();
    let columns = vec![
        column("ENTRY", &|service| service.entry.clone()),
        column("SERVICE", &|service| service.service.to_string()),
        column("CLIENTS CONNECT TO", &frontends),
        column("PLACED", &placed),
    ];
    text + &table(columns, &["ENTRY"])
}

fn group_text(group: &GroupStatus) -> String {
    let id = &group.id;
    let mut text = format!(
        "{}: Service {}, target port {}\n",
        id.entry, id.service, id.port
    );
    text += &wrapped("  Quota: ", &group.sentence);
    if group.starved > 0 {
        let words = format!(
            "at least {} starved clients: so many sources are refused again and again, and served by \
             no pod. There may be several clients behind one (NAT).",
            group.starved
        );
        text += &wrapped("  ! ", &words);
    }
    for backend in &group.backends {
        if let Some(health) = &backend.health {
            text += &wrapped("  ! ", &unhealthy(backend, health));
        }
    }
    text + &backends(group)
}

/// Why a pod does not serve, and what follows.
fn unhealthy(backend: &BackendStatus, health: &PodHealth) -> String {
    let state = HealthState::ALL
        .into_iter()
        .find(|state| state.name() == health.state);
    let time = span(Duration::from_secs(health.seconds));
    let words = state.and_then(|state| in_words(state, &time));
    // Another version of the balancer may know other states.
    let words = words.unwrap_or_else(|| format!("{} since {time}", health.state));
    let share = if health.has_share {
        ""
    } else {
        " It has no share of a computed quota: its clients are refused there, and have room on the \
         other pods."
    };
    format!("{} is {words}.{share}", backend.pod)
}

/// The columns that a narrow terminal can do without, the least needed first.
const LEAST: [&str; 8] = [
    "WEIGHT", "EXEMPT", "MOVING", "PENDING", "ADDRESS", "ROOM", "NODE", "REPORTED",
];

fn backends(group: &GroupStatus) -> String {
    let column = |heading: &'static str, cell: &dyn Fn(&BackendStatus) -> String, total: &str| {
        let cells = group.backends.iter().map(cell);
        let cells = cells.chain([total.to_owned()]).collect();
        Column { heading, cells }
    };
    let number = |backend: &BackendStatus, value: Option<u32>, none: &str| {
        or(value, if backend.state.is_some() { none } else { "?" })
    };
    let sum = |value: fn(&BackendStatus) -> Option<u32>| -> String {
        let sum: u64 = group.backends.iter().filter_map(value).map(u64::from).sum();
        sum.to_string()
    };
    let established = sum(|backend| backend.established);
    let mut columns = vec![
        column("POD", &|backend| backend.pod.to_string(), "total"),
        column("NODE", &|backend| or(backend.node.as_ref(), "-"), ""),
        column("ADDRESS", &|backend| or(backend.address, "-"), ""),
        column("STATE", &state, ""),
        column(
            ">ESTABLISHED",
            &|backend| number(backend, backend.established, "?"),
            &established,
        ),
        column(
            ">QUOTA",
            &|backend| number(backend, backend.quota, "unlimited"),
            "",
        ),
        column(
            ">ROOM",
            &|backend| number(backend, backend.room, "unlimited"),
            "",
        ),
        column(
            ">PENDING",
            &|backend| number(backend, backend.pending, "-"),
            "",
        ),
    ];
    let any = |is_so: fn(&BackendStatus) -> bool| group.backends.iter().any(is_so);
    if any(|backend| backend.exempt.is_some_and(|exempt| exempt != 0)) {
        let exempt = sum(|backend| backend.exempt);
        columns.push(column(
            ">EXEMPT",
            &|backend| number(backend, backend.exempt, "?"),
            &exempt,
        ));
    }
    if any(|backend| backend.moving.is_some_and(|moving| moving != 0)) {
        let moving = sum(|backend| backend.moving);
        columns.push(column(
            ">MOVING",
            &|backend| number(backend, backend.moving, "?"),
            &moving,
        ));
    }
    if any(|backend| backend.weight != 1) {
        columns.push(column(">WEIGHT", &|backend| backend.weight.to_string(), ""));
    }
    columns.push(column(">REPORTED", &age, ""));
    table(columns, &LEAST)
}

/// The state that Kubernetes gives the pod, and the state of the backend where it is not active.
fn state(backend: &BackendStatus) -> String {
    let held = |value: Option<u32>| value.unwrap_or(0);
    let pod = match (backend.terminating, backend.drained, backend.ready) {
        (true, ..) => "terminating",
        (false, Some(true), _) if held(backend.established) > held(backend.exempt) => "draining",
        (false, Some(true), _) => "drained",
        (false, _, true) => "ready",
        (false, _, false) => "not ready",
    };
    match backend.state.as_deref() {
        Some("active") => match &backend.health {
            Some(health) => format!("{pod}, {}", health.state),
            None => pod.to_owned(),
        },
        Some(state) => format!("{pod}, {state}"),
        None => format!("{pod}, no report yet"),
    }
}

/// The age of what is shown.
fn age(backend: &BackendStatus) -> String {
    match backend.seconds_ago {
        None => "never".to_owned(),
        Some(0) => "now".to_owned(),
        Some(seconds) if seconds < OLD => format!("{seconds} s ago"),
        Some(seconds) => format!("{} ago (!)", span(Duration::from_secs(seconds))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::{DaemonsStatus, GroupId, ObjectName};

    fn name(namespace: &str, name: &str) -> ObjectName {
        ObjectName {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    fn backend(number: u8, established: u32, seconds_ago: u64) -> BackendStatus {
        BackendStatus {
            pod: name("skywalking", &format!("oap-{number}")),
            node: Some(format!("node-{number}")),
            address: Some([10, 244, number, 7].into()),
            ready: true,
            terminating: false,
            weight: 1,
            slot: Some(0),
            state: Some("active".to_owned()),
            established: Some(established),
            exempt: Some(2),
            pending: Some(0),
            quota: Some(78),
            room: Some((78 + 2_u32).saturating_sub(established)),
            health: None,
            drained: Some(false),
            moving: Some(0),
            seconds_ago: Some(seconds_ago),
        }
    }

    fn placing() -> PlacingStatus {
        PlacingStatus {
            on: true,
            why_not: None,
            zone: None,
            daemons: Some(DaemonsStatus {
                wanted: 100,
                ready: 97,
                seconds_ago: 130,
            }),
            services: vec![PlacedService {
                entry: "agents".to_owned(),
                service: name("skywalking", "skywalking-oap"),
                frontends: vec![([10, 96, 0, 7], 11800).into()],
                matching: Match::Service,
                placed: true,
                restrictions: Vec::new(),
                notes: Vec::new(),
            }],
        }
    }

    fn status(backends: Vec<BackendStatus>) -> ClusterStatus {
        ClusterStatus {
            schema: 1,
            node: "node-1".to_owned(),
            complete: true,
            silent_seconds: 0,
            problems: Vec::new(),
            placing: placing(),
            groups: vec![GroupStatus {
                id: GroupId {
                    entry: "agents".to_owned(),
                    service: name("skywalking", "skywalking-oap"),
                    port: 11800,
                },
                sentence: "ceil(202 connections (observed) × 1.15 / 3 ready) = 78".to_owned(),
                starved: 0,
                backends,
            }],
        }
    }

    /// docs/kubernetes.md shows it.
    #[test]
    fn the_pods_of_all_nodes_are_a_table() {
        let backends = vec![backend(1, 70, 0), backend(2, 69, 1), backend(3, 69, 2)];
        let shown = text(&status(backends));
        let docs = include_str!("../../../../docs/kubernetes.md");
        let indented = docs.lines().filter_map(|line| match line {
            "" => Some(line),
            line => line.strip_prefix("    "),
        });
        let examples = indented.collect::<Vec<_>>().join("\n");
        assert!(
            examples.contains(&shown),
            "docs/kubernetes.md lacks:\n{shown}"
        );
    }

    #[test]
    fn whose_connects_are_not_placed_is_said() {
        let mut status = status(vec![backend(1, 70, 0)]);
        status.placing.on = false;
        status.placing.why_not = Some("`place: off`".to_owned());
        status.placing.daemons = None;
        let service = &mut status.placing.services[0];
        service.placed = false;
        service.notes = vec!["sessionAffinity is ClientIP".to_owned()];
        let shown = text(&status);
        for words in [
            "Placing: off on this node: `place: off`",
            "- skywalking/skywalking-oap: sessionAffinity",
            "10.96.0.7:11800     no",
        ] {
            assert!(shown.contains(words), "{words:?} is not in:\n{shown}");
        }
    }

    #[test]
    fn what_is_matched_is_shown() {
        let shown = |headless: bool, matching| {
            let mut status = status(Vec::new());
            let service = &mut status.placing.services[0];
            if headless {
                service.frontends.clear();
            }
            service.matching = matching;
            let shown = text(&status);
            let row = shown.lines().last().unwrap_or_default();
            row.split_whitespace().skip(2).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(shown(false, Match::Service), "10.96.0.7:11800 yes");
        assert_eq!(
            shown(false, Match::Endpoints),
            "10.96.0.7:11800, its pods yes"
        );
        assert_eq!(shown(true, Match::Endpoints), "its pods yes");
        assert_eq!(shown(true, Match::Service), "- yes");
    }

    #[test]
    fn a_pod_that_does_not_serve_is_named_with_since_when_and_why() {
        let health = |seconds, has_share| PodHealth {
            state: "hung".to_owned(),
            seconds,
            has_share,
        };
        let mut hung = backend(2, 80, 1);
        hung.health = Some(health(74, false));
        let mut young = backend(3, 80, 1);
        young.health = Some(health(4, true));
        let shown = text(&status(vec![backend(1, 80, 0), hung, young]));
        for words in [
            "  ! skywalking/oap-2 is hung since 1 min 14 s: it does not read what",
            "It has no share of a computed quota",
            "  ! skywalking/oap-3 is hung since 4.0 s: it does not",
            " ready, hung ",
        ] {
            assert!(shown.contains(words), "{words:?} is not in:\n{shown}");
        }
        assert_eq!(shown.matches("no share").count(), 1, "{shown}");
    }

    #[test]
    fn what_is_old_or_missing_or_wrong_is_said() {
        let silent = BackendStatus {
            ready: false,
            slot: None,
            state: None,
            established: None,
            exempt: None,
            pending: None,
            quota: None,
            room: None,
            health: None,
            drained: None,
            moving: None,
            seconds_ago: None,
            ..backend(3, 2, 0)
        };
        let mut status = status(vec![backend(1, 80, 0), backend(2, 80, 75), silent]);
        status.silent_seconds = 61;
        status.problems = vec!["something is wrong".to_owned()];
        status.groups[0].starved = 2;
        let shown = text(&status);
        for words in [
            "the API server has been silent for 1 min 1 s",
            "! something is wrong",
            "! at least 2 starved clients",
            "1 min 15 s ago (!)",
            "not ready, no report yet",
            "never",
        ] {
            assert!(shown.contains(words), "{words:?} is not in:\n{shown}");
        }
    }
}
