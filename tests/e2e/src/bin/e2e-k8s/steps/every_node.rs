//! 13: a node that can't be guarded hurts no rollout, and what is deleted leaves nothing in any
//! kernel: a node, and the namespace.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use testkit::scenario::{Check, Report};

use crate::fixture::Fixture;
use crate::kernel;
use crate::layout::{self, NODES, RELEASE, SYSTEM, VICTIM};

const ROLLED_OUT_WITHIN: Duration = Duration::from_secs(120);
const TOLD_WITHIN: Duration = Duration::from_secs(30);
/// Pods of a node that is no more are looked for every 20 s, and have 40 s, and 30 s to end.
const COLLECTED_WITHIN: Duration = Duration::from_secs(120);
const ENDS_WITHIN: Duration = Duration::from_secs(60);

pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    unfit(fixture, report)?;
    deleted_node(fixture, report)?;
    deleted_namespace(fixture, report)
}

/// One node of three has no BPF file system any more: every daemon is replaced all the same.
fn unfit(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    install(fixture, report, "one")?;
    let before: BTreeSet<_> = (fixture.daemons.values())
        .map(|daemon| daemon.uid.clone())
        .collect();
    let unmount = ["umount", "--lazy", "/sys/fs/bpf"];
    fixture.cluster.on_node(VICTIM, &unmount)?;
    let mut values = layout::by_observation(&fixture.cluster.product);
    values["podAnnotations"]["scenario"] = "unfit".into();
    fixture.cluster.helm_upgrade(&values)?;
    let daemons = format!("daemonset/{RELEASE}");
    let rolled_out = fixture
        .cluster
        .wait_rolled_out(SYSTEM, &daemons, ROLLED_OUT_WITHIN);
    report.check(
        "13 one unfit node of three: the rollout ends",
        &Check::new(
            "yes",
            rolled_out.map_or_else(|error| format!("{error:#}"), |()| "yes".into()),
        ),
    )?;
    fixture.daemons_ready(report, "13 one unfit node of three", &before)?;
    let cluster = &fixture.cluster;
    report.wait("13 doctor --cluster: unfit nodes", TOLD_WITHIN, || {
        Ok(Check::new(VICTIM, cluster.named_by_doctor("unfit nodes")?))
    })?;
    let pinned = NODES.iter().filter(|node| kernel::is_there(cluster, node));
    report.check(
        "13 one unfit node of three: nodes that are guarded",
        &Check::new(NODES.len() - 1, pinned.count()),
    )?;
    let mount = ["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"];
    cluster.on_node(VICTIM, &mount)?;
    let pod = fixture.daemons[VICTIM].name.clone();
    cluster.kubectl(&["delete", "pod", &pod, "-n", SYSTEM])?;
    fixture.daemons_ready(report, "13 the node is fit again", &BTreeSet::new())?;
    let cluster = &fixture.cluster;
    report.wait("13 the node is fit again: guarded", TOLD_WITHIN, || {
        Ok(Check::new(true, kernel::is_there(cluster, VICTIM)))
    })
}

/// `kubectl delete node`.
fn deleted_node(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture.look()?;
    let programs = kernel::programs(&fixture.cluster, VICTIM);
    report.check(
        "13 before delete node: programs on it",
        &Check::judged("some", programs.len(), !programs.is_empty()),
    )?;
    fixture.cluster.kubectl(&["delete", "node", VICTIM])?;
    let cluster = &fixture.cluster;
    report.wait("13 delete node: pins on it", COLLECTED_WITHIN, || {
        Ok(Check::new(false, kernel::is_there(cluster, VICTIM)))
    })?;
    report.wait("13 delete node: programs on it", ENDS_WITHIN, || {
        Ok(Check::new(0, kernel::still_loaded(&programs)?))
    })
}

/// `kubectl delete namespace`: pods go first.
fn deleted_namespace(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture.look()?;
    let programs = fixture.programs();
    report.check(
        "13 before delete namespace: programs of all nodes",
        &Check::judged("some", programs.len(), !programs.is_empty()),
    )?;
    let delete = ["delete", "namespace", SYSTEM, "--wait=false"];
    fixture.cluster.kubectl(&delete)?;
    let cluster = &fixture.cluster;
    report.wait("13 delete namespace: nodes with pins", ENDS_WITHIN, || {
        let pinned = NODES.iter().filter(|node| kernel::is_there(cluster, node));
        Ok(Check::new(0, pinned.count()))
    })?;
    report.wait("13 delete namespace: programs", ENDS_WITHIN, || {
        Ok(Check::new(0, kernel::still_loaded(&programs)?))
    })
}

fn install(fixture: &mut Fixture, report: &mut Report, scenario: &str) -> Result<()> {
    let mut values = layout::by_observation(&fixture.cluster.product);
    values["podAnnotations"]["scenario"] = scenario.into();
    fixture.cluster.helm_upgrade(&values)?;
    fixture.daemons_ready(report, "13 installed again", &BTreeSet::new())
}
