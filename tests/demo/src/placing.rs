//! The client's side: three nodes with clients, four OAPs on another machine, nothing between them.
//! A daemon on each clients' node chooses the OAP at `connect()`.
//!
//! ```text
//!   netns "clients 1", 10.78.1.1 ──┐
//!   netns "clients 2", 10.78.2.1 ──┼── netns "OAPs": 10.79.0.1 … 10.79.0.4, port 11800
//!   netns "clients 3", 10.78.3.1 ──┘
//!   connect(10.96.0.1:11800), an address that nobody has
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use standin::Tally;
use testkit::fixtures::{Balancer, Machine, binary, process};
use tokio::time::sleep;

use crate::kubernetes::KubernetesService;
use crate::node::{Loads, Node};
use crate::report::{Report, heading, spread, total};

/// The OAPs.
const OAPS: RangeInclusive<u16> = 1..=4;
/// What clients connect to: the address of a Kubernetes Service.
const FRONTEND: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 11800);
/// The clients of each node.
const CLIENTS: u32 = 100;
/// Nodes with clients.
const NODES: u8 = 3;
/// All clients.
const ALL: usize = CLIENTS as usize * NODES as usize;
/// Where the clients of a node answer, in its netns.
const ANSWERS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9000);
/// Longer than clients take to arrive, and to come back after an OAP was killed.
const ARRIVED: Duration = Duration::from_secs(20);

/// Where the OAP with this number listens.
fn address(number: u16) -> SocketAddr {
    let last = u8::try_from(number).expect("there are few OAPs");
    SocketAddr::from(([10, 79, 0, last], 11800))
}

/// Plays it, and adds what was seen to the report.
pub async fn run(report: &mut Report) {
    let machines: Vec<_> = (1..=NODES).map(|_| Machine::new()).collect();
    let servers = Machine::new();
    for number in OAPS {
        servers.netns.add_address(address(number).ip());
    }
    for (machine, number) in machines.iter().zip(1..) {
        wire(machine, &servers, number);
    }
    let mut oaps = Node::start_at(&servers, OAPS, address);
    without(report, &machines, &oaps).await;
    placed(report, &machines, &mut oaps).await;
}

/// A cable between a node and the OAPs, and the way to their addresses.
fn wire(node: &Machine, servers: &Machine, number: u8) {
    let cable = format!("node{number}");
    servers.netns.ip(&format!(
        "link add {cable} type veth peer name eth0 netns {}",
        node.netns.path().display()
    ));
    let ends = [
        (&servers.netns, cable.as_str(), 254),
        (&node.netns, "eth0", 1),
    ];
    for (netns, device, host) in ends {
        netns.ip(&format!(
            "address add 10.78.{number}.{host}/24 dev {device}"
        ));
        netns.ip(&format!("link set {device} up"));
    }
    node.netns
        .ip(&format!("route add default via 10.78.{number}.254"));
}

/// kube-proxy's rule on each node.
async fn without(report: &mut Report, machines: &[Machine], oaps: &Node<'_>) {
    heading(
        "6.",
        &format!(
            "On the clients' side. No balancer: {NODES} nodes of {CLIENTS} clients, a Kubernetes Service, four OAPs on other machines."
        ),
    );
    let backends: Vec<_> = OAPS.map(address).collect();
    let services: Vec<_> = machines
        .iter()
        .map(|machine| KubernetesService::to(machine, FRONTEND, &backends))
        .collect();
    let clients = start(machines).await;
    let loads = arrived(oaps, &clients).await;
    report.picture("6 Kubernetes Service", &loads);
    everybody_is_in(report, &loads);
    drop(clients);
    wait_for("connections remain", || total(&oaps.loads()) == 0).await;
    // Not before: connections that are translated can't even be closed without it.
    drop(services);
}

async fn placed(report: &mut Report, machines: &[Machine], oaps: &mut Node<'_>) {
    heading(
        "7.",
        "A balancer on each of these nodes places connections: each connect() goes straight to the OAP that should have it. Nobody is refused.",
    );
    let configuration = configuration();
    let balancers: Vec<_> = machines
        .iter()
        .map(|machine| Balancer::start(machine, &configuration))
        .collect();
    let clients = start(machines).await;
    let loads = arrived(oaps, &clients).await;
    report.picture("7 placed", &loads);
    everybody_is_in(report, &loads);
    is_even(report, &loads);
    let refused = tally(&clients).refused;
    report.check("connects that were refused", refused, refused == 0);
    killed(report, oaps, &clients).await;
    drop(clients);
    drop(balancers);
}

/// Every node learns from its own failures.
async fn killed(report: &mut Report, oaps: &mut Node<'_>, clients: &[Clients<'_>]) {
    let before = tally(clients);
    let began = standin::now();
    println!("    oap-4 is killed.");
    oaps.kill_oap(4);
    let loads = arrived(oaps, clients).await;
    report.picture("7 oap-4 killed", &loads);
    everybody_is_in(report, &loads);
    is_even(report, &loads);
    let now = tally(clients);
    let outage = now.longest_outage(began, standin::now());
    report.check(
        "without a connection, at most",
        format!("{:.1} s", outage.as_secs_f64()),
        outage < Duration::from_secs(5),
    );
    let lost = now.lost() - before.lost();
    let refused = now.refused - before.refused;
    report.check(
        format!("of {lost} that came back, so many tried the dead one again"),
        refused,
        refused <= u64::from(NODES) * 4,
    );
}

/// Waits until all clients have a connection; what the OAPs hold then.
async fn arrived(oaps: &Node<'_>, clients: &[Clients<'_>]) -> Loads {
    wait_for("not all clients are connected", || {
        tally(clients).connected as usize == ALL && total(&oaps.loads()) == ALL
    })
    .await;
    oaps.loads()
}

fn everybody_is_in(report: &mut Report, loads: &Loads) {
    let held = total(loads);
    report.check("everybody is in", held, held == ALL);
}

/// Each node spreads its own clients evenly, and knows nothing of the others here.
fn is_even(report: &mut Report, loads: &Loads) {
    let spread = spread(loads);
    let most = usize::from(NODES);
    report.check(
        format!("max - min is at most {most}"),
        spread,
        spread <= most,
    );
}

fn configuration() -> String {
    let endpoints: Vec<_> = OAPS
        .map(|number| format!("\"{}\"", address(number)))
        .collect();
    format!(
        "services:\n  - name: agents\n    connect:\n      to: [\"{FRONTEND}\"]\n      endpoints: [{}]\n",
        endpoints.join(", ")
    )
}

/// Starts the clients of all nodes.
async fn start(machines: &[Machine]) -> Vec<Clients<'_>> {
    let clients: Vec<_> = machines.iter().map(Clients::start).collect();
    wait_for("clients do not answer", || {
        clients.iter().all(|node| node.ask().is_ok())
    })
    .await;
    clients
}

/// Waits, so that Ctrl-C can end it.
///
/// # Panics
/// When it takes too long.
async fn wait_for(otherwise: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < ARRIVED, "{otherwise} after {ARRIVED:?}");
        sleep(Duration::from_millis(100)).await;
    }
}

/// What all clients have seen.
fn tally(clients: &[Clients<'_>]) -> Tally {
    let mut all = Tally::default();
    for node in clients {
        all.add(&node.tally());
    }
    all
}

/// The clients of a node, one process. It ends when this is dropped, and also when this program is
/// killed: its standard input ends then.
struct Clients<'a> {
    machine: &'a Machine,
    process: Child,
}

impl<'a> Clients<'a> {
    fn start(machine: &'a Machine) -> Self {
        let mut command = Command::new(binary().with_file_name("standin-client"));
        command
            .arg(format!("--to={FRONTEND}"))
            .arg(format!("--connections={CLIENTS}"))
            .arg(format!("--answer={ANSWERS}"))
            .arg("--until-stdin-ends")
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let process = machine
            .run(|| process::spawn(&mut command))
            .expect("the stand-in can be started");
        Self { machine, process }
    }

    fn tally(&self) -> Tally {
        self.ask().expect("the clients answer")
    }

    fn ask(&self) -> std::io::Result<Tally> {
        self.machine.netns.run(|| standin::ask(ANSWERS, "tell"))
    }
}

impl Drop for Clients<'_> {
    fn drop(&mut self) {
        // Both fail only where it has ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
