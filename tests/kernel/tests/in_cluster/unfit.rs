//! Nodes that can't be guarded, or not all of them: the daemon is ready, says why, hurts nobody.

use anyhow::ensure;
use serde_json::{Value, json};
use testkit::fixtures::foreign::{Answer, Connect4, SkLookup, SockOps};
use testkit::fixtures::{Balancer, Signal, eventually};
use testkit::kubernetes::objects;

use super::fixture::{
    Cluster, NODE, Pod, SETTLES_WITHIN, SYSTEM, cluster_status, elsewhere, own_report,
    placing_config, with_cluster, with_route_back,
};

const QUOTA: &str = "{per_backend: 3}";
const UNFIT: &str = "this node can't be guarded: ";

/// A pod that is ready, and the daemon's answers while its node can't be guarded for this reason.
#[track_caller]
fn says_so_and_hurts_nobody(cluster: &Cluster, pod: &Pod, balancer: &Balancer, why: &str) {
    assert!(!balancer.is_loaded(), "{}", balancer.logs());
    let logs = balancer.logs();
    assert_eq!(logs.matches(UNFIT).count(), 1, "{logs}");
    assert!(logs.contains(why), "{logs}");
    let alive = balancer.must(&["ping"]);
    assert!(
        alive.contains("the daemon lives") && alive.contains(why),
        "{alive}"
    );
    eventually(SETTLES_WITHIN, || {
        let report = own_report(cluster)?;
        let text = report["data"]["publication.json"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        ensure!(
            text.contains("\"unfit\":") && text.contains(why),
            "{report}"
        );
        Ok(())
    });
    let problems = cluster_status(balancer)["problems"].to_string();
    assert!(
        problems.contains(&format!("node {NODE} can't be guarded: ")),
        "{problems}"
    );
    let config = balancer.config().display().to_string();
    let doctor = balancer.verb(&["doctor", "--config", &config, "-o", "json"]);
    let found: Value = serde_json::from_str(&doctor.stdout).expect("JSON");
    let checks = found["checks"].as_array().expect("a list");
    let daemon = checks.iter().find(|check| check["name"] == "daemon");
    assert_eq!(daemon.expect("a finding")["status"], "fail", "{found}");
    let status = balancer.verb(&["status"]);
    assert!(
        status.code != 0 && status.stderr.contains(UNFIT),
        "{}",
        status.stderr
    );
    let set = balancer.verb(&["quota", "set", "agents", "1"]);
    assert!(
        set.code != 0 && set.stderr.contains(UNFIT),
        "{}",
        set.stderr
    );
    let _listener = cluster.listen(pod);
    assert_eq!(cluster.clients(pod, 9).len(), 9);
}

#[test]
fn without_a_capability() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint()]);
        let mut balancer = cluster
            .placing_balancer(QUOTA)
            .without_capability("net_admin");
        balancer.launch();
        says_so_and_hurts_nobody(cluster, &pod, &balancer, "may not load programs");
        let status = balancer.stop(Signal::SIGTERM);
        assert!(status.success(), "{}", balancer.logs());
    });
}

/// The kernel refuses a program while another one is in its way. Then it is taken away.
#[test]
fn as_long_as_the_kernel_refuses_a_program() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint()]);
        let exclusive = SockOps::load("exclusive", &[]);
        let attached = exclusive.attach_alone(&cluster.machine.cgroup);
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        says_so_and_hurts_nobody(cluster, &pod, &balancer, "cannot attach `account`");
        drop(attached);
        balancer.must(&["reload"]);
        let _listener = cluster.listen(&pod);
        balancer.wait_for_log("guarding the network namespace", 0);
        balancer.wait_active(1);
        eventually(SETTLES_WITHIN, || {
            let problems = cluster_status(&balancer)["problems"].to_string();
            ensure!(!problems.contains("can't be guarded"), "{problems}");
            Ok(())
        });
        let clients = cluster.clients(&pod, 3);
        assert!(cluster.connect(&pod).is_refused(), "{}", balancer.logs());
        drop(clients);
        assert!(
            balancer.stop(Signal::SIGINT).success(),
            "{}",
            balancer.logs()
        );
        assert!(!balancer.is_loaded());
    });
}

/// The most programs of a hook of a netns (`kernel/bpf/net_namespace.c`).
const MOST_PROGRAMS: usize = 64;

/// Where `steer` can't be attached connections are counted all the same.
#[test]
fn what_can_be_done_without_steer_is_done() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint()]);
        let foreign = SkLookup::load("foreign", 1, Answer::Drop);
        let attached: Vec<_> = (0..MOST_PROGRAMS)
            .map(|_| foreign.attach(&pod.netns))
            .collect();
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        let _listener = cluster.listen(&pod);
        let clients = cluster.clients(&pod, 9);
        assert_eq!(clients.len(), 9);
        balancer.wait_until(|service| service.established() == 9);
        eventually(SETTLES_WITHIN, || {
            let problems = cluster_status(&balancer)["problems"].to_string();
            ensure!(
                problems.contains("1 of its network namespaces are counted, and neither steered"),
                "{problems}"
            );
            Ok(())
        });
        drop(attached);
    });
}

/// Where another program at `connect()` allows none beside it clients are not placed, and
/// everything else is done. The other nodes hear of it.
#[test]
fn what_can_be_done_without_placing_is_done() {
    const WHY: &str = "connects of its clients are not placed: another program at connect()";
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint()]);
        install(cluster);
        let other = Connect4::load("exclusive", 11_900, 11_901);
        let alone = other.attach_alone(&cluster.machine.cgroup);
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        eventually(SETTLES_WITHIN, || {
            let report = own_report(cluster)?.to_string();
            ensure!(report.contains(WHY), "{report}");
            let status = cluster_status(&balancer);
            let problems = status["problems"].to_string();
            let named = format!("node {NODE} can't be guarded: {WHY}");
            ensure!(problems.contains(&named), "{problems}");
            let placing = &status["placing"];
            ensure!(
                placing["on"] == false && placing["services"][0]["placed"] == false,
                "{placing}"
            );
            Ok(())
        });
        let outside = cluster.balancer_as(cluster.api.admin(), QUOTA);
        let (said, nodes) = found_outside(&outside, "unfit nodes");
        assert_eq!(said, "warn");
        assert!(
            nodes.to_string().contains(&format!("{NODE}: {WHY}")),
            "{nodes}"
        );
        let _listener = cluster.listen(&pod);
        balancer.wait_active(1);
        let clients = cluster.clients(&pod, 3);
        assert!(cluster.connect(&pod).is_refused(), "{}", balancer.logs());
        drop((alone, clients));
        balancer.must(&["reload"]);
        eventually(SETTLES_WITHIN, || {
            let status = cluster_status(&balancer);
            ensure!(status["placing"]["on"] == true, "{status}");
            let problems = status["problems"].to_string();
            ensure!(!problems.contains("can't be guarded"), "{problems}");
            Ok(())
        });
    });
}

/// The daemon's pod is in a namespace that is being deleted, before its `DaemonSet` is: no other
/// daemon follows.
#[test]
fn a_deleted_namespace_leaves_nothing_in_the_kernel() {
    with_cluster(|cluster| {
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        // A finalizer of the test keeps the namespace, as pods that end would.
        let held = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"namespace": SYSTEM, "name": "held", "finalizers": ["example.com/held"]},
        });
        cluster.api.admin().apply(&held);
        let delete = ["delete", "namespace", SYSTEM, "--wait=false"];
        assert_eq!(cluster.api.admin().attempt(&delete).code, 0);
        assert!(balancer.stop(Signal::SIGTERM).success());
        let logs = balancer.logs();
        assert!(
            logs.contains("the namespace balancer-system is being deleted"),
            "{logs}"
        );
        assert!(!balancer.is_loaded(), "{logs}");
    });
}

#[test]
fn a_deleted_node_leaves_nothing_in_the_kernel() {
    with_cluster(|cluster| {
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        assert_eq!(
            cluster.api.admin().attempt(&["delete", "node", NODE]).code,
            0
        );
        assert!(balancer.stop(Signal::SIGTERM).success());
        let logs = balancer.logs();
        assert!(logs.contains("the node node1 is deleted"), "{logs}");
        assert!(!balancer.is_loaded(), "{logs}");
        // There again, another one follows: everything stays for it.
        cluster.api.admin().apply(&objects::node(NODE));
        balancer.launch();
        assert!(balancer.stop(Signal::SIGTERM).success());
        assert!(balancer.is_loaded(), "{}", balancer.logs());
    });
}

/// What the chart installs, as far as one looks from outside: its daemons are on node2.
fn install(cluster: &Cluster) {
    let labels = json!({"app.kubernetes.io/part-of": "balancer", "app": "balancer"});
    let set = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"namespace": SYSTEM, "name": "balancer", "labels": labels},
        "spec": {"selector": {"matchLabels": {"app": "balancer"}}, "template": {
            "metadata": {"labels": {"app": "balancer"}},
            "spec": {"containers": [{"name": "balancer", "image": "balancer:1"}]},
        }},
    });
    let file = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"namespace": SYSTEM, "name": "balancer", "labels": labels},
        "stringData": {"balancer.yaml": placing_config(QUOTA)},
    });
    let mut daemon = objects::pod(SYSTEM, "balancer-y", "node2", &["10.89.0.12"]);
    daemon["metadata"]["labels"] = json!({"app": "balancer"});
    cluster
        .api
        .admin()
        .apply(&objects::list(&[set, file, daemon]));
}

/// What `doctor --cluster` finds: its status and its words.
#[track_caller]
fn found_outside(outside: &Balancer, name: &str) -> (Value, Value) {
    let said = outside.verb(&["doctor", "--cluster", "-o", "json"]);
    let said: Value = serde_json::from_str(&said.stdout).expect("JSON");
    let checks = said["checks"].as_array().expect("a list");
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.unwrap_or_else(|| panic!("no {name} in {said}"));
    (check["status"].clone(), check["found"].clone())
}

/// No daemon is asked: `doctor --cluster` and `status --cluster` go by what the API server has.
#[test]
fn a_cluster_is_seen_from_a_machine_that_is_no_node_of_it() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        cluster.publish("node2", &[("far-1", 10)]);
        install(cluster);
        let outside = cluster.balancer_as(cluster.api.admin(), QUOTA);
        let found = |name: &str| found_outside(&outside, name);
        assert_eq!(
            found("nodes without a daemon"),
            (json!("warn"), json!("node1"))
        );
        assert_eq!(found("unfit nodes").0, "ok");
        let (status, reports) = found("node reports");
        let words = "1 of 2 nodes tell, the oldest report is ";
        assert!(
            status == "ok" && reports.to_string().contains(words),
            "{reports}"
        );
        let status = cluster_status(&outside);
        let pods = status["groups"][0]["backends"].as_array().expect("a list");
        let far = pods.iter().find(|pod| pod["node"] == "node2");
        assert_eq!(far.expect("it is told of")["established"], 10, "{status}");
        assert_eq!(pods.len(), 2, "{status}");
    });
}
