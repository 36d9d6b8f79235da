//! Measurement 9: what the daemons of all nodes cost the API server, and one of them its node.
//!
//! A real API server, with its database and the controllers; nodes that are objects alone; and in
//! one process what the daemon of each node asks and tells, by the product's own code. A real
//! daemon runs on a node without an OAP.

mod control_plane;
mod daemon;
pub mod fleet;
mod kubelet;
mod objects;
mod table;

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use testkit::fixtures::Machine;

use self::control_plane::{ControlPlane, Cost};
use self::daemon::{Daemon, Use};
use crate::children::{Helper, Place};
use crate::interrupt;
use crate::report::Section;
use crate::settings::Settings;

/// What was measured.
#[derive(Serialize)]
struct Measured {
    nodes: usize,
    oaps: usize,
    /// No daemon runs.
    alone: Cost,
    alone_rollout: Cost,
    /// All daemons start at once.
    start: Cost,
    rest: Cost,
    storm: Cost,
    rollout: Cost,
    /// The daemon of a node without an OAP.
    daemon_at_rest: Use,
    daemon_in_storm: Use,
}

/// Measures.
///
/// # Errors
/// When the control plane refuses something, or a daemon does not get to know everything.
pub fn measure(settings: &Settings) -> Result<Section> {
    let (nodes, oaps) = settings.pick((30, 3), (300, 12));
    // A watch is renewed once in it.
    let window = settings.pick(Duration::from_secs(10), Duration::from_secs(65));
    let machine = Machine::new();
    let plane = ControlPlane::start(&machine);
    let mut fleet = Fleet::start(&machine, &plane, nodes, oaps)?;
    // What objects that were just made cause.
    pause(window / 4)?;
    let alone = fleet.cost(&plane, |_| pause(window))?;
    let alone_rollout = fleet.cost(&plane, Fleet::roll_out)?;
    let start = fleet.cost(&plane, |fleet| fleet.ask("start").map(drop))?;
    let daemon = Daemon::start(&machine, &plane, nodes)?;
    pause(window / 2)?;
    let (rest, daemon_at_rest) = beside(&daemon, || fleet.cost(&plane, |_| pause(window)))?;
    fleet.ask("storm")?;
    pause(window / 4)?;
    let (storm, daemon_in_storm) = beside(&daemon, || fleet.cost(&plane, |_| pause(window)))?;
    fleet.ask("calm")?;
    drop(daemon);
    pause(window / 4)?;
    fleet.check()?;
    let rollout = fleet.cost(&plane, Fleet::roll_out)?;
    pause(window / 2)?;
    fleet.check()?;
    Ok(table::section(&Measured {
        nodes,
        oaps,
        alone,
        alone_rollout,
        start,
        rest,
        storm,
        rollout,
        daemon_at_rest,
        daemon_in_storm,
    }))
}

/// What the work returns, and what the daemon uses meanwhile.
fn beside<T>(daemon: &Daemon<'_>, work: impl FnOnce() -> Result<T>) -> Result<(T, Use)> {
    let mut done = None;
    let used = daemon.uses(|| {
        done = Some(work()?);
        Ok(())
    })?;
    Ok((done.context("the work was done")?, used))
}

fn pause(time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        interrupt::check()?;
        sleep(Duration::from_millis(100).min(until - Instant::now()));
    }
    Ok(())
}

/// The process with the daemons of all nodes.
struct Fleet(Helper);

impl Fleet {
    fn start(machine: &Machine, plane: &ControlPlane, nodes: usize, oaps: usize) -> Result<Self> {
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let (admin, account) = (text(plane.admin()), text(plane.account()));
        let (nodes, oaps) = (nodes.to_string(), oaps.to_string());
        let arguments = [
            "fleet",
            "--admin",
            &admin,
            "--nodes",
            &nodes,
            "--oaps",
            &oaps,
            "--config",
            objects::FILE,
        ];
        let environment = [("KUBECONFIG", &*account)];
        let mut helper = Helper::spawn_with(Place::Beside(machine), arguments, &environment)?;
        helper.read()?;
        Ok(Self(helper))
    }

    fn ask(&mut self, question: &str) -> Result<u64> {
        interrupt::check()?;
        self.0.ask(question)
    }

    fn roll_out(&mut self) -> Result<()> {
        self.ask("rollout").map(drop)
    }

    fn cost(
        &mut self,
        plane: &ControlPlane,
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<Cost> {
        let id = self.0.id();
        plane.cost(id, || work(self))
    }

    /// What was measured counts only where all daemons know everything.
    fn check(&mut self) -> Result<()> {
        let (running, content) = (self.ask("running")?, self.ask("content")?);
        ensure!(
            running == content,
            "{content} daemons of {running} know everything"
        );
        Ok(())
    }
}
