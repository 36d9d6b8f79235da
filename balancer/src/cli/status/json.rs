//! `status -o json`, as it is contracted.

use std::net::{IpAddr, SocketAddr};

use balancer_common::Reason;
use balancer_common::abi::Keepalive;
use balancer_common::place::PlaceReason;
use serde::{Serialize, Serializer};

use crate::dataplane::{
    BackendHealth, BackendSnapshot, DaemonNotes, DownBackend, EndpointGroupSnapshot,
    EndpointSnapshot, ServiceSnapshot, Snapshot,
};
use crate::health::reason;

#[derive(Serialize)]
pub(in crate::cli) struct Json<'a> {
    schema: u32,
    services: Vec<JsonService<'a>>,
    placing: Vec<JsonGroup<'a>>,
    place: JsonPlace<'a>,
    /// The daemon; the key is part of the contract.
    agent: JsonDaemon<'a>,
}

/// What keeps connects from being placed.
#[derive(Serialize)]
struct JsonPlace<'a> {
    refused: Option<&'a str>,
    left_out: &'a [String],
}

#[derive(Serialize)]
struct JsonDaemon<'a> {
    alive: bool,
    heartbeat_age_ms: Option<u128>,
    checks: u64,
    drift: u64,
    repairs: u64,
    failed_reload: Option<JsonReload<'a>>,
}

#[derive(Serialize)]
struct JsonReload<'a> {
    age_ms: u128,
    error: &'a str,
}

#[derive(Serialize)]
struct JsonService<'a> {
    name: &'a str,
    port: u16,
    address: Option<IpAddr>,
    policy: &'static str,
    mode: &'static str,
    keepalive: Option<JsonKeepalive>,
    unattributed: u32,
    backends: Vec<JsonBackend<'a>>,
    down: Vec<JsonDown>,
    #[serde(serialize_with = "by_name")]
    verdicts: &'a [(Reason, u64)],
    warnings: &'a [String],
}

#[derive(Serialize)]
struct JsonKeepalive {
    idle_s: u16,
    interval_s: u16,
    probes: u8,
    user_timeout_ms: Option<u32>,
}

#[derive(Serialize)]
struct JsonBackend<'a> {
    slot: u32,
    address: SocketAddr,
    netns: u64,
    state: &'static str,
    weight: u32,
    quota: Option<u32>,
    server: Option<JsonServer>,
    established: u32,
    exempt: u32,
    pending: Option<u32>,
    silent: u32,
    longest_silence_s: u32,
    drained: bool,
    moves: JsonMoves,
    steerable: bool,
    health: Option<JsonHealth>,
    note: Option<&'a str>,
}

/// What has become of connections that were moved.
#[derive(Serialize)]
struct JsonMoves {
    left: u64,
    under_way: u32,
    stay: u32,
}

/// The health of a backend that listens.
#[derive(Serialize)]
struct JsonHealth {
    state: &'static str,
    since_ms: Option<u128>,
    reason: Option<&'static str>,
}

/// The server whose quota a backend shares with those that have the same first slot.
#[derive(Serialize)]
struct JsonServer {
    first_slot: u32,
    quota: Option<u32>,
}

/// A backend that is named and does not listen: it has no slot.
#[derive(Serialize)]
struct JsonDown {
    address: SocketAddr,
    state: &'static str,
    since_ms: Option<u128>,
}

/// An endpoint group.
#[derive(Serialize)]
struct JsonGroup<'a> {
    group: &'a str,
    frontends: &'a [SocketAddr],
    own_addresses: &'a [SocketAddr],
    rank: Option<u32>,
    nodes: Option<u32>,
    known_for_ms: Option<u128>,
    knows_others: bool,
    dry_run: bool,
    endpoints: Vec<JsonEndpoint<'a>>,
    #[serde(serialize_with = "by_place_name")]
    verdicts: &'a [(PlaceReason, u64)],
}

/// An endpoint, as `explain` shows it too.
#[derive(Serialize)]
pub(in crate::cli) struct JsonEndpoint<'a> {
    name: &'a str,
    addresses: &'a [SocketAddr],
    weight: u64,
    leaving: bool,
    established: u64,
    in_flight: u64,
    total: u64,
    failed: u64,
    others: u64,
    published: Option<u64>,
    published_age_ms: Option<u128>,
    avoided: Option<JsonAvoided>,
}

#[derive(Serialize)]
struct JsonAvoided {
    since_ms: u128,
    for_ms: u128,
    reason: &'static str,
}

fn by_place_name<S: Serializer>(
    verdicts: &&[(PlaceReason, u64)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let entries = verdicts.iter();
    serializer.collect_map(entries.map(|(reason, count)| (reason.name(), count)))
}

impl<'a> JsonGroup<'a> {
    fn new(group: &'a EndpointGroupSnapshot) -> Self {
        Self {
            group: &group.name,
            frontends: &group.frontends,
            own_addresses: &group.own_addresses,
            rank: group.rank.map(|(rank, _)| rank),
            nodes: group.rank.map(|(_, nodes)| nodes),
            known_for_ms: group.known_for.map(|left| left.as_millis()),
            knows_others: group.knows_others,
            dry_run: group.dry_run,
            endpoints: group.endpoints.iter().map(JsonEndpoint::new).collect(),
            verdicts: &group.verdicts,
        }
    }
}

impl<'a> JsonEndpoint<'a> {
    pub(in crate::cli) fn new(endpoint: &'a EndpointSnapshot) -> Self {
        let avoided = endpoint.avoided.map(|(since, left)| JsonAvoided {
            since_ms: since.as_millis(),
            for_ms: left.as_millis(),
            reason: EndpointSnapshot::WHY_AVOIDED,
        });
        Self {
            name: &endpoint.name,
            addresses: &endpoint.addresses,
            weight: endpoint.weight,
            leaving: endpoint.leaving,
            established: endpoint.established,
            in_flight: endpoint.in_flight,
            total: endpoint.total,
            failed: endpoint.failed,
            others: endpoint.others,
            published: endpoint.published.map(|(connections, _)| connections),
            published_age_ms: endpoint.published.map(|(_, age)| age.as_millis()),
            avoided,
        }
    }
}

fn by_name<S: Serializer>(verdicts: &&[(Reason, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(
        verdicts
            .iter()
            .map(|(reason, count)| (reason.name(), count)),
    )
}

impl<'a> Json<'a> {
    pub(in crate::cli) fn new(snapshot: &'a Snapshot, notes: &'a DaemonNotes) -> Self {
        Self {
            schema: 1,
            services: snapshot.services.iter().map(JsonService::new).collect(),
            placing: snapshot.placing.iter().map(JsonGroup::new).collect(),
            place: JsonPlace {
                refused: notes.placing.refused.as_deref(),
                left_out: &notes.placing.left_out,
            },
            agent: JsonDaemon {
                alive: notes.state(&snapshot.daemon).is_alive(),
                heartbeat_age_ms: snapshot.daemon.heartbeat_age.map(|age| age.as_millis()),
                checks: snapshot.daemon.audit_totals.checks,
                drift: snapshot.daemon.audit_totals.drift,
                repairs: snapshot.daemon.audit_totals.repairs,
                failed_reload: notes.failed_reload.as_ref().map(|failed| JsonReload {
                    age_ms: failed.age.as_millis(),
                    error: &failed.error,
                }),
            },
        }
    }
}

impl<'a> JsonService<'a> {
    fn new(service: &'a ServiceSnapshot) -> Self {
        Self {
            name: &service.name,
            port: service.port,
            address: service.address,
            policy: service.policy.name(),
            mode: service.effect.name(),
            keepalive: service.keepalive.map(JsonKeepalive::new),
            unattributed: service.unattributed,
            backends: service.backends.iter().map(JsonBackend::new).collect(),
            down: service.down.iter().map(JsonDown::new).collect(),
            verdicts: &service.verdicts,
            warnings: &service.warnings,
        }
    }
}

impl JsonHealth {
    fn new(health: &BackendHealth) -> Self {
        let reason = reason(health.state);
        Self {
            state: health.state.name(),
            since_ms: reason.map(|_| health.age.as_millis()),
            reason,
        }
    }
}

impl JsonDown {
    fn new(down: &DownBackend) -> Self {
        Self {
            address: down.address,
            state: DownBackend::STATE,
            since_ms: down.since.map(|since| since.as_millis()),
        }
    }
}

impl JsonKeepalive {
    fn new(keepalive: Keepalive) -> Self {
        Self {
            idle_s: keepalive.idle,
            interval_s: keepalive.interval,
            probes: keepalive.probes,
            user_timeout_ms: Some(keepalive.user_timeout_ms()).filter(|timeout| *timeout != 0),
        }
    }
}

impl<'a> JsonBackend<'a> {
    fn new(backend: &'a BackendSnapshot) -> Self {
        Self {
            slot: backend.slot,
            address: backend.address,
            netns: backend.netns,
            state: backend.state.name(),
            weight: backend.weight,
            quota: backend.quota,
            server: backend.server.map(|server| JsonServer {
                first_slot: server.first_slot,
                quota: server.quota,
            }),
            established: backend.established,
            exempt: backend.exempt,
            pending: backend.pending,
            silent: backend.silence.connections(),
            longest_silence_s: backend.silence.longest(),
            drained: backend.drained,
            moves: JsonMoves {
                left: backend.moves.left,
                under_way: backend.moves.under_way(),
                stay: backend.moves.stay(),
            },
            steerable: backend.steerable,
            health: backend.health.as_ref().map(JsonHealth::new),
            note: backend.note.as_deref(),
        }
    }
}
