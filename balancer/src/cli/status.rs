//! `balancer status`

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result};
use balancer_common::{BackendState, Reason};
use clap::Args;
use serde::{Serialize, Serializer};

use super::{
    Place,
    output::{Output, or, span, table, wrapped},
};
use crate::dataplane::{AgentSnapshot, BackendSnapshot, ServiceSnapshot, Snapshot};

/// Show services, backends, their connections and quotas, and how look-ups ended (changes nothing)
///
/// Reads the kernel's own counters, so it works without the daemon. ESTABLISHED is what the socket table says, EXEMPT are those of them that are
/// never refused and don't count against the quota, PENDING are handshakes under way. A backend takes a connection while ESTABLISHED - EXEMPT + PENDING
/// is below its QUOTA.
///
/// Verdicts are look-ups, nearly always one for each new connection, but stray packets and other programs look up sockets too.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer status
  watch -n1 balancer status
  balancer status -o json | jq '.services[].backends[] | {address, established, quota}'")]
pub(super) struct Status {
    #[command(flatten)]
    output: Output,
}

impl Status {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let snapshot = place
            .reader()?
            .snapshot()
            .context("can't read the balancer's maps")?;
        self.output.show(&Json::new(&snapshot), || text(&snapshot))
    }
}

#[derive(Serialize)]
pub(super) struct Json<'a> {
    schema: u32,
    services: Vec<JsonService<'a>>,
    agent: JsonAgent,
}

#[derive(Serialize)]
struct JsonAgent {
    alive: bool,
    heartbeat_age_ms: Option<u128>,
}

#[derive(Serialize)]
struct JsonService<'a> {
    name: &'a str,
    port: u16,
    address: Option<IpAddr>,
    policy: &'static str,
    backends: Vec<JsonBackend<'a>>,
    #[serde(serialize_with = "by_name")]
    verdicts: &'a [(Reason, u64)],
}

#[derive(Serialize)]
struct JsonBackend<'a> {
    slot: u32,
    address: SocketAddr,
    netns: u64,
    state: &'static str,
    weight: u32,
    quota: Option<u32>,
    established: u32,
    exempt: u32,
    pending: Option<u32>,
    steerable: bool,
    note: Option<&'a str>,
}

fn by_name<S: Serializer>(verdicts: &&[(Reason, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(
        verdicts
            .iter()
            .map(|(reason, count)| (reason.name(), count)),
    )
}

impl<'a> Json<'a> {
    pub(super) fn new(snapshot: &'a Snapshot) -> Self {
        Self {
            schema: 1,
            services: snapshot.services.iter().map(JsonService::new).collect(),
            agent: JsonAgent {
                alive: snapshot.agent.alive,
                heartbeat_age_ms: snapshot.agent.heartbeat_age.map(|age| age.as_millis()),
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
            backends: service.backends.iter().map(JsonBackend::new).collect(),
            verdicts: &service.verdicts,
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
            established: backend.established,
            exempt: backend.exempt,
            pending: backend.pending,
            steerable: backend.steerable,
            note: backend.note.as_deref(),
        }
    }
}

pub(super) fn text(snapshot: &Snapshot) -> String {
    let mut text = agent_line(&snapshot.agent);
    for service in &snapshot.services {
        text += "\n";
        text += &service_text(service);
    }
    if snapshot.services.is_empty() {
        text += "\nNo service is loaded: the daemon has not finished starting, or has been told to take them all out.\n";
    }
    text
}

fn agent_line(agent: &AgentSnapshot) -> String {
    let limit = span(agent.fail_open_after);
    match agent.heartbeat_age {
        Some(age) if agent.alive => format!("Daemon: alive, last heartbeat {} ago\n", span(age)),
        Some(age) => wrapped(
            "Daemon: ",
            &format!(
                "DEAD OR STUCK, last heartbeat {} ago; {} Start it again with `balancer run --config FILE`.",
                span(age),
                when_stale(age, agent.fail_open_after)
            ),
        ),
        None => wrapped(
            "Daemon: ",
            &format!(
                "has not lived since the balancer was loaded; without it nobody is refused after {limit}. Start it with `balancer run --config FILE`."
            ),
        ),
    }
}

fn when_stale(age: Duration, fail_open_after: Duration) -> String {
    if age >= fail_open_after {
        "until it lives again nobody is refused (fail open) and no new backend joins.".to_owned()
    } else {
        format!(
            "from {} on nobody is refused (fail open).",
            span(fail_open_after)
        )
    }
}

fn service_text(service: &ServiceSnapshot) -> String {
    let mut text = format!(
        "{}: {}, {}\n",
        service.name,
        place(service),
        service.policy.name()
    );
    text += &wrapped("  Quota: ", &quota_words(service));
    for alert in alerts(service) {
        text += &wrapped("  ! ", &alert);
    }
    if service.backends.is_empty() {
        return text + &verdicts(service);
    }
    text + &backends(service) + &notes(service) + &verdicts(service)
}

/// Where clients find it.
fn place(service: &ServiceSnapshot) -> String {
    let kind = if service.virtual_port {
        "virtual port"
    } else {
        "port"
    };
    match service.address {
        Some(address) => format!("{kind} {}", SocketAddr::new(address, service.port)),
        None => format!("{kind} {}", service.port),
    }
}

fn quota_words(service: &ServiceSnapshot) -> String {
    match service.quota_override {
        Some(quota) => format!(
            "{quota} for each backend, set by hand until `balancer quota clear {}` (otherwise {})",
            service.name, service.sentence
        ),
        None => service.sentence.clone(),
    }
}

/// What an operator who looks because something is wrong should see first.
fn alerts(service: &ServiceSnapshot) -> Vec<String> {
    let active = || {
        service
            .backends
            .iter()
            .filter(|backend| backend.state == BackendState::Active)
    };
    let mut alerts = Vec::new();
    if service
        .backends
        .iter()
        .all(|backend| backend.state == BackendState::Closed)
    {
        let why = if service.virtual_port {
            "none of its backends listens"
        } else {
            "nobody listens on it"
        };
        alerts.push(format!(
            "No backend: {why} in a guarded network namespace, so new connections are refused by the kernel itself. Start a server, or see `balancer doctor`."
        ));
    } else if active().count() > 0 && active().all(is_full) {
        alerts.push(format!(
            "Every backend is at its quota: new clients are refused. Raise it with `balancer quota set {} N`, or start another backend.",
            service.name
        ));
    }
    alerts
}

fn is_full(backend: &BackendSnapshot) -> bool {
    let taken = counted(backend).saturating_add(backend.pending.unwrap_or(0));
    backend.quota.is_some_and(|quota| taken >= quota)
}

fn backends(service: &ServiceSnapshot) -> String {
    let mut headings = vec![
        ">SLOT",
        "BACKEND",
        "STATE",
        ">ESTABLISHED",
        ">QUOTA",
        ">USED",
        ">PENDING",
        ">EXEMPT",
        ">WEIGHT",
    ];
    let mut rows: Vec<Vec<String>> = service.backends.iter().map(row).collect();
    if rows.len() > 1 {
        rows.push(total(&service.backends));
    }
    // Pods all listen on the same wildcard address: only the namespace tells them apart.
    let netns = |backend: &BackendSnapshot| backend.netns;
    if service
        .backends
        .windows(2)
        .any(|two| netns(&two[0]) != netns(&two[1]))
    {
        headings.push(">NETNS");
        for (row, backend) in rows.iter_mut().zip(&service.backends) {
            row.push(backend.netns.to_string());
        }
    }
    table(&headings, rows)
}

fn row(backend: &BackendSnapshot) -> Vec<String> {
    vec![
        backend.slot.to_string(),
        backend.address.to_string(),
        backend.state.name().to_owned(),
        backend.established.to_string(),
        or(backend.quota, "unlimited") + if backend.overridden { "*" } else { "" },
        used(backend),
        or(backend.pending, "?"),
        backend.exempt.to_string(),
        backend.weight.to_string(),
    ]
}

/// The connections that count against the quota.
fn counted(backend: &BackendSnapshot) -> u32 {
    backend.established.saturating_sub(backend.exempt)
}

fn used(backend: &BackendSnapshot) -> String {
    match backend.quota {
        Some(quota) if quota > 0 => {
            format!("{}%", u64::from(counted(backend)) * 100 / u64::from(quota))
        }
        _ => String::new(),
    }
}

fn total(backends: &[BackendSnapshot]) -> Vec<String> {
    let sum = |of: fn(&BackendSnapshot) -> Option<u32>| {
        backends
            .iter()
            .map(of)
            .try_fold(0, |sum, part| Some(sum + u64::from(part?)))
    };
    vec![
        String::new(),
        "total".to_owned(),
        String::new(),
        or(sum(|backend| Some(backend.established)), ""),
        or(sum(|backend| backend.quota), "unlimited"),
        String::new(),
        or(sum(|backend| backend.pending), "?"),
        or(sum(|backend| Some(backend.exempt)), ""),
    ]
}

/// What the table has no room for. Backends about which there is the same to say share a line.
fn notes(service: &ServiceSnapshot) -> String {
    let mut notes: Vec<(&str, Vec<String>)> = Vec::new();
    for backend in &service.backends {
        let Some(note) = note(backend) else { continue };
        let slot = backend.slot.to_string();
        match notes.iter_mut().find(|(known, _)| *known == note) {
            Some((_, slots)) => slots.push(slot),
            None => notes.push((note, vec![slot])),
        }
    }
    let mut text = String::new();
    if service.backends.iter().any(|backend| backend.overridden) {
        let back = format!(
            "set by hand; `balancer quota clear {} [--slot N]` goes back to the rule",
            service.name
        );
        text += &wrapped("  * ", &back);
    }
    for (note, slots) in notes {
        let slots = if slots.len() == 1 {
            format!("slot {}", slots[0])
        } else {
            format!("slots {}", slots.join(", "))
        };
        text += &wrapped("  - ", &format!("{slots}: {note}"));
    }
    text
}

fn note(backend: &BackendSnapshot) -> Option<&str> {
    match (&backend.note, backend.state) {
        (Some(note), _) => Some(note),
        (None, BackendState::Candidate) => {
            Some("not confirmed by the daemon yet: counted, but no connection is steered to it")
        }
        (None, BackendState::Closed) => {
            Some("its listener is gone; these connections remain until their clients leave")
        }
        _ if !backend.steerable => Some("no connection can be steered to it"),
        _ if backend.quota == Some(0) => Some("its quota is 0: it gets no new connections"),
        _ => None,
    }
}

fn verdicts(service: &ServiceSnapshot) -> String {
    let given: Vec<_> = service
        .verdicts
        .iter()
        .filter(|(_, count)| *count > 0)
        .collect();
    if given.is_empty() {
        return "  No connection has been looked up yet.\n".to_owned();
    }
    let mut text = "\n".to_owned();
    text += &verdict_line("LOOK-UPS", "VERDICT", "REASON", "MEANING");
    for (reason, count) in given {
        text += &verdict_line(
            &count.to_string(),
            reason.verdict().name(),
            reason.name(),
            reason.meaning(),
        );
    }
    text
}

fn verdict_line(count: &str, verdict: &str, reason: &str, meaning: &str) -> String {
    wrapped(
        &format!("  {count:>8}  {verdict:<7}  {reason:<18}  "),
        meaning,
    )
}
