//! `match: endpoints`: connects to the pods' own addresses, as the clients of a headless Service
//! make them.

use std::net::{SocketAddr, TcpStream};

use anyhow::ensure;
use serde_json::{Value, json};
use testkit::fixtures::{Balancer, eventually, tcp};
use testkit::kubernetes::objects;

use super::{PLACE, Place, Process, QUOTA, Went};
use crate::in_cluster::fixture::{
    Cluster, NODE, OAPS, PORT, Pod, SETTLES_WITHIN, cluster_status, labelled_as_oap,
    placing_config, with_cluster,
};

const HEADLESS: &str = "oap-headless";

/// The file with an entry for the headless Service alone.
fn file(matching: &str) -> String {
    let entry = format!("service: {OAPS}/{HEADLESS}\n      match: {matching}\n      quota:");
    placing_config(QUOTA).replace("quota:", &entry)
}

fn serve_headless(place: &Place<'_>, ready: &[bool]) {
    let endpoints = place.pods.iter().zip(ready).map(|((pod, _), ready)| {
        let endpoint = pod.endpoint();
        if *ready { endpoint } else { endpoint.unready() }
    });
    let endpoints: Vec<_> = endpoints.collect();
    place.cluster.write_slice(OAPS, HEADLESS, PORT, &endpoints);
}

/// A headless Service of three pods of this node, and a daemon that matches them.
fn headless<'c>(cluster: &'c Cluster<'c>) -> (Place<'c>, Balancer<'c>) {
    let place = Place::new(cluster, &[NODE; 3]);
    let mut service = labelled_as_oap(objects::service(OAPS, HEADLESS, &[("grpc", PORT)]));
    service["spec"]["clusterIP"] = json!("None");
    cluster.api.admin().apply(&service);
    serve_headless(&place, &[true; 3]);
    cluster.make_pods(OAPS, &[place.client.endpoint()]);
    let mut balancer = cluster.placing_balancer(QUOTA);
    balancer.configure(&file("endpoints"));
    balancer.launch();
    (place, balancer)
}

impl Place<'_> {
    fn own_address(&self, pod: usize) -> SocketAddr {
        self.pods[pod].0.at()
    }

    /// So many clients connect from a pod, and stay.
    #[track_caller]
    fn connect_from(
        &mut self,
        from: &Pod,
        to: SocketAddr,
        number: usize,
    ) -> (Vec<TcpStream>, Went) {
        let connect = || tcp::connect_many(to, number);
        let streams = self.cluster.in_pod(from, connect);
        (streams, self.arrived(number))
    }

    /// So many connect from the client's pod, and stay.
    #[track_caller]
    fn connect_client(&mut self, to: SocketAddr, number: usize) -> (Vec<TcpStream>, Went) {
        let connect = || tcp::connect_many(to, number);
        let streams = self.cluster.in_pod(&self.client, connect);
        (streams, self.arrived(number))
    }

    /// Waits until connects of the client to a pod's own address go to that pod alone, or to all.
    #[track_caller]
    fn wait_spread(&mut self, pod: usize, spread: bool, balancer: &Balancer<'_>) {
        let to = self.own_address(pod);
        eventually(SETTLES_WITHIN, || {
            let (_, went) = self.connect_client(to, 6);
            let others: usize = went.pods.iter().sum::<usize>() - went.pods[pod];
            let logs = balancer.logs();
            ensure!((others > 0) == spread, "{went:?}, spread: {spread}\n{logs}");
            Ok(())
        });
    }
}

fn reasons(balancer: &Balancer<'_>) -> Value {
    let json = balancer.must(&["status", "-o", "json"]);
    let status: Value = serde_json::from_str(&json).expect("JSON");
    status["placing"][0].clone()
}

/// Waits until nobody holds a place. What did not come through placing is known as others', and
/// only as of the last look at the listeners.
#[track_caller]
fn wait_none_counted(balancer: &Balancer<'_>) {
    eventually(SETTLES_WITHIN, || {
        let group = reasons(balancer);
        let endpoints = group["endpoints"].as_array().expect("a list");
        let free = |endpoint: &Value| {
            ["established", "in_flight", "others"].map(|counted| endpoint[counted].as_u64())
                == [Some(0); 3]
        };
        ensure!(endpoints.iter().all(free), "{group}");
        Ok(())
    });
}

#[test]
fn clients_of_a_headless_service_get_the_pod_that_should_have_them() {
    with_cluster(|cluster| {
        let (mut place, balancer) = headless(cluster);
        // Of a pod without a process it can't be told which connects are its own.
        eventually(SETTLES_WITHIN, || {
            let status = cluster_status(&balancer).to_string();
            ensure!(status.contains("not in force on this node"), "{status}");
            Ok(())
        });
        place.wait_spread(0, false, &balancer);
        let pods = place.pods.iter();
        let _processes: Vec<_> = pods.map(|(pod, _)| Process::of(cluster, pod)).collect();
        place.wait_spread(0, true, &balancer);
        wait_none_counted(&balancer);

        let to = place.own_address(0);
        let (clients, went) = place.connect_client(to, 30);
        let (most, least) = (went.pods.iter().max(), went.pods.iter().min());
        let apart = most.expect("three") - least.expect("three");
        assert!(apart <= 2, "{went:?}");
        for client in &clients {
            assert_eq!(client.peer_addr().expect("connected"), to);
        }
        let group = reasons(&balancer);
        assert_eq!(group["frontends"], json!([]), "{group}");
        assert_eq!(group["own_addresses"].as_array().map(Vec::len), Some(3));
        let service = &cluster_status(&balancer)["placing"]["services"][0];
        assert_eq!(
            (&service["match"], &service["placed"]),
            (&json!("endpoints"), &json!(true)),
            "{service}"
        );

        // Who is not ready is what it was: nobody's frontend, and no endpoint.
        serve_headless(&place, &[true, false, true]);
        place.wait_spread(1, false, &balancer);
        // Its own address leads nowhere first, and then it is no endpoint.
        eventually(SETTLES_WITHIN, || {
            let (_, went) = place.connect_client(to, 6);
            ensure!(went.pods[1] == 0, "{went:?}");
            Ok(())
        });
        serve_headless(&place, &[true; 3]);
        place.wait_spread(1, true, &balancer);
        for (matching, spread) in [("service", false), ("endpoints", true)] {
            balancer.configure(&file(matching));
            balancer.reload();
            place.wait_spread(0, spread, &balancer);
        }
    });
}

#[test]
fn who_means_a_pod_reaches_that_pod() {
    with_cluster(|cluster| {
        let (mut place, balancer) = headless(cluster);
        let pods = place.pods.iter();
        let _processes: Vec<_> = pods.map(|(pod, _)| Process::of(cluster, pod)).collect();
        place.wait_spread(0, true, &balancer);
        let to = place.own_address(0);
        let that_pod = |number| Went {
            pods: vec![number, 0, 0],
            kube_proxy: 0,
        };

        // The kubelet of this node, and every process that uses its network.
        let node = &cluster.machine.netns;
        let probes = node.run(|| tcp::connect_many(to, 6));
        assert_eq!(place.arrived(6), that_pod(6), "probes");
        // Another pod of the Service.
        let (peer, listener) = place.pods.remove(2);
        let peers = cluster.in_pod(&peer, || tcp::connect_many(to, 6));
        place.pods.push((peer, listener));
        assert_eq!(place.arrived(6), that_pod(6), "peers");
        let verdicts = reasons(&balancer)["verdicts"].clone();
        assert_eq!(verdicts["own-address"], 12, "{verdicts}");

        let explain = |from: &str| {
            let to = to.to_string();
            let asked = ["explain", "--from", from, "--to", &to, "-o", "json"];
            let json = balancer.must(&asked);
            let said: Value = serde_json::from_str(&json).expect("JSON");
            said["reason"].as_str().unwrap_or("none").to_owned()
        };
        // Another test's netns may have the client's address, so its process is named.
        let process = Process::of(cluster, &place.client);
        let client = process.0.id().to_string();
        let peer = format!("{OAPS}/{}", place.pods[2].0.name);
        assert_eq!(explain(&peer), "own-address");
        assert_eq!(explain(&client), "placed");

        // A Satellite that looks the pods up itself says so in its annotations.
        let annotation = format!("{PLACE}=off");
        let pod = place.client.name.clone();
        let annotate = ["annotate", "pod", &pod, "-n", OAPS, &annotation];
        cluster.api.kubectl(&annotate);
        place.wait_spread(0, false, &balancer);
        assert_eq!(explain(&client), "excluded");
        drop((probes, peers, process));
    });
}

/// Beside an ordinary Service of the same pods both ways lead to one group.
#[test]
fn pods_of_a_service_with_an_address_are_matched_beside_it() {
    with_cluster(|cluster| {
        let mut place = Place::new(cluster, &[NODE; 2]);
        let pods = place.pods.iter();
        let _processes: Vec<_> = pods.map(|(pod, _)| Process::of(cluster, pod)).collect();
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer
            .configure(&placing_config(QUOTA).replace("quota:", "match: endpoints\n      quota:"));
        balancer.launch();
        place.wait_spread(0, true, &balancer);
        place.wait_placed(true, &balancer);
        wait_none_counted(&balancer);
        let client = cluster.pod(101);
        super::with_routes(&client);
        let to = place.own_address(1);
        let (own, first) = place.connect_from(&client, to, 10);
        let (service, second) = place.connect_client(place.frontend, 10);
        assert_eq!(second.kube_proxy, 0, "{second:?}");
        let held = [0, 1].map(|pod| first.pods[pod] + second.pods[pod]);
        assert!(held[0].abs_diff(held[1]) <= 2, "{first:?} {second:?}");
        let text = balancer.must(&["status"]);
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(", the endpoints' own addresses"), "{text}");
        let cluster = balancer.must(&["status", "--cluster"]);
        assert!(cluster.contains(", its pods"), "{cluster}");
        drop((own, service));
    });
}
