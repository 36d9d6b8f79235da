//! Pods that do not serve: they lose their share of a computed quota, the others have room for
//! their clients, and all nodes know.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use testkit::fixtures::{Balancer, eventually, remains};

use super::fixture::{
    Pod, SETTLES_WITHIN, cluster_status, elsewhere, with_cluster, with_route_back,
};

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
