use std::{collections::BTreeSet, path::Path, time::Duration};

use balancer_common::abi::{
    AuditTotals, EndpointGroup, HealthState, Keepalive, Silence, SlotMoves,
};
use balancer_common::place::PlaceReason;
use balancer_common::{BackendState, Policy, Reason, Verdict};
use clap::CommandFactory;

use super::*;
use crate::{
    config::Effect,
    dataplane::{
        Avoided, BackendHealth, BackendSnapshot, DaemonNotes, DaemonSnapshot, DownBackend,
        EndpointGroupSnapshot, EndpointSnapshot, Explanation, FailedReload, ListeningBackend,
        PlacingNotes, ServerSnapshot, ServiceSnapshot, SeveralNetns, Snapshot, Unsuited,
    },
    doctor::{Check, Report, Status},
    kubernetes::{BackendStatus, GroupId, GroupStatus, ObjectName, PlacingStatus},
};

fn backend(slot: u32, address: &str, established: u32, quota: Option<u32>) -> BackendSnapshot {
    BackendSnapshot {
        slot,
        address: address.parse().unwrap(),
        netns: 4_026_531_840,
        state: BackendState::Active,
        weight: 1,
        quota,
        overridden: false,
        server: None,
        established,
        exempt: 0,
        pending: Some(0),
        silence: Silence::default(),
        drained: false,
        moves: SlotMoves::default(),
        steerable: true,
        health: Some(BackendHealth::SERVING),
        note: None,
    }
}

fn agents() -> ServiceSnapshot {
    let verdicts = Reason::ALL.iter().map(|reason| match reason {
        Reason::Steered => (*reason, 1203),
        Reason::OverQuota => (*reason, 12),
        _ => (*reason, 0),
    });
    ServiceSnapshot {
        id: 0,
        name: "agents".to_owned(),
        port: 11800,
        address: None,
        policy: Policy::LeastConnections,
        virtual_port: true,
        effect: Effect::On,
        rule: "300 clients × 2, 15% headroom, at least 16".to_owned(),
        sentence: "ceil(300 clients × 2 × 1.15 / 3 ready) = 230".to_owned(),
        keepalive: Some(Keepalive::DEFAULT),
        quota_override: None,
        unattributed: 0,
        backends: vec![
            backend(0, "127.0.0.1:21801", 120, Some(230)),
            BackendSnapshot {
                pending: Some(2),
                exempt: 1,
                weight: 2,
                ..backend(1, "[::1]:21802", 9, Some(230))
            },
            BackendSnapshot {
                overridden: true,
                ..backend(7, "127.0.0.1:21803", 120, Some(0))
            },
        ],
        down: Vec::new(),
        verdicts: verdicts.collect(),
        warnings: Vec::new(),
    }
}

/// The other extremes: an own port, nothing limited, backends that something is the matter with.
fn als() -> ServiceSnapshot {
    ServiceSnapshot {
        id: 1,
        name: "als".to_owned(),
        port: 11802,
        address: Some("10.0.0.9".parse().unwrap()),
        policy: Policy::SourceHash,
        virtual_port: false,
        effect: Effect::On,
        rule: "none: steering only".to_owned(),
        sentence: "set by hand: 50 for each backend".to_owned(),
        keepalive: Some(Keepalive::DEFAULT),
        quota_override: Some(50),
        unattributed: 0,
        backends: vec![
            BackendSnapshot { netns: 7, state: BackendState::Candidate, ..backend(3, "0.0.0.0:11802", 4, None) },
            BackendSnapshot { state: BackendState::Closed, pending: None, ..backend(4, "[::]:11802", 5, None) },
            BackendSnapshot {
                steerable: false,
                pending: None,
                note: Some("an MPTCP listener: counted and limited, but not steered to; GODEBUG=multipathtcp=0 makes it ordinary".to_owned()),
                ..backend(5, "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:11802", 1_000_000, None)
            },
        ],
        down: Vec::new(),
        verdicts: Reason::ALL.iter().map(|reason| (*reason, 0)).collect(),
        warnings: Vec::new(),
    }
}

fn alive() -> DaemonSnapshot {
    DaemonSnapshot {
        refuses: true,
        heartbeat_age: Some(Duration::from_millis(412)),
        fail_open_after: Duration::from_secs(30),
        audit_totals: AuditTotals {
            checks: 7,
            ..AuditTotals::default()
        },
    }
}

/// An endpoint group as in a cluster; nobody has failed.
fn placing() -> EndpointGroupSnapshot {
    let endpoint = |index: u32, established, others| EndpointSnapshot {
        index,
        name: format!("skywalking/oap-{index}"),
        addresses: vec![format!("10.244.0.{index}:11800").parse().unwrap()],
        weight: 1,
        leaving: false,
        established,
        in_flight: 0,
        total: established,
        failed: 0,
        others,
        published: Some((others + established, Duration::from_millis(1_200))),
        avoided: None,
    };
    EndpointGroupSnapshot {
        name: "agents skywalking/oap".to_owned(),
        frontends: vec!["10.96.0.9:11800".parse().unwrap()],
        own_addresses: Vec::new(),
        dry_run: false,
        rank: Some((2, 100)),
        known_for: Some(Duration::from_secs(58)),
        knows_others: true,
        endpoints: vec![endpoint(1, 4, 37), endpoint(2, 4, 36)],
        verdicts: PlaceReason::ALL
            .iter()
            .map(|one| (*one, u64::from(*one == PlaceReason::Placed) * 8))
            .collect(),
        group: EndpointGroup {
            level: 45 * EndpointGroup::LOAD_ONE,
            start: 0,
            known_until_ns: 0,
            lost_below: 0,
        },
        draws: 8,
        has_lost_most: false,
    }
}

/// The other extremes: a host, endpoints that something is the matter with.
fn placing_of_a_host() -> EndpointGroupSnapshot {
    let mut group = placing();
    group.name = "agents".to_owned();
    group.frontends = vec![
        "10.0.0.9:11800".parse().unwrap(),
        "[fd00::9]:11800".parse().unwrap(),
    ];
    (group.rank, group.known_for, group.knows_others) = (None, None, false);
    for endpoint in &mut group.endpoints {
        endpoint.name = endpoint.addresses[0].to_string();
        (endpoint.others, endpoint.published) = (0, None);
    }
    let second = &mut group.endpoints[1];
    (second.weight, second.failed, second.total) = (2, 3, 12);
    second.avoided = Some((Duration::from_millis(900), Duration::from_millis(3_100)));
    let third = EndpointSnapshot {
        leaving: true,
        name: "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:11800".to_owned(),
        ..group.endpoints[0].clone()
    };
    group.endpoints.push(third);
    group
}

#[test]
fn status_of_placing() {
    let snapshot = Snapshot {
        services: Vec::new(),
        placing: vec![placing(), placing_of_a_host()],
        daemon: alive(),
    };
    assert_text(
        &status_of(&snapshot),
        "\
Daemon: alive, last heartbeat 0.4 s ago

agents skywalking/oap: connects to 10.96.0.9:11800
  Placing: by the connections of all nodes; this is node 3 of 100
  ENDPOINT          STATE   PLACED  IN FLIGHT  OTHERS      PUBLISHED
  skywalking/oap-1  active       4          0      37  41, 1.2 s ago
  skywalking/oap-2  active       4          0      36  40, 1.2 s ago

  CONNECTS  REASON  MEANING
         8  placed  sent to the endpoint that should have it

agents: connects to 10.0.0.9:11800, [fd00::9]:11800
  Placing: by the connections of this node alone
  ENDPOINT                                  STATE    PLACED  IN FLIGHT  WEIGHT  FAILED
  10.244.0.1:11800                          active        4          0       1       0
  10.244.0.2:11800                          avoided       4          0       2       3
  …b8:aaaa:bbbb:cccc:dddd:eeee:ffff]:11800  leaving       4          0       1       0
  - 10.244.0.2:11800 is avoided for 0.9 s, and for 3.1 s more: a connect was
    refused, or not answered in time; 3 of 12 have failed
  - [2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:11800 is removed: it gets no new
    connections, and those that it has are counted until they end

  CONNECTS  REASON  MEANING
         8  placed  sent to the endpoint that should have it
",
    );
    let notes = DaemonNotes::default();
    let json = serde_json::to_value(status::Json::new(&snapshot, &notes)).unwrap();
    assert_eq!(
        json["placing"][1]["endpoints"][1],
        serde_json::json!({
            "name": "10.244.0.2:11800",
            "addresses": ["10.244.0.2:11800"],
            "weight": 2,
            "leaving": false,
            "established": 4,
            "in_flight": 0,
            "total": 12,
            "failed": 3,
            "others": 0,
            "published": null,
            "published_age_ms": null,
            "avoided": {
                "since_ms": 900,
                "for_ms": 3100,
                "reason": "a connect was refused, or not answered in time",
            },
        })
    );
    let group = &json["placing"][0];
    assert_eq!(group["group"], "agents skywalking/oap");
    assert_eq!(group["frontends"], serde_json::json!(["10.96.0.9:11800"]));
    assert_eq!(group["verdicts"]["placed"], 8);
    assert_eq!(group["endpoints"][0]["published"], 41);
}

#[test]
fn what_keeps_connects_from_being_placed_is_said_first() {
    let mut removed = placing_of_a_host();
    removed.frontends.clear();
    let snapshot = Snapshot {
        services: Vec::new(),
        placing: vec![placing(), removed],
        daemon: alive(),
    };
    let notes = DaemonNotes {
        placing: PlacingNotes {
            refused: Some("another program sits there".to_owned()),
            left_out: vec!["there is no room for 3 endpoints of `als`".to_owned()],
        },
        ..DaemonNotes::default()
    };
    let text = status::text(&snapshot, &notes);
    assert!(
        text.starts_with(
            "\
Daemon: alive, last heartbeat 0.4 s ago
Placing: OFF: connects of this node go where clients send them: another program
         sits there
Placing: there is no room for 3 endpoints of `als`

agents skywalking/oap: connects to 10.96.0.9:11800
  Placing: off, as said above
"
        ),
        "{text}"
    );
    assert!(text.contains("  Placing: removed; connections"), "{text}");
    let json = serde_json::to_value(status::Json::new(&snapshot, &notes)).unwrap();
    assert_eq!(
        json["place"],
        serde_json::json!({
            "refused": "another program sits there",
            "left_out": ["there is no room for 3 endpoints of `als`"],
        })
    );
    let metrics = crate::metrics::text(&snapshot, &notes).unwrap();
    for line in ["balancer_place_refused 1", "balancer_place_left_out 1"] {
        assert!(metrics.lines().any(|found| found == line), "{metrics}");
    }
}

#[test]
fn own_addresses_are_not_listed_one_by_one_for_people() {
    let shown = |frontends: &[&str], own: &[&str]| {
        let parse = |all: &[&str]| all.iter().map(|one| one.parse().unwrap()).collect();
        let group = EndpointGroupSnapshot {
            frontends: parse(frontends),
            own_addresses: parse(own),
            ..placing()
        };
        let snapshot = Snapshot {
            services: Vec::new(),
            placing: vec![group],
            daemon: alive(),
        };
        let notes = DaemonNotes::default();
        let json = serde_json::to_value(status::Json::new(&snapshot, &notes)).unwrap();
        assert_eq!(
            json["placing"][0]["frontends"],
            serde_json::json!(frontends)
        );
        assert_eq!(json["placing"][0]["own_addresses"], serde_json::json!(own));
        let text = status_of(&snapshot);
        let heading = text.split("Placing:").next().unwrap_or_default();
        let words = heading.split_whitespace().collect::<Vec<_>>().join(" ");
        words
            .split("agents skywalking/oap: ")
            .nth(1)
            .map(str::to_owned)
    };
    let (service, own) = ("10.96.0.9:11800", ["10.244.0.1:11800", "10.244.0.2:11800"]);
    let both = "connects to 10.96.0.9:11800, the endpoints' own addresses";
    assert_eq!(shown(&[service], &own).as_deref(), Some(both));
    let alone = "connects to the endpoints' own addresses";
    assert_eq!(shown(&[], &own).as_deref(), Some(alone));
    let none = "connects to nothing any more";
    assert_eq!(shown(&[], &[]).as_deref(), Some(none));
}

#[test]
fn metrics_of_placing() {
    let snapshot = Snapshot {
        services: Vec::new(),
        placing: vec![placing(), placing_of_a_host()],
        daemon: alive(),
    };
    let text = crate::metrics::text(&snapshot, &DaemonNotes::default()).unwrap();
    for line in [
        r#"balancer_place_established_connections{group="agents skywalking/oap",endpoint="skywalking/oap-2"} 4"#,
        r#"balancer_place_others_connections{group="agents skywalking/oap",endpoint="skywalking/oap-1"} 37"#,
        r#"balancer_place_avoided{group="agents",endpoint="10.244.0.2:11800"} 1"#,
        r#"balancer_place_failed_total{group="agents",endpoint="10.244.0.2:11800"} 3"#,
        r#"balancer_place_connects_total{group="agents",reason="placed"} 8"#,
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn placing_fits_terminals_of_60_and_80_columns() {
    let snapshot = Snapshot {
        services: Vec::new(),
        placing: vec![placing(), placing_of_a_host()],
        daemon: alive(),
    };
    for columns in [60, 80] {
        let text = at_columns(columns, || status_of(&snapshot));
        for line in text.lines() {
            assert!(line.chars().count() <= columns, "{columns} columns: {line}");
        }
        assert_eq!(text.matches("10.244.0.2:11800 ").count(), 2, "{text}");
    }
}

/// What `status` prints where the daemon has noted nothing.
fn status_of(snapshot: &Snapshot) -> String {
    status::text(snapshot, &DaemonNotes::default())
}

/// What `text` prints on a terminal with so many columns.
fn at_columns(columns: usize, text: impl FnOnce() -> String) -> String {
    output::set_columns(Some(columns));
    let text = text();
    output::set_columns(None);
    text
}

/// Shows the first difference of two texts line by line, which a failing `assert_eq!` of long
/// strings hides.
#[track_caller]
fn assert_text(actual: &str, expected: &str) {
    for (number, (actual, expected)) in actual.lines().zip(expected.lines()).enumerate() {
        assert_eq!(actual, expected, "line {}", number + 1);
    }
    assert_eq!(actual, expected);
}

#[test]
fn status_of_a_service_under_pressure() {
    let snapshot = Snapshot {
        services: vec![agents()],
        placing: Vec::new(),
        daemon: alive(),
    };
    assert_text(
        &status_of(&snapshot),
        "\
Daemon: alive, last heartbeat 0.4 s ago

agents: virtual port 11800, least-connections
  Quota: ceil(300 clients × 2 × 1.15 / 3 ready) = 230
  SLOT  BACKEND          STATE   ESTABLISHED  QUOTA  USED  PENDING  EXEMPT  WEIGHT
     0  127.0.0.1:21801  active          120    230   52%        0       0       1
     7  127.0.0.1:21803  active          120     0*              0       0       1
     1  [::1]:21802      active            9    230    3%        2       1       2
        total                            249    460              2       1
  * set by hand; `balancer quota clear agents --slot SLOT` goes back to the rule
  - slot 7: its quota is 0: it gets no new connections

  LOOK-UPS  VERDICT  REASON      MEANING
      1203  steer    steered     virtual port: steered to a backend with room
        12  refuse   over-quota  every backend that could take it is at its
                                 quota
",
    );
}

#[test]
fn status_of_backends_with_something_the_matter() {
    let snapshot = Snapshot {
        services: vec![als()],
        placing: Vec::new(),
        daemon: alive(),
    };
    assert_text(
        &status_of(&snapshot),
        "\
Daemon: alive, last heartbeat 0.4 s ago

als: port 10.0.0.9:11802, source-hash
  Quota: 50 for each backend, set by hand; `balancer quota clear als` goes back
         to the rule (none: steering only)
  SLOT  BACKEND                                         STATE      ESTABLISHED      QUOTA  USED  PENDING       NETNS
     3  0.0.0.0:11802                                   candidate            4  unlimited              0           7
     4  [::]:11802                                      closed               5                         ?  4026531840
     5  [2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:11802  active         1000000  unlimited              ?  4026531840
        total                                                          1000009  unlimited              ?
  - slot 3: not confirmed by the daemon yet: counted, but no connection is
    steered to it
  - slot 4: its listener is gone; its connections remain until their clients
    leave
  - slot 5: an MPTCP listener: counted and limited, but not steered to;
    GODEBUG=multipathtcp=0 makes it ordinary
  No connection has been looked up yet.
",
    );
}

/// A service with so many ordinary backends, whose addresses are in another order than their slots.
fn service_of(backends: u32) -> ServiceSnapshot {
    let numbered = |slot: u32| {
        let port = 22_000 - slot;
        backend(slot, &format!("127.0.0.1:{port}"), 100 + slot, Some(230))
    };
    ServiceSnapshot {
        backends: (0..backends).map(numbered).collect(),
        ..agents()
    }
}

#[test]
fn status_fits_terminals_of_60_and_80_columns() {
    for columns in [60, 80] {
        for backends in [0, 1, 3, 30] {
            let mut odd = service_of(backends);
            for backend in &mut odd.backends {
                (backend.exempt, backend.weight, backend.netns) = (3, 2, backend.slot.into());
                backend.overridden = backend.slot == 1;
            }
            let snapshot = Snapshot {
                services: vec![service_of(backends), odd],
                placing: Vec::new(),
                daemon: alive(),
            };
            let services: Vec<_> = snapshot.services.iter().collect();
            let text = at_columns(columns, || status_of(&snapshot) + &quota::text(&services));
            for line in text.lines() {
                assert!(line.chars().count() <= columns, "{columns} columns: {line}");
            }
            for backend in &snapshot.services[0].backends {
                let address = backend.address.to_string();
                let rows = text.lines().filter(|line| line.contains(&address));
                assert_eq!(rows.count(), 4, "{text}");
            }
        }
    }
}

#[test]
fn what_a_narrow_terminal_has_no_room_for_is_named() {
    let snapshot = Snapshot {
        services: vec![agents()],
        placing: Vec::new(),
        daemon: alive(),
    };
    let text = at_columns(60, || status_of(&snapshot));
    assert_text(
        &text,
        "\
Daemon: alive, last heartbeat 0.4 s ago

agents: virtual port 11800, least-connections
  Quota: ceil(300 clients × 2 × 1.15 / 3 ready) = 230
  SLOT  BACKEND          STATE   ESTABLISHED  QUOTA  USED
     0  127.0.0.1:21801  active          120    230   52%
     7  127.0.0.1:21803  active          120     0*
     1  [::1]:21802      active            9    230    3%
        total                            249    460
  (no room for WEIGHT, EXEMPT, PENDING; `-o json` has all)
  * set by hand; `balancer quota clear agents --slot SLOT`
    goes back to the rule
  - slot 7: its quota is 0: it gets no new connections

  LOOK-UPS  REASON      MEANING
      1203  steered     virtual port: steered to a backend
                        with room
        12  over-quota  every backend that could take it is
                        at its quota
",
    );
    let wide = at_columns(200, || status_of(&snapshot));
    assert!(
        wide.contains("WEIGHT") && !wide.contains("no room"),
        "{wide}"
    );
    let piped = status_of(&snapshot);
    assert!(
        piped.contains("WEIGHT") && !piped.contains("no room"),
        "{piped}"
    );
}

#[test]
fn backends_are_in_the_order_of_their_addresses() {
    let snapshot = Snapshot {
        services: vec![service_of(12)],
        placing: Vec::new(),
        daemon: alive(),
    };
    for text in [status_of(&snapshot), quota::text(&[&snapshot.services[0]])] {
        let ports: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split_once("127.0.0.1:")?.1.split(' ').next())
            .collect();
        assert!(ports.is_sorted() && ports.len() == 12, "{text}");
    }
}

#[test]
fn columns_that_say_nothing_are_left_out() {
    let snapshot = Snapshot {
        services: vec![service_of(2)],
        placing: Vec::new(),
        daemon: alive(),
    };
    let text = status_of(&snapshot);
    assert!(
        text.contains("  SLOT  BACKEND          STATE   ESTABLISHED  QUOTA  USED  PENDING\n"),
        "{text}"
    );
}

#[test]
fn status_says_that_a_reload_failed() {
    let snapshot = Snapshot {
        services: vec![agents()],
        placing: Vec::new(),
        daemon: alive(),
    };
    let notes = DaemonNotes {
        failed_reload: Some(FailedReload {
            age: Duration::from_secs(75),
            error: "the old one stays in force: /etc/balancer.yaml:3:5: unknown key `prot`"
                .to_owned(),
        }),
        ..DaemonNotes::default()
    };
    let text = status::text(&snapshot, &notes);
    assert!(
        text.starts_with(
            "\
Daemon: alive, last heartbeat 0.4 s ago
Reload: FAILED 1 min 15 s ago (`balancer reload` tries again): the old one stays
        in force: /etc/balancer.yaml:3:5: unknown key `prot`

agents:"
        ),
        "{text}"
    );
    let json = serde_json::to_value(status::Json::new(&snapshot, &notes)).unwrap();
    assert_eq!(json["agent"]["failed_reload"]["age_ms"], 75_000);
    let error = json["agent"]["failed_reload"]["error"].as_str().unwrap();
    assert!(error.contains("/etc/balancer.yaml:3:5: "), "{error}");
}

#[test]
fn a_daemon_whose_process_is_gone_is_dead_at_its_first_missed_heartbeat() {
    let of = |milliseconds| {
        let mut snapshot = Snapshot {
            services: Vec::new(),
            placing: Vec::new(),
            daemon: alive(),
        };
        snapshot.daemon.heartbeat_age = Some(Duration::from_millis(milliseconds));
        let notes = DaemonNotes {
            ended: Some(4321),
            ..DaemonNotes::default()
        };
        let json = serde_json::to_value(status::Json::new(&snapshot, &notes)).unwrap();
        let metrics = crate::metrics::text(&snapshot, &notes).unwrap();
        let alive = json["agent"]["alive"].as_bool().unwrap();
        let series = format!("balancer_alive {}\n", i32::from(alive));
        assert!(metrics.contains(&series), "{metrics}");
        (status::text(&snapshot, &notes), alive)
    };
    let (dead, alive_then) = of(1_600);
    assert!(!alive_then, "JSON and metrics say what the text says");
    assert!(
        dead.starts_with(
            "Daemon: DEAD: its process 4321 is gone, last heartbeat 1.6 s ago; from 30 s on"
        ),
        "{dead}"
    );
    let (beats, alive_then) = of(900);
    assert!(
        alive_then && beats.starts_with("Daemon: alive, "),
        "another process namespace's number"
    );
    let mut snapshot = Snapshot {
        services: Vec::new(),
        placing: Vec::new(),
        daemon: alive(),
    };
    (snapshot.daemon.refuses, snapshot.daemon.heartbeat_age) =
        (false, Some(Duration::from_secs(99)));
    let long_dead = status::text(
        &snapshot,
        &DaemonNotes {
            ended: Some(4321),
            ..DaemonNotes::default()
        },
    );
    assert!(
        long_dead.starts_with("Daemon: DEAD: its process 4321 is gone, last heartbeat 1 min 39 s"),
        "{long_dead}"
    );
}

#[test]
fn status_says_when_everybody_is_refused() {
    let mut service = agents();
    service.backends.truncate(2);
    service.backends[0].established = 230;
    service.backends[1].established = 229;
    let snapshot = Snapshot {
        services: vec![service],
        placing: Vec::new(),
        daemon: alive(),
    };
    let text = status_of(&snapshot);
    assert!(text.contains("  ! Every backend is at its quota: new clients are refused. Raise it with\n    `balancer quota set agents N`, or start another backend.\n"), "{text}");
    let mut snapshot = snapshot;
    snapshot.services[0].backends[1].pending = Some(1);
    assert!(!status_of(&snapshot).contains('!'));
}

#[test]
fn status_says_when_nobody_listens() {
    let mut closed = agents();
    for backend in &mut closed.backends {
        backend.state = BackendState::Closed;
    }
    let mut none = als();
    none.backends.clear();
    let text = status_of(&Snapshot {
        services: vec![closed, none],
        placing: Vec::new(),
        daemon: alive(),
    });
    assert!(
        text.contains("  ! No backend: none of its backends listens"),
        "{text}"
    );
    assert!(
        text.contains("  ! No backend: nobody listens on it"),
        "{text}"
    );
    assert!(
        text.contains("  - each of slots 0, 1, 7: its listener is gone"),
        "{text}"
    );
}

#[test]
fn backends_that_do_not_serve_are_named_with_since_when_and_why() {
    let mut service = agents();
    service.backends[0].health = Some(BackendHealth {
        state: HealthState::Hung,
        age: Duration::from_secs(75),
    });
    service.backends[2].health = None;
    let mut most = service.clone();
    most.backends[1].health = Some(BackendHealth {
        state: HealthState::Stalled,
        age: Duration::from_millis(2_400),
    });
    let snapshot = Snapshot {
        services: vec![service, most],
        placing: Vec::new(),
        daemon: alive(),
    };
    let text = status_of(&snapshot);
    for words in [
        "  ! 127.0.0.1:21801 (slot 0) is hung since 1 min 15 s: it does not read what its\n    connections have received.\n  ! New connections go to the other backends.",
        "  ! [::1]:21802 (slot 1) is stalled since 2.4 s: connections wait in its accept\n    queue, and it accepts none.\n",
        "  ! More than half of the backends (2 of 2) do not serve, so none of them is\n    avoided.\n",
        "     0  127.0.0.1:21801  hung             120",
        "     7  127.0.0.1:21803  active           120",
    ] {
        assert!(text.contains(words), "{words:?} is not in:\n{text}");
    }
    let json = serde_json::to_value(status::Json::new(&snapshot, &DaemonNotes::default())).unwrap();
    let backends = &json["services"][0]["backends"];
    let hung = &backends[0]["health"];
    assert_eq!(
        (&hung["state"], &hung["since_ms"]),
        (&"hung".into(), &75_000.into())
    );
    assert_eq!(
        hung["reason"],
        "it does not read what its connections have received"
    );
    assert_eq!(backends[0]["state"], "active");
    assert!(backends[2]["health"].is_null());
    let metrics = crate::metrics::text(&snapshot, &DaemonNotes::default()).unwrap();
    for (slot, health, value) in [(0, "hung", 1), (0, "serving", 0), (1, "stalled", 1)] {
        let series = |line: &&str| {
            line.starts_with("balancer_backend_health{")
                && line.contains(&format!("slot=\"{slot}\""))
                && line.ends_with(&format!("health=\"{health}\"}} {value}"))
        };
        assert!(
            metrics.lines().any(|line| series(&line)),
            "{health}: {metrics}"
        );
    }
}

#[test]
fn backends_that_are_named_and_do_not_listen_have_a_row() {
    let down = |address: &str, since| DownBackend {
        address: address.parse().unwrap(),
        since,
    };
    let mut service = agents();
    service.backends.truncate(1);
    service.down = vec![
        down("127.0.0.1:21800", Some(Duration::from_secs(75))),
        down("127.0.0.1:21802", None),
    ];
    let mut none = service.clone();
    none.backends.clear();
    let snapshot = Snapshot {
        services: vec![service, none],
        placing: Vec::new(),
        daemon: alive(),
    };
    let text = status_of(&snapshot);
    assert!(
        text.contains(
            "
  SLOT  BACKEND          STATE   ESTABLISHED  QUOTA  USED  PENDING
        127.0.0.1:21800  down
     0  127.0.0.1:21801  active          120    230   52%        0
        127.0.0.1:21802  down
        total                            120    230              0
  - 127.0.0.1:21800 is down: nobody listens there for 1 min 15 s
  - 127.0.0.1:21802 is down: nobody listens there
"
        ),
        "{text}"
    );
    assert!(
        text.contains(
            "
  SLOT  BACKEND          STATE  ESTABLISHED  QUOTA  USED  PENDING
        127.0.0.1:21800  down
        127.0.0.1:21802  down
"
        ),
        "{text}"
    );
    let json = serde_json::to_value(status::Json::new(&snapshot, &DaemonNotes::default())).unwrap();
    let down = &json["services"][1]["down"];
    assert_eq!(down[0]["address"], "127.0.0.1:21800");
    assert_eq!(
        (&down[0]["state"], &down[0]["since_ms"]),
        (&"down".into(), &75_000.into())
    );
    assert!(down[1]["since_ms"].is_null());
    let metrics = crate::metrics::text(&snapshot, &DaemonNotes::default()).unwrap();
    let series = "balancer_backend_state{service=\"agents\",slot=\"\",backend=\"127.0.0.1:21802\",netns=\"\",state=\"down\"} 1\n";
    assert!(metrics.contains(series), "{metrics}");
}

#[test]
fn status_says_what_a_dead_daemon_means() {
    let with = |refuses: bool, seconds: Option<u64>| {
        let daemon = DaemonSnapshot {
            refuses,
            heartbeat_age: seconds.map(Duration::from_secs),
            fail_open_after: Duration::from_secs(30),
            audit_totals: AuditTotals::default(),
        };
        status_of(&Snapshot {
            placing: Vec::new(),
            services: Vec::new(),
            daemon,
        })
    };
    assert_text(
        &with(false, Some(125)),
        "\
Daemon: DEAD OR STUCK, last heartbeat 2 min 5 s ago: nobody is refused (fail
        open after 30 s), quotas stay as they are. `balancer ping` says which,
        and what to do.

No service is loaded: the daemon has not finished starting, or has been told to
take them all out.
",
    );
    let silent = with(true, Some(12));
    assert!(silent.starts_with("Daemon: SILENT for 12 s: "), "{silent}");
    assert!(
        silent.contains("from 30 s on\n        nobody is refused"),
        "{silent}"
    );
    let never = with(false, None);
    assert!(never.contains("has not lived since"), "{never}");
}

#[test]
fn status_names_connections_that_nobody_counts() {
    let mut service = agents();
    let text = |service: &ServiceSnapshot| {
        status_of(&Snapshot {
            services: vec![service.clone()],
            placing: Vec::new(),
            daemon: alive(),
        })
    };
    assert!(!text(&service).contains("older than the data plane"));
    service.unattributed = 40;
    let text = text(&service);
    let alert = "  ! 40 established connections through this port are older than the data plane";
    assert!(text.contains(alert), "{text}");
}

#[test]
fn status_tells_of_silent_connections_and_of_keepalive_that_is_not_the_default() {
    let mut service = agents();
    let text = |service: &ServiceSnapshot| {
        status_of(&Snapshot {
            services: vec![service.clone()],
            placing: Vec::new(),
            daemon: alive(),
        })
    };
    assert!(!text(&service).contains("Keepalive"));
    service.backends[1].silence = Silence::new(40, 3_600);
    let silent = text(&service);
    let words = "  Keepalive: after 60 s of silence 3 probes, 10 s apart: a client that has";
    assert!(silent.contains(words), "{silent}");
    assert!(silent.contains("40 connections, the most"), "{silent}");
    assert!(silent.contains("3600 s"), "{silent}");
    assert!(silent.contains("SILENT"), "{silent}");
    service.backends[1].silence = Silence::default();
    service.keepalive = None;
    let off = text(&service);
    assert!(off.contains("  Keepalive: off: a client"), "{off}");
}

/// Only of those through virtual ports it is not plain whose they are.
#[test]
fn what_is_left_open_is_told_of_virtual_ports() {
    let left_open = |services: Vec<ServiceSnapshot>| {
        let snapshot = Snapshot {
            services,
            placing: Vec::new(),
            daemon: alive(),
        };
        snapshot.left_open()
    };
    assert_eq!(left_open(vec![als()]), None);
    let mut service = agents();
    service.unattributed = 40;
    let many = left_open(vec![service.clone(), als()]).expect("some are left open");
    assert!(
        many.starts_with("289 established connections through virtual ports stay open: "),
        "{many}"
    );
    service.backends.clear();
    service.unattributed = 1;
    let one = left_open(vec![service]).expect("one is left open");
    assert!(
        one.starts_with("1 established connection through a"),
        "{one}"
    );
}

#[test]
fn status_tells_what_was_done_by_hand_from_what_is_full() {
    let mut service = agents();
    service.quota_override = Some(0);
    for backend in &mut service.backends {
        (backend.quota, backend.overridden) = (Some(0), true);
    }
    let text = status_of(&Snapshot {
        services: vec![service],
        placing: Vec::new(),
        daemon: alive(),
    });
    assert!(
        text.contains("  ! Every backend is closed by hand (quota 0)"),
        "{text}"
    );
    assert!(
        text.contains("`balancer quota clear agents` goes\n         back to the rule"),
        "{text}"
    );
    assert!(
        text.contains("  - each of slots 0, 1, 7: its quota is 0"),
        "{text}"
    );
    assert!(!text.contains("--slot") && !text.contains("0*"), "{text}");
}

#[test]
fn text_fits_into_80_columns_with_the_longest_ipv4_addresses() {
    let mut service = agents();
    service.sentence = "word ".repeat(100);
    service.verdicts = Reason::ALL
        .iter()
        .map(|reason| (*reason, 12_345_678))
        .collect();
    for backend in &mut service.backends {
        backend.address = "255.255.255.255:65535".parse().unwrap();
        backend.established = 1_000_000;
        backend.state = BackendState::Candidate;
        backend.quota = None;
        (backend.exempt, backend.weight) = (0, 1);
    }
    let services = [&service];
    let text = quota::text(&services)
        + &status_of(&Snapshot {
            services: vec![service_of(3), service],
            placing: Vec::new(),
            daemon: alive(),
        });
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
        assert_eq!(line, line.trim_end());
    }
}

#[test]
fn backends_of_one_server_are_shown_with_the_quota_that_they_share() {
    let mut service = agents();
    let of = |first_slot, quota| Some(ServerSnapshot { first_slot, quota });
    service.backends = vec![backend(0, "10.0.0.1:11800", 2, Some(6)); 4];
    for (slot, backend) in (0..).zip(&mut service.backends) {
        backend.slot = slot;
        backend.server = of(slot / 3 * 3, Some(10));
    }
    (service.backends[1].quota, service.backends[2].quota) = (Some(4), Some(0));
    let words = "  - slots 0, 1, 2 are listeners of one server: they share a quota of 10\n";
    let text = quota::text(&[&service]);
    assert!(text.contains(words), "{text}");
    let status = |service: &ServiceSnapshot| {
        status_of(&Snapshot {
            services: vec![service.clone()],
            placing: Vec::new(),
            daemon: alive(),
        })
    };
    let text = status(&service);
    assert!(
        text.contains(words) && text.matches("  - ").count() == 1,
        "{text}"
    );
    // A part of what was set by hand for all is no exception from it.
    service.quota_override = Some(10);
    for backend in &mut service.backends {
        backend.overridden = true;
    }
    assert!(!status(&service).contains("--slot"), "{text}");
}

#[test]
fn status_shows_the_warnings_of_a_service_in_its_lines() {
    let mut service = agents();
    service
        .warnings
        .push("the listener 0.0.0.0:11800 gets no connections".to_owned());
    let text = status_of(&Snapshot {
        services: vec![service],
        placing: Vec::new(),
        daemon: alive(),
    });
    let quota = text.find("  Quota: ").unwrap();
    let warning = text.find("  ! the listener 0.0.0.0:11800").unwrap();
    assert!(
        quota < warning && warning < text.find("  SLOT").unwrap(),
        "{text}"
    );
}

#[test]
fn status_as_json_is_as_contracted() {
    let mut snapshot = Snapshot {
        services: vec![agents()],
        placing: Vec::new(),
        daemon: alive(),
    };
    snapshot.services[0].unattributed = 40;
    snapshot.services[0].backends.truncate(1);
    snapshot.services[0]
        .warnings
        .push("a hidden listener".to_owned());
    let backend = &mut snapshot.services[0].backends[0];
    (backend.quota, backend.pending, backend.note) = (None, None, Some("a \"note\"".to_owned()));
    backend.server = Some(ServerSnapshot {
        first_slot: 3,
        quota: Some(20),
    });
    let verdicts: serde_json::Map<_, _> = snapshot.services[0]
        .verdicts
        .iter()
        .map(|(reason, count)| (reason.name().to_owned(), (*count).into()))
        .collect();
    assert_eq!(verdicts["steered"], 1203);
    assert_eq!(
        serde_json::to_value(status::Json::new(&snapshot, &DaemonNotes::default())).unwrap(),
        serde_json::json!({
            "schema": 1,
            "placing": [],
            "place": {"refused": null, "left_out": []},
            "services": [{
                "name": "agents",
                "port": 11800,
                "address": null,
                "policy": "least-connections",
                "mode": "on",
                "keepalive": {"idle_s": 60, "interval_s": 10, "probes": 3, "user_timeout_ms": 90_000},
                "unattributed": 40,
                "backends": [{
                    "slot": 0,
                    "address": "127.0.0.1:21801",
                    "netns": 4_026_531_840_u64,
                    "state": "active",
                    "weight": 1,
                    "quota": null,
                    "established": 120,
                    "exempt": 0,
                    "pending": null,
                    "silent": 0,
                    "longest_silence_s": 0,
                    "drained": false,
                    "moves": {"left": 0, "under_way": 0, "stay": 0},
                    "server": {"first_slot": 3, "quota": 20},
                    "steerable": true,
                    "health": {"state": "serving", "since_ms": null, "reason": null},
                    "note": "a \"note\"",
                }],
                "down": [],
                "verdicts": verdicts,
                "warnings": ["a hidden listener"],
            }],
            "agent": {"alive": true, "heartbeat_age_ms": 412, "checks": 7, "drift": 0, "repairs": 0, "failed_reload": null},
        })
    );
}

#[test]
fn metrics_are_what_status_shows() {
    let mut snapshot = Snapshot {
        services: vec![agents()],
        placing: Vec::new(),
        daemon: alive(),
    };
    (
        snapshot.daemon.audit_totals.drift,
        snapshot.daemon.audit_totals.repairs,
    ) = (3, 2);
    snapshot.services[0].unattributed = 40;
    snapshot.services[0].backends.truncate(2);
    snapshot.services[0].backends[1].quota = None;
    let text = crate::metrics::text(&snapshot, &DaemonNotes::default()).unwrap();
    let lines: Vec<_> = text.lines().collect();
    for line in [
        "balancer_alive 1",
        "balancer_drift_connections 3",
        "balancer_checks_total 7",
        "balancer_repairs_total 2",
        "balancer_unattributed_connections{service=\"agents\"} 40",
        "balancer_lookups_total{service=\"agents\",verdict=\"steer\",reason=\"steered\"} 1203",
        "balancer_established_connections{service=\"agents\",slot=\"0\",backend=\"127.0.0.1:21801\",netns=\"4026531840\"} 120",
    ] {
        assert!(lines.contains(&line), "{line} is not in\n{text}");
    }
    let quotas = lines
        .iter()
        .filter(|line| line.starts_with("balancer_quota_connections{"));
    assert_eq!(quotas.count(), 1, "unlimited is no number:\n{text}");
    assert_eq!(lines.last(), Some(&"# EOF"));
}

#[test]
fn a_reload_that_failed_is_a_metric() {
    let snapshot = Snapshot {
        services: Vec::new(),
        placing: Vec::new(),
        daemon: alive(),
    };
    let mut notes = DaemonNotes::default();
    let has = |notes: &DaemonNotes, line: &str| {
        let text = crate::metrics::text(&snapshot, notes).unwrap();
        text.lines().any(|found| found == line)
    };
    assert!(has(&notes, "balancer_reload_failed 0"));
    notes.failed_reload = Some(FailedReload {
        age: Duration::from_secs(3),
        error: "a bad file".to_owned(),
    });
    assert!(has(&notes, "balancer_reload_failed 1"));
}

#[test]
fn the_state_of_a_backend_is_a_metric_and_no_label_of_others() {
    let mut snapshot = Snapshot {
        services: vec![agents()],
        placing: Vec::new(),
        daemon: alive(),
    };
    snapshot.services[0].backends.truncate(1);
    let mut series = |state| {
        snapshot.services[0].backends[0].state = state;
        let text = crate::metrics::text(&snapshot, &DaemonNotes::default()).unwrap();
        let lines = text.lines().map(str::to_owned);
        // The series of a metric come in no order.
        lines.partition::<BTreeSet<_>, _>(|line| line.starts_with("balancer_backend_state{"))
    };
    let (active, with_active) = series(BackendState::Active);
    let (closed, with_closed) = series(BackendState::Closed);
    assert_eq!(with_active, with_closed);
    let line = |state: &str, value: u8| {
        format!(
            "balancer_backend_state{{service=\"agents\",slot=\"0\",backend=\"127.0.0.1:21801\",\
             netns=\"4026531840\",state=\"{state}\"}} {value}"
        )
    };
    assert_eq!((active.len(), closed.len()), (5, 5));
    for (state, in_first) in [("active", 1), ("closed", 0)] {
        assert!(active.contains(&line(state, in_first)), "{active:?}");
        assert!(closed.contains(&line(state, 1 - in_first)), "{closed:?}");
    }
    for state in ["candidate", "claimed", "held"] {
        assert!(active.contains(&line(state, 0)), "{active:?}");
    }
}

#[test]
fn the_series_of_a_metric_are_in_the_order_of_their_labels() {
    let snapshot = Snapshot {
        services: vec![als(), service_of(12)],
        placing: Vec::new(),
        daemon: alive(),
    };
    let text = crate::metrics::text(&snapshot, &DaemonNotes::default()).unwrap();
    let slots: Vec<u32> = text
        .lines()
        .filter_map(|line| {
            line.strip_prefix("balancer_established_connections{service=\"agents\",slot=\"")
        })
        .map(|rest| rest.split('"').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(slots, (0..12).collect::<Vec<u32>>());
    let again = crate::metrics::text(&snapshot, &DaemonNotes::default()).unwrap();
    assert_eq!(text, again);
    assert!(text.ends_with("# EOF\n"), "{text}");
}

/// The words of the help follow what is computed: SYNs that are expected, not what admission reads.
#[test]
fn help_and_reference_say_what_pending_shows() {
    use balancer_common::abi::ticks_of_ms;
    use balancer_common::decision::admission::EXPECTED_FOR;

    assert_eq!(EXPECTED_FOR, ticks_of_ms(1_100), "the texts say 1.1 s");
    let mut command = Cli::command();
    let status = command.find_subcommand_mut("status").unwrap();
    let help = status.render_long_help().to_string();
    let reference = include_str!("../../../docs/reference.md");
    for text in [&help, reference] {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            text.contains("SYNs sent to it in the last 1.1 s that have not become established"),
            "{text}"
        );
        assert!(!text.contains("+ PENDING"), "{text}");
    }
}

#[test]
fn quota_as_text() {
    let (agents, als) = (agents(), als());
    assert_text(
        &quota::text(&[&agents, &als]),
        "\
agents
  Rule: 300 clients × 2, 15% headroom, at least 16
  Now:  ceil(300 clients × 2 × 1.15 / 3 ready) = 230
        but by hand 0 for slot 7; `balancer quota clear agents --slot SLOT` goes
        back to the rule
  SLOT  BACKEND          QUOTA  ESTABLISHED  SET
     0  127.0.0.1:21801    230          120  by the rule
     7  127.0.0.1:21803      0          120  by hand
     1  [::1]:21802        230            9  by the rule

als
  Rule: none: steering only
  Now:  set by hand: 50 for each backend
        `balancer quota clear als` goes back to the rule
  SLOT  BACKEND                                             QUOTA  ESTABLISHED  SET
     3  0.0.0.0:11802                                   unlimited            4  by the rule
     4  [::]:11802                                      unlimited            5  by the rule
     5  [2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:11802  unlimited      1000000  by the rule
",
    );
}

/// A backend's own quota by hand gives way to the service's, which may be by hand, too.
#[test]
fn a_backend_goes_back_to_the_quota_of_the_service() {
    let mut service = agents();
    service.quota_override = Some(50);
    let to = "goes back to 50, the service's by hand";
    let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let quotas = flat(&quota::text(&[&service]));
    let status = flat(&status_of(&Snapshot {
        services: vec![service],
        placing: Vec::new(),
        daemon: alive(),
    }));
    for text in [quotas, status] {
        assert!(
            text.contains(&format!("`balancer quota clear agents --slot SLOT` {to}")),
            "{text}"
        );
    }
}

/// Errors in a file quote what is wrong, a single backquote, too.
#[test]
fn a_lone_backquote_keeps_nothing_together() {
    let text = format!("`balancer a b` found character '`' {}", "word ".repeat(20));
    let wrapped = at_columns(40, || output::wrapped("  ", &text));
    assert!(wrapped.starts_with("  `balancer a b` found"), "{wrapped}");
    for line in wrapped.lines() {
        assert!(line.chars().count() <= 40, "{line}");
    }
}

#[test]
fn quota_as_json_is_as_contracted() {
    let mut service = agents();
    service.quota_override = Some(7);
    service.backends.drain(..2);
    assert_eq!(
        serde_json::to_value(quota::Json::new(&[&service])).unwrap(),
        serde_json::json!({
            "schema": 1,
            "services": [{
                "name": "agents",
                "rule": "300 clients × 2, 15% headroom, at least 16",
                "sentence": "ceil(300 clients × 2 × 1.15 / 3 ready) = 230",
                "override": 7,
                "backends": [{"slot": 7, "address": "127.0.0.1:21803", "quota": 0, "override": true}],
            }],
        })
    );
}

fn listening(slot: u32, address: &str) -> ListeningBackend {
    ListeningBackend {
        slot,
        address: address.parse().unwrap(),
        state: BackendState::Active,
    }
}

fn explained() -> Explanation {
    Explanation {
        netns: 4711,
        service: Some("agents".to_owned()),
        reason: Some(Reason::Steered),
        verdict: Verdict::Steer,
        backend: Some(listening(1, "[::1]:21802")),
        unsuited: vec![Unsuited {
            backend: listening(0, "127.0.0.1:21801"),
            why: "takes no IPv6",
        }],
        avoided: vec![Avoided {
            backend: listening(2, "[::1]:21803"),
            state: HealthState::Stalled,
            age: Duration::from_secs(75),
        }],
        sentence: "it has the fewest connections for its weight: (9 + 2) / 2, of 3 with room"
            .to_owned(),
    }
}

#[test]
fn explain_as_text() {
    let (from, to) = ("10.0.0.7".parse().unwrap(), "11800".parse().unwrap());
    assert_text(
        &explain::text(from, to, &explained()),
        "\
10.0.0.7 -> 11800: it has the fewest connections for its weight: (9 + 2) / 2, of
                   3 with room
  service  agents
  verdict  steer
  reason   steered: virtual port: steered to a backend with room
  backend  [::1]:21802 (slot 1)
  unsuited 127.0.0.1:21801 (slot 0): it takes no IPv6
  avoided  [::1]:21803 (slot 2): stalled since 1 min 15 s: connections wait in
           its accept queue, and it accepts none
",
    );
    let stranger = Explanation {
        service: None,
        backend: None,
        reason: None,
        unsuited: Vec::new(),
        avoided: Vec::new(),
        verdict: Verdict::Pass,
        ..explained()
    };
    let text = explain::text(from, to, &stranger);
    assert!(
        text.ends_with("  service  none: nobody is steered or refused there\n  verdict  pass\n"),
        "{text}"
    );
    let of_many = Explanation {
        unsuited: vec![explained().unsuited[0]; 30],
        avoided: vec![explained().avoided[0]; 9],
        ..explained()
    };
    let text = explain::text(from, to, &of_many);
    assert!(text.contains("  unsuited 22 more\n"), "{text}");
    assert!(text.ends_with("  avoided  1 more\n"), "{text}");
}

#[test]
fn explain_as_json_is_as_contracted() {
    let (from, to) = (
        "10.0.0.7:5".parse().unwrap(),
        "10.0.0.9:11800".parse().unwrap(),
    );
    assert_eq!(
        serde_json::to_value(explain::Json::new(from, to, &explained())).unwrap(),
        serde_json::json!({
            "schema": 1,
            "from": "10.0.0.7:5",
            "to": "10.0.0.9:11800",
            "netns": 4711,
            "service": "agents",
            "reason": "steered",
            "verdict": "steer",
            "backend": {"slot": 1, "address": "[::1]:21802"},
            "unsuited": [{"slot": 0, "address": "127.0.0.1:21801", "why": "takes no IPv6"}],
            "avoided": [{"slot": 2, "address": "[::1]:21803", "health": "stalled", "since_ms": 75_000, "reason": "connections wait in its accept queue, and it accepts none"}],
            "choices": [],
            "sentence": "it has the fewest connections for its weight: (9 + 2) / 2, of 3 with room",
        })
    );
}

/// Two netns, the first of them a pod's.
fn several() -> explain::Several {
    let several = SeveralNetns {
        service: "agents".to_owned(),
        netns: vec![
            (4711, vec![listening(6, "0.0.0.0:11800")]),
            (
                4712,
                vec![
                    ListeningBackend {
                        state: BackendState::Candidate,
                        ..listening(2, "[::]:11800")
                    },
                    listening(3, "[::]:11800"),
                ],
            ),
        ],
    };
    let pods = explain::Pods::from([
        (4711, [pod("oap-0")].into()),
        // They use the node's network: none of them is the one.
        (4712, [pod("oap-1"), pod("oap-2")].into()),
    ]);
    explain::Several::new(&several, &pods, "balancer explain --from ::1 --to 11800")
}

fn pod(name: &str) -> ObjectName {
    ObjectName {
        namespace: "skywalking".to_owned(),
        name: name.to_owned(),
    }
}

#[test]
fn the_netns_to_choose_from_are_listed_with_the_commands() {
    let (from, to) = ("::1".parse().unwrap(), "11800".parse().unwrap());
    assert_text(
        &several().text(from, to),
        "\
::1 -> 11800: agents has backends in 2 network namespaces, and none in that of
              this command: say which one is meant
  NETNS  POD               SLOT  BACKEND        STATE
   4711  skywalking/oap-0     6  0.0.0.0:11800  active
   4712  -                    2  [::]:11800     candidate
   4712  -                    3  [::]:11800     active
  balancer explain --from ::1 --to 11800 --pod skywalking/oap-0
  balancer explain --from ::1 --to 11800 --netns 4712
",
    );
    assert_eq!(
        serde_json::to_value(explain::Json::of_several(from, to, &several())).unwrap(),
        serde_json::json!({
            "schema": 1,
            "from": "::1",
            "to": "11800",
            "netns": null,
            "service": "agents",
            "reason": null,
            "verdict": null,
            "backend": null,
            "unsuited": [],
            "avoided": [],
            "choices": [
                {
                    "netns": 4711,
                    "pod": "skywalking/oap-0",
                    "backends": [{"slot": 6, "address": "0.0.0.0:11800", "state": "active"}],
                    "command": "balancer explain --from ::1 --to 11800 --pod skywalking/oap-0",
                },
                {
                    "netns": 4712,
                    "pod": null,
                    "backends": [
                        {"slot": 2, "address": "[::]:11800", "state": "candidate"},
                        {"slot": 3, "address": "[::]:11800", "state": "active"},
                    ],
                    "command": "balancer explain --from ::1 --to 11800 --netns 4712",
                },
            ],
            "sentence": "agents has backends in 2 network namespaces, and none in that of this command: say which one is meant",
        })
    );
}

#[test]
fn a_command_is_said_again_as_a_shell_reads_it() {
    for (argument, word) in [
        ("[::1]:11800", "'[::1]:11800'"),
        ("--state-dir=/a b", "'--state-dir=/a b'"),
        ("10.0.0.7", "10.0.0.7"),
        ("it's", r"'it'\''s'"),
        ("", "''"),
    ] {
        assert_eq!(explain::shell_word(argument), word);
    }
}

/// Two pods of this node, one without a listener, and one of another node.
fn cluster() -> ClusterStatus {
    let backend = |name: &str, node: &str, slot| BackendStatus {
        pod: pod(name),
        node: Some(node.to_owned()),
        address: None,
        ready: true,
        terminating: false,
        weight: 1,
        slot,
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
    };
    ClusterStatus {
        schema: 1,
        node: "node-1".to_owned(),
        complete: true,
        silent_seconds: 0,
        problems: Vec::new(),
        groups: vec![GroupStatus {
            id: GroupId {
                entry: "agents".to_owned(),
                service: pod("oap"),
                port: 11800,
            },
            sentence: String::new(),
            starved: 0,
            backends: vec![
                backend("oap-0", "node-1", Some(7)),
                backend("oap-1", "node-1", None),
                // Slots of other nodes are theirs.
                backend("oap-2", "node-2", Some(0)),
            ],
        }],
        placing: PlacingStatus::default(),
    }
}

#[test]
fn a_pod_leads_to_its_listener_or_to_what_is_wrong() {
    let cluster = cluster();
    let slot = |name: &str, port| explain::slot_of(&cluster, &pod(name), port);
    assert_eq!(slot("oap-0", 11800).unwrap(), 7);
    for (name, port, words) in [
        ("oap-0", 12800, "serves port 11800, not 12800"),
        ("oap-1", 11800, "no listener on port 11800 is known"),
        ("oap-2", 11800, "is on node node-2, and this is node node-1"),
        (
            "oap-3",
            11800,
            "those of this node are skywalking/oap-0, skywalking/oap-1",
        ),
    ] {
        let error = format!("{:#}", slot(name, port).unwrap_err());
        assert!(error.contains(words), "{error}");
    }
    let mut service = agents();
    service.backends[2].netns = 4711;
    let snapshot = Snapshot {
        services: vec![service],
        placing: Vec::new(),
        daemon: alive(),
    };
    let pods = explain::pods(&cluster, &snapshot);
    assert_eq!(pods, [(4711, [pod("oap-0")].into())].into());
}

#[test]
fn a_netns_is_a_name_a_file_or_a_number() {
    use super::explain::Netns;

    for (text, netns) in [
        ("4026531840", Netns::Cookie(4_026_531_840)),
        ("blue", Netns::File("/run/netns/blue".into())),
        ("/proc/7/ns/net", Netns::File("/proc/7/ns/net".into())),
        ("./7", Netns::File("./7".into())),
    ] {
        assert_eq!(text.parse(), Ok(netns), "{text}");
    }
    assert!("".parse::<Netns>().is_err());
}

#[test]
fn the_ends_of_a_connection() {
    use super::explain::{From, To};

    for (text, address, port) in [
        ("10.0.0.7", "10.0.0.7", None),
        ("10.0.0.7:5", "10.0.0.7", Some(5)),
        ("::1", "::1", None),
        ("[::1]", "::1", None),
        ("[::1]:5", "::1", Some(5)),
        ("::ffff:10.0.0.7", "10.0.0.7", None),
    ] {
        assert_eq!(
            text.parse(),
            Ok(From {
                address: address.parse().unwrap(),
                port
            }),
            "{text}"
        );
    }
    for (text, address, port) in [
        ("11800", None, 11800),
        ("10.0.0.9:1", Some("10.0.0.9"), 1),
        ("[::1]:1", Some("::1"), 1),
    ] {
        let address = address.map(|address| address.parse().unwrap());
        assert_eq!(text.parse(), Ok(To { address, port }), "{text}");
    }
    for (text, words) in [
        ("", "is no address"),
        ("oap", "`oap` is no address, and names are not looked up"),
        (
            "oap:11800",
            "`oap` is no address, and names are not looked up",
        ),
        ("10.0.0", "`10.0.0` is no address"),
        ("10.0.0.7:", "`` is no port from 1 to 65535"),
        ("10.0.0.7:0", "`0` is no port from 1 to 65535"),
        ("10.0.0.7:70000", "`70000` is no port from 1 to 65535"),
        ("11800", "write an address"),
        ("fe80::1%eth0", "`fe80::1%eth0` has a zone"),
        ("0.0.0.0", "no connection has the address 0.0.0.0"),
        ("[ff02::1]:5", "no connection has the address ff02::1"),
    ] {
        let error = text.parse::<From>().unwrap_err();
        assert!(error.contains(words), "{text}: {error}");
        assert!(
            error.contains("write an address such as 10.0.0.7"),
            "{text}: {error}"
        );
    }
    for (text, words) in [
        ("", "is no address"),
        ("0", "`0` is no port from 1 to 65535"),
        ("70000", "`70000` is no port from 1 to 65535"),
        ("10.0.0.9", "the port is missing"),
        ("::1", "the port is missing"),
        ("[::1]", "the port is missing"),
        ("10.0.0.9:0", "`0` is no port from 1 to 65535"),
        ("http", "`http` is no address, and names are not looked up"),
        (
            "oap:11800",
            "`oap` is no address, and names are not looked up",
        ),
        ("0.0.0.0:11800", "no connection has the address 0.0.0.0"),
    ] {
        let error = text.parse::<To>().unwrap_err();
        assert!(error.contains(words), "{text}: {error}");
        assert!(
            error.contains("write a port, or an address and a port"),
            "{text}: {error}"
        );
    }
}

fn report() -> Report {
    let check = |name: &'static str, status, advice: Option<&str>| {
        Check {
        name,
        status,
        found: "tcp_syncookies is 2".to_owned(),
        means: "every connection is judged again at its ACK, so a refusal may come after the client's connect has succeeded".to_owned(),
        advice: advice.map(str::to_owned),
    }
    };
    Report {
        checks: vec![
            check("kernel", Status::Ok, None),
            check(
                "syncookies",
                Status::Warn,
                Some("sysctl net.ipv4.tcp_syncookies=1"),
            ),
            check(
                "btf",
                Status::Fail,
                Some("boot a kernel with CONFIG_DEBUG_INFO_BTF"),
            ),
        ],
    }
}

#[test]
fn doctor_as_text() {
    assert_text(
        &doctor::text(&report()),
        "\
ok    kernel: tcp_syncookies is 2
      every connection is judged again at its ACK, so a refusal may come after
      the client's connect has succeeded
WARN  syncookies: tcp_syncookies is 2
      every connection is judged again at its ACK, so a refusal may come after
      the client's connect has succeeded
      -> sysctl net.ipv4.tcp_syncookies=1
FAIL  btf: tcp_syncookies is 2
      every connection is judged again at its ACK, so a refusal may come after
      the client's connect has succeeded
      -> boot a kernel with CONFIG_DEBUG_INFO_BTF

The balancer can't work here as it should: 1 of 3 checks fails: btf; 1 warns:
syncookies.
",
    );
    let mut fine = report();
    fine.checks.truncate(2);
    assert!(
        doctor::text(&fine)
            .ends_with("The balancer works here; 1 of 2 checks warns: syncookies.\n")
    );
    fine.checks.truncate(1);
    assert!(doctor::text(&fine).ends_with("All 1 checks are ok.\n"));
}

#[test]
fn doctor_leaves_the_lines_of_a_log_as_they_are() {
    let mut report = report();
    report.checks.drain(..2);
    report.checks[0].found =
        "refused, with this log:\n0: (bf) r6 = r1   ; R1=ctx()\n\nprocessed 1 insns".to_owned();
    assert_text(
        &doctor::text(&report),
        "\
FAIL  btf: refused, with this log:
      0: (bf) r6 = r1   ; R1=ctx()

      processed 1 insns
      every connection is judged again at its ACK, so a refusal may come after
      the client's connect has succeeded
      -> boot a kernel with CONFIG_DEBUG_INFO_BTF

The balancer can't work here as it should: 1 of 1 checks fails: btf.
",
    );
}

#[test]
fn doctor_as_json_is_as_contracted() {
    let mut report = report();
    report.checks.drain(..2);
    assert_eq!(
        serde_json::to_value(doctor::Json::new(&report)).unwrap(),
        serde_json::json!({
            "schema": 1,
            "checks": [{
                "name": "btf",
                "status": "fail",
                "found": "tcp_syncookies is 2",
                "means": "every connection is judged again at its ACK, so a refusal may come after the client's connect has succeeded",
                "advice": "boot a kernel with CONFIG_DEBUG_INFO_BTF",
            }],
        })
    );
}

#[test]
fn spans_read_as_people_say_them() {
    for (milliseconds, words) in [
        (0, "0.0 s"),
        (412, "0.4 s"),
        (9_999, "9.9 s"),
        (10_000, "10 s"),
        (125_000, "2 min 5 s"),
        (7_500_000, "2 h 5 min"),
        (90_000_000, "1 d 1 h"),
    ] {
        assert_eq!(output::span(Duration::from_millis(milliseconds)), words);
    }
}

mod parsing {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["balancer"], arguments].concat())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_is_understood_and_says_whether_it_changes_something() {
        for arguments in [
            &["run", "--config", "a.yaml"][..],
            &[
                "run",
                "--config",
                "a.yaml",
                "--cgroup",
                "/c",
                "--on-exit",
                "keep",
                "--log",
                "debug,balancer=trace",
            ],
            &["status"],
            &["status", "-o", "json"],
            &["status", "--output=text"],
            &["quota", "show"],
            &["quota", "show", "agents", "-o", "json"],
            &["quota", "set", "agents", "0"],
            &["quota", "set", "agents", "5", "--slot", "7"],
            &["quota", "clear", "agents"],
            &["quota", "clear", "agents", "--slot=7"],
            &["explain", "--from", "10.0.0.7", "--to", "11800"],
            &[
                "explain",
                "--from",
                "[::1]:4",
                "--to",
                "[::1]:11800",
                "-o",
                "json",
            ],
            &["explain", "--from", "::1", "--to", "1", "--netns", "blue"],
            &["explain", "--from", "::1", "--to", "1", "--pod", "a/b"],
            &["doctor"],
            &[
                "doctor", "--config", "a.yaml", "--cgroup", "/c", "-o", "json",
            ],
            &["reload"],
            &["unload"],
            &["completions", "bash"],
        ] {
            assert!(
                parse(arguments).is_ok(),
                "{arguments:?}: {}",
                parse(arguments).unwrap_err()
            );
        }
        let command = Cli::command();
        let quota = command.find_subcommand("quota").unwrap();
        let verbs = command
            .get_subcommands()
            .filter(|verb| verb.get_name() != "quota")
            .chain(quota.get_subcommands());
        for verb in verbs {
            let about = verb.get_about().unwrap().to_string();
            assert!(
                about.ends_with("(changes nothing)") || about.ends_with("(changes the kernel)"),
                "{about}"
            );
            let examples = verb.get_after_long_help().unwrap().to_string();
            assert!(examples.starts_with("Example"), "{examples}");
        }
    }

    #[test]
    fn wrong_usage_is_exit_code_2() {
        for arguments in [
            &[][..],
            &["frobnicate"],
            &["run"],
            &["run", "--config"],
            &["run", "--config", "a", "--on-exit", "explode"],
            &["run", "--config", "a", "--log", "balancer=loud"],
            &["status", "-o", "xml"],
            &["status", "agents"],
            &["quota"],
            &["quota", "set", "agents"],
            &["quota", "set", "agents", "-5"],
            &["quota", "set", "agents", "lots"],
            &["quota", "set", "agents", "100000001"],
            &["reload", "now"],
            &["quota", "set", "agents", "5", "--slot", "-1"],
            &["quota", "clear"],
            &["explain", "--from", "10.0.0.7"],
            &["explain", "--from", "oap", "--to", "11800"],
            &["explain", "--from", "10.0.0.7", "--to", "0"],
            &["explain", "--from", "::1", "--to", "1", "--pod", "a"],
            &["explain", "--from", "::1", "--to", "1", "--pod", "a/b/c"],
            &[
                "explain", "--from", "::1", "--to", "1", "--pod", "a/b", "--netns", "c",
            ],
            &["completions", "cmd"],
            &["unload", "now"],
        ] {
            let error = parse(arguments)
                .err()
                .unwrap_or_else(|| panic!("{arguments:?} is understood"));
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
        assert_eq!(parse(&["--help"]).unwrap_err().exit_code(), 0);
        assert_eq!(parse(&["--version"]).unwrap_err().exit_code(), 0);
    }

    #[test]
    fn a_wrong_quota_is_told_what_is_wanted() {
        for quota in ["sixty", "10%", "unlimited", "-1", "1.5", "100000001", ""] {
            let error = parse(&["quota", "set", "agents", quota]).unwrap_err();
            let said = error.to_string();
            for words in [
                "a whole number of connections for each backend",
                "0 takes none",
                "`balancer quota clear SERVICE`",
            ] {
                assert!(said.contains(words), "{said}");
            }
        }
    }

    #[test]
    fn no_verb_that_changes_something_is_suggested() {
        let said =
            |arguments: &[&str]| without_changing_verbs(parse(arguments).unwrap_err()).to_string();
        for arguments in [
            &["unlod"][..],
            &["relaod"],
            &["load"],
            &["rum"],
            &["quota", "ste"],
            &["quota", "claer"],
        ] {
            let said = said(arguments);
            assert!(
                said.contains("unrecognized subcommand") && !said.contains("similar"),
                "{said}"
            );
        }
        for (arguments, verb) in [
            (&["statu"][..], "'status'"),
            (&["quot"], "'quota'"),
            (&["quota", "shwo"], "'show'"),
        ] {
            let said = said(arguments);
            assert!(said.contains("similar") && said.contains(verb), "{said}");
        }
        // What is wrong elsewhere keeps its tip.
        let said = said(&["status", "--outptu", "json"]);
        assert!(said.contains("'--output'"), "{said}");
    }

    #[test]
    fn which_balancer_is_meant_may_stand_before_and_after_the_verb() {
        for arguments in [
            &[
                "--state-dir",
                "/s",
                "--admin-socket",
                "/a",
                "quota",
                "clear",
                "x",
            ],
            &[
                "quota",
                "--state-dir",
                "/s",
                "clear",
                "x",
                "--admin-socket",
                "/a",
            ],
            &[
                "quota",
                "clear",
                "x",
                "--state-dir",
                "/s",
                "--admin-socket",
                "/a",
            ],
        ] {
            let place = parse(arguments).unwrap().place;
            assert_eq!(place.state_dir, Path::new("/s"));
            assert_eq!(place.admin_socket, Path::new("/a"));
        }
    }

    #[test]
    fn a_relative_path_is_one_from_here() {
        let here = env::current_dir().unwrap();
        let place = parse(&["--state-dir", "a/b", "--admin-socket", "c", "status"]);
        let place = place.unwrap().place;
        assert_eq!(place.state_dir, here.join("a/b"));
        assert_eq!(place.admin_socket, here.join("c"));
    }
}

/// The environment of this process has none of our variables.
mod usage {
    use super::*;

    #[test]
    fn options_from_the_environment_are_none_that_must_be_given() {
        let arguments = |words: &[&str]| {
            let words = words.iter().map(OsString::from);
            words.collect::<Vec<_>>()
        };
        let usage = usage_without_environment(&arguments(&["balancer", "quota", "set"])).unwrap();
        let said = usage.to_string();
        assert!(
            said.contains("Usage: balancer quota set <SERVICE> <QUOTA>\n"),
            "{said}"
        );
        let usage = usage_without_environment(&arguments(&["balancer", "run"])).unwrap();
        let said = usage.to_string();
        assert!(
            said.contains("Usage: balancer run --config <FILE>\n"),
            "{said}"
        );
    }
}

mod without_a_daemon {
    use super::*;

    fn nowhere() -> (tempfile::TempDir, Place) {
        let directory = tempfile::tempdir().unwrap();
        let place = Place {
            state_dir: directory.path().join("state"),
            admin_socket: directory.path().join("a.sock"),
        };
        (directory, place)
    }

    fn perform(place: &Place, arguments: &[&str]) -> String {
        let cli = Cli::try_parse_from([&["balancer"], arguments].concat()).unwrap();
        let error = cli.verb.perform(place).expect_err("there is nothing there");
        format!("{error:#}")
    }

    #[test]
    fn the_reading_verbs_say_that_nothing_is_loaded() {
        let (_directory, place) = nowhere();
        for arguments in [
            &["status"][..],
            &["metrics"],
            &["quota", "show"],
            &["explain", "--from", "::1", "--to", "1"],
        ] {
            let message = perform(&place, arguments);
            assert!(
                message.starts_with(&format!(
                    "no balancer is loaded at {}: ",
                    place.state_dir.display()
                )),
                "{message}"
            );
            assert!(
                message.contains("`balancer run --config FILE`") && message.contains("--state-dir"),
                "{message}"
            );
        }
    }

    #[test]
    fn the_verbs_that_need_the_daemon_say_that_none_answers() {
        let (_directory, place) = nowhere();
        for arguments in [
            &["quota", "set", "agents", "5"][..],
            &["quota", "clear", "agents"],
            &["reload"],
        ] {
            let message = perform(&place, arguments);
            assert!(
                message.starts_with(&format!(
                    "no daemon answers at {}",
                    place.admin_socket.display()
                )),
                "{message}"
            );
        }
    }

    #[test]
    fn unload_finds_nothing_to_do() {
        let (_directory, place) = nowhere();
        let cli = Cli::try_parse_from(["balancer", "unload"]).unwrap();
        assert_eq!(cli.verb.perform(&place).unwrap(), ExitCode::SUCCESS);
    }

    #[test]
    fn a_bad_file_is_one_error_with_its_line() {
        let (directory, place) = nowhere();
        let file = directory.path().join("bad.yaml");
        std::fs::write(&file, "services:\n- name: a\n  prot: 1\n").unwrap();
        let message = perform(&place, &["doctor", "--config", file.to_str().unwrap()]);
        assert!(
            message.starts_with(&format!("{}:3:3: unknown key `prot`", file.display())),
            "{message}"
        );
    }
}
