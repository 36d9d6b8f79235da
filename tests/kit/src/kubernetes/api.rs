//! The control plane: etcd, the API server and, if wanted, the controllers and the scheduler.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::keeper::Keeper;
use super::kubectl::Kubectl;
use super::pki::{ADMIN, Pki};
use super::{directory, program};
use crate::fixtures::Netns;

/// Ready in three seconds on two idle processors.
const STARTS_WITHIN: Duration = Duration::from_secs(120);

/// Between two looks whether it is.
const PAUSE: Duration = Duration::from_millis(50);

const PORT: u16 = 6443;
const ETCD_PORT: u16 = 2379;
const ETCD: &str = "http://127.0.0.1:2379";
const ETCD_PEERS: &str = "http://127.0.0.1:2380";

/// A program of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The database.
    Etcd,
    /// `kube-apiserver`.
    ApiServer,
    /// `kube-controller-manager`.
    Controllers,
    /// `kube-scheduler`.
    Scheduler,
}

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "kube-apiserver",
            Self::Controllers => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
        }
    }
}

/// An API server in a network namespace, and what belongs to it. It authorises as a real cluster
/// does (`Node,RBAC`). Everything ends with it.
pub struct ApiServer {
    keeper: Keeper,
    netns: Netns,
    pki: Pki,
    admin: Kubectl,
    address: IpAddr,
    has_nodes: bool,
    has_controllers: bool,
    directory: TempDir,
}

impl ApiServer {
    /// Starts one on the loopback of this namespace, and waits until it is ready.
    ///
    /// # Panics
    /// With its log, when it does not get ready.
    #[track_caller]
    pub fn start(netns: &Netns) -> Self {
        let mut api = Self::prepare(netns, Ipv4Addr::LOCALHOST.into());
        api.launch();
        api
    }

    /// The same with the controllers and the scheduler, but no nodes: those that a test writes stay
    /// as they are written. Service accounts, `EndpointSlice`s, Deployments and `DaemonSet`s come
    /// to life; the status of the pods is the test's to write.
    ///
    /// # Panics
    /// With a log, when something does not get ready.
    #[track_caller]
    pub fn start_with_controllers(netns: &Netns) -> Self {
        let mut api = Self::prepare(netns, Ipv4Addr::LOCALHOST.into());
        api.has_controllers = true;
        api.launch();
        api
    }

    /// One for real nodes, which reach it at this address, to be [launched](Self::launch).
    pub(super) fn prepare_for_nodes(netns: &Netns, address: IpAddr) -> Self {
        let mut api = Self::prepare(netns, address);
        api.has_nodes = true;
        api.has_controllers = true;
        api
    }

    fn prepare(netns: &Netns, address: IpAddr) -> Self {
        let directory = directory();
        // 10.96.0.1 is the Service `kubernetes`.
        let addresses = [
            Ipv4Addr::LOCALHOST.into(),
            Ipv4Addr::new(10, 96, 0, 1).into(),
            address,
        ];
        let pki = Pki::make(&directory.path().join("pki"), &addresses);
        let kubeconfig = directory.path().join(ADMIN);
        fs::write(&kubeconfig, pki.kubeconfig(ADMIN, &server(address)))
            .expect("the directory can be written");
        let keeper = Keeper::new();
        Self {
            admin: Kubectl::new(netns, keeper.namespace(), &kubeconfig),
            keeper,
            netns: netns.share(),
            pki,
            address,
            has_nodes: false,
            has_controllers: false,
            directory,
        }
    }

    /// Starts all of it, and waits until the API server is ready.
    #[track_caller]
    pub(super) fn launch(&mut self) {
        self.spawn(Program::Etcd);
        // The API server would try again only a second later (gRPC's first backoff).
        self.wait_for(Program::Etcd, |api| {
            api.connects(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), ETCD_PORT))
        });
        self.start_again();
        if self.has_controllers {
            self.spawn(Program::Controllers);
            self.spawn(Program::Scheduler);
        }
    }

    /// Who may do everything.
    pub fn admin(&self) -> &Kubectl {
        &self.admin
    }

    /// `kubectl` as the administrator; what it prints.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.admin.run(arguments)
    }

    /// The URL of the API server.
    pub fn url(&self) -> String {
        server(self.address)
    }

    /// `kubectl` as a service account, which must exist: with a token that the API server has made
    /// for it (`TokenRequest`), good for an hour.
    ///
    /// # Panics
    /// When there is no such account.
    #[track_caller]
    pub fn account(&self, namespace: &str, name: &str) -> Kubectl {
        self.with_token(namespace, name, name, &[])
    }

    /// The same with a token that belongs to a pod of the account, and names the pod's node.
    ///
    /// # Panics
    /// When there is no such account or pod.
    #[track_caller]
    pub fn account_of_pod(&self, namespace: &str, name: &str, pod: &str) -> Kubectl {
        let bound = ["--bound-object-kind=Pod", "--bound-object-name", pod];
        self.with_token(namespace, name, pod, &bound)
    }

    #[track_caller]
    fn with_token(&self, namespace: &str, name: &str, user: &str, options: &[&str]) -> Kubectl {
        let create = ["create", "token", name, "--namespace", namespace];
        let token = self.kubectl(&[&create[..], &["--duration=1h"], options].concat());
        let kubeconfig = self.directory.path().join(format!("{namespace}-{user}"));
        let text = self.pki.kubeconfig_with_token(token.trim(), &self.url());
        fs::write(&kubeconfig, text).expect("the directory can be written");
        Kubectl::new(&self.netns, self.keeper.namespace(), &kubeconfig)
    }

    /// Kills the API server: connections to it are refused from now on. What it has stored stays.
    ///
    /// # Panics
    /// When it does not run.
    #[track_caller]
    pub fn stop(&mut self) {
        self.kill(Program::ApiServer);
    }

    /// Starts the API server after [`Self::stop`], and waits until it is ready.
    ///
    /// # Panics
    /// With its log, when it does not get ready.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.spawn(Program::ApiServer);
        self.wait_ready();
    }

    /// Stops the API server in its tracks: connections to it succeed and stay without an answer.
    ///
    /// # Panics
    /// When it does not run.
    #[track_caller]
    pub fn freeze(&self) {
        self.keeper
            .signal(Program::ApiServer.name(), Signal::SIGSTOP);
    }

    /// Lets it go on.
    ///
    /// # Panics
    /// When it does not run.
    #[track_caller]
    pub fn thaw(&self) {
        self.keeper
            .signal(Program::ApiServer.name(), Signal::SIGCONT);
    }

    /// The process id of a program of the control plane.
    ///
    /// # Panics
    /// When it was not started.
    #[track_caller]
    pub fn id(&self, which: Program) -> u32 {
        let id = self.keeper.id(which.name()).as_raw();
        u32::try_from(id).expect("a process id")
    }

    /// Kills a program of the control plane.
    ///
    /// # Panics
    /// When it does not run.
    #[track_caller]
    pub fn kill(&mut self, which: Program) {
        self.keeper.kill(which.name());
    }

    /// Starts a program that was killed, and does not wait for it.
    ///
    /// # Panics
    /// When it runs.
    #[track_caller]
    pub fn spawn(&mut self, which: Program) {
        let mut command = match which {
            Program::Etcd => self.etcd(),
            Program::ApiServer => self.api_server(),
            Program::Controllers => self.controllers(),
            Program::Scheduler => self.scheduler(),
        };
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log(which))
            .expect("the log file can be made");
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file can be shared"))
            .stderr(log);
        self.keeper.start(which.name(), &self.netns, &mut command);
    }

    /// What a program has logged.
    pub fn logs(&self, which: Program) -> String {
        fs::read_to_string(self.log(which)).unwrap_or_default()
    }

    pub(super) fn pki(&self) -> &Pki {
        &self.pki
    }

    fn log(&self, which: Program) -> PathBuf {
        self.directory.path().join(format!("{}.log", which.name()))
    }

    /// A file with the kubeconfig of a program.
    fn kubeconfig(&self, user: &str) -> PathBuf {
        let path = self.directory.path().join(user.replace(':', "-"));
        fs::write(&path, self.pki.kubeconfig(user, &self.url()))
            .expect("the directory can be written");
        path
    }

    #[track_caller]
    fn wait_ready(&mut self) {
        // This one comes a second after everything else, and only pods of the system's own
        // priorities need it.
        let ready = "/readyz?exclude=poststarthook/scheduling/bootstrap-system-priority-classes";
        self.wait_for(Program::ApiServer, |api| {
            // A connect costs less than a kubectl, which takes from the processors what the API
            // server needs.
            api.connects(SocketAddr::new(api.address, PORT))
                && api.admin.attempt(&["get", "--raw", ready]).code == 0
        });
    }

    fn connects(&self, address: SocketAddr) -> bool {
        self.netns.run(|| TcpStream::connect(address)).is_ok()
    }

    #[track_caller]
    fn wait_for(&mut self, which: Program, is_ready: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + STARTS_WITHIN;
        while !is_ready(self) {
            assert!(
                self.keeper.runs(which.name()) && Instant::now() < deadline,
                "{} did not get ready:\n{}",
                which.name(),
                self.tail(which)
            );
            std::thread::sleep(PAUSE);
        }
    }

    /// The end of a log.
    fn tail(&self, which: Program) -> String {
        let log = self.logs(which);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn etcd(&self) -> Command {
        let mut etcd = program("etcd");
        etcd.arg("--data-dir")
            .arg(self.directory.path().join("etcd"));
        etcd.args([
            "--listen-client-urls",
            ETCD,
            "--advertise-client-urls",
            ETCD,
        ]);
        etcd.args(["--listen-peer-urls", ETCD_PEERS]);
        etcd.args(["--initial-advertise-peer-urls", ETCD_PEERS]);
        etcd.arg(format!("--initial-cluster=default={ETCD_PEERS}"));
        // Alone it has nobody to wait for before it elects itself; and what it holds need not
        // outlive the machine.
        etcd.args(["--heartbeat-interval=10", "--election-timeout=50"]);
        etcd.arg("--unsafe-no-fsync");
        etcd
    }

    fn api_server(&self) -> Command {
        let mut api = program("kube-apiserver");
        let mut file = |option: &str, name: &str| {
            api.arg(option).arg(self.pki.file(name));
        };
        file("--tls-cert-file", "apiserver.crt");
        file("--tls-private-key-file", "apiserver.key");
        file("--client-ca-file", "ca.crt");
        file("--token-auth-file", "tokens.csv");
        file("--service-account-key-file", "accounts.pub");
        file("--service-account-signing-key-file", "accounts.key");
        if self.has_nodes {
            file("--kubelet-client-certificate", "kubelet-client.crt");
            file("--kubelet-client-key", "kubelet-client.key");
            api.arg("--kubelet-preferred-address-types=InternalIP");
            // What kubelets ask for before they trust whoever calls them
            // (`extension-apiserver-authentication`).
            api.arg("--requestheader-client-ca-file")
                .arg(self.pki.file("ca.crt"));
            api.args([
                "--requestheader-allowed-names=front-proxy-client",
                "--requestheader-username-headers=X-Remote-User",
                "--requestheader-group-headers=X-Remote-Group",
                "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            ]);
        } else {
            // The Service `kubernetes` would need an address that is not loopback.
            api.arg("--endpoint-reconciler-type=none");
        }
        if !self.has_controllers {
            // It would refuse every pod until a controller has made the account `default`.
            api.arg("--disable-admission-plugins=ServiceAccount");
        }
        let address = self.address;
        api.args([
            &format!("--bind-address={address}"),
            &format!("--advertise-address={address}"),
            &format!("--secure-port={PORT}"),
            &format!("--etcd-servers={ETCD}"),
            "--service-account-issuer=https://kubernetes.default.svc",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
            "--profiling=false",
        ]);
        api
    }

    fn controllers(&self) -> Command {
        let mut controllers = self.component(Program::Controllers);
        controllers
            .arg("--service-account-private-key-file")
            .arg(self.pki.file("accounts.key"));
        controllers
            .arg("--root-ca-file")
            .arg(self.pki.file("ca.crt"));
        // They would make the one in /usr/libexec.
        controllers
            .arg("--flex-volume-plugin-dir")
            .arg(self.directory.path().join("plugins"));
        controllers.args([
            "--use-service-account-credentials",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        ]);
        controllers.args(if self.has_nodes {
            &[
                "--node-monitor-period=1s",
                "--node-monitor-grace-period=12s",
            ][..]
        } else {
            // Nodes that no kubelet keeps alive would be given up.
            &["--controllers=*,-node-lifecycle-controller,-node-ipam-controller"]
        });
        controllers
    }

    fn scheduler(&self) -> Command {
        self.component(Program::Scheduler)
    }

    /// What the controllers and the scheduler have in common.
    fn component(&self, which: Program) -> Command {
        let kubeconfig = self.kubeconfig(&format!("system:{}", which.name()));
        let mut component = program(which.name());
        for option in [
            "--kubeconfig",
            "--authentication-kubeconfig",
            "--authorization-kubeconfig",
        ] {
            component.arg(option).arg(&kubeconfig);
        }
        component.args([
            "--bind-address=127.0.0.1",
            "--secure-port=0",
            "--leader-elect=false",
        ]);
        component
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for program in [Program::ApiServer, Program::Controllers] {
                eprintln!(
                    "--- end of the log of {} ---\n{}",
                    program.name(),
                    self.tail(program)
                );
            }
        }
    }
}

fn server(address: IpAddr) -> String {
    format!("https://{}", SocketAddr::new(address, PORT))
}
