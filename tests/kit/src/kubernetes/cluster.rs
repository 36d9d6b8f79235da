//! A cluster whose nodes are made of namespaces.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use tempfile::TempDir;

use super::api::ApiServer;
use super::images;
use super::keeper::Keeper;
use super::kubectl::Kubectl;
use super::{directory, kubeall, run};
use crate::fixtures::{Finished, Netns, eventually, preflight, remove_tree, sweep, unique_name};

/// Ready in about ten seconds on two idle processors.
const STARTS_WITHIN: &str = "--timeout=150s";
const STARTS_AGAIN_WITHIN: Duration = Duration::from_secs(120);
/// The kernel ends what is on a node in well under a second.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// The port of a kubelet's health check: the kubelet's own default.
const KUBELET_HEALTHZ_PORT: u16 = 10248;

/// What nodes are called.
const NODES: [&str; 3] = ["node1", "node2", "node3"];

/// Where the control plane is.
const CONTROL_PLANE: Ipv4Addr = Ipv4Addr::new(10, 89, 0, 1);
/// The same over IPv6: the way from nodes to what is outside.
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x89, 0, 0, 0, 0, 0, 1);

/// A Kubernetes cluster of up to three nodes, each with containerd, kubelet and kube-proxy, and
/// with file systems, processes, cgroups and a network of its own.
///
/// | where | addresses | |
/// |---|---|---|
/// | [`outside`](Self::outside) the nodes, where the control plane is | 10.89.0.1 | `fd00:89::1` |
/// | nodes `node1` … | 10.89.0.11 … | `fd00:89::11` … |
/// | pods of `node1` … | 10.244.1.0/24 … | `fd00:244:1::/64` … |
/// | Services, from outside through `node1` | 10.96.0.0/16 | `fd00:96::/112` |
///
/// There is no name server. Several clusters may stand side by side. All of it ends with this
/// guard, and with the test process.
pub struct Cluster {
    keeper: Keeper,
    api: ApiServer,
    nodes: BTreeMap<&'static str, Netns>,
    outside: Netns,
    name: String,
    directory: TempDir,
}

impl Cluster {
    /// Starts one with so many nodes, which have these images (archives) besides
    /// [`images::BUSYBOX`], and waits until all are ready for pods.
    ///
    /// # Panics
    /// With logs, when they do not get ready; for more than three nodes.
    #[track_caller]
    pub fn start(nodes: usize, images: &[&Path]) -> Self {
        preflight();
        assert!((1..=NODES.len()).contains(&nodes), "one to three nodes");
        for hierarchy in hierarchies() {
            sweep(&hierarchy);
        }
        let outside = Netns::new();
        let mut cluster = Self {
            keeper: Keeper::new(),
            api: ApiServer::prepare_for_nodes(&outside, CONTROL_PLANE.into()),
            nodes: BTreeMap::new(),
            outside,
            name: unique_name(),
            directory: directory(),
        };
        cluster.lay_network();
        cluster.keep_images(images);
        // They unpack their images while the control plane starts.
        for node in &NODES[..nodes] {
            cluster.boot(node);
        }
        cluster.api.launch();
        for node in &NODES[..nodes] {
            cluster.tell_that_the_api_is_ready(node);
        }
        for node in &NODES[..nodes] {
            cluster.wait_ready(node);
        }
        // Without these pods are refused.
        let last = [
            "serviceaccount/default",
            "priorityclass/system-node-critical",
        ];
        cluster.kubectl(&[&["wait", "--for=create", STARTS_WITHIN][..], &last].concat());
        cluster
    }

    /// `kubectl` as the administrator; what it prints.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.api.kubectl(arguments)
    }

    /// Who may do everything.
    pub fn admin(&self) -> &Kubectl {
        self.api.admin()
    }

    /// The control plane.
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// The control plane, to stop it and start it again.
    pub fn api_mut(&mut self) -> &mut ApiServer {
        &mut self.api
    }

    /// The network outside the nodes, from which pods, Services and nodes are reached.
    pub fn outside(&self) -> &Netns {
        &self.outside
    }

    /// Runs a command on a node.
    ///
    /// # Panics
    /// When the node does not run, or the command goes on for three minutes.
    #[track_caller]
    pub fn enter(&self, node: &str, command: &[&str]) -> Finished {
        run::to_its_end(self.on_node(node).args(command), b"")
    }

    /// A command that runs the program given by its arguments on a node: in its namespaces and in
    /// its cgroup.
    ///
    /// # Panics
    /// When the node does not run.
    #[track_caller]
    pub fn on_node(&self, node: &str) -> Command {
        let mut enter = Command::new(kit().join("node.sh"));
        enter
            .arg("enter")
            .arg(self.cgroup(node))
            .arg(self.first_process(node).to_string());
        enter
    }

    /// Whether the node runs: it was not killed, or was started again.
    pub fn runs(&self, node: &str) -> bool {
        self.nodes.contains_key(node)
    }

    /// The root directory of a node, with all that is mounted there, as it is seen from here.
    ///
    /// # Panics
    /// When the node does not run.
    #[track_caller]
    pub fn root(&self, node: &str) -> PathBuf {
        format!("/proc/{}/root", self.first_process(node)).into()
    }

    /// Brings an image (an archive) onto a node, or a new one of the same name.
    ///
    /// # Panics
    /// With what containerd says against it.
    #[track_caller]
    pub fn import_image(&self, node: &str, archive: &Path) {
        let name = self.keep_image(archive);
        let inside = format!("/run/node/images/{name}");
        let import = ["ctr", "-n", "k8s.io", "images", "import", "--digests=false"];
        let finished = self.enter(node, &[&import[..], &[&inside]].concat());
        assert!(finished.code == 0, "cannot import {name}: {finished:?}");
    }

    /// Ends a node as a power cut would: nobody on it says good-bye, and nothing answers at its
    /// address.
    ///
    /// # Panics
    /// When it does not run.
    #[track_caller]
    pub fn kill_node(&mut self, node: &str) {
        self.outside.ip(&format!("link delete {node}"));
        self.keeper.kill(node);
        self.nodes.remove(node);
        remove_cgroup(&self.cgroup(node));
    }

    /// Starts a node again that was killed, with an empty disk, and waits until it is ready for
    /// pods.
    ///
    /// # Panics
    /// With logs, when it does not get ready.
    #[track_caller]
    pub fn start_node(&mut self, node: &str) {
        let known = NODES.iter().find(|known| **known == node);
        let node = known.unwrap_or_else(|| panic!("no node is called {node}"));
        self.boot(node);
        self.tell_that_the_api_is_ready(node);
        // Until the new kubelet says something else, the node is what the old one said last.
        eventually(STARTS_AGAIN_WITHIN, || {
            let healthz = (Ipv4Addr::LOCALHOST, KUBELET_HEALTHZ_PORT);
            self.nodes[node].run(|| TcpStream::connect(healthz))?;
            Ok(())
        });
        self.wait_ready(node);
    }

    fn lay_network(&self) {
        let outside = &self.outside;
        outside.ip("link add br0 type bridge");
        outside.ip(&format!("address add {CONTROL_PLANE}/24 dev br0"));
        // Nobody else has these addresses: there is nothing to wait for before they are used.
        outside.ip(&format!("address add {OUTSIDE6}/64 dev br0 nodad"));
        outside.ip("link set br0 up");
        for node in NODES {
            add_routes(outside, node);
        }
        outside.ip(&format!("route add 10.96.0.0/16 via {}", address(NODES[0])));
        outside.ip(&format!(
            "route add fd00:96::/112 via {}",
            address6(NODES[0])
        ));
    }

    fn plug_in(&self, node: &str, netns: &Netns) {
        let outside = &self.outside;
        let other_end = netns.path();
        outside.ip(&format!(
            "link add {node} type veth peer name eth0 netns {}",
            other_end.display()
        ));
        outside.ip(&format!("link set {node} master br0 up"));
        netns.ip(&format!("address add {}/24 dev eth0", address(node)));
        netns.ip(&format!("address add {}/64 dev eth0 nodad", address6(node)));
        netns.ip("link set eth0 up");
        netns.ip(&format!("route add default via {CONTROL_PLANE}"));
        netns.ip(&format!("route add default via {OUTSIDE6}"));
        for other in NODES.iter().filter(|other| **other != node) {
            add_routes(netns, other);
        }
    }

    /// Starts what is on a node before there is an API server.
    fn boot(&mut self, node: &'static str) {
        let netns = Netns::new();
        self.plug_in(node, &netns);
        let state = self.state(node);
        if state.exists() {
            fs::remove_dir_all(&state).expect("a directory of the test can be removed");
        }
        fs::create_dir(&state).expect("a directory can be made");
        let write = |name: &str, text: &str| {
            fs::write(state.join(name), text).expect("the directory can be written");
        };
        let pki = self.api.pki();
        let kubeconfig = |user: &str| pki.kubeconfig(user, &self.api.url());
        write(
            "kubelet.kubeconfig",
            &kubeconfig(&format!("system:node:{node}")),
        );
        write("kube-proxy.kubeconfig", &kubeconfig("system:kube-proxy"));
        let authority = fs::read_to_string(pki.file("ca.crt"));
        write("ca.crt", &authority.expect("the certificate is there"));
        write("cni.conflist", &pod_network(node));
        write(
            "addresses",
            &format!("{},{}", address(node), address6(node)),
        );
        write("resolv.conf", "");
        let log = File::create(state.join("outer.log")).expect("the log file can be made");
        let mut run = Command::new(kit().join("node.sh"));
        run.arg("run")
            .arg(self.cgroup(node))
            .arg(node)
            .arg(&state)
            .arg(kubeall())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file can be shared"))
            .stderr(log);
        self.keeper.start(node, &netns, &mut run);
        self.nodes.insert(node, netns);
    }

    fn tell_that_the_api_is_ready(&self, node: &str) {
        File::create(self.state(node).join("go")).expect("the directory can be written");
    }

    #[track_caller]
    fn wait_ready(&self, node: &str) {
        let node = format!("node/{node}");
        self.kubectl(&["wait", "--for=create", &node, STARTS_WITHIN]);
        self.kubectl(&["wait", "--for=condition=Ready", &node, STARTS_WITHIN]);
    }

    fn keep_images(&self, images: &[&Path]) {
        let kept = self.images();
        fs::create_dir(&kept).expect("a directory can be made");
        images::write_pause(&kept.join("pause.tar")).expect("an image can be written");
        images::write_busybox(&kept.join("busybox.tar")).expect("an image can be written");
        for image in images {
            self.keep_image(image);
        }
    }

    /// Where nodes see it; its name there.
    #[track_caller]
    fn keep_image(&self, archive: &Path) -> String {
        let number = fs::read_dir(self.images()).map_or(0, Iterator::count);
        let name = format!("{number}.tar");
        fs::copy(archive, self.images().join(&name))
            .unwrap_or_else(|error| panic!("cannot copy {}: {error}", archive.display()));
        name
    }

    fn images(&self) -> PathBuf {
        self.directory.path().join("images")
    }

    fn state(&self, node: &str) -> PathBuf {
        self.directory.path().join(node)
    }

    /// Below the root of every hierarchy.
    fn cgroup(&self, node: &str) -> String {
        format!("{}/{node}", self.name)
    }

    /// The first process of a node, by the id that it has here.
    #[track_caller]
    fn first_process(&self, node: &str) -> u32 {
        // `unshare` waits for it.
        let parent = self.keeper.id(node);
        eventually(ENDS_WITHIN, || {
            let children = format!("/proc/{parent}/task/{parent}/children");
            let children = fs::read_to_string(&children)
                .with_context(|| format!("{node} does not run: cannot read {children}"))?;
            let first = children.split_whitespace().next();
            Ok(first.context("it has no process yet")?.parse()?)
        })
    }

    fn print_logs(&self) {
        for node in self.nodes.keys() {
            for name in ["outer.log", "node.log", "containerd.log", "kubelet.log"] {
                let log = fs::read_to_string(self.state(node).join(name)).unwrap_or_default();
                let lines: Vec<_> = log.lines().collect();
                let end = lines[lines.len().saturating_sub(20)..].join("\n");
                eprintln!("--- end of {name} of {node} ---\n{end}");
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        self.keeper.end();
        remove_cgroup(&self.name);
    }
}

/// The scripts and settings of nodes.
fn kit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes")
}

/// Removes it from every hierarchy, as soon as what was in it has ended.
fn remove_cgroup(cgroup: &str) {
    let deadline = Instant::now() + ENDS_WITHIN;
    for hierarchy in hierarchies() {
        let cgroup = hierarchy.join(cgroup);
        while cgroup.exists() {
            if Instant::now() >= deadline {
                eprintln!("{} could not be removed", cgroup.display());
                break;
            }
            remove_tree(&cgroup);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The mount points of all hierarchies of cgroups.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc/self/mounts is readable");
    let mounts = mounts.lines().filter_map(|mount| {
        let mut fields = mount.split(' ').skip(1);
        let (place, kind) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup").then(|| place.into())
    });
    mounts.collect()
}

fn number(node: &str) -> u8 {
    let index = NODES.iter().position(|known| *known == node);
    let index = index.unwrap_or_else(|| panic!("no node is called {node}"));
    u8::try_from(index + 1).expect("few nodes")
}

fn address(node: &str) -> IpAddr {
    Ipv4Addr::new(10, 89, 0, 10 + number(node)).into()
}

fn address6(node: &str) -> IpAddr {
    // The same digits as in the IPv4 address.
    let last = 0x10 + u16::from(number(node));
    Ipv6Addr::new(0xfd00, 0x89, 0, 0, 0, 0, 0, last).into()
}

/// The addresses of its pods.
fn pods(node: &str) -> String {
    format!("10.244.{}.0/24", number(node))
}

fn pods6(node: &str) -> String {
    format!("fd00:244:{}::/64", number(node))
}

/// The way to the pods of a node.
fn add_routes(from: &Netns, node: &str) {
    from.ip(&format!("route add {} via {}", pods(node), address(node)));
    from.ip(&format!("route add {} via {}", pods6(node), address6(node)));
}

/// The configuration of the CNI plugins.
fn pod_network(node: &str) -> String {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": pods(node)}], [{"subnet": pods6(node)}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        }],
    })
    .to_string()
}
