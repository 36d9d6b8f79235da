//! A cluster with a real API server, whose nodes and pods are objects that the test writes, and
//! pods of this node that are real.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Cgroup, Machine, Netns, eventually};
use testkit::kubernetes::objects::{self, Endpoint};
use testkit::kubernetes::{ApiServer, Kubectl};

pub const SETTLES_WITHIN: Duration = Duration::from_secs(40);
pub const PORT: u16 = 11800;
/// The namespace of the balancer's own objects.
pub const SYSTEM: &str = "balancer-system";
/// The namespace of the OAPs.
pub const OAPS: &str = "skywalking";
/// The node that the daemon under test is on.
pub const NODE: &str = "node1";

/// An API server, and pods of this node that listen.
pub struct Cluster<'a> {
    pub machine: &'a Machine,
    pub api: ApiServer,
    /// The uids of the pods that were made, by name.
    pub uids: Mutex<BTreeMap<String, String>>,
}

/// A pod of this node: its netns, its cgroup and its OAP.
pub struct Pod {
    pub name: String,
    pub address: String,
    pub netns: Netns,
    /// What the kubelet gives it: made when it is first needed, because its name has the uid.
    pub cgroup: OnceLock<Cgroup>,
    _resident: Resident,
}

/// A thread that lives in a netns, as a pod's processes do.
struct Resident(Option<(Sender<()>, JoinHandle<()>)>);

impl Resident {
    pub fn of(netns: &Netns) -> Self {
        let (leave, left) = mpsc::channel::<()>();
        let (arrive, arrived) = mpsc::channel();
        let netns = netns.share();
        let thread = thread::spawn(move || {
            netns.enter();
            let _ = arrive.send(());
            let _ = left.recv();
        });
        arrived.recv().expect("the thread enters the namespace");
        Self(Some((leave, thread)))
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        if let Some((leave, thread)) = self.0.take() {
            drop(leave);
            let _ = thread.join();
        }
    }
}

impl<'a> Cluster<'a> {
    pub fn start(machine: &'a Machine) -> Self {
        Self::over(machine, ApiServer::start(&machine.netns))
    }

    /// With an API server that is there.
    pub fn over(machine: &'a Machine, api: ApiServer) -> Self {
        api.admin().apply(&objects::list(&[
            objects::namespace(SYSTEM),
            objects::namespace(OAPS),
            objects::node(NODE),
            objects::node("node2"),
            objects::service_account(SYSTEM, "balancer"),
            service(),
        ]));
        api.admin().apply(&permissions());
        Self {
            machine,
            api,
            uids: Mutex::default(),
        }
    }

    /// A daemon with this quota, under the balancer's own service account, that leaves clients to
    /// themselves: quotas see to it that backends are even.
    pub fn balancer(&self, quota: &str) -> Balancer<'a> {
        self.balancer_as(&self.api.account(SYSTEM, "balancer"), quota)
    }

    pub fn balancer_as(&self, account: &Kubectl, quota: &str) -> Balancer<'a> {
        self.of_config(account, &config(quota))
    }

    /// One that places clients.
    pub fn placing_balancer(&self, quota: &str) -> Balancer<'a> {
        self.of_config(
            &self.api.account(SYSTEM, "balancer"),
            &placing_config(quota),
        )
    }

    /// One that places clients, and moves them.
    pub fn moving_balancer(&self, quota: &str) -> Balancer<'a> {
        self.of_config(&self.api.account(SYSTEM, "balancer"), &moving_config(quota))
    }

    fn of_config(&self, account: &Kubectl, config: &str) -> Balancer<'a> {
        let kubeconfig = account.kubeconfig().to_str().expect("UTF-8").to_owned();
        Balancer::prepare(self.machine, config).with_environment(&[
            ("KUBECONFIG", &kubeconfig),
            ("NODE_NAME", NODE),
            ("POD_NAME", "balancer-x"),
            ("POD_NAMESPACE", SYSTEM),
            ("NODE_IP", "10.89.0.11"),
        ])
    }

    /// A pod's network, beside those with other numbers.
    pub fn pod(&self, number: u8) -> Pod {
        let netns = Netns::new();
        let peer = format!("pod{number}");
        let host = &self.machine.netns;
        host.ip(&format!(
            "link add {peer} type veth peer name eth0 netns {}",
            netns.path().display()
        ));
        host.ip(&format!("link set {peer} up"));
        host.ip(&format!("address add 10.244.1.1/32 dev {peer}"));
        let address = format!("10.244.1.{number}");
        host.ip(&format!("route add {address}/32 dev {peer} src 10.244.1.1"));
        netns.ip(&format!("address add {address}/24 dev eth0"));
        netns.ip("link set eth0 up");
        Pod {
            name: format!("oap-{number}"),
            address,
            _resident: Resident::of(&netns),
            netns,
            cgroup: OnceLock::new(),
        }
    }

    /// Writes which pods serve the Service, and the pods that there are not yet.
    pub fn serve(&self, endpoints: &[Endpoint]) {
        self.make_pods(OAPS, endpoints);
        self.write_slice(OAPS, "oap", PORT, endpoints);
    }

    /// Writes the only `EndpointSlice` of a Service, with pods of its namespace.
    pub fn write_slice(&self, namespace: &str, service: &str, port: u16, endpoints: &[Endpoint]) {
        self.api
            .admin()
            .apply(&self.slice(namespace, service, port, endpoints));
    }

    pub fn slice(
        &self,
        namespace: &str,
        service: &str,
        port: u16,
        endpoints: &[Endpoint],
    ) -> Value {
        let name = format!("{service}-1");
        let mut slice =
            objects::endpoint_slice(namespace, &name, service, &[("grpc", port)], endpoints);
        for endpoint in slice["endpoints"].as_array_mut().expect("a list") {
            let pod = endpoint["targetRef"]["name"].as_str().expect("a name");
            endpoint["targetRef"]["uid"] = json!(self.uid(pod));
        }
        slice
    }

    /// Makes the pods that there are not yet, each with its endpoint's address.
    pub fn make_pods(&self, namespace: &str, endpoints: &[Endpoint]) {
        let known = self.uids.lock().expect("no panic").clone();
        let pods: Vec<Value> = endpoints
            .iter()
            .filter(|endpoint| !known.contains_key(&endpoint.pod))
            .map(
                |Endpoint {
                     pod, node, address, ..
                 }| { objects::pod(namespace, pod, node, &[address]) },
            )
            .collect();
        if pods.is_empty() {
            return;
        }
        self.api.admin().apply(&objects::list(&pods));
        self.learn_uids(namespace);
    }

    /// Finds the uids of the pods of a namespace.
    pub fn learn_uids(&self, namespace: &str) {
        let made = self.api.admin().get(&["pods", "-n", namespace]);
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let uids = made["items"].as_array().expect("a list").iter();
        let uids = uids.map(|pod| {
            (
                text(&pod["metadata"]["name"]),
                text(&pod["metadata"]["uid"]),
            )
        });
        self.uids.lock().expect("no panic").extend(uids);
    }

    /// The cgroup of a pod. One that is in no Service has one that tells of no pod.
    pub fn cgroup_of<'p>(&self, pod: &'p Pod) -> &'p Cgroup {
        pod.cgroup.get_or_init(|| {
            let uids = self.uids.lock().expect("no panic");
            match uids.get(&pod.name) {
                Some(uid) => {
                    let name = format!("kubepods-pod{}.slice", uid.replace('-', "_"));
                    self.machine.cgroup.below_as(&name)
                }
                None => self.machine.cgroup.below(),
            }
        })
    }

    /// The uid of a pod that was made.
    pub fn uid(&self, pod: &str) -> String {
        let uids = self.uids.lock().expect("no panic");
        uids.get(pod)
            .unwrap_or_else(|| panic!("no pod {pod}"))
            .clone()
    }

    /// Writes the node report of another node's daemon.
    pub fn publish(&self, node: &str, pods: &[(&str, u32)]) {
        self.publish_of(node, pods, |_| None);
    }

    /// The same, with what the report says of the health of each pod.
    pub fn publish_of(
        &self,
        node: &str,
        pods: &[(&str, u32)],
        health: impl Fn(&str) -> Option<Value>,
    ) {
        let backends: Vec<Value> = pods
            .iter()
            .map(|(pod, established)| {
                json!({
                    "group": {"entry": "agents", "service": {"namespace": OAPS, "name": "oap"}, "port": PORT},
                    "pod": {"namespace": OAPS, "name": pod},
                    "uid": self.uid(pod),
                    "slot": 0,
                    "address": "10.244.2.9",
                    "state": "active",
                    "established": established,
                    "exempt": 0,
                    "pending": 0,
                    "quota": null,
                    "room": null,
                    "health": health(pod),
                })
            })
            .collect();
        let report =
            json!({"schema": 1, "node": node, "backends": backends, "peaks": [], "refused": []});
        self.publish_json(node, &report);
    }

    /// Writes something in the place of a node report.
    pub fn publish_json(&self, node: &str, report: &Value) {
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "namespace": SYSTEM,
                "name": format!("balancer-{node}"),
                "labels": {"app.kubernetes.io/name": "balancer", "app.kubernetes.io/component": "publication"},
            },
            "data": {"publication.json": report.to_string()},
        });
        self.api.admin().apply(&object);
    }

    /// A thread's work in the cgroup and netns of a pod.
    pub fn in_pod<T: Send>(&self, pod: &Pod, work: impl FnOnce() -> T + Send) -> T {
        self.cgroup_of(pod).run(|| pod.netns.run(work))
    }

    /// The pod of this node, of two, with a listener; and a daemon with that quota.
    pub fn one_of_two_pods(&self, quota: &str) -> (Pod, Balancer<'a>, Listener) {
        let pod = self.pod(5);
        with_route_back(&pod);
        self.serve(&[pod.endpoint(), elsewhere(1)]);
        let mut balancer = self.balancer(quota);
        balancer.launch();
        let listener = self.listen(&pod);
        (pod, balancer, listener)
    }

    pub fn listen(&self, pod: &Pod) -> Listener {
        self.in_pod(pod, || Listen::on(&format!("0.0.0.0:{PORT}")).open())
    }

    /// A client from outside: its address is not the one that the node itself sends from.
    pub fn connect(&self, pod: &Pod) -> tcp::Outcome {
        let from = SocketAddr::new(CLIENT, 0);
        self.machine.netns.run(|| tcp::connect_from(from, pod.at()))
    }

    pub fn clients(&self, pod: &Pod, number: usize) -> Vec<TcpStream> {
        (0..number).map(|_| self.connect(pod).connected()).collect()
    }
}

pub const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 99, 0, 1));

impl Pod {
    pub fn at(&self) -> SocketAddr {
        SocketAddr::new(self.address.parse().expect("an address"), PORT)
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::new(&self.address, &self.name, NODE)
    }
}

pub fn elsewhere(number: u8) -> Endpoint {
    Endpoint::new(
        &format!("10.244.2.{number}"),
        &format!("far-{number}"),
        "node2",
    )
}

fn service() -> Value {
    labelled_as_oap(objects::service(
        OAPS,
        "oap",
        &[("rest", 12800), ("grpc", PORT)],
    ))
}

/// With the labels of `SkyWalking`'s Helm chart.
pub fn labelled_as_oap(service: Value) -> Value {
    let labels = [
        ("app", "skywalking"),
        ("chart", "skywalking-4.9.0"),
        ("component", "oap"),
        ("heritage", "Helm"),
        ("release", "skywalking"),
    ];
    objects::labelled(service, &labels)
}

/// The permissions that the chart gives the daemon.
pub fn permissions() -> Value {
    let mut role = objects::cluster_role("balancer", (SYSTEM, "balancer"), &cluster_rules());
    let home = objects::cluster_role(
        "balancer-home",
        (SYSTEM, "balancer"),
        &[
            (
                "",
                "configmaps",
                &["list", "watch", "create", "patch", "delete"],
            ),
            ("apps", "daemonsets", &["list"]),
            ("", "pods", &["get"]),
            ("", "namespaces", &["get"]),
        ],
    );
    let more = home["items"].as_array().expect("a list").clone();
    role["items"].as_array_mut().expect("a list").extend(more);
    role
}

fn cluster_rules() -> [(&'static str, &'static str, &'static [&'static str]); 4] {
    [
        ("", "services", &["list", "watch"]),
        ("", "pods", &["list", "watch"]),
        ("", "nodes", &["get"]),
        ("discovery.k8s.io", "endpointslices", &["list", "watch"]),
    ]
}

pub fn config(quota: &str) -> String {
    format!(
        "kubernetes:\n  services:\n    - name: agents\n      rebalance: off\n      quota: {quota}\n  place: off\n  publish_every: 500ms\n  hold_for: 10s\nfail_open_after: 30s\n"
    )
}

/// The same of one that places clients.
pub fn placing_config(quota: &str) -> String {
    config(quota).replace("place: off", "place: on")
}

/// The same of one that evens out, too.
pub fn moving_config(quota: &str) -> String {
    placing_config(quota).replace("      rebalance: off\n", "")
}

/// A quota without regard to health, for listeners that accept late or never.
pub fn without_health(quota: &str) -> String {
    format!("{quota}\n      health: off")
}

/// The JSON of `status --cluster`.
pub fn cluster_status(balancer: &Balancer) -> Value {
    let json = balancer.must(&["status", "--cluster", "-o", "json"]);
    serde_json::from_str(&json).expect("JSON")
}

pub fn group(balancer: &Balancer) -> anyhow::Result<Value> {
    let status = cluster_status(balancer);
    let group = status["groups"].get(0).cloned();
    group.with_context(|| format!("no group: {status}"))
}

/// The `ConfigMap` with the report of this node.
pub fn own_report(cluster: &Cluster) -> anyhow::Result<Value> {
    let get = [
        "get",
        "-o",
        "json",
        "configmap",
        "balancer-node1",
        "-n",
        SYSTEM,
    ];
    let got = cluster.api.admin().attempt(&get);
    ensure!(got.code == 0, "{}", got.stderr);
    Ok(serde_json::from_str(&got.stdout)?)
}

/// Waits until the only backend of this node has this quota, and its sentence these words.
pub fn wait_for_quota(balancer: &Balancer, quota: Option<u32>, words: &str) {
    eventually(SETTLES_WITHIN, || {
        let status = balancer.status();
        let service = status.services.first().context("no service yet")?;
        let active = service
            .backends
            .iter()
            .find(|backend| backend.state == "active");
        let seen = active.context("no active backend yet")?.quota;
        let sentence = group(balancer)?["sentence"].to_string();
        ensure!(
            seen == quota,
            "quota {seen:?}, expected {quota:?}: {sentence}\n{}",
            balancer.logs()
        );
        ensure!(sentence.contains(words), "{sentence} has no {words:?}");
        Ok(())
    });
}

/// The machine's host netns with the address that clients come from.
pub fn with_cluster(test: impl FnOnce(&Cluster) + Send) {
    Machine::with(|machine| {
        machine.netns.add_address(CLIENT);
        let cluster = Cluster::start(machine);
        test(&cluster);
    });
}

pub fn with_route_back(pod: &Pod) {
    pod.netns
        .ip("route add default via 10.244.1.1 dev eth0 onlink");
}
