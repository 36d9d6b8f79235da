//! The metrics of placing.

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{Counters, Gauges, Labels, counters, gauges};
use crate::dataplane::{EndpointGroupSnapshot, EndpointSnapshot, PlacingNotes};

/// Adds what there is to measure of endpoint groups. Without any there are no such metrics.
pub(super) fn register(
    registry: &mut Registry,
    groups: &[EndpointGroupSnapshot],
    notes: &PlacingNotes,
) {
    if groups.is_empty() && *notes == PlacingNotes::default() {
        return;
    }
    trouble(registry, notes);
    let endpoints = Endpoints::new(registry);
    let help = "Connects to frontends by how they ended";
    let connects = counters(registry, "place_connects", help);
    for group in groups {
        for endpoint in &group.endpoints {
            endpoints.add(group, endpoint);
        }
        for (reason, count) in &group.verdicts {
            let labels = vec![
                ("group", group.name.clone()),
                ("reason", reason.name().to_owned()),
            ];
            connects.get_or_create(&labels).inc_by(*count);
        }
    }
}

/// What keeps connects from being placed.
fn trouble(registry: &mut Registry, notes: &PlacingNotes) {
    let mut gauge = |name, help, value| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let help = "Whether the kernel refuses the programs that place, so that nobody is placed: 1";
    gauge("place_refused", help, i64::from(notes.refused.is_some()));
    let left_out = i64::try_from(notes.left_out.len()).unwrap_or(i64::MAX);
    let help = "Sentences of `status` about what there is no room for, or what two claim";
    gauge("place_left_out", help, left_out);
}

/// The metrics of each endpoint.
struct Endpoints {
    established: Gauges,
    in_flight: Gauges,
    others: Gauges,
    avoided: Gauges,
    placed: Counters,
    failed: Counters,
}

impl Endpoints {
    fn new(registry: &mut Registry) -> Self {
        let mut gauge = |name, help| gauges(registry, name, help);
        let established = gauge(
            "place_established",
            "Placed by this node, in TCP state ESTABLISHED",
        );
        let in_flight = gauge(
            "place_in_flight",
            "Placed by this node, whose SYN is not answered yet",
        );
        let others = gauge("place_others", "Placed by other nodes, as far as is known");
        let avoided = Gauges::default();
        let help = "Whether new connections avoid it, because connects to it have failed: 1";
        registry.register("place_avoided", help, avoided.clone());
        let help = "Connections that this node has placed, ever";
        let placed = counters(registry, "place_placed", help);
        let help = "Of these, those that failed or whose SYN had to be sent again";
        let failed = counters(registry, "place_failed", help);
        Self {
            established,
            in_flight,
            others,
            avoided,
            placed,
            failed,
        }
    }

    fn add(&self, group: &EndpointGroupSnapshot, endpoint: &EndpointSnapshot) {
        let labels: Labels = vec![
            ("group", group.name.clone()),
            ("endpoint", endpoint.name.clone()),
        ];
        // One that has left and one that has come may have a name in common.
        let set = |family: &Gauges, value: u64| {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            family.get_or_create(&labels).inc_by(value);
        };
        set(&self.established, endpoint.established);
        set(&self.in_flight, endpoint.in_flight);
        set(&self.others, endpoint.others);
        set(&self.avoided, u64::from(endpoint.avoided.is_some()));
        self.placed.get_or_create(&labels).inc_by(endpoint.total);
        self.failed.get_or_create(&labels).inc_by(endpoint.failed);
    }
}
