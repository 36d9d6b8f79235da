//! 2: `helm install` while everything runs; the total is what the agents observe.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use testkit::scenario::{Report, Sight};

use crate::agents::{Named, Way};
use crate::checks::wait;
use crate::layout::{self, ENTRY, HEADROOM, OAPS, PORT, REPLICAS, WITHOUT_CONNECTION};
use crate::oaps::{Held, Oap};
use crate::stamp;
use crate::world::World;

const QUOTAS_WITHIN: Duration = Duration::from_secs(15);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    let mark = world.clients()?.mark(&world.lab)?;
    let begun = Instant::now();
    let values = layout::by_observation(&world.lab.product.name);
    world.lab.helm_upgrade(&values)?;
    world.agents_ready(report, "2 helm install", &BTreeSet::new())?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell("2 helm install: all agents ready", &took);
    let since = ready_since(world)?;
    world.attached(report, "2 helm install", &since)?;
    world.counts_are_true(report, "2 helm install", Way::Exec)?;
    let replicas = REPLICAS as usize;
    world.quotas_follow(report, "2 helm install", replicas, QUOTAS_WITHIN, begun)?;
    world.views_agree(report, "2 helm install")?;
    world.nothing_lost(report, "2 helm install", &mark)?;
    observed(world, report)?;
    peers(world, report)?;
    reconnect(world, report)
}

/// When the agent of each node was ready.
pub fn ready_since(world: &World) -> Result<BTreeMap<String, u64>> {
    let agents = world.agents.values().map(|agent| {
        let log = agent.log(&world.lab, &["--timestamps"])?;
        let line = log.lines().find(|line| line.trim_end().ends_with("ready"));
        let ready = line.and_then(stamp::of_line);
        let ready = ready.with_context(|| format!("{} was never ready: {log}", agent.name))?;
        Ok((agent.node.clone(), ready))
    });
    agents.collect()
}

/// The quotas are what the sentence says, of as many connections as there are.
fn observed(world: &mut World, report: &mut Report) -> Result<()> {
    let group = world.groups(Way::Exec)?.remove(0);
    let Named { namespace, name } = &group.service;
    report.check(
        "2 the group",
        &Sight::new(
            format!("{ENTRY} {OAPS}/skywalking-oap {PORT}"),
            format!("{} {namespace}/{name} {}", group.entry, group.port),
        ),
    )?;
    let agent = world.agents.values().next().context("there is an agent")?;
    let total: u32 = world.held().into_iter().map(Held::admitted).sum();
    let quota = (total * (100 + HEADROOM)).div_ceil(100 * REPLICAS);
    let expected =
        format!("ceil({total} connections (observed) × 1.{HEADROOM} / {REPLICAS} ready) = {quota}");
    wait(report, "2 quota show", QUOTAS_WITHIN, &expected, || {
        let said = agent.ask(&world.lab, Way::Exec, &["quota", "show"])?;
        let now = said.split("Now:").nth(1).unwrap_or(&said);
        let now: Vec<_> = now.split_whitespace().collect();
        let now = now.join(" ");
        let seen = if now.starts_with(&expected) {
            &expected
        } else {
            &now
        };
        Ok(Sight::new(&expected, seen))
    })
}

/// Over quota a stranger is refused, another OAP and the node's kubelet are not.
fn peers(world: &mut World, report: &mut Report) -> Result<()> {
    let full = world.oaps.first().context("there is an OAP")?;
    let other = world.oaps.last().context("there is another one")?;
    let address: SocketAddr = (full.address, PORT).into();
    let agent = &world.agents[&full.node];
    agent.ask(&world.lab, Way::Exec, &["quota", "set", ENTRY, "1"])?;
    let from_outside = world.lab.cluster.outside().run(|| connect(address));
    report.check(
        "2 quota set 1: a stranger's connect",
        &Sight::new("refused", from_outside),
    )?;
    let from_peer = other.run(|| connect(address));
    report.check(
        "2 quota set 1: another OAP's connect",
        &Sight::new("connected", from_peer),
    )?;
    // Several probes of the kubelet, one a second, three of which must fail.
    let end = Instant::now() + Duration::from_secs(5);
    let mut unready = BTreeSet::new();
    while Instant::now() < end {
        let oaps = crate::oaps::look(&world.lab)?;
        unready.extend(oaps.iter().filter(|oap| !oap.ready).map(name));
        testkit::scenario::interrupt::pause(Duration::from_millis(300))?;
    }
    report.check(
        "2 quota set 1: OAPs that fail their probes in 5 s",
        &Sight::new(0, unready.len()),
    )?;
    let agent = &world.agents[&world.oaps[0].node];
    agent.ask(&world.lab, Way::Exec, &["quota", "clear", ENTRY])?;
    Ok(())
}

/// All clients come anew: the first chance to refuse some.
fn reconnect(world: &mut World, report: &mut Report) -> Result<()> {
    let begun = standin::now();
    let mark = world.clients()?.mark(&world.lab)?;
    world
        .clients()?
        .reconnect(&world.lab, Duration::from_secs(3))?;
    world.reconnected(begun)?;
    world.all_connected(report, "2 all come anew")?;
    world.nobody_waited(report, "2 all come anew", &mark, WITHOUT_CONNECTION)?;
    world.counts_are_true(report, "2 all come anew", Way::Exec)?;
    world.within_quotas(report, "2 all come anew")
}

fn name(oap: &Oap) -> String {
    oap.name.clone()
}

fn connect(address: SocketAddr) -> String {
    match TcpStream::connect_timeout(&address, CONNECT_WITHIN) {
        Ok(_) => "connected".to_owned(),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => "refused".to_owned(),
        Err(error) => error.to_string(),
    }
}
