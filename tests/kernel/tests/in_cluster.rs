//! The daemon in a cluster with a real API server. Nodes and pods are objects that the test writes;
//! the netns and connections of the pods are real.

mod crowded;
pub mod fixture;
mod moving;
mod placing;
mod sick;
mod told;
mod unfit;

use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{
    Deed, Machine, Signal, Stranger, binary, eventually, long, process, remains,
};
use testkit::kubernetes::objects::{self, Endpoint};
use testkit::kubernetes::{ApiServer, Kubectl, Program};

use self::fixture::{
    CLIENT, Cluster, NODE, OAPS, PORT, Pod, SETTLES_WITHIN, SYSTEM, cluster_status, elsewhere,
    group, labelled_as_oap, own_report, permissions, wait_for_quota, with_cluster, with_route_back,
    without_health,
};

#[test]
fn a_pod_that_listens_is_found_counted_and_limited() {
    with_cluster(|cluster| {
        let (pod, stranger) = (cluster.pod(5), cluster.pod(6));
        with_route_back(&pod);
        with_route_back(&stranger);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        let mut balancer = cluster.balancer("{clients: 20, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let mut listener = cluster.listen(&pod);
        let mut other = cluster.listen(&stranger);
        wait_for_quota(&balancer, Some(10), "ceil(20 clients × 1 / 2 ready) = 10");
        let clients = cluster.clients(&pod, 10);
        assert!(cluster.connect(&pod).is_refused(), "{}", balancer.logs());
        // The node's own address is its kubelet's.
        let probe = cluster
            .machine
            .netns
            .run(|| tcp::connect(pod.at()))
            .connected();
        let peer = cluster
            .machine
            .netns
            .run(|| tcp::connect_from("10.244.1.1:0".parse().expect("valid"), pod.at()));
        drop(peer.connected());
        let service = balancer.service();
        let backend = service
            .backends
            .iter()
            .find(|backend| backend.state == "active")
            .expect("one");
        assert_eq!(
            (backend.established, backend.exempt),
            (11, 1),
            "{service:?}"
        );
        assert_eq!(service.verdicts("over-quota"), 1);
        // Nobody asked for the other pod: it is counted where its port says so, and never refuses.
        let strangers = cluster.clients(&stranger, 15);
        assert_eq!(balancer.service().active(), 1);
        assert_eq!(listener.accept_all() + other.accept_all(), 27);
        drop((clients, probe, strangers));
        balancer.wait_until(|service| service.established() == 0);
    });
}

#[test]
fn quotas_follow_the_pods_that_are_ready() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint()]);
        let mut balancer = cluster.balancer("{clients: 60, headroom: 50%, min_quota: 1}");
        balancer.launch();
        let _listener = cluster.listen(&pod);
        wait_for_quota(&balancer, None, "one backend is ready");
        cluster.serve(&[pod.endpoint(), elsewhere(1), elsewhere(2)]);
        wait_for_quota(&balancer, Some(30), "× 1.5 / 3 ready) = 30");
        cluster.serve(&[pod.endpoint(), elsewhere(1), elsewhere(2).unready()]);
        wait_for_quota(&balancer, Some(45), "/ 2 ready) = 45");
        // Up at once, down slowly.
        cluster.serve(&[pod.endpoint(), elsewhere(1), elsewhere(2)]);
        wait_for_quota(&balancer, Some(45), "lowered by at most 10 % a minute");
        cluster.serve(&[pod.endpoint().terminating(), elsewhere(1), elsewhere(2)]);
        wait_for_quota(&balancer, None, "");
    });
}

#[test]
fn what_all_agents_counted_is_shared_out() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1), elsewhere(2)]);
        let mut balancer = cluster.balancer(&without_health(
            "{observed: 1m, headroom: 10%, min_quota: 12}",
        ));
        balancer.launch();
        let _listener = cluster.listen(&pod);
        wait_for_quota(
            &balancer,
            None,
            "the daemons of 2 of 3 ready pods have not told yet",
        );
        let clients = cluster.clients(&pod, 12);
        cluster.publish("node2", &[("far-1", 10)]);
        // A pod without a report for a while is taken to hold as many as the others:
        // (12 + 10) × 3 / 2.
        wait_for_quota(
            &balancer,
            Some(13),
            "ceil(33 connections (observed) × 1.1 / 3 ready) = 13",
        );
        cluster.publish("node2", &[("far-1", 10), ("far-2", 8)]);
        wait_for_quota(
            &balancer,
            Some(13),
            "ceil(30 connections (observed) × 1.1 / 3 ready) = 11; at least min_quota 12",
        );
        // The most within the window counts.
        cluster.publish("node2", &[("far-1", 100), ("far-2", 8)]);
        wait_for_quota(
            &balancer,
            Some(44),
            "120 connections (observed) × 1.1 / 3 ready) = 44",
        );
        cluster.publish("node2", &[("far-1", 1), ("far-2", 1)]);
        remains(Duration::from_secs(2), || {
            let quota = balancer.service().backends[0].quota;
            ensure!(quota == Some(44), "{quota:?}");
            Ok(())
        });
        // And what this one counted is told to the others.
        eventually(SETTLES_WITHIN, || {
            let own = own_report(cluster)?;
            let text = own["data"]["publication.json"]
                .as_str()
                .context("no report")?;
            let told: Value = serde_json::from_str(text)?;
            ensure!(told["backends"][0]["established"] == 12, "{told}");
            ensure!(told["backends"][0]["pod"]["name"] == "oap-5", "{told}");
            Ok(())
        });
        let status = cluster_status(&balancer);
        let backends = status["groups"][0]["backends"]
            .as_array()
            .expect("backends")
            .clone();
        let told: Vec<_> = backends
            .iter()
            .map(|backend| {
                (
                    backend["pod"]["name"].clone(),
                    backend["established"].clone(),
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                (json!("far-1"), json!(1)),
                (json!("far-2"), json!(1)),
                (json!("oap-5"), json!(12))
            ]
        );
        drop(clients);
    });
}

/// The command is in the node's netns, where no pod listens.
#[test]
fn explain_answers_for_the_pod_that_is_named() {
    with_cluster(|cluster| {
        let (full, free) = (cluster.pod(5), cluster.pod(6));
        with_route_back(&full);
        with_route_back(&free);
        let silent = Endpoint::new("10.244.1.7", "oap-7", NODE);
        cluster.serve(&[full.endpoint(), free.endpoint(), silent, elsewhere(1)]);
        let mut balancer = cluster.balancer("{per_backend: 2}");
        balancer.launch();
        let _listeners = [cluster.listen(&full), cluster.listen(&free)];
        balancer.wait_active(2);
        let _clients = cluster.clients(&full, 2);
        let from = CLIENT.to_string();
        let ask = ["explain", "--from", &from, "--to", "11800"];
        let explain =
            |pod: &str| balancer.explain_with(&CLIENT, &PORT, &["--pod", &format!("{OAPS}/{pod}")]);
        assert_eq!(explain("oap-5").verdict, "refuse");
        assert_eq!(explain("oap-6").verdict, "steer");
        let listed = balancer.verb(&ask);
        assert_eq!(listed.code, 1, "{listed:?}");
        for pod in ["oap-5", "oap-6"] {
            let command = format!("explain --from {CLIENT} --to 11800 --pod {OAPS}/{pod}\n");
            assert!(listed.stdout.contains(&command), "{}", listed.stdout);
        }
        for (pod, port, words) in [
            (
                "skywalking/oap-9",
                "11800",
                "those of this node are skywalking/oap-5, skywalking/oap-6, skywalking/oap-7",
            ),
            (
                "skywalking/oap-7",
                "11800",
                "no listener on port 11800 is known",
            ),
            ("skywalking/far-1", "11800", "is on node node2"),
            ("skywalking/oap-5", "12800", "serves port 11800, not 12800"),
        ] {
            let refused = balancer.verb(&["explain", "--from", &from, "--to", port, "--pod", pod]);
            assert_eq!(refused.code, 1, "{refused:?}");
            assert!(refused.stderr.contains(words), "{refused:?}");
        }
        assert!(balancer.stop(Signal::SIGTERM).success());
        let alone = balancer.verb(&[&ask[..], &["--pod", "skywalking/oap-5"]].concat());
        assert!(alone.stderr.contains("no daemon answers"), "{alone:?}");
        // The pods' names are the daemon's to know, the netns are the kernel's.
        let listed = balancer.verb(&ask).stdout;
        assert!(
            !listed.contains("POD") && listed.contains("--netns"),
            "{listed}"
        );
    });
}

#[test]
fn monitored_pods_are_counted() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        let java = |name: &str| {
            objects::labelled(
                objects::pod(OAPS, name, "node2", &["10.244.2.50"]),
                &[("agent", "java")],
            )
        };
        cluster.api.admin().apply(&objects::list(&[
            objects::service_account(OAPS, "default"),
            java("workload-1"),
            java("workload-2"),
            objects::labelled(
                objects::pod(OAPS, "mesh-1", "node2", &["10.244.2.51"]),
                &[("sidecar", "envoy")],
            ),
        ]));
        let mut balancer = cluster.balancer(
            "{pods: [{selector: agent=java, namespace: skywalking, connections: 10}, {selector: sidecar=envoy, connections: 4}], headroom: 0%, min_quota: 1}",
        );
        balancer.launch();
        let _listener = cluster.listen(&pod);
        wait_for_quota(&balancer, Some(12), "2 pods × 10 + 1 pod");
        cluster.api.admin().apply(&java("workload-3"));
        wait_for_quota(&balancer, Some(17), "3 pods × 10");
        cluster
            .api
            .admin()
            .patch_status("pod", OAPS, "workload-3", &json!({"phase": "Succeeded"}));
        eventually(SETTLES_WITHIN, || {
            let sentence = group(&balancer)?["sentence"].to_string();
            ensure!(sentence.contains("2 pods × 10"), "{sentence}");
            Ok(())
        });
    });
}

#[test]
fn a_missing_permission_is_named_and_its_return_noticed() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        cluster.api.kubectl(&["delete", "clusterrole", "balancer"]);
        let mut balancer = cluster.balancer("{clients: 20, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let _listener = cluster.listen(&pod);
        eventually(SETTLES_WITHIN, || {
            let problems = cluster_status(&balancer)["problems"].to_string();
            for words in ["may not", "list", "services", "ClusterRole"] {
                ensure!(problems.contains(words), "{problems} has no {words}");
            }
            ensure!(
                balancer.logs().contains("may not list services"),
                "{}",
                balancer.logs()
            );
            Ok(())
        });
        let config = balancer.config();
        let doctor = balancer.verb(&["doctor", "--config", config.to_str().expect("UTF-8")]);
        assert_ne!(doctor.code, 0, "{}", doctor.stdout);
        for words in ["list", "watch", "endpointslices", "services"] {
            assert!(doctor.stdout.contains(words), "{}", doctor.stdout);
        }
        assert_eq!(
            cluster.clients(&pod, 15).len(),
            15,
            "nobody is refused meanwhile"
        );
        cluster.api.admin().apply(&permissions());
        wait_for_quota(&balancer, Some(10), "/ 2 ready) = 10");
        eventually(SETTLES_WITHIN, || {
            let problems = cluster_status(&balancer)["problems"].clone();
            ensure!(problems == json!([]), "{problems}");
            Ok(())
        });
    });
}

#[test]
fn while_the_api_server_is_silent_quotas_hold_and_then_open() {
    Machine::with(|machine| {
        machine.netns.add_address(CLIENT);
        let mut cluster = Cluster::start(machine);
        let (pod, mut balancer, mut listener) =
            cluster.one_of_two_pods(&without_health("{clients: 20, headroom: 0%, min_quota: 1}"));
        wait_for_quota(&balancer, Some(10), "= 10");
        cluster.api.stop();
        let clients = cluster.clients(&pod, 10);
        assert!(cluster.connect(&pod).is_refused(), "it holds");
        wait_for_quota(&balancer, None, "longer than hold_for");
        let more = cluster.clients(&pod, 5);
        // A daemon that starts meanwhile goes on with what is there.
        balancer.signal(Signal::SIGKILL);
        balancer.wait();
        balancer.launch();
        assert_eq!(balancer.service().established(), 15, "{}", balancer.logs());
        cluster.api.start_again();
        wait_for_quota(&balancer, Some(10), "/ 2 ready) = 10");
        assert_eq!(listener.accept_all(), 15);
        drop((clients, more));
    });
}

#[test]
fn an_api_server_that_hangs_harms_nobody() {
    with_cluster(|cluster| {
        let (pod, balancer, _listener) =
            cluster.one_of_two_pods(&without_health("{clients: 20, headroom: 0%, min_quota: 1}"));
        wait_for_quota(&balancer, Some(10), "= 10");
        cluster.api.freeze();
        let clients = cluster.clients(&pod, 10);
        assert!(cluster.connect(&pod).is_refused(), "it holds");
        drop(clients);
        if long() {
            // As late as a dead connection is given up.
            eventually(Duration::from_secs(150), || {
                let silent = cluster_status(&balancer)["silent_seconds"].as_u64();
                ensure!(silent.is_some_and(|seconds| seconds > 0), "not noticed");
                Ok(())
            });
        }
        cluster.api.thaw();
        eventually(Duration::from_secs(90), || {
            let status = cluster_status(&balancer);
            ensure!(status["silent_seconds"] == 0, "{}", status["problems"]);
            Ok(())
        });
        wait_for_quota(&balancer, Some(10), "= 10");
    });
}

#[test]
fn who_is_dismissed_takes_everything_along() {
    with_cluster(|cluster| {
        let set = json!({
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"namespace": SYSTEM, "name": "balancer"},
            "spec": {
                "selector": {"matchLabels": {"app": "balancer"}},
                "template": {
                    "metadata": {"labels": {"app": "balancer"}},
                    "spec": {"containers": [{"name": "balancer", "image": "none"}]},
                },
            },
        });
        cluster.api.admin().apply(&set);
        let set = cluster
            .api
            .admin()
            .get(&["daemonset", "balancer", "-n", SYSTEM]);
        let mut own = objects::pod(SYSTEM, "balancer-x", NODE, &["10.89.0.11"]);
        own["metadata"]["ownerReferences"] = json!([{
            "apiVersion": "apps/v1", "kind": "DaemonSet", "name": "balancer", "uid": set["metadata"]["uid"], "controller": true,
        }]);
        cluster.api.admin().apply(&objects::list(&[
            objects::service_account(SYSTEM, "default"),
            own,
        ]));
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint()]);
        let mut balancer = cluster.balancer("{clients: 20}");
        balancer.launch();
        let _listener = cluster.listen(&pod);
        eventually(SETTLES_WITHIN, || {
            let own = own_report(cluster)?;
            ensure!(
                own["metadata"]["ownerReferences"][0]["name"] == "balancer-x",
                "{own}"
            );
            Ok(())
        });
        // Its pod is replaced: the data plane waits for the next.
        assert!(balancer.stop(Signal::SIGTERM).success());
        assert!(balancer.is_loaded());
        balancer.launch();
        cluster.api.kubectl(&[
            "delete",
            "daemonset",
            "balancer",
            "-n",
            SYSTEM,
            "--cascade=orphan",
            "--wait=false",
        ]);
        assert!(balancer.stop(Signal::SIGTERM).success());
        assert!(!balancer.is_loaded(), "{}", balancer.logs());
    });
}

/// An OAP in a process of its own, which ends with this.
struct Server(Child);

impl Server {
    fn start() -> Self {
        let mut command = Command::new(binary().with_file_name("standin-oap"));
        command
            .args(["--listen", "0.0.0.0:11800", "--until-stdin-ends"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = process::spawn(&mut command).expect("the stand-in can be started");
        let mut line = String::new();
        let stdout = child.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("it says that it listens");
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pod_of_the_nodes_own_network_is_told_by_its_cgroup() {
    with_cluster(|cluster| {
        let host: IpAddr = "10.89.0.11".parse().expect("an address");
        cluster.machine.netns.add_address(host);
        cluster.serve(&[Endpoint::new("10.89.0.11", "oap-host", NODE), elsewhere(1)]);
        let mut balancer = cluster.balancer("{clients: 4, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let connect = || {
            let (from, to) = (SocketAddr::new(CLIENT, 0), SocketAddr::new(host, PORT));
            cluster.machine.netns.run(|| tcp::connect_from(from, to))
        };
        // Somebody else of the same network and port is none of ours.
        let stranger = cluster
            .machine
            .cgroup
            .run(|| cluster.machine.netns.run(Server::start));
        remains(Duration::from_secs(2), || {
            ensure!(balancer.service().active() == 0, "{}", balancer.logs());
            Ok(())
        });
        drop(stranger);
        let group = cluster
            .machine
            .cgroup
            .below_as(&format!("pod{}", cluster.uid("oap-host")));
        let server = group.run(|| cluster.machine.netns.run(Server::start));
        wait_for_quota(&balancer, Some(2), "/ 2 ready) = 2");
        let clients = [connect().connected(), connect().connected()];
        assert!(connect().is_refused(), "{}", balancer.logs());
        drop((clients, server));
    });
}

/// Somebody else's namespace, with a Service that has the labels of an OAP's.
const TENANT: &str = "tenant";

#[test]
fn clients_that_a_service_of_their_own_selects_are_not_exempt() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        let clients = [Endpoint::new(&CLIENT.to_string(), "client", "node2")];
        cluster.api.admin().apply(&objects::list(&[
            objects::namespace(TENANT),
            labelled_as_oap(objects::service(TENANT, "oap", &[("grpc", PORT)])),
        ]));
        cluster.make_pods(TENANT, &clients);
        cluster.write_slice(TENANT, "oap", PORT, &clients);
        let mut balancer = cluster.balancer("{clients: 10, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let mut listener = cluster.listen(&pod);
        eventually(SETTLES_WITHIN, || {
            let quota = balancer
                .service()
                .backends
                .first()
                .map(|backend| backend.quota);
            ensure!(quota == Some(Some(5)), "{quota:?}\n{}", balancer.logs());
            Ok(())
        });
        let status = cluster_status(&balancer);
        assert_eq!(
            status["groups"].as_array().map(Vec::len),
            Some(2),
            "{status}"
        );
        let outcomes: Vec<_> = (0..20).map(|_| cluster.connect(&pod)).collect();
        let refused = outcomes
            .iter()
            .filter(|outcome| outcome.is_refused())
            .count();
        assert_eq!(refused, 15, "{}", balancer.logs());
        assert_eq!(listener.accept_all(), 5);
    });
}

#[test]
fn a_slice_of_another_namespace_takes_no_listener_over() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        // It comes before that of the OAPs in every order of names.
        let first = "aaa";
        let mut slice = cluster.slice(first, "oap", PORT, &[pod.endpoint(), elsewhere(1)]);
        for endpoint in slice["endpoints"].as_array_mut().expect("a list") {
            endpoint["targetRef"]["namespace"] = json!(OAPS);
        }
        cluster.api.admin().apply(&objects::list(&[
            objects::namespace(first),
            labelled_as_oap(objects::service(first, "oap", &[("grpc", PORT)])),
            slice,
        ]));
        let mut balancer = cluster.balancer("{clients: 20, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let _listener = cluster.listen(&pod);
        eventually(SETTLES_WITHIN, || {
            let status = cluster_status(&balancer);
            let groups = status["groups"].as_array().context("no groups")?;
            let pods = |namespace: &str| {
                let mut groups = groups.iter();
                let of = groups.find(|group| group["service"]["namespace"] == namespace);
                of.map(|group| group["backends"].clone())
            };
            let ours = pods(OAPS).context("no group yet")?;
            ensure!(ours[1]["quota"] == 10, "{status}");
            ensure!(pods(first) == Some(json!([])), "{status}");
            Ok(())
        });
    });
}

#[test]
fn many_services_of_one_namespace_keep_no_other_from_being_guarded() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        let pods = [Endpoint::new("10.244.2.66", "anything", "node2")];
        cluster.api.admin().apply(&objects::namespace(TENANT));
        cluster.make_pods(TENANT, &pods);
        let many = (0..70_u16).flat_map(|index| {
            let name = format!("oap{index}");
            let service = objects::service(TENANT, &name, &[("grpc", PORT)]);
            let slice = cluster.slice(TENANT, &name, 20_000 + index, &pods);
            [labelled_as_oap(service), slice]
        });
        cluster
            .api
            .admin()
            .apply(&objects::list(&many.collect::<Vec<_>>()));
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        let mut balancer = cluster.balancer("{clients: 20, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let _listener = cluster.listen(&pod);
        eventually(SETTLES_WITHIN, || {
            let status = balancer.status();
            let services = status.services.iter();
            let ours = services.clone().find(|service| service.port == PORT);
            let quota = ours.and_then(|service| service.backends.first()?.quota);
            ensure!(quota == Some(10), "{quota:?}\n{}", balancer.logs());
            ensure!(services.count() == 1 + 8, "{:?}", status.services);
            Ok(())
        });
        let problems = cluster_status(&balancer)["problems"].to_string();
        assert!(
            problems.contains("the namespace tenant has 70 Services"),
            "{problems}"
        );
    });
}

#[test]
fn a_report_out_of_bounds_is_named_and_nothing_else_happens() {
    with_cluster(|cluster| {
        let (_pod, balancer, _listener) =
            cluster.one_of_two_pods("{observed: 1m, headroom: 0%, min_quota: 12}");
        cluster.publish("node2", &[("far-1", 30)]);
        wait_for_quota(&balancer, Some(15), "30 connections (observed)");
        let group =
            json!({"entry": "agents", "service": {"namespace": OAPS, "name": "oap"}, "port": PORT});
        let peak = json!({"group": group, "connections": 7, "seconds_ago": u64::MAX});
        let report =
            json!({"schema": 1, "node": "node3", "backends": [], "peaks": [peak], "refused": []});
        cluster.publish_json("node3", &report);
        eventually(SETTLES_WITHIN, || {
            let problems = cluster_status(&balancer)["problems"].to_string();
            for words in [
                "balancer-node3",
                "peaks[0].seconds_ago is 18446744073709551615",
            ] {
                ensure!(problems.contains(words), "{problems} has no {words}");
            }
            Ok(())
        });
        wait_for_quota(&balancer, Some(15), "30 connections (observed)");
    });
}

#[test]
fn while_the_api_server_tells_old_things_quotas_hold_and_then_open() {
    Machine::with(|machine| {
        machine.netns.add_address(CLIENT);
        let mut cluster = Cluster::start(machine);
        let (pod, balancer, _listener) =
            cluster.one_of_two_pods(&without_health("{clients: 20, headroom: 0%, min_quota: 1}"));
        wait_for_quota(&balancer, Some(10), "= 10");
        // Watches stay open, and nothing is new.
        cluster.api.kill(Program::Etcd);
        let client = cluster.connect(&pod).connected();
        wait_for_quota(&balancer, None, "longer than hold_for");
        let problems = cluster_status(&balancer)["problems"].to_string();
        assert!(problems.contains("has not come back"), "{problems}");
        cluster.api.spawn(Program::Etcd);
        wait_for_quota(&balancer, Some(10), "/ 2 ready) = 10");
        drop(client);
    });
}

/// `kubectl` as the daemon on a node: with a token of its pod, as its kubelet asks for.
fn daemon_on(api: &ApiServer, node: &str) -> Kubectl {
    let name = format!("balancer-on-{node}");
    let mut pod = objects::pod(SYSTEM, &name, node, &["10.89.0.11"]);
    pod["spec"]["serviceAccountName"] = json!("balancer");
    api.admin().apply(&pod);
    api.account_of_pod(SYSTEM, "balancer", &name)
}

/// A node report without content.
fn config_map(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": SYSTEM, "name": name},
        "data": {"publication.json": "{}"},
    })
}

#[test]
fn a_daemon_can_change_the_report_of_its_own_node_and_nothing_else() {
    Machine::with(|machine| {
        let api = ApiServer::start(&machine.netns);
        let manifests = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../deploy/manifests/balancer.yaml"
        );
        api.kubectl(&["apply", "--server-side", "-f", manifests]);
        api.admin().apply(&objects::list(&[
            objects::node(NODE),
            objects::node("node2"),
        ]));
        api.admin().apply(&config_map("balancer-node2"));
        api.admin().apply(&config_map("kube-root-ca.crt"));
        let daemon = daemon_on(&api, NODE);
        let refused = |object: &Value, words: &str| {
            let attempt = daemon.attempt_to_apply(object);
            ensure!(attempt.code != 0, "{object} was taken");
            ensure!(attempt.stderr.contains(words), "{attempt:?}");
            Ok(())
        };
        // A policy is in force a moment after it was made.
        let policy = "the node report of its own node alone";
        eventually(SETTLES_WITHIN, || {
            refused(&config_map("balancer-node2"), policy)
        });
        for other in ["kube-root-ca.crt", "balancer-node3", "anything"] {
            refused(&config_map(other), policy).expect("it is another one's");
        }
        let delete = ["delete", "configmap", "balancer-node2", "-n", SYSTEM];
        let deleted = daemon.attempt(&delete);
        assert!(
            deleted.code != 0 && deleted.stderr.contains(policy),
            "{deleted:?}"
        );
        // The configuration.
        let secret = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"namespace": SYSTEM, "name": "balancer"},
            "stringData": {"balancer.yaml": "kubernetes: {services: []}"},
        });
        refused(&secret, "Forbidden").expect("RBAC refuses it");
        let read = daemon.attempt(&["get", "secret", "balancer", "-n", SYSTEM]);
        assert!(read.stderr.contains("Forbidden"), "{read:?}");
        // Its own report: new, changed and taken away.
        for _ in 0..2 {
            daemon.apply(&config_map("balancer-node1"));
        }
        daemon.run(&["delete", "configmap", "balancer-node1", "-n", SYSTEM]);
        // A token that belongs to no pod names no node.
        let unbound = api.account(SYSTEM, "balancer");
        let attempt = unbound.attempt_to_apply(&config_map("balancer-node1"));
        assert!(
            attempt.code != 0 && attempt.stderr.contains(policy),
            "{attempt:?}"
        );
    });
}

/// How many of so many clients get into a pod.
fn admitted(cluster: &Cluster, pod: &Pod, clients: usize) -> usize {
    let attempts: Vec<_> = (0..clients)
        .filter_map(|_| cluster.connect(pod).ok())
        .collect();
    attempts.len()
}

/// Whoever can make a netns can give it any address, and listen there.
#[test]
fn a_stranger_with_a_pods_address_takes_no_share_of_its_quota() {
    with_cluster(|cluster| {
        let (pod, balancer, _listener) =
            cluster.one_of_two_pods(&without_health("{clients: 20, headroom: 0%, min_quota: 1}"));
        wait_for_quota(&balancer, Some(10), "/ 2 ready) = 10");
        let _stranger = cluster
            .machine
            .run(|| Stranger::start(pod.at(), 1, Deed::Hold(20)));
        remains(Duration::from_secs(5), || {
            let service = balancer.service();
            ensure!(service.active() == 1, "{service:?}");
            let sentence = group(&balancer)?["sentence"].to_string();
            ensure!(sentence.contains("/ 2 ready) = 10"), "{sentence}");
            Ok(())
        });
        let strangers = balancer.service().backends.len() - 1;
        assert_eq!(strangers, 20, "it was seen: {}", balancer.logs());
        assert_eq!(admitted(cluster, &pod, 12), 10, "{}", balancer.logs());
    });
}

/// Whatever strangers hold, a pod that begins to listen is registered, and its quota holds.
#[test]
fn strangers_take_no_slot_from_a_pod() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        let mut balancer = cluster.balancer("{clients: 8, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let here = SocketAddr::new("127.0.0.1".parse().expect("valid"), PORT);
        let _stranger = cluster
            .machine
            .run(|| Stranger::start(here, 8, Deed::Connect(140)));
        let held = balancer.service().backends.len();
        assert!((33..=128).contains(&held), "strangers hold {held} slots");
        let _listener = cluster.listen(&pod);
        wait_for_quota(&balancer, Some(4), "/ 2 ready) = 4");
        assert_eq!(admitted(cluster, &pod, 6), 4, "{}", balancer.logs());
        assert_eq!(balancer.service().verdicts("fail-open-full"), 0);
        let lines = balancer.logs().lines().count();
        assert!(lines < 400, "{lines} lines of log");
    });
}

/// Strangers that listened before the daemon get no more slots than those that come after it.
#[test]
fn strangers_that_listened_before_the_daemon_get_few_slots() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        let here = SocketAddr::new("127.0.0.1".parse().expect("valid"), PORT);
        let _stranger = cluster
            .machine
            .run(|| Stranger::start(here, 1, Deed::Hold(60)));
        let _listener = cluster.listen(&pod);
        let mut balancer = cluster.balancer("{clients: 8, headroom: 0%, min_quota: 1}");
        balancer.launch();
        wait_for_quota(&balancer, Some(4), "/ 2 ready) = 4");
        remains(Duration::from_secs(5), || {
            let strangers = balancer.service().backends.len() - 1;
            ensure!(strangers == 32, "{strangers} slots");
            Ok(())
        });
        assert_eq!(balancer.service().verdicts("fail-open-full"), 0);
    });
}

/// Connections of a listener that nobody confirms take memory for a minute. Should it turn out to
/// be a pod's after all, all of them are counted.
#[test]
fn a_listener_of_nobodys_is_given_up_after_a_minute_and_counted_once_it_is_somebodys() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[elsewhere(1)]);
        cluster.make_pods(OAPS, &[pod.endpoint()]);
        let mut balancer = cluster.balancer("{clients: 80, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let mut listener = cluster.listen(&pod);
        let _before = cluster.clients(&pod, 5);
        balancer.wait_until(|service| service.established() == 5);
        eventually(Duration::from_secs(90), || {
            let given_up = balancer.logs().contains("belong to nobody");
            ensure!(given_up, "{}", balancer.logs());
            Ok(())
        });
        let after = cluster.clients(&pod, 7);
        listener.accept_all();
        remains(Duration::from_secs(2), || {
            let counted = balancer.service().established();
            ensure!(counted == 5, "{counted} counted");
            Ok(())
        });
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        balancer.wait_until(|service| service.active() == 1 && service.established() == 12);
        let _more = cluster.clients(&pod, 3);
        balancer.wait_until(|service| service.established() == 15);
        drop(after);
        balancer.wait_until(|service| service.established() == 8);
        assert_eq!(balancer.status().agent.repairs, Some(0));
    });
}

/// A pod is one backend to its group, however often it listens.
#[test]
fn several_listeners_of_a_pod_have_one_share() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        let mut balancer = cluster.balancer("{clients: 18, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let listen = || {
            cluster.in_pod(&pod, || {
                let listen = Listen::on(&format!("0.0.0.0:{PORT}"));
                listen.reuse_port().open()
            })
        };
        let _listeners = [listen(), listen()];
        eventually(SETTLES_WITHIN, || {
            let service = balancer.service();
            let quotas: Vec<_> = service
                .backends
                .iter()
                .map(|backend| backend.quota)
                .collect();
            ensure!(
                quotas == [Some(5), Some(4)],
                "{quotas:?}: {}",
                group(&balancer)?
            );
            Ok(())
        });
        assert_eq!(admitted(cluster, &pod, 12), 9, "{}", balancer.logs());
    });
}

/// Where the kubelet uses cgroup v1, no cgroup tells of a pod: its address has to do.
#[test]
fn without_pod_cgroups_a_pod_is_told_by_its_address() {
    with_cluster(|cluster| {
        let pod = cluster.pod(5);
        let elsewhere_in_the_hierarchy = cluster.machine.cgroup.below();
        assert!(pod.cgroup.set(elsewhere_in_the_hierarchy).is_ok());
        with_route_back(&pod);
        cluster.serve(&[pod.endpoint(), elsewhere(1)]);
        let mut balancer = cluster.balancer("{clients: 8, headroom: 0%, min_quota: 1}");
        balancer.launch();
        let _listener = cluster.listen(&pod);
        wait_for_quota(&balancer, Some(4), "/ 2 ready) = 4");
    });
}

/// A source that comes seldom is known beside one that comes a hundred times a second.
#[test]
fn a_source_that_comes_seldom_is_starved_beside_a_noisy_one() {
    with_cluster(|cluster| {
        let (pod, balancer, _listener) =
            cluster.one_of_two_pods("{clients: 4, headroom: 0%, min_quota: 1}");
        wait_for_quota(&balancer, Some(2), "/ 2 ready) = 2");
        let quiet: IpAddr = "10.99.0.2".parse().expect("an address");
        cluster.machine.netns.add_address(quiet);
        let _clients = cluster.clients(&pod, 2);
        let connect = |from: IpAddr| {
            let from = SocketAddr::new(from, 0);
            cluster
                .machine
                .netns
                .run(|| tcp::connect_from(from, pod.at()))
        };
        // Both are starved after five seconds, and have room after twenty.
        let began = Instant::now();
        let mut next = Duration::ZERO;
        while began.elapsed() < Duration::from_secs(12) {
            let _ = connect(CLIENT);
            if began.elapsed() >= next {
                assert!(connect(quiet).is_refused(), "{}", balancer.logs());
                next += Duration::from_secs(5);
            }
            thread::sleep(Duration::from_millis(10));
        }
        let starved = group(&balancer).expect("a group")["starved"].clone();
        assert_eq!(starved, 2, "{}", balancer.logs());
        let lines = balancer.logs().matches("refused ").count();
        assert!(
            (2..=4).contains(&lines),
            "{lines} lines:\n{}",
            balancer.logs()
        );
    });
}

/// With what the chart sets, and without a floor.
#[test]
fn ten_clients_of_two_pods_are_two_apart_at_most() {
    with_cluster(|cluster| {
        let pods = [cluster.pod(5), cluster.pod(6)];
        pods.iter().for_each(with_route_back);
        cluster.serve(&pods.each_ref().map(Pod::endpoint));
        let mut balancer = cluster.balancer("{clients: 10, headroom: 15%}");
        balancer.launch();
        let _listeners = pods.each_ref().map(|pod| cluster.listen(pod));
        eventually(SETTLES_WITHIN, || {
            let quotas: Vec<_> = balancer
                .service()
                .backends
                .iter()
                .map(|backend| backend.quota)
                .collect();
            ensure!(quotas == [Some(6); 2], "{quotas:?}");
            Ok(())
        });
        // All of them try one first: as bad as chance can be.
        let mut held: [Vec<TcpStream>; 2] = [Vec::new(), Vec::new()];
        for _ in 0..10 {
            match cluster.connect(&pods[0]).ok() {
                Some(client) => held[0].push(client),
                None => held[1].push(cluster.connect(&pods[1]).connected()),
            }
        }
        assert_eq!(held.each_ref().map(Vec::len), [6, 4], "{}", balancer.logs());
    });
}
