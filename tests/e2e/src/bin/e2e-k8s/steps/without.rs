//! 1: OAPs, clients and a Service, without the balancer.

use anyhow::Result;
use testkit::scenario::Report;

use crate::checks::PODS_START_WITHIN;
use crate::clients::Clients;
use crate::fixture::{Fixture, slashed, unevenness};
use crate::layout::{self, CLIENT_PODS, OAPS, REPLICAS, SERVICE, WORKLOAD, WORKLOADS};
use crate::oaps::Held;

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    run_short(fixture, report)?;
    restart(fixture)?;
    fixture.all_connected(report, "1 no balancer, OAPs restarted")?;
    look(fixture, report, "1 no balancer, OAPs restarted")
}

/// Until the clients are connected.
pub fn run_short(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let cluster = &fixture.cluster;
    cluster.kubernetes.admin().apply(&layout::oaps(REPLICAS));
    cluster.wait_rolled_out(OAPS, "deployment/skywalking-oap", PODS_START_WITHIN)?;
    let clients = layout::clients(WORKLOAD, SERVICE.parse()?, CLIENT_PODS);
    cluster.kubernetes.admin().apply(&clients);
    let deployment = format!("deployment/{WORKLOAD}");
    cluster.wait_rolled_out(WORKLOADS, &deployment, PODS_START_WITHIN)?;
    let mut clients = Clients::in_pods(cluster)?;
    clients.start_outside(cluster)?;
    fixture.clients = Some(clients);
    fixture.all_connected(report, "1 no balancer")?;
    look(fixture, report, "1 no balancer: connections of each OAP")
}

/// Replaces the OAPs one after the other, and waits until that is done.
pub fn restart(fixture: &mut Fixture) -> Result<()> {
    let restart = [
        "rollout",
        "restart",
        "deployment/skywalking-oap",
        "-n",
        OAPS,
    ];
    fixture.cluster.kubectl(&restart)?;
    fixture
        .cluster
        .wait_rolled_out(OAPS, "deployment/skywalking-oap", PODS_START_WITHIN)?;
    fixture.wait_oaps(REPLICAS)
}

fn look(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    fixture.look()?;
    let held: Vec<u32> = fixture.held().into_iter().map(Held::admitted).collect();
    fixture.uneven = unevenness(&held);
    let seen = format!("{}, max/mean {:.2}", slashed(&held), fixture.uneven);
    report.tell(step, &seen);
    Ok(())
}
