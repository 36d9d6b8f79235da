//! 12: the Service of the OAPs has an IPv6 address, beside its IPv4 address and then alone. Its
//! clients are placed as those of IPv4 are.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testkit::scenario::{Check, Report, interrupt};

use super::place::{self, WITHOUT, come_anew};
use super::without;
use crate::checks::{PODS_START_WITHIN, wait};
use crate::clients::Clients;
use crate::daemons::Way;
use crate::fixture::Fixture;
use crate::layout::{
    self, CLIENT_PODS, OAP, OAPS, SERVICE, SERVICE6, WORKLOAD, WORKLOAD6, WORKLOADS,
};

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    place::switch_on(fixture, report, "12 place on")?;
    dual_stack(fixture, report)?;
    six_alone(fixture, report)
}

/// Half of the clients come by each address.
fn dual_stack(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let cluster = &fixture.cluster;
    let both = layout::service(&[("IPv4", SERVICE), ("IPv6", SERVICE6)]);
    cluster.kubernetes.admin().apply(&both);
    clients(fixture, CLIENT_PODS / 2, CLIENT_PODS / 2)?;
    frontends(fixture, report, "12 dual-stack", &[SERVICE, SERVICE6])?;
    fixture.all_connected(report, "12 dual-stack, half of the clients by IPv6")?;
    everybody(fixture, report, "12 dual-stack, all come anew", come_anew)
}

/// Everybody comes by the only address.
fn six_alone(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let cluster = &fixture.cluster;
    // An address that is taken away is a change that the API server refuses.
    let delete = ["delete", "service", OAP, "-n", OAPS];
    cluster.kubectl(&delete)?;
    let six = layout::service(&[("IPv6", SERVICE6)]);
    cluster.kubernetes.admin().apply(&six);
    clients(fixture, 0, CLIENT_PODS)?;
    frontends(fixture, report, "12 IPv6 alone", &[SERVICE6])?;
    fixture.all_connected(report, "12 IPv6 alone")?;
    everybody(fixture, report, "12 IPv6 alone, all come anew", come_anew)?;
    let step = "12 IPv6 alone, OAPs restarted";
    everybody(fixture, report, step, without::restart)
}

/// Has so many pods of clients of either address.
fn clients(fixture: &mut Fixture, four: u32, six: u32) -> Result<()> {
    let cluster = &fixture.cluster;
    for (name, to, pods) in [(WORKLOAD, SERVICE, four), (WORKLOAD6, SERVICE6, six)] {
        let clients = layout::clients(name, to.parse()?, pods);
        cluster.kubernetes.admin().apply(&clients);
        let deployment = format!("deployment/{name}");
        cluster.wait_rolled_out(WORKLOADS, &deployment, PODS_START_WITHIN)?;
    }
    // Some that are to end may still be there.
    let deadline = Instant::now() + PODS_START_WITHIN;
    loop {
        let clients = Clients::in_pods(cluster)?;
        if clients.pods() == (four + six) as usize {
            fixture.clients = Some(clients);
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "there are {} pods of clients, not {}",
            clients.pods(),
            four + six
        );
        interrupt::pause(Duration::from_millis(200))?;
    }
}

/// Something happens as in the step that places, and the nodes have placed all connections.
fn everybody(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    happens: impl FnOnce(&mut Fixture) -> Result<()>,
) -> Result<()> {
    place::event(fixture, report, step, WITHOUT, happens)?;
    let clients = fixture.clients()?.tally(&fixture.cluster)?.clients;
    let step = format!("{step}: placed by the nodes");
    wait(report, &step, PODS_START_WITHIN, "all", || {
        Ok(Check::new(clients, placed(fixture)?))
    })
}

/// How many connections that stand all nodes together have placed.
fn placed(fixture: &Fixture) -> Result<u64> {
    let mut sum = 0;
    for daemon in fixture.daemons.values() {
        let said = daemon.ask(&fixture.cluster, Way::OnNode, &["status", "-o", "json"])?;
        let said: Value = serde_json::from_str(&said).context("no JSON")?;
        let groups = said["placing"].as_array().into_iter().flatten();
        let endpoints = groups.filter_map(|group| group["endpoints"].as_array());
        let established = endpoints
            .flatten()
            .filter_map(|endpoint| endpoint["established"].as_u64());
        sum += established.sum::<u64>();
    }
    Ok(sum)
}

/// The addresses that every node places connects to.
fn frontends(
    fixture: &mut Fixture,
    report: &mut Report,
    step: &str,
    addresses: &[&str],
) -> Result<()> {
    let step = format!("{step}: nodes that place for {}", addresses.join(", "));
    wait(report, &step, PODS_START_WITHIN, "all", || {
        fixture.look()?;
        let daemons = fixture.daemons.values();
        let views = daemons.map(|daemon| {
            let said = daemon.ask(&fixture.cluster, Way::OnNode, &["status", "-o", "json"])?;
            let said: Value = serde_json::from_str(&said).context("no JSON")?;
            Ok(said["placing"].to_string())
        });
        let views: Vec<String> = views.collect::<Result<_>>()?;
        let all = views.iter().filter(|view| {
            let known = |address: &str| view.contains(address);
            known(SERVICE) == addresses.contains(&SERVICE)
                && known(SERVICE6) == addresses.contains(&SERVICE6)
        });
        Ok(Check::new(fixture.daemons.len(), all.count()))
    })
}
