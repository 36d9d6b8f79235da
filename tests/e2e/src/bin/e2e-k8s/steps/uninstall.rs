//! 13: `helm uninstall`.

use std::time::Duration;

use anyhow::Result;
use testkit::scenario::{Check, Report};

use crate::fixture::Fixture;
use crate::kernel;
use crate::layout::{RELEASE, SYSTEM};

const ENDS_WITHIN: Duration = Duration::from_secs(45);

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    let mark = fixture.clients()?.mark(&fixture.cluster)?;
    leaves_nothing(fixture, report)?;
    fixture.nothing_lost(report, "13 helm uninstall", &mark)
}

/// Takes the balancer away, and looks for what is left of it.
pub fn leaves_nothing(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture.look()?;
    let nodes: Vec<_> = fixture.daemons.keys().cloned().collect();
    let programs = fixture.programs();
    let loaded = kernel::still_loaded(&programs)?;
    report.check(
        "13 before: programs in the kernel, of all nodes",
        &Check::judged(
            "some",
            loaded,
            loaded >= nodes.len() && loaded == programs.len(),
        ),
    )?;
    fixture.cluster.helm(&["uninstall", RELEASE])?;
    let cluster = &fixture.cluster;
    report.wait("13 helm uninstall: pods of it", ENDS_WITHIN, || {
        let pods = cluster.get(&["pods", "-n", SYSTEM])?;
        Ok(Check::new(0, pods["items"].as_array().map_or(0, Vec::len)))
    })?;
    let pinned = nodes.iter().filter(|node| kernel::is_there(cluster, node));
    report.check(
        "13 helm uninstall: nodes with pins",
        &Check::new(0, pinned.count()),
    )?;
    // What held them last is freed a moment later.
    report.wait(
        "13 helm uninstall: programs in the kernel",
        Duration::from_secs(5),
        || Ok(Check::new(0, kernel::still_loaded(&programs)?)),
    )?;
    report.wait("13 helm uninstall: ConfigMaps", ENDS_WITHIN, || {
        let names = ["configmaps", "-n", SYSTEM, "-o", "name"];
        let names = cluster.kubectl(&[&["get"], &names[..]].concat())?;
        // Kubernetes itself puts one into every namespace.
        let left = names
            .lines()
            .filter(|name| *name != "configmap/kube-root-ca.crt");
        Ok(Check::new("", left.collect::<Vec<_>>().join(" ")))
    })
}
