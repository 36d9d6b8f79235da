//! `balancer metrics`

use std::sync::atomic::AtomicU64;

use anyhow::{Context, Result};
use clap::Args;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::{Place, output::print};
use crate::dataplane::{BackendSnapshot, DaemonSnapshot, ServiceSnapshot, Snapshot};

/// Print what `status` shows as metrics, in the `OpenMetrics` text format (changes nothing)
///
/// Reads the kernel's own counters, so it works without the daemon. Two of them should alarm: `balancer_drift_connections`, by how many connections the
/// counts lastingly differed from the socket table at the last comparison, must be 0, and `balancer_repairs_total` must not grow.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Example, for the textfile collector of Prometheus' node_exporter:
  balancer metrics > /var/lib/node_exporter/balancer.prom.new && mv /var/lib/node_exporter/balancer.prom{.new,}")]
pub(super) struct Metrics {}

impl Metrics {
    #[expect(clippy::unused_self, reason = "as every verb has it")]
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let snapshot = place
            .reader()?
            .snapshot()
            .context("can't read the balancer's maps")?;
        print(&text(&snapshot)?)
    }
}

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge>;
type Counters = Family<Labels, Counter<u64, AtomicU64>>;

pub(in crate::cli) fn text(snapshot: &Snapshot) -> Result<String> {
    let mut registry = Registry::with_prefix("balancer");
    daemon(&mut registry, &snapshot.agent);
    let mut backends = Backends::new(&mut registry);
    let lookups = counters(&mut registry, "lookups", "Look-ups by how they ended");
    for service in &snapshot.services {
        for backend in &service.backends {
            backends.add(service, backend);
        }
        for (reason, count) in &service.verdicts {
            let labels = vec![
                ("service", service.name.clone()),
                ("verdict", reason.verdict().name().to_owned()),
                ("reason", reason.name().to_owned()),
            ];
            lookups.get_or_create(&labels).inc_by(*count);
        }
    }
    let mut text = String::new();
    encode(&mut text, &registry).context("can't write metrics")?;
    Ok(text)
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

fn daemon(registry: &mut Registry, agent: &DaemonSnapshot) {
    let alive = Gauge::<i64>::default();
    alive.set(i64::from(agent.alive));
    let help = "Whether the daemon's last sign of life is recent: 1, and refusing is possible";
    registry.register("alive", help, alive);
    if let Some(age) = agent.heartbeat_age {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(age.as_secs_f64());
        let help = "Since the daemon's last sign of life";
        registry.register_with_unit("heartbeat_age", help, Unit::Seconds, gauge);
    }
    let drift = Gauge::<i64>::default();
    drift.set(i64::try_from(agent.audit_totals.drift).unwrap_or(i64::MAX));
    let help = "By how much counts lastingly differed from the socket table at the last comparison";
    registry.register_with_unit("drift", help, connections(), drift);
    let help = "Comparisons of the counts with the socket table";
    registry.register("checks", help, counter(agent.audit_totals.checks));
    let help = "Counts that were put right after comparisons with the socket table";
    registry.register("repairs", help, counter(agent.audit_totals.repairs));
}

fn counter(value: u64) -> Counter {
    let counter = Counter::default();
    counter.inc_by(value);
    counter
}

/// What there is of each backend.
struct Backends {
    established: Gauges,
    exempt: Gauges,
    quota: Gauges,
    pending: Gauges,
}

impl Backends {
    fn new(registry: &mut Registry) -> Self {
        let mut gauge = |name, help| gauges(registry, name, help);
        Self {
            established: gauge("established", "In TCP state ESTABLISHED, accept side"),
            exempt: gauge("exempt", "Those of them that don't count against the quota"),
            quota: gauge("quota", "The most that it should hold; absent: unlimited"),
            pending: gauge("pending", "Handshakes under way; absent: can't be read"),
        }
    }

    fn add(&mut self, service: &ServiceSnapshot, backend: &BackendSnapshot) {
        let labels = vec![
            ("service", service.name.clone()),
            ("slot", backend.slot.to_string()),
            ("backend", backend.address.to_string()),
            ("netns", backend.netns.to_string()),
            ("state", backend.state.name().to_owned()),
        ];
        let set = |family: &Gauges, value: u32| {
            family.get_or_create(&labels).set(i64::from(value));
        };
        set(&self.established, backend.established);
        set(&self.exempt, backend.exempt);
        if let Some(quota) = backend.quota {
            set(&self.quota, quota);
        }
        if let Some(pending) = backend.pending {
            set(&self.pending, pending);
        }
    }
}
