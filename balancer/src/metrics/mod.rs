//! The metrics of a loaded data plane, in the `OpenMetrics` text format.

mod placing;

use std::sync::atomic::AtomicU64;

use balancer_common::BackendState;
use balancer_common::abi::HealthState;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::dataplane::{
    BackendHealth, BackendSnapshot, DaemonNotes, DaemonSnapshot, DaemonState, DownBackend,
    ServiceSnapshot, Snapshot,
};

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge>;
type Counters = Family<Labels, Counter<u64, AtomicU64>>;

/// The states that a backend can be seen in.
const STATES: [BackendState; 5] = [
    BackendState::Active,
    BackendState::Candidate,
    BackendState::Closed,
    BackendState::Claimed,
    BackendState::Held,
];

/// A snapshot in the `OpenMetrics` text format.
///
/// # Errors
/// When it can't be written as text.
pub fn text(snapshot: &Snapshot, notes: &DaemonNotes) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("balancer");
    daemon(
        &mut registry,
        &snapshot.daemon,
        notes.state(&snapshot.daemon),
    );
    let failed = Gauge::<i64>::default();
    failed.set(i64::from(notes.failed_reload.is_some()));
    let help = "Whether the configuration could not be put in force when it was last read again: 1";
    registry.register("reload_failed", help, failed);
    let mut backends = Backends::new(&mut registry);
    let lookups = counters(&mut registry, "lookups", "Look-ups by how they ended");
    let help = "Through the virtual port, and counted on no backend";
    let unattributed = gauges(&mut registry, "unattributed", help);
    for service in &snapshot.services {
        let labels = vec![("service", service.name.clone())];
        unattributed
            .get_or_create(&labels)
            .set(i64::from(service.unattributed));
        for backend in &service.backends {
            backends.add(service, backend);
        }
        for down in &service.down {
            backends.add_down(service, down);
        }
        for (reason, count) in &service.verdicts {
            let labels = vec![
                ("service", service.name.clone()),
                ("verdict", service.verdict(*reason).name().to_owned()),
                ("reason", reason.name().to_owned()),
            ];
            lookups.get_or_create(&labels).inc_by(*count);
        }
    }
    placing::register(&mut registry, &snapshot.placing, &notes.placing);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(with_sorted_series(&text))
}

/// The series of each metric in the order of their labels: the encoder has them in no order.
fn with_sorted_series(text: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    for series in lines.chunk_by_mut(|one, next| !one.starts_with('#') && !next.starts_with('#')) {
        series.sort_unstable_by_key(|line| by_numbers(line));
    }
    lines.join("\n") + "\n"
}

/// The pieces of a line, so that slot 9 comes before slot 10.
fn by_numbers(line: &str) -> Vec<(usize, &str)> {
    let pieces = line.split('"');
    let is_number = |piece: &str| piece.bytes().all(|byte| byte.is_ascii_digit());
    pieces
        .map(|piece| (if is_number(piece) { piece.len() } else { 0 }, piece))
        .collect()
}

fn gauges(registry: &mut Registry, name: &str, help: &str) -> Gauges {
    let family = Gauges::default();
    registry.register_with_unit(name, help, connections(), family.clone());
    family
}

fn counters(registry: &mut Registry, name: &str, help: &str) -> Counters {
    let family = Counters::default();
    registry.register(name, help, family.clone());
    family
}

fn connections() -> Unit {
    Unit::Other("connections".to_owned())
}

fn daemon(registry: &mut Registry, daemon: &DaemonSnapshot, state: DaemonState) {
    let alive = Gauge::<i64>::default();
    alive.set(i64::from(state.is_alive()));
    let help =
        "Whether the daemon lives: 1 while its last heartbeat is recent and its process is there";
    registry.register("alive", help, alive);
    if let Some(age) = daemon.heartbeat_age {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(age.as_secs_f64());
        let help = "Since the daemon's last sign of life";
        registry.register_with_unit("heartbeat_age", help, Unit::Seconds, gauge);
    }
    let drift = Gauge::<i64>::default();
    drift.set(i64::try_from(daemon.audit_totals.drift).unwrap_or(i64::MAX));
    let help = "By how much counts lastingly differed from the socket table at the last comparison";
    registry.register_with_unit("drift", help, connections(), drift);
    let help = "Comparisons of the counts with the socket table";
    registry.register("checks", help, counter(daemon.audit_totals.checks));
    let help = "Counts that were put right after comparisons with the socket table";
    registry.register("repairs", help, counter(daemon.audit_totals.repairs));
}

fn counter(value: u64) -> Counter {
    let counter = Counter::default();
    counter.inc_by(value);
    counter
}

/// The metrics of each backend.
struct Backends {
    established: Gauges,
    exempt: Gauges,
    quota: Gauges,
    pending: Gauges,
    silent: Gauges,
    moving: Gauges,
    moved: Counters,
    stay: Counters,
    state: Gauges,
    health: Gauges,
}

impl Backends {
    fn new(registry: &mut Registry) -> Self {
        let state = Gauges::default();
        let help = "1 for the state that it is in, 0 for the others";
        registry.register("backend_state", help, state.clone());
        let health = Gauges::default();
        let help =
            "1 for how it serves, 0 for the others; absent: it does not listen, or `health: off`";
        registry.register("backend_health", help, health.clone());
        let help = "Connections that have left because they were moved";
        let moved = counters(registry, "moved", help);
        let help = "How often a connection that was to move was left where it is";
        let stay = counters(registry, "unmovable", help);
        let mut gauge = |name, help| gauges(registry, name, help);
        Self {
            established: gauge("established", "In TCP state ESTABLISHED, accept side"),
            exempt: gauge("exempt", "Those of them that don't count against the quota"),
            quota: gauge("quota", "The most that it should hold; absent: unlimited"),
            pending: gauge(
                "pending",
                "SYNs sent to it in the last 1.1 s that have not become established; absent: can't be read",
            ),
            silent: gauge(
                "silent",
                "Those of them from which nothing was heard for longer than keepalive's first probe takes",
            ),
            moving: gauge("moving", "Those of them that are being moved"),
            moved,
            stay,
            state,
            health,
        }
    }

    fn add(&mut self, service: &ServiceSnapshot, backend: &BackendSnapshot) {
        let labels = vec![
            ("service", service.name.clone()),
            ("slot", backend.slot.to_string()),
            ("backend", backend.address.to_string()),
            ("netns", backend.netns.to_string()),
        ];
        let set = |family: &Gauges, value: u32| {
            family.get_or_create(&labels).set(i64::from(value));
        };
        set(&self.established, backend.established);
        set(&self.exempt, backend.exempt);
        set(&self.silent, backend.silence.connections());
        set(&self.moving, backend.moves.under_way());
        self.moved.get_or_create(&labels).inc_by(backend.moves.left);
        self.stay
            .get_or_create(&labels)
            .inc_by(backend.moves.stay().into());
        if let Some(quota) = backend.quota {
            set(&self.quota, quota);
        }
        if let Some(pending) = backend.pending {
            set(&self.pending, pending);
        }
        if let Some(health) = backend.health {
            self.add_health(&labels, health);
        }
        // In the other metrics a label that changes would end one series and begin another.
        for state in STATES {
            self.set_state(&labels, state.name(), backend.state == state);
        }
    }

    fn add_health(&self, labels: &Labels, health: BackendHealth) {
        for state in HealthState::ALL {
            let mut labels = labels.clone();
            labels.push(("health", state.name().to_owned()));
            let is_in = i64::from(health.state == state);
            self.health.get_or_create(&labels).set(is_in);
        }
    }

    /// It has no slot, and is in no netns that is known.
    fn add_down(&self, service: &ServiceSnapshot, down: &DownBackend) {
        let labels = vec![
            ("service", service.name.clone()),
            ("slot", String::new()),
            ("backend", down.address.to_string()),
            ("netns", String::new()),
        ];
        self.set_state(&labels, DownBackend::STATE, true);
    }

    fn set_state(&self, labels: &Labels, state: &str, is_in: bool) {
        let mut labels = labels.clone();
        labels.push(("state", state.to_owned()));
        self.state.get_or_create(&labels).set(i64::from(is_in));
    }
}
