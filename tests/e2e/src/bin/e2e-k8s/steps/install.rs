//! 2: `helm install` while everything runs; the total is what the daemons observe.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use testkit::scenario::{Check, Report};

use crate::checks::wait;
use crate::daemons::{DaemonPod, Named, Way};
use crate::fixture::{Fixture, slashed};
use crate::layout::{self, ENTRY, HEADROOM, OAPS, PORT, REPLICAS, WITHOUT_CONNECTION};
use crate::oaps::{Held, Oap};
use crate::timestamp;

const QUOTAS_WITHIN: Duration = Duration::from_secs(15);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    let begun = Instant::now();
    let values = layout::by_observation(&fixture.cluster.product);
    fixture.cluster.helm_upgrade(&values)?;
    fixture.daemons_ready(report, "2 helm install", &BTreeSet::new())?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell("2 helm install: all daemons ready", &took);
    confined(fixture, report)?;
    let since = ready_since(fixture)?;
    fixture.attached(report, "2 helm install", &since)?;
    fixture.counts_are_true(report, "2 helm install", Way::Exec)?;
    let replicas = REPLICAS as usize;
    fixture.quotas_follow(report, "2 helm install", replicas, QUOTAS_WITHIN, begun)?;
    fixture.views_agree(report, "2 helm install")?;
    fixture.nothing_lost(report, "2 helm install", &mark)?;
    observed(fixture, report)?;
    peers(fixture, report)?;
    reconnect(fixture, report)
}

/// When the daemon of each node was ready.
pub fn ready_since(fixture: &Fixture) -> Result<BTreeMap<String, u64>> {
    let daemons = fixture.daemons.values().map(|daemon| {
        let log = daemon.log(&fixture.cluster, &["--timestamps"])?;
        let line = log.lines().find(|line| line.trim_end().ends_with("ready"));
        let ready = line.and_then(timestamp::of_line);
        let ready = ready.with_context(|| format!("{} was never ready: {log}", daemon.name))?;
        Ok((daemon.node.clone(), ready))
    });
    daemons.collect()
}

/// Beside the filter that a daemon puts on itself there is the runtime's, where the container is
/// not privileged.
fn confined(fixture: &Fixture, report: &mut Report) -> Result<()> {
    let unprivileged = fixture.cluster.product.unprivileged;
    let each = if unprivileged { 2 } else { 1 };
    let daemons = fixture.daemons.values();
    let filters: Vec<_> = daemons
        .map(DaemonPod::seccomp_filters)
        .collect::<Result<_>>()?;
    report.check(
        "2 helm install: seccomp filters of each daemon",
        &Check::new(slashed(filters.iter().map(|_| each)), slashed(filters)),
    )
}

/// The quotas are what the sentence says, of as many connections as there are.
fn observed(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let group = fixture.groups(Way::Exec)?.remove(0);
    let Named { namespace, name } = &group.service;
    report.check(
        "2 the group",
        &Check::new(
            format!("{ENTRY} {OAPS}/skywalking-oap {PORT}"),
            format!("{} {namespace}/{name} {}", group.entry, group.port),
        ),
    )?;
    let daemon = fixture
        .daemons
        .values()
        .next()
        .context("there is a daemon")?;
    let total: u32 = fixture.held().into_iter().map(Held::admitted).sum();
    let quota = (total * (100 + HEADROOM)).div_ceil(100 * REPLICAS);
    let expected =
        format!("ceil({total} connections (observed) × 1.{HEADROOM} / {REPLICAS} ready) = {quota}");
    wait(report, "2 quota show", QUOTAS_WITHIN, &expected, || {
        let said = daemon.ask(&fixture.cluster, Way::Exec, &["quota", "show"])?;
        let now = said.split("Now:").nth(1).unwrap_or(&said);
        let now: Vec<_> = now.split_whitespace().collect();
        let now = now.join(" ");
        let seen = if now.starts_with(&expected) {
            &expected
        } else {
            &now
        };
        Ok(Check::new(&expected, seen))
    })
}

/// Over quota a stranger is refused, another OAP and the node's kubelet are not.
fn peers(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let full = fixture.oaps.first().context("there is an OAP")?;
    let other = fixture.oaps.last().context("there is another one")?;
    let address: SocketAddr = (full.address, PORT).into();
    let daemon = &fixture.daemons[&full.node];
    daemon.ask(&fixture.cluster, Way::Exec, &["quota", "set", ENTRY, "1"])?;
    let from_outside = fixture
        .cluster
        .kubernetes
        .outside()
        .run(|| connect(address));
    report.check(
        "2 quota set 1: a stranger's connect",
        &Check::new("refused", from_outside),
    )?;
    report.check(
        "2 quota set 1: explain --pod, of a stranger",
        &Check::new("refuse", verdict_of_explain(fixture, full)?),
    )?;
    let from_peer = other.run(|| connect(address));
    report.check(
        "2 quota set 1: another OAP's connect",
        &Check::new("connected", from_peer),
    )?;
    // Several probes of the kubelet, one a second, three of which must fail.
    let end = Instant::now() + Duration::from_secs(5);
    let mut unready = BTreeSet::new();
    while Instant::now() < end {
        let oaps = crate::oaps::look(&fixture.cluster)?;
        unready.extend(oaps.iter().filter(|oap| !oap.ready).map(name));
        testkit::scenario::interrupt::pause(Duration::from_millis(300))?;
    }
    report.check(
        "2 quota set 1: OAPs that fail their probes in 5 s",
        &Check::new(0, unready.len()),
    )?;
    let daemon = &fixture.daemons[&fixture.oaps[0].node];
    daemon.ask(&fixture.cluster, Way::Exec, &["quota", "clear", ENTRY])?;
    Ok(())
}

/// What `explain` says of a connection to an OAP from outside of the cluster.
fn verdict_of_explain(fixture: &Fixture, oap: &Oap) -> Result<String> {
    let daemon = &fixture.daemons[&oap.node];
    let (to, pod) = (PORT.to_string(), format!("{OAPS}/{}", oap.name));
    let explain = [
        "explain",
        "--from",
        "203.0.113.9",
        "--to",
        &to,
        "--pod",
        &pod,
    ];
    let said = daemon.ask(
        &fixture.cluster,
        Way::Exec,
        &[&explain[..], &["-o", "json"]].concat(),
    )?;
    let said: serde_json::Value = serde_json::from_str(&said).context("explain is not JSON")?;
    crate::oaps::text(&said["verdict"])
}

/// All clients come anew: the first chance to refuse some.
fn reconnect(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let begun = standin::now();
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    fixture
        .clients()?
        .reconnect(&fixture.cluster, Duration::from_secs(3))?;
    fixture.reconnected(begun)?;
    fixture.all_connected(report, "2 all come anew")?;
    fixture.nobody_waited(report, "2 all come anew", &mark, WITHOUT_CONNECTION)?;
    fixture.counts_are_true(report, "2 all come anew", Way::Exec)?;
    fixture.within_quotas(report, "2 all come anew")
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
