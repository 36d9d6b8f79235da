//! Connects of this node's clients to a Service: which pod they go to, and who is left to
//! kube-proxy.

mod own_addresses;

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, eventually, process, remains};
use testkit::kubernetes::objects::{self, Endpoint};

use super::fixture::{
    Cluster, NODE, OAPS, PORT, Pod, SETTLES_WITHIN, cluster_status, labelled_as_oap,
    placing_config, with_cluster,
};

const QUOTA: &str = "{per_backend: 1000}";
const PLACE: &str = "balancer.skywalking.apache.org/place";

/// Some pods that listen, a client beside them, and what stands for kube-proxy: whoever is not
/// placed reaches it.
struct Place<'c> {
    cluster: &'c Cluster<'c>,
    client: Pod,
    frontend: SocketAddr,
    pods: Vec<(Pod, Listener)>,
    kube_proxy: Listener,
}

/// Where connects went.
#[derive(Debug, PartialEq, Eq)]
struct Went {
    pods: Vec<usize>,
    kube_proxy: usize,
}

impl<'c> Place<'c> {
    /// With a pod on each of these nodes, all of them in netns of this machine.
    fn new(cluster: &'c Cluster<'c>, nodes: &[&str]) -> Self {
        let pods: Vec<Pod> = (5..)
            .take(nodes.len())
            .map(|number| cluster.pod(number))
            .collect();
        let endpoints: Vec<Endpoint> = pods.iter().zip(nodes).map(endpoint).collect();
        cluster.serve(&endpoints);
        forward(cluster);
        let listening = pods.into_iter().map(|pod| {
            with_routes(&pod);
            let listen = || Listen::on(&format!("[::]:{PORT}")).dual_stack().open();
            let listener = cluster.in_pod(&pod, listen);
            (pod, listener)
        });
        let client = cluster.pod(100);
        with_routes(&client);
        let frontend = SocketAddr::new(cluster_ips(cluster, "oap")[0], PORT);
        Self {
            cluster,
            client,
            frontend,
            pods: listening.collect(),
            kube_proxy: in_place_of_kube_proxy(cluster, frontend),
        }
    }

    /// Says of the pods, in their order, whether they are ready.
    fn serve(&self, ready: &[bool]) {
        let endpoints = self.pods.iter().zip(ready).map(|((pod, _), ready)| {
            let endpoint = pod.endpoint();
            if *ready { endpoint } else { endpoint.unready() }
        });
        self.cluster.serve(&endpoints.collect::<Vec<_>>());
    }

    /// So many clients connect, and stay.
    #[track_caller]
    fn connect(&mut self, number: usize) -> (Vec<TcpStream>, Went) {
        let frontend = self.frontend;
        let connect = || (0..number).map(|_| tcp::connect(frontend).connected());
        let connect = || connect().collect::<Vec<_>>();
        let streams = self.cluster.in_pod(&self.client, connect);
        (streams, self.arrived(number))
    }

    /// Where so many connects went that came since the last time. The last packet of a handshake
    /// may still be on its way when the client goes on.
    #[track_caller]
    fn arrived(&mut self, number: usize) -> Went {
        let mut arrived = Went {
            pods: vec![0; self.pods.len()],
            kube_proxy: 0,
        };
        eventually(SETTLES_WITHIN, || {
            let more = self.went();
            let pods = arrived.pods.iter_mut().zip(more.pods);
            pods.for_each(|(all, more)| *all += more);
            arrived.kube_proxy += more.kube_proxy;
            let all = arrived.pods.iter().sum::<usize>() + arrived.kube_proxy;
            ensure!(all == number, "{arrived:?}, of {number}");
            Ok(())
        });
        arrived
    }

    fn connect_to(&mut self, frontend: SocketAddr, number: usize) -> (Vec<TcpStream>, Went) {
        let streams = self.cluster.in_pod(&self.client, || {
            let connects = (0..number).map(|_| tcp::connect(frontend).connected());
            connects.collect::<Vec<_>>()
        });
        (streams, self.went())
    }

    /// Where those went that came since the last time.
    fn went(&mut self) -> Went {
        Went {
            pods: self
                .pods
                .iter_mut()
                .map(|(_, listener)| listener.accept_all())
                .collect(),
            kube_proxy: self.kube_proxy.accept_all(),
        }
    }

    /// Waits until connects go to pods, or to kube-proxy.
    #[track_caller]
    fn wait_placed(&mut self, placed: bool, balancer: &Balancer<'_>) {
        eventually(SETTLES_WITHIN, || {
            let (_, went) = self.connect(1);
            let logs = balancer.logs();
            ensure!(
                (went.kube_proxy == 0) == placed,
                "{went:?}, placed: {placed}\n{logs}"
            );
            Ok(())
        });
        // Those were closed at once: nobody counts them any more.
        balancer.wait_until(|service| service.established() == 0);
    }

    fn change_service(&self, patch: &Value) {
        let patch = patch.to_string();
        let change = [
            "patch",
            "service",
            "oap",
            "-n",
            OAPS,
            "--type=merge",
            "-p",
            &patch,
        ];
        self.cluster.api.kubectl(&change);
    }
}

/// The node forwards between its pods, which have no other way to each other.
pub(super) fn forward(cluster: &Cluster<'_>) {
    for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        let on = || fs::write(format!("/proc/sys/net/{switch}"), "1").expect("the test may do it");
        cluster.machine.netns.run(on);
    }
}

pub(super) fn with_routes(pod: &Pod) {
    let node = "via 10.244.1.1 dev eth0 onlink";
    pod.netns.ip(&format!("route replace 10.244.1.0/24 {node}"));
    pod.netns.ip(&format!("route add default {node}"));
}

/// A process of a pod, which does nothing.
struct Process(Child);

impl Process {
    fn of(cluster: &Cluster<'_>, pod: &Pod) -> Self {
        let sleep = || process::spawn(Command::new("sleep").arg("600"));
        Self(cluster.in_pod(pod, sleep).expect("sleep can be run"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn endpoint((pod, node): (&Pod, &&str)) -> Endpoint {
    Endpoint::new(&pod.address, &pod.name, node)
}

pub(super) fn cluster_ips(cluster: &Cluster<'_>, service: &str) -> Vec<IpAddr> {
    let got = cluster.api.admin().get(&["service", service, "-n", OAPS]);
    let addresses = got["spec"]["clusterIPs"].as_array().expect("a list").iter();
    addresses
        .map(|address| address.as_str().expect("text").parse().expect("an address"))
        .collect()
}

/// A listener at the Service's own address, on the node. It is no pod's.
pub(super) fn in_place_of_kube_proxy(cluster: &Cluster<'_>, frontend: SocketAddr) -> Listener {
    let machine = cluster.machine;
    machine.netns.add_address(frontend.ip());
    let listen = || Listen::on(&frontend).open();
    machine.cgroup.below().run(|| machine.netns.run(listen))
}

#[test]
fn connects_go_to_the_pod_that_should_have_them_by_what_all_nodes_count() {
    with_cluster(|cluster| {
        let mut place = Place::new(cluster, &[NODE, NODE, "node2"]);
        cluster.publish("node2", &[("oap-7", 50)]);
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        place.wait_placed(true, &balancer);
        let (first, went) = place.connect(40);
        assert_eq!(
            (went.kube_proxy, went.pods[2]),
            (0, 0),
            "{went:?}\n{}",
            balancer.logs()
        );
        assert!(went.pods[0].abs_diff(went.pods[1]) <= 2, "{went:?}");
        let mut held = went.pods;
        // Its clients have gone, says its node: they are expected back, and most of them there.
        cluster.publish("node2", &[("oap-7", 0)]);
        let second = eventually(SETTLES_WITHIN, || {
            let (stream, went) = place.connect(1);
            ensure!(went.pods[2] == 1, "{went:?}");
            Ok(stream)
        });
        let (third, went) = place.connect(48);
        held[2] += 1;
        held.iter_mut()
            .zip(&went.pods)
            .for_each(|(held, more)| *held += more);
        let most = held.iter().max().expect("three");
        let least = held.iter().min().expect("three");
        assert!(
            most - least <= 3 && went.kube_proxy == 0,
            "{held:?}: {went:?}"
        );
        // Who is not ready gets nobody.
        place.serve(&[true, false, true]);
        eventually(SETTLES_WITHIN, || {
            let (_, went) = place.connect(8);
            ensure!(went.pods[1] == 0 && went.kube_proxy == 0, "{went:?}");
            Ok(())
        });
        remains(Duration::from_secs(2), || {
            let (_, went) = place.connect(4);
            ensure!(went.pods[1] == 0 && went.kube_proxy == 0, "{went:?}");
            Ok(())
        });
        // Nobody is: kube-proxy decides.
        place.serve(&[false, false, false]);
        eventually(SETTLES_WITHIN, || {
            let (_, went) = place.connect(1);
            ensure!(went.kube_proxy == 1, "{went:?}");
            Ok(())
        });
        drop((first, second, third));
    });
}

#[test]
fn whoever_wants_something_else_is_left_to_kube_proxy() {
    with_cluster(|cluster| {
        let mut place = Place::new(cluster, &[NODE, NODE]);
        cluster.make_pods(OAPS, &[place.client.endpoint()]);
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        place.wait_placed(true, &balancer);
        let both = |place: &mut Place<'_>, off: &Value, on: &Value, why: &str| {
            place.change_service(off);
            place.wait_placed(false, &balancer);
            let said = balancer.must(&["status", "--cluster"]);
            assert!(said.contains(why), "{said}");
            place.change_service(on);
            place.wait_placed(true, &balancer);
        };
        let affinity = |kind: &str| json!({"spec": {"sessionAffinity": kind}});
        both(
            &mut place,
            &affinity("ClientIP"),
            &affinity("None"),
            "sessionAffinity is ClientIP",
        );
        let annotated = |value: Option<&str>| json!({"metadata": {"annotations": {PLACE: value}}});
        both(
            &mut place,
            &annotated(Some("off")),
            &annotated(None),
            "its annotation",
        );
        // All pods of the Service are on this node.
        place.change_service(&json!({"spec": {"internalTrafficPolicy": "Local"}}));
        place.wait_placed(true, &balancer);
        let off = format!("{PLACE}=off");
        let pod = place.client.name.clone();
        let annotate = |what: &str| {
            let change = ["annotate", "pod", &pod, "-n", OAPS, what];
            cluster.api.kubectl(&change);
        };
        // By its processes the daemon finds where it lives.
        let _process = Process::of(cluster, &place.client);
        annotate(&off);
        place.wait_placed(false, &balancer);
        annotate(&format!("{PLACE}-"));
        place.wait_placed(true, &balancer);
        let switched =
            |on: &str| placing_config(QUOTA).replace("place: on", &format!("place: {on}"));
        for (on, placed) in [("off", false), ("on", true)] {
            balancer.configure(&switched(on));
            balancer.reload();
            place.wait_placed(placed, &balancer);
        }
    });
}

#[test]
fn both_addresses_of_a_dual_stack_service_lead_to_its_pods() {
    with_cluster(|cluster| {
        let mut place = Place::new(cluster, &[NODE, NODE]);
        let mut service = labelled_as_oap(objects::service(OAPS, "both", &[("grpc", PORT)]));
        service["spec"]["ipFamilyPolicy"] = json!("RequireDualStack");
        cluster.api.admin().apply(&service);
        let four: Vec<Endpoint> = place.pods.iter().map(|(pod, _)| pod.endpoint()).collect();
        let six: Vec<Endpoint> = place
            .pods
            .iter()
            .map(|(pod, _)| with_v6(cluster, pod))
            .collect();
        with_v6(cluster, &place.client);
        cluster.write_slice(OAPS, "both", PORT, &four);
        let mut slice = cluster.slice(OAPS, "both", PORT, &six);
        slice["metadata"]["name"] = json!("both-6");
        cluster.api.admin().apply(&slice);
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        place.wait_placed(true, &balancer);
        for address in cluster_ips(cluster, "both") {
            let mut sentinel = in_place_of_kube_proxy(cluster, SocketAddr::new(address, PORT));
            eventually(SETTLES_WITHIN, || {
                let (_streams, went) = place.connect_to(SocketAddr::new(address, PORT), 8);
                ensure!(
                    sentinel.accept_all() == 0 && went.kube_proxy == 0,
                    "{address}: {went:?}"
                );
                ensure!(
                    went.pods[0].abs_diff(went.pods[1]) <= 2,
                    "{address}: {went:?}"
                );
                Ok(())
            });
        }
    });
}

/// Gives a pod an IPv6 address, and says so to the API server where it is known there.
fn with_v6(cluster: &Cluster<'_>, pod: &Pod) -> Endpoint {
    let number = pod.address.rsplit('.').next().expect("a number");
    let address = format!("fd00:244::{number}");
    let host = &cluster.machine.netns;
    let peer = format!("pod{number}");
    host.ip(&format!(
        "address add fd00:244::1:{number}/128 dev {peer} nodad"
    ));
    host.ip(&format!("route add {address}/128 dev {peer}"));
    pod.netns
        .ip(&format!("address add {address}/128 dev eth0 nodad"));
    pod.netns
        .ip(&format!("route add fd00:244::1:{number}/128 dev eth0"));
    pod.netns.ip(&format!(
        "route add default via fd00:244::1:{number} dev eth0"
    ));
    let known = cluster
        .uids
        .lock()
        .expect("no panic")
        .contains_key(&pod.name);
    if known {
        let ips = json!([{"ip": pod.address}, {"ip": address}]);
        let status = json!({"podIP": pod.address, "podIPs": ips});
        cluster
            .api
            .admin()
            .patch_status("pod", OAPS, &pod.name, &status);
    }
    Endpoint::new(&address, &pod.name, NODE)
}

#[test]
fn an_api_server_that_is_gone_for_a_minute_leaves_everybody_to_kube_proxy() {
    with_cluster(|cluster| {
        let mut place = Place::new(cluster, &[NODE, NODE]);
        let mut balancer = cluster.placing_balancer(QUOTA);
        balancer.launch();
        place.wait_placed(true, &balancer);
        cluster.api.freeze();
        remains(Duration::from_secs(20), || {
            let (_, went) = place.connect(1);
            ensure!(went.kube_proxy == 0, "{went:?}");
            Ok(())
        });
        eventually(Duration::from_secs(100), || {
            let (_, went) = place.connect(1);
            ensure!(went.kube_proxy == 1, "{went:?}");
            Ok(())
        });
        cluster.api.thaw();
        place.wait_placed(true, &balancer);
    });
}

/// The words of `status --cluster`, on one line, once it knows of the Service's address.
fn told(balancer: &Balancer<'_>, words: &str) {
    eventually(SETTLES_WITHIN, || {
        let said = balancer.must(&["status", "--cluster"]);
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(
            said.contains("oap 10.") && said.contains(words),
            "{words:?} is not in {said}"
        );
        Ok(())
    });
}

/// What `status --cluster` says in JSON of whether this node places, and the Service's clients.
fn places(balancer: &Balancer<'_>) -> (Value, Value) {
    let placing = &cluster_status(balancer)["placing"];
    let services = placing["services"].as_array().expect("a list");
    let oap = services.iter().find(|one| one["service"]["name"] == "oap");
    (
        placing["on"].clone(),
        oap.expect("it is known")["placed"].clone(),
    )
}

/// The links that place, by their pins.
fn links(balancer: &Balancer<'_>) -> usize {
    let version = format!("v{}", balancer_common::abi::VERSION);
    let pins = fs::read_dir(balancer.state().join(version)).expect("the state directory");
    let names = pins.map(|pin| pin.expect("a pin").file_name());
    names
        .filter(|name| name.to_string_lossy().starts_with("link_place_"))
        .count()
}

/// A first installation changes nothing; how it would have placed is counted in a dry run.
#[test]
fn modes_that_change_nothing_place_nobody_and_say_so() {
    with_cluster(|cluster| {
        let mut place = Place::new(cluster, &[NODE, NODE]);
        let mut balancer = cluster.placing_balancer(QUOTA);
        let in_mode = |mode: &str| format!("{}mode: {mode}\n", placing_config(QUOTA));
        balancer.configure(&in_mode("count"));
        balancer.launch();
        told(&balancer, "Placing: off on this node: the mode is count");
        let (_clients, went) = place.connect(6);
        assert_eq!((went.kube_proxy, &went.pods[..]), (6, &[0, 0][..]));
        assert_eq!(places(&balancer), (json!(false), json!(false)));
        assert_eq!(links(&balancer), 0);
        assert!(balancer.status().placing.is_empty());

        balancer.configure(&in_mode("dry-run"));
        balancer.must(&["reload"]);
        told(&balancer, "Placing: off on this node: the mode is dry-run");
        let dry = |balancer: &Balancer<'_>| {
            let placing = balancer.status().placing;
            let group = placing.into_iter().next()?;
            let total: u64 = group.endpoints.iter().map(|one| one.total).sum();
            assert_eq!(total, 0, "{group:?}");
            assert!(!group.verdicts.contains_key("placed") || group.verdicts["placed"] == 0);
            group.verdicts.get("dry-run").copied()
        };
        eventually(SETTLES_WITHIN, || {
            let before = dry(&balancer).unwrap_or(0);
            let (_clients, went) = place.connect(6);
            assert_eq!((went.kube_proxy, &went.pods[..]), (6, &[0, 0][..]));
            let now = dry(&balancer).unwrap_or(0);
            ensure!(now == before + 6, "{before}, then {now}");
            Ok(())
        });
        assert_eq!(places(&balancer), (json!(false), json!(false)));
        let said = balancer.must(&["status"]);
        assert!(said.contains("Placing: dry-run: endpoints are"), "{said}");

        balancer.configure(&in_mode("on"));
        balancer.must(&["reload"]);
        place.wait_placed(true, &balancer);
        told(&balancer, "Placing: on for the clients of this node");
        assert_eq!(places(&balancer), (json!(true), json!(true)));
        balancer.configure(&in_mode("count"));
        balancer.must(&["reload"]);
        assert_eq!(links(&balancer), 0);
        place.wait_placed(false, &balancer);
    });
}
