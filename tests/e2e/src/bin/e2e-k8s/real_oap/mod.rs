//! The other story: real OAPs that find each other through the API server, and real Java agents, all of them pods.

mod checks;
mod layout;
mod shops;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use e2e::oap::cache::Cache;
use e2e::oap::image;
use testkit::scenario::{Report, Sight};

use crate::agents::Way;
use crate::chapters::install::ready_since;
use crate::chapters::uninstall;
use crate::checks::{living, quotas, wait};
use crate::kernel;
use crate::lab::{Lab, Product};
use crate::layout::{OAPS, RELEASE, SHOP, SYSTEM};
use crate::oaps::{Held, Oap};
use crate::world::{World, slashed};
use layout::{IMAGE, NODES, QUOTA, REPLICAS, WITHOUT_CONNECTION};
use shops::Watch;

/// Several JVMs start at once on what may be two busy processors.
const OAPS_START_WITHIN: Duration = Duration::from_secs(240);
/// One pod after the other.
const SHOPS_RESTART_WITHIN: Duration = Duration::from_secs(150);
/// Two pods start, one after the other.
const AGENTS_RESTART_WITHIN: Duration = Duration::from_secs(120);
const QUOTAS_WITHIN: Duration = Duration::from_secs(30);
/// By chance nobody is refused: then the agents come once more.
const TRIES: u32 = 4;

/// Starts two nodes that have the images; what is not cached is fetched and built first.
///
/// # Errors
/// When something can't be fetched, or files can't be written.
pub fn start(product: Product) -> Result<Lab> {
    let cache = Cache::prepare_java()?;
    Lab::start(product, NODES, |archive| {
        image::write(&cache, IMAGE, archive)
    })
}

/// Plays it from the first to the last chapter.
///
/// # Errors
/// When it can't go on. Differences are in the report.
pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    for chapter in [begin, install, spread, replace_agents, restart_oap, end] {
        let played = chapter(world, report);
        world.keep_logs();
        checks::keep_logs(world);
        played?;
    }
    Ok(())
}

/// 1: OAPs and agents, without the balancer.
fn begin(world: &mut World, report: &mut Report) -> Result<()> {
    let lab = &world.lab;
    let begun = Instant::now();
    lab.cluster.admin().apply(&layout::oaps());
    lab.wait_rolled_out(OAPS, "deployment/skywalking-oap", OAPS_START_WITHIN)?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell("1 OAPs ready", &took);
    world.look()?;
    world.oaps_form_a_cluster(report, "1")?;
    world.lab.cluster.admin().apply(&layout::shops());
    world
        .lab
        .wait_rolled_out(SHOP, "statefulset/shop", SHOPS_RESTART_WITHIN)?;
    world.shops_connected(report, "1 no balancer")?;
    report.tell(
        "1 no balancer: sockets of the OAPs (peers)",
        &slashed(world.held()),
    );
    world.oaps_are_linked(report, "1")
}

/// 2: `helm install`.
fn install(world: &mut World, report: &mut Report) -> Result<()> {
    let before = world.connections()?;
    world
        .lab
        .helm_upgrade(&layout::values(&world.lab.product.name))?;
    let step = "2 helm install";
    world.agents_ready(report, step, &BTreeSet::new())?;
    let since = ready_since(world)?;
    world.attached(report, step, &since)?;
    world.quotas_are_exact(report, step)?;
    world.counts_are_true(report, step, Way::Exec)?;
    world.peers_are_exempt(report, step)?;
    world.views_agree(report, step)?;
    world.no_connection_lost(report, step, &before)
}

/// 3: the agents come anew, as far as they have to, until some were refused.
fn spread(world: &mut World, report: &mut Report) -> Result<()> {
    restart_shops(world, report, "3 agents' pods restarted")?;
    world.nothing_is_missing(report, "3 segments")
}

/// 4: all of the balancer's pods are replaced under load.
fn replace_agents(world: &mut World, report: &mut Report) -> Result<()> {
    let step = "4 balancer's pods restarted";
    let in_force = world.quotas()?;
    let before = world.connections()?;
    let old: BTreeSet<_> = world
        .agents
        .values()
        .map(|agent| agent.uid.clone())
        .collect();
    let set = format!("daemonset/{RELEASE}");
    world
        .lab
        .kubectl(&["rollout", "restart", &set, "-n", SYSTEM])?;
    wait(report, step, AGENTS_RESTART_WITHIN, "true", || {
        Ok(Sight::new(true, world.lab.rolled_out(SYSTEM, &set)?))
    })?;
    world.agents_ready(report, step, &old)?;
    world.no_connection_lost(report, step, &before)?;
    // Where everybody is full, one may be open: a refused agent would have nowhere to go.
    wait(
        report,
        &format!("{step}: quotas, as each node knows them"),
        QUOTAS_WITHIN,
        &in_force,
        || Ok(Sight::new(&in_force, world.quotas()?)),
    )?;
    world.counts_are_true(report, step, Way::Exec)?;
    world.nothing_is_missing(report, "4 segments")?;
    world.probes_hold(report, "4")
}

/// 5: an OAP ends, and another one takes its place; then the agents are shared out again.
fn restart_oap(world: &mut World, report: &mut Report) -> Result<()> {
    world.look()?;
    let step = "5 an OAP's pod deleted";
    let watch = Watch::start(&world.shops()?);
    let gone = world.oaps.first().context("there is an OAP")?;
    let delete = ["delete", "pod", &gone.name, "-n", OAPS, "--wait=false"];
    world.lab.kubectl(&delete)?;
    let gone = gone.name.clone();
    world.shops_connected(report, step)?;
    let since = world.made()?;
    let begun = Instant::now();
    wait(
        report,
        &format!("{step}: OAPs that are ready"),
        OAPS_START_WITHIN,
        "2",
        || {
            world.look()?;
            let others = world.oaps.iter().filter(|oap| oap.name != gone);
            Ok(Sight::new(REPLICAS, others.filter(|oap| oap.ready).count()))
        },
    )?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell(&format!("{step}: the other one is ready"), &took);
    world.shops_connected(report, step)?;
    let outage = watch.longest_outage()?;
    report.check(
        &format!("{step}: longest time of an agent without one"),
        &Sight::within(WITHOUT_CONNECTION, outage),
    )?;
    world.report_again(report, step, &since)?;
    world.oaps_form_a_cluster(report, "5")?;
    world.guarded(report, step)?;
    world.quotas_are_exact(report, step)?;
    world.counts_are_true(report, step, Way::Exec)?;
    restart_shops(world, report, "5 agents' pods restarted")?;
    world.oaps_are_linked(report, "5")?;
    world.peers_are_exempt(report, "5")?;
    world.views_agree(report, "5")?;
    world.nothing_is_missing(report, "5 segments")
}

/// 9, as in the other story: `helm uninstall`.
fn end(world: &mut World, report: &mut Report) -> Result<()> {
    world.probes_hold(report, "9")?;
    let before = world.connections()?;
    uninstall::leaves_nothing(world, report)?;
    world.no_connection_lost(report, "9 helm uninstall", &before)?;
    world.nothing_is_missing(report, "9 segments")
}

/// Restarts the pods with agents until they are shared out evenly, and at least one was refused on its way.
fn restart_shops(world: &mut World, report: &mut Report, step: &str) -> Result<()> {
    let before = world.refused()?;
    let mut refused = 0;
    for _ in 0..TRIES {
        let restart = ["rollout", "restart", "statefulset/shop", "-n", SHOP];
        world.lab.kubectl(&restart)?;
        world
            .lab
            .wait_rolled_out(SHOP, "statefulset/shop", SHOPS_RESTART_WITHIN)?;
        world.shops_connected(report, step)?;
        refused = world.refused()? - before;
        if refused > 0 {
            break;
        }
    }
    report.check(
        &format!("{step}: connects refused over quota"),
        &Sight::judged("some", refused, refused > 0),
    )?;
    let agents = world.refused_shops()?.len().to_string();
    report.tell(&format!("{step}: agents that were, by their logs"), &agents);
    let even = slashed([QUOTA; REPLICAS as usize]);
    let held = world.held().into_iter().map(Held::admitted);
    report.check(
        &format!("{step}: agents of each OAP"),
        &Sight::new(even, slashed(held)),
    )?;
    world.counts_are_true(report, step, Way::Exec)
}
