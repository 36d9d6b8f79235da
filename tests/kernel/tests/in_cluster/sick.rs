//! Pods that do not serve: they lose their share of a computed quota, the others have room for
//! their clients, and all nodes know.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use testkit::fixtures::{Balancer, Signal, eventually, remains};

use super::fixture::{
    Cluster, PORT, Pod, SETTLES_WITHIN, cluster_status, elsewhere, own_report, with_cluster,
    with_route_back,
};
use crate::failures::server::{Act, Server};

/// Until a pod is found out, and the ten seconds that its share is left alone.
const SHARE_GONE_WITHIN: Duration = Duration::from_secs(25);
/// A failing one is tried at least every 30 seconds.
const BACK_WITHIN: Duration = Duration::from_secs(45);

/// A server in a process of its own.
fn serve(cluster: &Cluster<'_>, pod: &Pod) -> Server<'static> {
    let listens = SocketAddr::new([0, 0, 0, 0].into(), PORT);
    cluster.in_pod(pod, || Server::start(listens))
}

/// The pods as `status --cluster` shows them, by name.
fn pod(balancer: &Balancer<'_>, name: &str) -> anyhow::Result<Value> {
    let status = cluster_status(balancer);
    let pods = status["groups"][0]["backends"]
        .as_array()
        .context("no group")?
        .clone();
    let mut pods = pods.into_iter();
    let found = pods.find(|pod| pod["pod"]["name"] == name);
    found.with_context(|| format!("no {name}: {status}"))
}

/// Waits until these pods have these quotas.
fn wait_for_quotas(balancer: &Balancer<'_>, within: Duration, quotas: &[(&Pod, u32)]) {
    eventually(within, || {
        for (of, quota) in quotas {
            let shown = pod(balancer, &of.name)?;
            ensure!(
                shown["quota"] == *quota,
                "{quota}: {shown}\n{}",
                balancer.logs()
            );
        }
        Ok(())
    });
}

/// Three pods of this node with a quota of 10 each, their servers, and the daemon.
fn three_pods<'a>(cluster: &Cluster<'a>) -> (Vec<Pod>, Vec<Server<'static>>, Balancer<'a>) {
    let pods: Vec<Pod> = (5..8).map(|number| cluster.pod(number)).collect();
    pods.iter().for_each(with_route_back);
    cluster.serve(&pods.iter().map(Pod::endpoint).collect::<Vec<_>>());
    let mut balancer = cluster.balancer("{clients: 30, headroom: 0%, min_quota: 1}");
    balancer.launch();
    let servers = pods.iter().map(|pod| serve(cluster, pod)).collect();
    let quotas: Vec<_> = pods.iter().map(|pod| (pod, 10)).collect();
    wait_for_quotas(&balancer, SETTLES_WITHIN, &quotas);
    (pods, servers, balancer)
}

/// What the report of this node says of the health of a pod.
fn told(cluster: &Cluster<'_>, name: &str) -> anyhow::Result<Value> {
    let report = own_report(cluster)?;
    let text = report["data"]["publication.json"]
        .as_str()
        .context("no report")?;
    let report: Value = serde_json::from_str(text)?;
    let backends = report["backends"]
        .as_array()
        .context("no backends")?
        .clone();
    let mut backends = backends.into_iter();
    let found = backends.find(|backend| backend["pod"]["name"] == name);
    Ok(found.with_context(|| text.to_owned())?["health"].clone())
}

#[test]
fn a_stopped_pod_gives_its_share_to_the_others_and_has_it_back_when_it_goes_on() {
    with_cluster(|cluster| {
        let (pods, mut servers, balancer) = three_pods(cluster);
        let _held = cluster.clients(&pods[0], 4);
        servers[0].suffer(Act::Signal(Signal::SIGSTOP));
        let stopped = Instant::now();
        // The accept() that it is in may still take the first. The other waits in the queue.
        let _waits = cluster.clients(&pods[0], 2);
        eventually(SETTLES_WITHIN, || {
            let health = pod(&balancer, "oap-5")?["health"].clone();
            ensure!(
                health["state"] == "stalled" && health["has_share"] == true,
                "{health}"
            );
            Ok(())
        });
        let (first, second) = (&pods[1], &pods[2]);
        wait_for_quotas(
            &balancer,
            SHARE_GONE_WITHIN,
            &[(&pods[0], 6), (first, 15), (second, 15)],
        );
        let gone = stopped.elapsed();
        assert!(
            gone >= Duration::from_secs(10),
            "a pause is no reason: {gone:?}"
        );
        assert!(
            cluster.connect(&pods[0]).is_refused(),
            "{}",
            balancer.logs()
        );
        let clients = cluster.clients(first, 15);
        let health = told(cluster, "oap-5").expect("it is told");
        assert_eq!(health["state"], "stalled");
        let shown = balancer.must(&["status", "--cluster"]);
        let shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
        for words in [
            "skywalking/oap-5 is stalled since",
            "It has no share of a computed quota",
        ] {
            assert!(shown.contains(words), "{words}: {shown}");
        }
        servers[0].suffer(Act::Signal(Signal::SIGCONT));
        // Up at once; those of the others go down slowly.
        wait_for_quotas(&balancer, SETTLES_WITHIN, &[(&pods[0], 10)]);
        eventually(SETTLES_WITHIN, || {
            let health = told(cluster, "oap-5")?;
            ensure!(health.is_null(), "{health}");
            Ok(())
        });
        drop(clients);
    });
}

#[test]
fn a_failing_pod_has_room_for_trials_alone_and_comes_back_by_one() {
    with_cluster(|cluster| {
        let (pods, mut servers, balancer) = three_pods(cluster);
        servers[0].suffer(Act::Tell("close 0"));
        let others = [(&pods[1], 15), (&pods[2], 15)];
        eventually(SHARE_GONE_WITHIN, || {
            drop(cluster.connect(&pods[0]));
            for (of, quota) in others {
                let shown = pod(&balancer, &of.name)?;
                ensure!(shown["quota"] == quota, "{shown}\n{}", balancer.logs());
            }
            Ok(())
        });
        let shown = pod(&balancer, "oap-5").expect("it is shown");
        assert_eq!(shown["health"]["state"], "failing", "{shown}");
        // It holds none, and has room for the trial.
        assert_eq!(shown["quota"], 1, "{shown}");
        servers[0].suffer(Act::Tell("serve"));
        let mut back = Vec::new();
        eventually(BACK_WITHIN, || {
            back.extend(cluster.connect(&pods[0]).ok());
            let shown = pod(&balancer, "oap-5")?;
            ensure!(shown["health"].is_null() && shown["quota"] == 10, "{shown}");
            Ok(())
        });
    });
}

/// What the daemon of another node tells counts as well, and not where most pods do not serve.
#[test]
fn a_pod_of_another_node_loses_its_share_unless_most_do_not_serve() {
    with_cluster(|cluster| {
        let own = cluster.pod(5);
        with_route_back(&own);
        cluster.serve(&[own.endpoint(), elsewhere(1), elsewhere(2)]);
        let mut balancer = cluster.balancer("{clients: 30, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let _listener = cluster.listen(&own);
        let publish = |sick: &[&str]| {
            cluster.publish_of("node2", &[("far-1", 3), ("far-2", 4)], |pod| {
                sick.contains(&pod)
                    .then(|| json!({"state": "hung", "seconds": 11}))
            });
        };
        publish(&[]);
        wait_for_quotas(&balancer, SETTLES_WITHIN, &[(&own, 10)]);
        publish(&["far-1"]);
        wait_for_quotas(&balancer, SETTLES_WITHIN, &[(&own, 15)]);
        let shown = pod(&balancer, "far-1").expect("it is shown");
        assert_eq!(shown["health"]["has_share"], false, "{shown}");
        publish(&["far-1", "far-2"]);
        eventually(SETTLES_WITHIN, || {
            let shown = pod(&balancer, "far-1")?;
            ensure!(shown["health"]["has_share"] == true, "{shown}");
            Ok(())
        });
        remains(Duration::from_secs(2), || {
            let quota = pod(&balancer, "oap-5")?["quota"].as_u64();
            ensure!(quota.is_some_and(|quota| quota <= 15), "{quota:?}");
            Ok(())
        });
    });
}

/// The cluster calls it ready, and nobody listens in it.
#[test]
fn a_ready_pod_of_this_node_that_does_not_listen_is_down() {
    with_cluster(|cluster| {
        let (up, silent) = (cluster.pod(5), cluster.pod(6));
        cluster.serve(&[up.endpoint(), silent.endpoint(), elsewhere(1)]);
        let mut balancer = cluster.balancer("{clients: 30}");
        balancer.launch();
        let _listener = cluster.listen(&up);
        let wait_for_down = |expected: &[SocketAddr]| {
            eventually(SETTLES_WITHIN, || {
                let status = balancer.status();
                let service = status.services.first().context("no service yet")?;
                let down: Vec<_> = service.down.iter().map(|down| down.address).collect();
                ensure!(down == expected, "{service:?}\n{}", balancer.logs());
                Ok(())
            });
        };
        wait_for_down(&[silent.at()]);
        let text = balancer.must(&["status"]);
        let named = format!("{} is down: nobody listens there for ", silent.at());
        assert!(text.contains(&named), "{text}");
        let _late = cluster.listen(&silent);
        wait_for_down(&[]);
    });
}
