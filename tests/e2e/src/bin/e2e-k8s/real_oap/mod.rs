//! The other scenario: real OAPs that find each other through the API server, and real Java agents,
//! all of them pods.

mod agents;
mod checks;
mod layout;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use e2e::oap::cache::Cache;
use e2e::oap::image;
use testkit::scenario::{Check, Report};

use crate::checks::{living, quotas, wait};
use crate::cluster::{Product, TestCluster};
use crate::daemons::Way;
use crate::fixture::{Fixture, slashed};
use crate::kernel;
use crate::layout::{OAPS, RELEASE, SYSTEM, WORKLOADS};
use crate::oaps::{Held, Oap};
use crate::steps::install::ready_since;
use crate::steps::uninstall;
use agents::Watch;
use layout::{IMAGE, NODES, QUOTA, REPLICAS, WITHOUT_CONNECTION};

/// Several JVMs start at once on what may be two busy processors.
const OAPS_START_WITHIN: Duration = Duration::from_secs(240);
/// One pod after the other.
const AGENTS_RESTART_WITHIN: Duration = Duration::from_secs(150);
/// Two pods start, one after the other.
const DAEMONS_RESTART_WITHIN: Duration = Duration::from_secs(120);
const QUOTAS_WITHIN: Duration = Duration::from_secs(30);
/// By chance nobody is refused: then the agents come once more.
const TRIES: u32 = 4;

/// Starts two nodes that have the images; what is not cached is fetched and built first.
///
/// # Errors
/// When something can't be fetched, or files can't be written.
pub fn start(product: Product) -> Result<TestCluster> {
    let cache = Cache::prepare_java()?;
    TestCluster::start(product, NODES, |archive| {
        image::write(&cache, IMAGE, archive)
    })
}

/// Runs the steps in their order.
///
/// # Errors
/// When it can't go on. Differences are in the report.
pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    for step in [begin, install, spread, replace_daemons, restart_oap, end] {
        let outcome = step(fixture, report);
        fixture.keep_logs();
        checks::keep_logs(fixture);
        outcome?;
    }
    Ok(())
}

/// 1: OAPs and agents, without the balancer.
fn begin(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let cluster = &fixture.cluster;
    let begun = Instant::now();
    cluster.kubernetes.admin().apply(&layout::oaps());
    cluster.wait_rolled_out(OAPS, "deployment/skywalking-oap", OAPS_START_WITHIN)?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell("1 OAPs ready", &took);
    fixture.look()?;
    fixture.oaps_form_a_cluster(report, "1")?;
    fixture.cluster.kubernetes.admin().apply(&layout::agents());
    fixture
        .cluster
        .wait_rolled_out(WORKLOADS, "statefulset/workload", AGENTS_RESTART_WITHIN)?;
    fixture.agents_connected(report, "1 no balancer")?;
    report.tell(
        "1 no balancer: sockets of the OAPs (peers)",
        &slashed(fixture.held()),
    );
    fixture.oaps_are_linked(report, "1")
}

/// 2: `helm install`.
fn install(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let before = fixture.connections()?;
    fixture
        .cluster
        .helm_upgrade(&layout::values(&fixture.cluster.product))?;
    let step = "2 helm install";
    fixture.daemons_ready(report, step, &BTreeSet::new())?;
    let since = ready_since(fixture)?;
    fixture.attached(report, step, &since)?;
    fixture.quotas_are_exact(report, step)?;
    fixture.counts_are_true(report, step, Way::Exec)?;
    fixture.peers_are_exempt(report, step)?;
    fixture.views_agree(report, step)?;
    fixture.no_connection_lost(report, step, &before)
}

/// 3: the agents come anew, as far as they have to, until some were refused.
fn spread(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    restart_agents(fixture, report, "3 agents' pods restarted")?;
    fixture.nothing_is_missing(report, "3 segments")
}

/// 4: all of the balancer's pods are replaced under load.
fn replace_daemons(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let step = "4 balancer's pods restarted";
    let in_force = fixture.quotas()?;
    let before = fixture.connections()?;
    let old: BTreeSet<_> = fixture
        .daemons
        .values()
        .map(|daemon| daemon.uid.clone())
        .collect();
    let set = format!("daemonset/{RELEASE}");
    fixture
        .cluster
        .kubectl(&["rollout", "restart", &set, "-n", SYSTEM])?;
    wait(report, step, DAEMONS_RESTART_WITHIN, "true", || {
        Ok(Check::new(true, fixture.cluster.rolled_out(SYSTEM, &set)?))
    })?;
    fixture.daemons_ready(report, step, &old)?;
    fixture.no_connection_lost(report, step, &before)?;
    // Where everybody is full, one may be open: a refused agent would have nowhere to go.
    wait(
        report,
        &format!("{step}: quotas, as each node knows them"),
        QUOTAS_WITHIN,
        &in_force,
        || Ok(Check::new(&in_force, fixture.quotas()?)),
    )?;
    fixture.counts_are_true(report, step, Way::Exec)?;
    fixture.nothing_is_missing(report, "4 segments")?;
    fixture.probes_hold(report, "4")
}

/// 5: an OAP ends, and another one takes its place; then the agents are shared out again.
fn restart_oap(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture.look()?;
    let step = "5 an OAP's pod deleted";
    let watch = Watch::start(&fixture.agents()?);
    let gone = fixture.oaps.first().context("there is an OAP")?;
    let delete = ["delete", "pod", &gone.name, "-n", OAPS, "--wait=false"];
    fixture.cluster.kubectl(&delete)?;
    let gone = gone.name.clone();
    fixture.agents_connected(report, step)?;
    let since = fixture.made()?;
    let begun = Instant::now();
    wait(
        report,
        &format!("{step}: OAPs that are ready"),
        OAPS_START_WITHIN,
        "2",
        || {
            fixture.look()?;
            let others = fixture.oaps.iter().filter(|oap| oap.name != gone);
            Ok(Check::new(REPLICAS, others.filter(|oap| oap.ready).count()))
        },
    )?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell(&format!("{step}: the other one is ready"), &took);
    fixture.agents_connected(report, step)?;
    let outage = watch.longest_outage()?;
    report.check(
        &format!("{step}: longest time of an agent without one"),
        &Check::within(WITHOUT_CONNECTION, outage),
    )?;
    fixture.report_again(report, step, &since)?;
    fixture.oaps_form_a_cluster(report, "5")?;
    fixture.guarded(report, step)?;
    fixture.quotas_are_exact(report, step)?;
    fixture.counts_are_true(report, step, Way::Exec)?;
    restart_agents(fixture, report, "5 agents' pods restarted")?;
    fixture.oaps_are_linked(report, "5")?;
    fixture.peers_are_exempt(report, "5")?;
    fixture.views_agree(report, "5")?;
    fixture.nothing_is_missing(report, "5 segments")
}

/// 9, as in the other scenario: `helm uninstall`.
fn end(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture.probes_hold(report, "9")?;
    let before = fixture.connections()?;
    uninstall::leaves_nothing(fixture, report)?;
    fixture.no_connection_lost(report, "9 helm uninstall", &before)?;
    fixture.nothing_is_missing(report, "9 segments")
}

/// Restarts the pods with agents until they are shared out evenly, and at least one was refused on
/// its way.
fn restart_agents(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    let before = fixture.refused()?;
    let mut refused = 0;
    for _ in 0..TRIES {
        let restart = [
            "rollout",
            "restart",
            "statefulset/workload",
            "-n",
            WORKLOADS,
        ];
        fixture.cluster.kubectl(&restart)?;
        fixture.cluster.wait_rolled_out(
            WORKLOADS,
            "statefulset/workload",
            AGENTS_RESTART_WITHIN,
        )?;
        fixture.agents_connected(report, step)?;
        refused = fixture.refused()? - before;
        if refused > 0 {
            break;
        }
    }
    report.check(
        &format!("{step}: connects refused over quota"),
        &Check::judged("some", refused, refused > 0),
    )?;
    let agents = fixture.refused_agents()?.len().to_string();
    report.tell(&format!("{step}: agents that were, by their logs"), &agents);
    let even = slashed([QUOTA; REPLICAS as usize]);
    let held = fixture.held().into_iter().map(Held::admitted);
    report.check(
        &format!("{step}: agents of each OAP"),
        &Check::new(even, slashed(held)),
    )?;
    fixture.counts_are_true(report, step, Way::Exec)
}
