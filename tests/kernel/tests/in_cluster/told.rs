//! What daemons tell of their nodes: how old it is, when it goes, and who is missing.

use anyhow::ensure;
use serde_json::json;
use std::time::Duration;
use testkit::fixtures::{Machine, Signal, eventually};
use testkit::kubernetes::ApiServer;
use testkit::kubernetes::objects::{self, Endpoint};

use super::fixture::{
    CLIENT, Cluster, NODE, OAPS, PORT, SETTLES_WITHIN, SYSTEM, cluster_status, elsewhere, group,
    own_report, wait_for_quota, with_cluster, with_route_back, without_health,
};

/// A report of another node with a peak.
fn publish_peak(cluster: &Cluster<'_>, connections: u32) {
    let group =
        json!({"entry": "agents", "service": {"namespace": OAPS, "name": "oap"}, "port": PORT});
    let peak = json!({"group": group, "connections": connections, "seconds_ago": 0});
    let report =
        json!({"schema": 1, "node": "node2", "backends": [], "peaks": [peak], "refused": []});
    cluster.publish_json("node2", &report);
}

/// Reports that a daemon finds are as old as the API server says, and a pod that nobody tells of
/// is named.
#[test]
fn a_report_counts_by_its_age_at_the_api_server_and_who_is_missing_is_named() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        publish_peak(cluster, 900);
        let mut balancer = cluster.balancer(&without_health(
            "{observed: 10m, headroom: 0%, min_quota: 1}",
        ));
        balancer.launch();
        let _listener = cluster.listen(&pod);
        let _clients = cluster.clients(&pod, 12);
        wait_for_quota(&balancer, Some(450), "900 connections (observed)");
        // What the API server has forgotten the time of may be from any time.
        balancer.signal(Signal::SIGKILL);
        balancer.wait();
        let patch = json!({"metadata": {"managedFields": [{}]}}).to_string();
        let forget = [
            "patch",
            "configmap",
            "balancer-node2",
            "-n",
            SYSTEM,
            "--type=merge",
            "-p",
        ];
        cluster.api.kubectl(&[&forget[..], &[&patch]].concat());
        balancer.launch();
        let sentence_has = |words: &str| {
            eventually(SETTLES_WITHIN, || {
                let sentence = group(&balancer)?["sentence"].to_string();
                ensure!(sentence.contains(words), "{sentence}");
                Ok(())
            });
        };
        sentence_has("24 connections (observed)");
        // It is new when it is written again.
        publish_peak(cluster, 800);
        sentence_has("800 connections (observed)");
        let named = "the pod skywalking/far-1 on node node2 is ready, and no daemon tells of it";
        eventually(Duration::from_secs(90), || {
            let problems = cluster_status(&balancer)["problems"].to_string();
            ensure!(problems.contains(named), "{problems}");
            Ok(())
        });
        let config = balancer.config();
        let doctor = balancer.verb(&["doctor", "--config", config.to_str().expect("UTF-8")]);
        let shown = doctor
            .stdout
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        assert!(shown.contains(named), "{shown}");
        cluster.publish("node2", &[("far-1", 12)]);
        eventually(SETTLES_WITHIN, || {
            let problems = cluster_status(&balancer)["problems"].clone();
            ensure!(problems == json!([]), "{problems}");
            Ok(())
        });
    });
}

#[test]
fn the_report_of_a_daemon_whose_pod_is_gone_is_taken_away() {
    Machine::with(|machine| {
        machine.netns.add_address(CLIENT);
        let cluster = Cluster::over(machine, ApiServer::start_with_controllers(&machine.netns));
        let own = objects::pod(SYSTEM, "balancer-x", NODE, &["10.89.0.11"]);
        let accounts = [SYSTEM, OAPS].map(|of| objects::service_account(of, "default"));
        cluster.api.admin().apply(&objects::list(&accounts));
        cluster.api.admin().apply(&own);
        let (_pod, mut balancer, _listener) = cluster.one_of_two_pods("{clients: 20}");
        eventually(SETTLES_WITHIN, || {
            let report = own_report(&cluster)?;
            let owner = &report["metadata"]["ownerReferences"][0];
            ensure!(
                owner["kind"] == "Pod" && owner["name"] == "balancer-x",
                "{report}"
            );
            Ok(())
        });
        assert!(balancer.stop(Signal::SIGTERM).success());
        own_report(&cluster).expect("another daemon of this pod may come");
        let delete = [
            "delete",
            "pod",
            "balancer-x",
            "-n",
            SYSTEM,
            "--force",
            "--grace-period=0",
        ];
        cluster.api.kubectl(&delete);
        eventually(SETTLES_WITHIN, || {
            ensure!(own_report(&cluster).is_err(), "it is there");
            Ok(())
        });
    });
}

/// Whoever is behind the address of a node is no peer because an OAP uses that node's network.
#[test]
fn clients_behind_the_node_of_an_oap_are_not_exempt() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        let there = CLIENT.to_string();
        let mut on_host = objects::pod(OAPS, "oap-host", "node2", &[&there]);
        on_host["spec"]["hostNetwork"] = json!(true);
        cluster.api.admin().apply(&on_host);
        cluster.learn_uids(OAPS);
        let endpoints = [pod.endpoint(), Endpoint::new(&there, "oap-host", "node2")];
        cluster.serve(&endpoints);
        let mut balancer = cluster.balancer("{per_backend: 5}");
        balancer.launch();
        let _listener = cluster.listen(&pod);
        wait_for_quota(&balancer, Some(5), "fixed: 5");
        let outcomes: Vec<_> = (0..8).map(|_| cluster.connect(&pod)).collect();
        let refused = outcomes.iter().filter(|outcome| outcome.is_refused());
        assert_eq!(refused.count(), 3, "{}", balancer.logs());
        let problems = cluster_status(&balancer)["problems"].to_string();
        assert!(
            problems.contains("oap-host, use their node's network"),
            "{problems}"
        );
    });
}
