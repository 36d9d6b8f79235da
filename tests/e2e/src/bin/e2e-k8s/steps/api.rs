//! 6: no API server; 7: a permission is missing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use serde_json::{Value, json};
use testkit::scenario::{Check, Report, interrupt};

use super::pods;
use crate::checks::wait;
use crate::daemons::{ClusterStatus, Way};
use crate::fixture::{Fixture, slashed};
use crate::layout::{API_DOWN, CLIENT_PODS, HOLD_FOR, RELEASE, SYSTEM, WITHOUT_CONNECTION};

/// Watches are opened again with growing pauses.
const RECOVERS_WITHIN: Duration = Duration::from_secs(45);
/// Well before they open.
const HOLDS_FOR_CERTAIN: Duration = Duration::from_secs(20);
/// What is old is noticed by the next heartbeat.
const OPENS_WITHIN: Duration = Duration::from_secs(8);

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    outage(fixture, report)?;
    permission(fixture, report)
}

fn outage(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    fixture.look()?;
    let before = identities(fixture);
    let held = own_quotas(fixture)?;
    fixture.cluster.kubernetes.api_mut().stop();
    let down = Instant::now();
    // Everything goes on: clients come anew, are counted and refused.
    let told = standin::now();
    fixture
        .clients()?
        .reconnect(&fixture.cluster, Duration::from_secs(3))?;
    fixture.reconnected(told)?;
    fixture.all_connected(report, "6 API server down")?;
    fixture.counts_are_true(report, "6 API server down", Way::OnNode)?;
    interrupt::pause(HOLDS_FOR_CERTAIN.saturating_sub(down.elapsed()))?;
    let step = format!(
        "6 API server down: quotas, after {} s",
        HOLDS_FOR_CERTAIN.as_secs()
    );
    let now = own_quotas(fixture)?;
    // What was being lowered at that moment still was. Who is refused for long gets room all the
    // same.
    let holds = now.split('/').zip(held.split('/')).all(|(now, before)| {
        let (now, before) = (now.parse::<u32>(), before.parse::<u32>());
        matches!((now, before), (Ok(now), Ok(before)) if now <= before + CLIENT_PODS)
    });
    let expected = format!("{held}, and one more for each source refused for long");
    report.check(&step, &Check::judged(expected, now, holds))?;
    report.wait(
        "6 API server down: daemons that say so",
        OPENS_WITHIN,
        || {
            let views = views(fixture, Way::OnNode);
            let say = views
                .iter()
                .filter(|view| view.silent_seconds > 0 && !view.problems.is_empty());
            Ok(Check::new(fixture.daemons.len(), say.count()))
        },
    )?;
    let patience = (HOLD_FOR + OPENS_WITHIN).saturating_sub(down.elapsed());
    let mut opened = None;
    let step = "6 API server down: quotas, in the end";
    wait(report, step, patience, "open", || {
        let open = own_quotas(fixture)?
            .split('/')
            .all(|quota| quota == "unlimited");
        if open {
            opened.get_or_insert(down.elapsed());
        }
        Ok(Check::new("open", if open { "open" } else { "hold" }))
    })?;
    if let Some(opened) = opened {
        let least = HOLD_FOR;
        report.check(
            "6 API server down: quotas open",
            &Check::judged(
                format!("at {} s or later", least.as_secs()),
                format!("{:.1} s", opened.as_secs_f64()),
                opened + Duration::from_secs(2) >= least,
            ),
        )?;
    }
    while down.elapsed() < API_DOWN {
        interrupt::pause(Duration::from_millis(200))?;
    }
    fixture.counts_are_true(report, "6 API server still down", Way::OnNode)?;
    fixture.cluster.kubernetes.api_mut().start_again();
    let back = Instant::now();
    recovers(fixture, report, "6 API server back")?;
    let took = format!("after {:.1} s", back.elapsed().as_secs_f64());
    report.tell("6 API server back: daemons follow", &took);
    fixture.look()?;
    pods::by_pods_in_time(fixture, report, "6 API server back")?;
    // What has raised them is in the logs.
    fixture.keep_logs();
    report.check(
        "6 API server back: the same daemons, not restarted",
        &Check::new(before, identities(fixture)),
    )?;
    fixture.all_connected(report, "6 API server back")?;
    fixture.nobody_waited(report, "6 API server back", &mark, WITHOUT_CONNECTION)?;
    fixture.counts_are_true(report, "6 API server back", Way::Exec)?;
    fixture.views_agree(report, "6 API server back")
}

fn permission(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    allow(fixture, &["list"])?;
    // A watch that is open stays allowed: only new ones are asked for.
    let api = fixture.cluster.kubernetes.api_mut();
    api.stop();
    api.start_again();
    let step = "7 watch endpointslices forbidden";
    let tells = |text: &str| text.contains("watch") && text.contains("endpointslices");
    report.wait(
        &format!("{step}: status --cluster that name it"),
        RECOVERS_WITHIN,
        || {
            let views = views(fixture, Way::OnNode);
            let telling = views
                .iter()
                .filter(|view| view.problems.iter().any(|problem| tells(problem)));
            Ok(Check::new(fixture.daemons.len(), telling.count()))
        },
    )?;
    let views = views(fixture, Way::OnNode);
    let problem = views.first().and_then(|view| view.problems.first());
    report.tell(step, problem.map_or("", String::as_str));
    let daemon = fixture
        .daemons
        .values()
        .next()
        .context("there is a daemon")?;
    let log = daemon.log(&fixture.cluster, &["--tail=200"])?;
    let logged = log.lines().any(|line| line.contains("WARN") && tells(line));
    report.check(
        &format!("{step}: the log names it"),
        &Check::new(true, logged),
    )?;
    let configuration = "/etc/balancer/balancer.yaml";
    let exec = ["exec", "-n", SYSTEM, &daemon.name, "--"];
    // As JSON: text is broken into lines.
    let doctor = [
        "balancer",
        "doctor",
        "--config",
        configuration,
        "-o",
        "json",
    ];
    let arguments = [&exec[..], &doctor].concat();
    let doctor = fixture.cluster.kubernetes.admin().attempt(&arguments);
    let said: Value = serde_json::from_str(&doctor.stdout)
        .with_context(|| format!("doctor did not answer: {}{}", doctor.stdout, doctor.stderr))?;
    let checks = said["checks"].as_array().context("doctor has checks")?;
    let failed = checks.iter().filter(|check| check["status"] == "fail");
    let mut found = failed.filter_map(|check| check["found"].as_str());
    let named = found.any(tells);
    report.check(
        &format!("{step}: doctor names it"),
        &Check::new(
            "true, exit code 1",
            format!("{named}, exit code {}", doctor.code),
        ),
    )?;
    fixture.counts_are_true(report, step, Way::Exec)?;
    allow(fixture, &["list", "watch"])?;
    recovers(fixture, report, "7 allowed again")?;
    fixture.nothing_lost(report, "7 allowed again", &mark)
}

/// What the `ClusterRole` of the chart lets daemons do with `EndpointSlice`s.
fn allow(fixture: &Fixture, verbs: &[&str]) -> Result<()> {
    let role = format!("{SYSTEM}:{RELEASE}");
    let rules = json!({"rules": [
        {"apiGroups": [""], "resources": ["services", "pods"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs},
    ]});
    let patch = ["patch", "clusterrole", &role, "--type=merge", "--patch"];
    let rules = rules.to_string();
    let arguments = [&patch[..], &[&rules]].concat();
    fixture.cluster.kubectl(&arguments).map(drop)
}

/// Nothing is wrong any more.
fn recovers(fixture: &mut Fixture, report: &mut Report, step: &str) -> Result<()> {
    report.wait(
        &format!("{step}: daemons without a problem"),
        RECOVERS_WITHIN,
        || {
            let views = views(fixture, Way::OnNode);
            let well = views.iter().filter(|view| {
                view.complete && view.silent_seconds == 0 && view.problems.is_empty()
            });
            Ok(Check::new(fixture.daemons.len(), well.count()))
        },
    )
}

fn views(fixture: &Fixture, way: Way) -> Vec<ClusterStatus> {
    let views = fixture
        .daemons
        .values()
        .map(|daemon| daemon.cluster_status(&fixture.cluster, way));
    views.filter_map(Result::ok).collect()
}

/// The quotas of the OAPs, each from the daemon of its node.
fn own_quotas(fixture: &Fixture) -> Result<String> {
    let mut quotas = Vec::new();
    for daemon in fixture.daemons.values() {
        let status = daemon.status(&fixture.cluster, Way::OnNode)?;
        let backends = status.services.iter().flat_map(|service| &service.backends);
        let active = backends.filter(|backend| backend.state == "active");
        quotas.extend(active.map(|backend| {
            let quota = backend.quota.map(|quota| quota.to_string());
            quota.unwrap_or_else(|| "unlimited".to_owned())
        }));
    }
    Ok(slashed(quotas))
}

fn identities(fixture: &Fixture) -> String {
    let daemons = fixture.daemons.values();
    let restarts: Vec<_> = daemons
        .map(|daemon| {
            format!(
                "{}:{}",
                &daemon.name[daemon.name.len() - 5..],
                daemon.restarts
            )
        })
        .collect();
    restarts.join(" ")
}
