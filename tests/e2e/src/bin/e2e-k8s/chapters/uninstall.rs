//! 9: `helm uninstall`.

use std::time::Duration;

use anyhow::Result;
use testkit::scenario::{Report, Sight};

use crate::kernel;
use crate::layout::{RELEASE, SYSTEM};
use crate::world::World;

const ENDS_WITHIN: Duration = Duration::from_secs(45);

pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    let mark = world.clients()?.mark(&world.lab)?;
    leaves_nothing(world, report)?;
    world.nothing_lost(report, "9 helm uninstall", &mark)
}

/// Takes the balancer away, and looks for what is left of it.
pub fn leaves_nothing(world: &mut World, report: &mut Report) -> Result<()> {
    world.look()?;
    let nodes: Vec<_> = world.agents.keys().cloned().collect();
    let programs = world.programs();
    let loaded = kernel::still_loaded(&programs)?;
    report.check(
        "9 before: programs in the kernel, of all nodes",
        &Sight::judged(
            "some",
            loaded,
            loaded >= nodes.len() && loaded == programs.len(),
        ),
    )?;
    world.lab.helm(&["uninstall", RELEASE])?;
    let lab = &world.lab;
    report.wait("9 helm uninstall: pods of it", ENDS_WITHIN, || {
        let pods = lab.get(&["pods", "-n", SYSTEM])?;
        Ok(Sight::new(0, pods["items"].as_array().map_or(0, Vec::len)))
    })?;
    let pinned = nodes.iter().filter(|node| kernel::is_there(lab, node));
    report.check(
        "9 helm uninstall: nodes with pins",
        &Sight::new(0, pinned.count()),
    )?;
    // What held them last is freed a moment later.
    report.wait(
        "9 helm uninstall: programs in the kernel",
        Duration::from_secs(5),
        || Ok(Sight::new(0, kernel::still_loaded(&programs)?)),
    )?;
    report.wait("9 helm uninstall: ConfigMaps", ENDS_WITHIN, || {
        let names = ["configmaps", "-n", SYSTEM, "-o", "name"];
        let names = lab.kubectl(&[&["get"], &names[..]].concat())?;
        // Kubernetes itself puts one into every namespace.
        let left = names
            .lines()
            .filter(|name| *name != "configmap/kube-root-ca.crt");
        Ok(Sight::new("", left.collect::<Vec<_>>().join(" ")))
    })
}
