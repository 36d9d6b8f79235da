//! 10: a node that can't be guarded hurts no rollout, and what is deleted leaves nothing in any
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
        "10 one unfit node of three: the rollout ends",
        &Check::new(
            "yes",
            rolled_out.map_or_else(|error| format!("{error:#}"), |()| "yes".into()),
        ),
    )?;
    fixture.daemons_ready(report, "10 one unfit node of three", &before)?;
    let kubeconfig = fixture
        .cluster
        .kubernetes
        .admin()
        .kubeconfig()
        .display()
        .to_string();
    let program = fixture.cluster.product.balancer.display().to_string();
    let doctor = format!("KUBECONFIG={kubeconfig} {program} doctor --cluster -o json");
    let cluster = &fixture.cluster;
    report.wait("10 doctor --cluster: unfit nodes", TOLD_WITHIN, || {
        let said = cluster.on_node(NODES[0], &["sh", "-c", &format!("{doctor} || true")])?;
        let said: serde_json::Value = serde_json::from_str(&said)?;
        let checks = said["checks"].as_array().cloned().unwrap_or_default();
        let unfit = checks.iter().find(|check| check["name"] == "unfit nodes");
        let found = unfit.map_or_else(String::new, |check| check["found"].to_string());
        let named = NODES.iter().filter(|node| found.contains(*node));
        Ok(Check::new(
            VICTIM,
            named.copied().collect::<Vec<_>>().join(" "),
        ))
    })?;
    let pinned = NODES.iter().filter(|node| kernel::is_there(cluster, node));
    report.check(
        "10 one unfit node of three: nodes that are guarded",
        &Check::new(NODES.len() - 1, pinned.count()),
    )?;
    let mount = ["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"];
    cluster.on_node(VICTIM, &mount)?;
    let pod = fixture.daemons[VICTIM].name.clone();
    cluster.kubectl(&["delete", "pod", &pod, "-n", SYSTEM])?;
    fixture.daemons_ready(report, "10 the node is fit again", &BTreeSet::new())?;
    let cluster = &fixture.cluster;
    report.wait("10 the node is fit again: guarded", TOLD_WITHIN, || {
        Ok(Check::new(true, kernel::is_there(cluster, VICTIM)))
    })
}

/// `kubectl delete node`.
fn deleted_node(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture.look()?;
    let programs = kernel::programs(&fixture.cluster, VICTIM);
    report.check(
        "10 before delete node: programs on it",
        &Check::judged("some", programs.len(), !programs.is_empty()),
    )?;
    fixture.cluster.kubectl(&["delete", "node", VICTIM])?;
    let cluster = &fixture.cluster;
    report.wait("10 delete node: pins on it", COLLECTED_WITHIN, || {
        Ok(Check::new(false, kernel::is_there(cluster, VICTIM)))
    })?;
    report.wait("10 delete node: programs on it", ENDS_WITHIN, || {
        Ok(Check::new(0, kernel::still_loaded(&programs)?))
    })
}

/// `kubectl delete namespace`: pods go first.
fn deleted_namespace(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    fixture.look()?;
    let programs = fixture.programs();
    report.check(
        "10 before delete namespace: programs of all nodes",
        &Check::judged("some", programs.len(), !programs.is_empty()),
    )?;
    let delete = ["delete", "namespace", SYSTEM, "--wait=false"];
    fixture.cluster.kubectl(&delete)?;
    let cluster = &fixture.cluster;
    report.wait("10 delete namespace: nodes with pins", ENDS_WITHIN, || {
        let pinned = NODES.iter().filter(|node| kernel::is_there(cluster, node));
        Ok(Check::new(0, pinned.count()))
    })?;
    report.wait("10 delete namespace: programs", ENDS_WITHIN, || {
        Ok(Check::new(0, kernel::still_loaded(&programs)?))
    })
}

fn install(fixture: &mut Fixture, report: &mut Report, scenario: &str) -> Result<()> {
    let mut values = layout::by_observation(&fixture.cluster.product);
    values["podAnnotations"]["scenario"] = scenario.into();
    fixture.cluster.helm_upgrade(&values)?;
    fixture.daemons_ready(report, "10 installed again", &BTreeSet::new())
}
