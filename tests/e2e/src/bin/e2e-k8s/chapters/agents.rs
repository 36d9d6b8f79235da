//! 4: agents end in every way under load.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::scenario::{Report, Sight, interrupt};

use crate::agents::{Agent, Way};
use crate::checks::{PODS_START_WITHIN, wait};
use crate::layout::{self, SYSTEM};
use crate::world::World;

pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    deleted(world, report)?;
    killed(world, report)?;
    replaced(world, report)
}

fn deleted(world: &mut World, report: &mut Report) -> Result<()> {
    let mark = world.clients()?.mark(&world.lab)?;
    world.look()?;
    let agent = world.agents.values().next().context("there is an agent")?;
    let gone = BTreeSet::from([agent.uid.clone()]);
    let delete = ["delete", "pod", &agent.name, "-n", SYSTEM, "--wait=false"];
    world.lab.kubectl(&delete)?;
    let step = "4 agent pod deleted";
    world.agents_ready(report, step, &gone)?;
    world.nothing_lost(report, step, &mark)?;
    world.counts_are_true(report, step, Way::Exec)
}

fn killed(world: &mut World, report: &mut Report) -> Result<()> {
    let mark = world.clients()?.mark(&world.lab)?;
    world.look()?;
    let agent = world.agents.values().nth(1).context("there are agents")?;
    let agent = agent.clone();
    let step = "4 agent killed (-9)";
    kill(process(&agent)?, Signal::SIGKILL).context("cannot kill an agent")?;
    wait(
        report,
        &format!("{step}: restarts, and ready"),
        PODS_START_WITHIN,
        "1, true",
        || {
            world.look()?;
            let now = world.agents.get(&agent.node);
            let seen = now.map_or("no pod".to_owned(), |now| {
                format!("{}, {}", now.restarts - agent.restarts, now.ready)
            });
            Ok(Sight::new("1, true", seen))
        },
    )?;
    world.nothing_lost(report, step, &mark)?;
    world.counts_are_true(report, step, Way::Exec)
}

/// Another configuration and another annotation: every agent is replaced.
fn replaced(world: &mut World, report: &mut Report) -> Result<()> {
    let mark = world.clients()?.mark(&world.lab)?;
    world.look()?;
    let old: BTreeSet<_> = world
        .agents
        .values()
        .map(|agent| agent.uid.clone())
        .collect();
    let begun = Instant::now();
    let values = layout::by_pods(&world.lab.product.name);
    world.lab.helm_upgrade(&values)?;
    let step = "4 helm upgrade";
    world.agents_ready(report, step, &old)?;
    let took = format!("after {:.1} s", begun.elapsed().as_secs_f64());
    report.tell("4 helm upgrade: all agents replaced", &took);
    world.nothing_lost(report, step, &mark)?;
    world.counts_are_true(report, step, Way::Exec)?;
    world.views_agree(report, step)
}

/// The daemon of an agent's pod, by the id that it has here.
fn process(agent: &Agent) -> Result<Pid> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        for entry in fs::read_dir("/proc")
            .context("cannot list the processes")?
            .flatten()
        {
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            if read("comm").trim() == "balancer"
                && read("cgroup").contains(&agent.uid)
                && read("cmdline").split('\0').nth(1) == Some("run")
            {
                let id = entry.file_name().to_string_lossy().parse()?;
                return Ok(Pid::from_raw(id));
            }
        }
        interrupt::pause(Duration::from_millis(50))?;
    }
    bail!("no process of {} is a daemon", agent.name)
}
