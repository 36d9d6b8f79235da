//! `status` for people.

use std::net::SocketAddr;

use balancer_common::BackendState;
use balancer_common::abi::{AuditTotals, Keepalive};

use super::placing;
use crate::{
    cli::output::{Column, or, span, table, text_columns, wrapped},
    config::Effect,
    dataplane::{
        BackendHealth, BackendSnapshot, DaemonNotes, DaemonSnapshot, DaemonState, DownBackend,
        FailedReload, ServerSnapshot, ServiceSnapshot, Snapshot,
    },
    health::in_words,
};

pub(in crate::cli) fn text(snapshot: &Snapshot, notes: &DaemonNotes) -> String {
    let mut text = daemon(&snapshot.daemon, notes.state(&snapshot.daemon));
    if let Some(failed) = &notes.failed_reload {
        text += &reload(failed);
    }
    text += &counts(&snapshot.daemon.audit_totals);
    text += &placing::trouble(&notes.placing);
    for service in &snapshot.services {
        text += "\n";
        text += &service_text(service);
    }
    for group in &snapshot.placing {
        text += "\n";
        text += &placing::group(group, &notes.placing);
    }
    if snapshot.services.is_empty() && snapshot.placing.is_empty() {
        text += "\n";
        text += &wrapped(
            "",
            "No service is loaded: the daemon has not finished starting, or has been told to take them all out.",
        );
    }
    text
}

fn daemon(daemon: &DaemonSnapshot, state: DaemonState) -> String {
    let limit = span(daemon.fail_open_after);
    let again = "`balancer run --config FILE`";
    let ago = span(daemon.heartbeat_age.unwrap_or_default());
    let words = match state {
        DaemonState::Unborn => format!(
            "has not lived since the balancer was loaded: nobody is refused. Start it with {again}."
        ),
        DaemonState::Dead(pid) if daemon.refuses => format!(
            "DEAD: its process {pid} is gone, last heartbeat {ago} ago; from {limit} on nobody is refused (fail open). Start it again with \
             {again}."
        ),
        DaemonState::Dead(pid) => format!(
            "DEAD: its process {pid} is gone, last heartbeat {ago} ago: nobody is refused (fail open after {limit}), quotas stay as they are. \
             Start it again with {again}."
        ),
        DaemonState::Alive => format!("alive, last heartbeat {ago} ago"),
        DaemonState::Silent => format!(
            "SILENT for {ago}: dead, stuck, or on a very busy machine; from {limit} on nobody is refused (fail open). `balancer ping` says which, \
             and what to do."
        ),
        DaemonState::DeadOrStuck => format!(
            "DEAD OR STUCK, last heartbeat {ago} ago: nobody is refused (fail open after {limit}), quotas stay as they are. `balancer ping` says \
             which, and what to do."
        ),
    };
    wrapped("Daemon: ", &words)
}

fn reload(failed: &FailedReload) -> String {
    let words = format!(
        "FAILED {} ago (`balancer reload` tries again): {}",
        span(failed.age),
        failed.error
    );
    wrapped("Reload: ", &words)
}

/// Nothing to be said where the counts have always been those of the socket table.
fn counts(audit_totals: &AuditTotals) -> String {
    if audit_totals.drift == 0 && audit_totals.repairs == 0 {
        return String::new();
    }
    let now = match audit_totals.drift {
        0 => "they agree with the socket table now".to_owned(),
        drift => format!("{drift} connections were put right at the last comparison"),
    };
    let words = format!(
        "put right {} times in {} comparisons with the socket table, which should never be needed; {now}. See the daemon's log and \
         `balancer doctor`.",
        audit_totals.repairs, audit_totals.checks
    );
    wrapped("Counts: ", &words)
}

fn service_text(service: &ServiceSnapshot) -> String {
    let mut text = format!(
        "{}: {}, {}\n",
        service.name,
        place(service),
        service.policy.name()
    );
    if let Some(words) = mode_words(service) {
        text += &wrapped("  Mode: ", words);
    }
    text += &wrapped("  Quota: ", &quota_words(service));
    if let Some(words) = keepalive_words(service) {
        text += &wrapped("  Keepalive: ", &words);
    }
    for alert in alerts(service).iter().chain(&service.warnings) {
        text += &wrapped("  ! ", alert);
    }
    if service.backends.is_empty() && service.down.is_empty() {
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

/// Nothing to be said where everything is done.
const fn mode_words(service: &ServiceSnapshot) -> Option<&'static str> {
    match (service.effect, service.virtual_port) {
        (Effect::On, _) => None,
        (Effect::Count, false) => Some(
            "count: connections are counted, and nothing is changed: nobody is refused or steered, \
             there is no quota",
        ),
        (Effect::DryRun, false) => Some(
            "dry-run: nothing is changed, nobody is refused or steered. The quotas are what they \
             would be, and the reasons below say how look-ups would have ended",
        ),
        (Effect::Count, true) => Some(
            "count: there is no quota. Nobody but the backends serves a \
             virtual port, so connections are steered to them",
        ),
        (Effect::DryRun, true) => Some(
            "dry-run: there is no quota. Nobody but the backends serves \
             a virtual port, so connections are steered to them, and a quota would refuse",
        ),
    }
}

fn quota_words(service: &ServiceSnapshot) -> String {
    match service.quota_override {
        Some(quota) => format!(
            "{quota} for each backend, set by hand; `balancer quota clear {}` goes back to the rule ({})",
            service.name, service.rule
        ),
        None => service.sentence.clone(),
    }
}

/// Nothing to be said of the default while every client can be heard.
fn keepalive_words(service: &ServiceSnapshot) -> Option<String> {
    let backends = &service.backends;
    let silent = backends.iter().map(|one| one.silence.connections());
    // Each may be anything that a pin holds.
    let silent: u64 = silent.map(u64::from).sum();
    if silent == 0 && service.keepalive == Some(Keepalive::DEFAULT) {
        return None;
    }
    let words = service.keepalive.map_or_else(
        || "off: a client that has vanished stays until its server notices".to_owned(),
        |keepalive| {
            let Keepalive { idle, interval, probes } = keepalive;
            format!(
                "after {idle} s of silence {probes} probes, {interval} s apart: a client that has vanished leaves after {} s",
                keepalive.gone_after()
            )
        },
    );
    if silent == 0 {
        return Some(words);
    }
    let longest = backends.iter().map(|one| one.silence.longest()).max();
    Some(format!(
        "{words}. Silent for longer than the first probe takes: {silent} connections, the most silent one for {} s",
        longest.unwrap_or(0)
    ))
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
        alerts.push(if active().all(is_closed_by_hand) {
            format!(
                "Every backend is closed by hand (quota 0): new clients {} refused.",
                if service.effect == Effect::On { "are" } else { "would be" },
            )
        } else {
            format!(
                "Every backend is at its quota: new clients {} refused. Raise it with `balancer quota set {} N`, or start another backend.",
                if service.effect == Effect::On { "are" } else { "would be" },
                service.name
            )
        });
    }
    alerts.extend(unhealthy(service));
    if service.unattributed > 0 {
        alerts.push(format!(
            "{} established connections through this port are older than the data plane and counted on no backend: new clients may exceed the \
             quota by as many, until these end or their server is started again. The daemon's log says why.",
            service.unattributed
        ));
    }
    alerts
}

/// Which backends don't serve, since when and why.
fn unhealthy(service: &ServiceSnapshot) -> Vec<String> {
    let backends = by_address(&service.backends);
    let bad = backends.iter().filter_map(|backend| {
        let health = backend.health.filter(BackendHealth::is_bad)?;
        let words = in_words(health.state, span(health.age))?;
        let (address, slot) = (backend.address, backend.slot);
        Some(format!("{address} (slot {slot}) is {words}."))
    });
    let mut alerts: Vec<String> = bad.collect();
    let listening = (backends.iter()).filter(|backend| backend.health.is_some());
    let (bad, all) = (alerts.len(), listening.count());
    if bad > 0 {
        alerts.push(if 2 * bad > all {
            format!(
                "More than half of the backends ({bad} of {all}) do not serve, so none of them is \
                 avoided."
            )
        } else {
            "New connections go to the other backends. `balancer explain` says where.".to_owned()
        });
    }
    alerts
}

fn is_closed_by_hand(backend: &BackendSnapshot) -> bool {
    backend.overridden && backend.server_quota() == Some(0)
}

fn is_full(backend: &BackendSnapshot) -> bool {
    let taken = counted(backend).saturating_add(backend.pending.unwrap_or(0));
    backend.quota.is_some_and(|quota| taken >= quota)
}

/// The columns that a narrow terminal can do without, the least needed first.
const LEAST: [&str; 8] = [
    "WEIGHT", "EXEMPT", "SILENT", "MOVED", "PENDING", "USED", "NETNS", "SLOT",
];

fn backends(service: &ServiceSnapshot) -> String {
    let backends = by_address(&service.backends);
    let total = total(&service.backends);
    let rows = rows(service);
    let column = |heading: &'static str, cell: &dyn Fn(&BackendSnapshot) -> String| {
        let cell = |row: &Row<'_>| match (row, heading) {
            (Row::Slot(backend), _) => cell(backend),
            (Row::Down(down), "BACKEND") => down.address.to_string(),
            (Row::Down(_), "STATE") => DownBackend::STATE.to_owned(),
            (Row::Down(_), _) => String::new(),
        };
        let mut cells: Vec<String> = rows.iter().map(cell).collect();
        if rows.len() > 1 {
            cells.push(total.of(heading));
        }
        Column { heading, cells }
    };
    let mut columns = vec![
        column(">SLOT", &|backend| backend.slot.to_string()),
        column("BACKEND", &|backend| backend.address.to_string()),
        column("STATE", &|backend| state(backend).to_owned()),
        column(">ESTABLISHED", &|backend| backend.established.to_string()),
        column(">QUOTA", &|backend| quota_cell(service, backend)),
        column(">USED", &used),
        column(">PENDING", &|backend| or(backend.pending, "?")),
    ];
    let any =
        |is_so: &dyn Fn(&BackendSnapshot) -> bool| backends.iter().any(|backend| is_so(backend));
    if any(&|backend| backend.exempt != 0) {
        columns.push(column(">EXEMPT", &|backend| backend.exempt.to_string()));
    }
    if any(&|backend| backend.silence.connections() != 0) {
        columns.push(column(">SILENT", &|backend| {
            backend.silence.connections().to_string()
        }));
    }
    if any(&|backend| moves(backend).is_some()) {
        columns.push(column(">MOVED", &|backend| {
            moves(backend).unwrap_or_default()
        }));
    }
    if any(&|backend| backend.weight != 1) {
        columns.push(column(">WEIGHT", &|backend| backend.weight.to_string()));
    }
    // Pods all listen on the same wildcard address: only the netns tells them apart.
    if any(&|backend| backend.netns != backends[0].netns) {
        columns.push(column(">NETNS", &|backend| backend.netns.to_string()));
    }
    table(columns, &LEAST)
}

/// The connections that have left because they were moved, and those that are on their way.
fn moves(backend: &BackendSnapshot) -> Option<String> {
    match (backend.moves.left, backend.moves.under_way()) {
        (0, 0) => None,
        (left, 0) => Some(left.to_string()),
        (left, under_way) => Some(format!("{left} (+{under_way})")),
    }
}

/// How it serves, where it listens and does not serve; whether it is drained; else the state of its
/// slot.
fn state(backend: &BackendSnapshot) -> &'static str {
    if backend.drained {
        return if backend.established > backend.exempt {
            "draining"
        } else {
            "drained"
        };
    }
    let health = backend.health.filter(BackendHealth::is_bad);
    health.map_or(backend.state.name(), |health| health.state.name())
}

/// A line of the table.
enum Row<'a> {
    Slot(&'a BackendSnapshot),
    Down(&'a DownBackend),
}

fn rows(service: &ServiceSnapshot) -> Vec<Row<'_>> {
    let backends = by_address(&service.backends).into_iter().map(Row::Slot);
    let mut rows: Vec<_> = backends.collect();
    rows.extend(service.down.iter().map(Row::Down));
    rows.sort_by_key(|row| match row {
        Row::Slot(backend) => backend.address,
        Row::Down(down) => down.address,
    });
    rows
}

/// In the order in which a person looks for one.
pub(in crate::cli) fn by_address(backends: &[BackendSnapshot]) -> Vec<&BackendSnapshot> {
    let mut sorted: Vec<_> = backends.iter().collect();
    sorted.sort_by_key(|backend| (backend.address, backend.netns, backend.slot));
    sorted
}

fn quota_cell(service: &ServiceSnapshot, backend: &BackendSnapshot) -> String {
    if backend.state == BackendState::Closed {
        return String::new();
    }
    or(backend.quota, "unlimited")
        + if is_own_override(service, backend) {
            "*"
        } else {
            ""
        }
}

/// The connections that count against the quota.
fn counted(backend: &BackendSnapshot) -> u32 {
    backend.established.saturating_sub(backend.exempt)
}

fn used(backend: &BackendSnapshot) -> String {
    match backend.quota {
        Some(quota) if quota > 0 && backend.state != BackendState::Closed => {
            format!("{}%", u64::from(counted(backend)) * 100 / u64::from(quota))
        }
        _ => String::new(),
    }
}

/// The last line of the table.
struct Total {
    established: u64,
    quota: Option<u64>,
    pending: Option<u64>,
    exempt: u64,
    silent: u64,
}

fn total(backends: &[BackendSnapshot]) -> Total {
    let sum = |of: fn(&BackendSnapshot) -> u32| backends.iter().map(|b| u64::from(of(b))).sum();
    let sum_of_known = |of: fn(&BackendSnapshot) -> Option<u32>| {
        let parts = backends.iter().map(|backend| of(backend).map(u64::from));
        parts.sum::<Option<u64>>()
    };
    Total {
        established: sum(|backend| backend.established),
        // A backend that takes nobody any more adds nothing to what there is room for.
        quota: sum_of_known(|backend| match backend.state {
            BackendState::Closed => Some(0),
            _ => backend.quota,
        }),
        pending: sum_of_known(|backend| backend.pending),
        exempt: sum(|backend| backend.exempt),
        silent: sum(|backend| backend.silence.connections()),
    }
}

impl Total {
    fn of(&self, heading: &str) -> String {
        match heading {
            "BACKEND" => "total".to_owned(),
            ">ESTABLISHED" => self.established.to_string(),
            ">QUOTA" => or(self.quota, "unlimited"),
            ">PENDING" => or(self.pending, "?"),
            ">EXEMPT" => self.exempt.to_string(),
            ">SILENT" => self.silent.to_string(),
            _ => String::new(),
        }
    }
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
    if service
        .backends
        .iter()
        .any(|backend| is_own_override(service, backend))
    {
        let words = format!("set by hand; {}", back_from_own(service));
        text += &wrapped("  * ", &words);
    }
    for shared in shared_quotas(service) {
        text += &wrapped("  - ", &shared);
    }
    for down in &service.down {
        let since = down.since.map(|since| format!(" for {}", span(since)));
        let words = format!(
            "{} is down: nobody listens there{}",
            down.address,
            since.unwrap_or_default()
        );
        text += &wrapped("  - ", &words);
    }
    for (note, slots) in notes {
        let slots = if slots.len() == 1 {
            format!("slot {}", slots[0])
        } else {
            format!("each of slots {}", slots.join(", "))
        };
        text += &wrapped("  - ", &format!("{slots}: {note}"));
    }
    text
}

/// Which backends share the quota of a server, in words.
pub(in crate::cli) fn shared_quotas(service: &ServiceSnapshot) -> Vec<String> {
    let mut servers: Vec<(ServerSnapshot, Vec<String>)> = Vec::new();
    let active = service.backends.iter();
    let active = active.filter(|backend| backend.state == BackendState::Active);
    for (backend, server) in active.filter_map(|backend| Some((backend, backend.server?))) {
        let slot = backend.slot.to_string();
        match servers.iter_mut().find(|(known, _)| *known == server) {
            Some((_, slots)) => slots.push(slot),
            None => servers.push((server, vec![slot])),
        }
    }
    let shared = servers.into_iter().filter(|(_, slots)| slots.len() > 1);
    let words = shared.filter_map(|(server, slots)| {
        Some(format!(
            "slots {} are listeners of one server: they share a quota of {}",
            slots.join(", "),
            server.quota?
        ))
    });
    words.collect()
}

/// Whether the quota was set by hand for this backend, as far as one can tell, and not for the
/// whole service.
pub(in crate::cli) fn is_own_override(
    service: &ServiceSnapshot,
    backend: &BackendSnapshot,
) -> bool {
    backend.overridden && service.quota_override != backend.server_quota()
}

/// How a backend gives up the quota that was set by hand for it alone, and for which.
pub(in crate::cli) fn back_from_own(service: &ServiceSnapshot) -> String {
    let to = service.quota_override.map_or_else(
        || "the rule".to_owned(),
        |quota| format!("{quota}, the service's by hand"),
    );
    format!(
        "`balancer quota clear {} --slot SLOT` goes back to {to}",
        service.name
    )
}

fn note(backend: &BackendSnapshot) -> Option<&str> {
    match (&backend.note, backend.state) {
        (Some(note), _) => Some(note),
        (None, BackendState::Candidate) => {
            Some("not confirmed by the daemon yet: counted, but no connection is steered to it")
        }
        (None, BackendState::Closed) if backend.established == 0 => {
            Some("its listener is gone; the slot becomes free at the daemon's next look")
        }
        (None, BackendState::Closed) => {
            Some("its listener is gone; its connections remain until their clients leave")
        }
        _ if !backend.steerable => Some("no connection can be steered to it"),
        _ if backend.server_quota() == Some(0) => {
            Some("its quota is 0: it gets no new connections")
        }
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
    let names = given.iter().map(|(reason, _)| reason.name().len());
    let widest = names.max().unwrap_or(0).max("REASON".len());
    let mut text = "\n".to_owned();
    text += &verdict_line(
        "LOOK-UPS",
        "VERDICT",
        &format!("{:<widest$}", "REASON"),
        "MEANING",
    );
    for (reason, count) in given {
        text += &verdict_line(
            &count.to_string(),
            service.verdict(*reason).name(),
            &format!("{:<widest$}", reason.name()),
            reason.meaning(),
        );
    }
    text
}

/// Narrower text has no column for the verdict: the reason says which it is.
const FITS_VERDICT: usize = 72;

fn verdict_line(count: &str, verdict: &str, reason: &str, meaning: &str) -> String {
    let verdict = if text_columns() < FITS_VERDICT {
        String::new()
    } else {
        format!("{verdict:<7}  ")
    };
    wrapped(&format!("  {count:>8}  {verdict}{reason}  "), meaning)
}
