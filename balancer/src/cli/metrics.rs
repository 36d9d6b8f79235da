//! `balancer metrics`

use anyhow::{Context, Result};
use clap::Args;

use super::{Place, output::print};
use crate::dataplane::DaemonNotes;
use crate::metrics;

/// Print what `status` shows as metrics, in the `OpenMetrics` text format (changes nothing)
///
/// Reads the kernel's own counters, so it works without the daemon. Three of them should alarm:
/// `balancer_drift_connections`, by how many connections the counts lastingly differed from the
/// socket table at the last comparison, must be 0, `balancer_repairs_total` must not grow, and
/// `balancer_reload_failed` is 1 while the file that was read last is not in force.
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
        let notes = DaemonNotes::read(&place.paths());
        print(&metrics::text(&snapshot, &notes).context("can't write metrics")?)
    }
}
