//! 6: no API server; 7: a permission is missing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use serde_json::json;
use testkit::scenario::{Report, Sight, interrupt};

use super::pods;
use crate::agents::{Cluster, Way};
use crate::checks::wait;
use crate::layout::{API_DOWN, CLIENT_PODS, HOLD_FOR, RELEASE, SYSTEM, WITHOUT_CONNECTION};
use crate::world::{World, slashed};

/// Watches are opened again with growing pauses.
const RECOVERS_WITHIN: Duration = Duration::from_secs(45);
/// Well before they open.
const HOLDS_FOR_CERTAIN: Duration = Duration::from_secs(20);
/// What is old is noticed by the next heartbeat.
const OPENS_WITHIN: Duration = Duration::from_secs(8);

pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    outage(world, report)?;
    permission(world, report)
}

fn outage(world: &mut World, report: &mut Report) -> Result<()> {
    let mark = world.clients()?.mark(&world.lab)?;
    world.look()?;
    let before = identities(world);
    let held = own_quotas(world)?;
    world.lab.cluster.api_mut().stop();
    let down = Instant::now();
    // Everything goes on: clients come anew, are counted and refused.
    let told = standin::now();
    world
        .clients()?
        .reconnect(&world.lab, Duration::from_secs(3))?;
    world.reconnected(told)?;
    world.all_connected(report, "6 API server down")?;
    world.counts_are_true(report, "6 API server down", Way::OnNode)?;
    interrupt::pause(HOLDS_FOR_CERTAIN.saturating_sub(down.elapsed()))?;
    let step = format!(
        "6 API server down: quotas, after {} s",
        HOLDS_FOR_CERTAIN.as_secs()
    );
    let now = own_quotas(world)?;
    // What was being lowered at that moment still was. Who is refused for long gets room all the same.
    let holds = now.split('/').zip(held.split('/')).all(|(now, before)| {
        let (now, before) = (now.parse::<u32>(), before.parse::<u32>());
        matches!((now, before), (Ok(now), Ok(before)) if now <= before + CLIENT_PODS)
    });
    let expected = format!("{held}, and one more for each source refused for long");
    report.check(&step, &Sight::judged(expected, now, holds))?;
    report.wait(
        "6 API server down: agents that say so",
        OPENS_WITHIN,
        || {
            let views = views(world, Way::OnNode);
            let say = views
                .iter()
                .filter(|view| view.silent_seconds > 0 && !view.problems.is_empty());
            Ok(Sight::new(world.agents.len(), say.count()))
        },
    )?;
    let patience = (HOLD_FOR + OPENS_WITHIN).saturating_sub(down.elapsed());
    let mut opened = None;
    let step = "6 API server down: quotas, in the end";
    wait(report, step, patience, "open", || {
        let open = own_quotas(world)?
            .split('/')
            .all(|quota| quota == "unlimited");
        if open {
            opened.get_or_insert(down.elapsed());
        }
        Ok(Sight::new("open", if open { "open" } else { "hold" }))
    })?;
    if let Some(opened) = opened {
        let least = HOLD_FOR;
        report.check(
            "6 API server down: quotas open",
            &Sight::judged(
                format!("at {} s or later", least.as_secs()),
                format!("{:.1} s", opened.as_secs_f64()),
                opened + Duration::from_secs(2) >= least,
            ),
        )?;
    }
    while down.elapsed() < API_DOWN {
        interrupt::pause(Duration::from_millis(200))?;
    }
    world.counts_are_true(report, "6 API server still down", Way::OnNode)?;
    world.lab.cluster.api_mut().start_again();
    let back = Instant::now();
    recovers(world, report, "6 API server back")?;
    let took = format!("after {:.1} s", back.elapsed().as_secs_f64());
    report.tell("6 API server back: agents follow", &took);
    pods::by_pods(world, report, "6 API server back", Way::Exec)?;
    world.look()?;
    report.check(
        "6 API server back: the same agents, not restarted",
        &Sight::new(before, identities(world)),
    )?;
    world.all_connected(report, "6 API server back")?;
    world.nobody_waited(report, "6 API server back", &mark, WITHOUT_CONNECTION)?;
    world.counts_are_true(report, "6 API server back", Way::Exec)?;
    world.views_agree(report, "6 API server back")
}

fn permission(world: &mut World, report: &mut Report) -> Result<()> {
    let mark = world.clients()?.mark(&world.lab)?;
    allow(world, &["list"])?;
    // A watch that is open stays allowed: only new ones are asked for.
    let api = world.lab.cluster.api_mut();
    api.stop();
    api.start_again();
    let step = "7 watch endpointslices forbidden";
    let tells = |text: &str| text.contains("watch") && text.contains("endpointslices");
    report.wait(
        &format!("{step}: status --cluster that name it"),
        RECOVERS_WITHIN,
        || {
            let views = views(world, Way::OnNode);
            let telling = views
                .iter()
                .filter(|view| view.problems.iter().any(|problem| tells(problem)));
            Ok(Sight::new(world.agents.len(), telling.count()))
        },
    )?;
    let views = views(world, Way::OnNode);
    let problem = views.first().and_then(|view| view.problems.first());
    report.tell(step, problem.map_or("", String::as_str));
    let agent = world.agents.values().next().context("there is an agent")?;
    let log = agent.log(&world.lab, &["--tail=200"])?;
    let logged = log.lines().any(|line| line.contains("WARN") && tells(line));
    report.check(
        &format!("{step}: the log names it"),
        &Sight::new(true, logged),
    )?;
    let configuration = "/etc/balancer/balancer.yaml";
    let exec = ["exec", "-n", SYSTEM, &agent.name, "--"];
    let doctor = ["balancer", "doctor", "--config", configuration];
    let arguments = [&exec[..], &doctor].concat();
    let doctor = world.lab.cluster.admin().attempt(&arguments);
    let said = doctor.stdout + &doctor.stderr;
    let named = said.lines().any(tells);
    report.check(
        &format!("{step}: doctor names it"),
        &Sight::new(
            "true, exit code 1",
            format!("{named}, exit code {}", doctor.code),
        ),
    )?;
    world.counts_are_true(report, step, Way::Exec)?;
    allow(world, &["list", "watch"])?;
    recovers(world, report, "7 allowed again")?;
    world.nothing_lost(report, "7 allowed again", &mark)
}

/// What the `ClusterRole` of the chart lets agents do with `EndpointSlice`s.
fn allow(world: &World, verbs: &[&str]) -> Result<()> {
    let role = format!("{SYSTEM}:{RELEASE}");
    let rules = json!({"rules": [
        {"apiGroups": [""], "resources": ["services", "pods"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs},
    ]});
    let patch = ["patch", "clusterrole", &role, "--type=merge", "--patch"];
    let rules = rules.to_string();
    let arguments = [&patch[..], &[&rules]].concat();
    world.lab.kubectl(&arguments).map(drop)
}

/// Nothing is wrong any more.
fn recovers(world: &mut World, report: &mut Report, step: &str) -> Result<()> {
    report.wait(
        &format!("{step}: agents without a problem"),
        RECOVERS_WITHIN,
        || {
            let views = views(world, Way::OnNode);
            let well = views.iter().filter(|view| {
                view.complete && view.silent_seconds == 0 && view.problems.is_empty()
            });
            Ok(Sight::new(world.agents.len(), well.count()))
        },
    )
}

fn views(world: &World, way: Way) -> Vec<Cluster> {
    let views = world
        .agents
        .values()
        .map(|agent| agent.cluster(&world.lab, way));
    views.filter_map(Result::ok).collect()
}

/// The quotas of the OAPs, each from the agent of its node.
fn own_quotas(world: &World) -> Result<String> {
    let mut quotas = Vec::new();
    for agent in world.agents.values() {
        let status = agent.status(&world.lab, Way::OnNode)?;
        let backends = status.services.iter().flat_map(|service| &service.backends);
        let active = backends.filter(|backend| backend.state == "active");
        quotas.extend(active.map(|backend| {
            let quota = backend.quota.map(|quota| quota.to_string());
            quota.unwrap_or_else(|| "unlimited".to_owned())
        }));
    }
    Ok(slashed(quotas))
}

fn identities(world: &World) -> String {
    let agents = world.agents.values();
    let restarts: Vec<_> = agents
        .map(|agent| format!("{}:{}", &agent.name[agent.name.len() - 5..], agent.restarts))
        .collect();
    restarts.join(" ")
}
