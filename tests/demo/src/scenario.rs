//! The steps in front of OAPs, one after the other.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::ensure;
use standin::Client;
use testkit::fixtures::{Machine, Signal, eventually};

use crate::kubernetes::KubernetesService;
use crate::load_generator::{self, Arrival};
use crate::moving;
use crate::node::{Loads, Node, address};
use crate::placing;
use crate::report::{Quantiles, Report, heading, progress, spread, total};

/// Clients that come at first, over a while.
const CLIENTS: usize = 300;
/// Clients that come all at once.
const STORM: usize = 150;
/// The quota of every OAP on node A, at first.
const QUOTA: usize = 110;
/// The quota that is set by hand in the end.
const RAISED: usize = 120;
/// The quota of every OAP on node B: enough for all that A refuses.
const QUOTA_ELSEWHERE: usize = 200;
/// Where clients find the service on each node.
pub const NODE_A: SocketAddr = SocketAddr::new(
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 1)),
    11800,
);
const NODE_B: SocketAddr = SocketAddr::new(
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 2)),
    11800,
);
/// How long clients take to arrive that do not come all at once.
const A_WHILE: Duration = Duration::from_secs(2);
/// Whoever gets no answer to a SYN sends it again after a second: a balancer that lets people wait
/// would be seen by that.
const SECOND_SYN: Duration = Duration::from_secs(1);
/// A real agent that nobody helps looks for another server after 30 s
/// (`collector.grpc_channel_check_interval`).
const AGENT_LOOKS_AGAIN: Duration = Duration::from_secs(30);

/// Plays all of it on node A and node B.
pub async fn run(machines: &[Machine; 2]) -> Report {
    let [a, b] = machines;
    a.netns.connect_to(&b.netns, "10.77.0.1/24", "10.77.0.2/24");
    let mut scenario = Scenario {
        report: Report::default(),
        clients: Vec::new(),
        a: Node::start(a, 1..=3),
        b: Node::start(b, 5..=6),
    };
    scenario.random().await;
    scenario.balanced().await;
    scenario.storm().await;
    scenario.one_more().await;
    scenario.raised().await;
    scenario.taken_out().await;
    let mut report = std::mem::take(&mut scenario.report);
    drop(scenario);
    placing::run(&mut report).await;
    moving::run(a, &mut report).await;
    report
}

/// Clients go before the nodes that they are connected to.
struct Scenario<'a> {
    report: Report,
    clients: Vec<Client>,
    a: Node<'a>,
    b: Node<'a>,
}

impl Scenario<'_> {
    /// A Kubernetes Service chooses once, at random, when a connection opens.
    async fn random(&mut self) {
        heading(
            "1.",
            &format!(
                "No balancer: a Kubernetes Service (kube-proxy's nftables rule) spreads {CLIENTS} clients."
            ),
        );
        let service = KubernetesService::start(self.a.machine(), NODE_A, 1..=3);
        let arrivals = self.arrive(CLIENTS, A_WHILE, |_| vec![NODE_A]).await;
        let loads = self.picture("1 Kubernetes Service");
        self.everybody_is_in(&arrivals, &loads);
        drop(arrivals);
        eventually(SECOND_SYN * 5, || {
            ensure!(total(&self.a.loads()) == 0, "connections remain");
            Ok(())
        });
        // Not before: connections that are translated can't even be closed without it.
        drop(service);
    }

    /// As many clients, through the balancer.
    async fn balanced(&mut self) {
        heading(
            "2.",
            &format!(
                "The balancer starts in front of the running OAPs: port 11800, least connections, a quota of {QUOTA} for each. {CLIENTS} clients."
            ),
        );
        self.a.balance(&with_quota(1..=4, QUOTA));
        let arrivals = self.arrive(CLIENTS, A_WHILE, |_| vec![NODE_A]).await;
        let loads = self.picture("2 balanced");
        self.everybody_is_in(&arrivals, &loads);
        self.report.check(
            "max - min is at most 1",
            spread(&loads),
            spread(&loads) <= 1,
        );
        self.status_agrees();
        self.keep(arrivals);
    }

    /// More than the quotas allow, all at once. Clients know a second node, as agents know several
    /// OAP addresses.
    async fn storm(&mut self) {
        let room = 3 * QUOTA - CLIENTS;
        heading(
            "3.",
            &format!(
                "A storm: {STORM} clients at once, room for {room}. Whom node A refuses these clients take to node B at once; it has a balancer too."
            ),
        );
        self.b.balance(&with_quota(5..=6, QUOTA_ELSEWHERE));
        let arrivals = self
            .arrive(STORM, Duration::ZERO, |_| vec![NODE_A, NODE_B])
            .await;
        let loads = self.picture("3 storm, node A");
        self.quotas_are_full(&loads, QUOTA);
        let elsewhere = self.b.loads();
        self.report.picture("  storm, node B", &elsewhere);
        self.refusals(&arrivals, STORM - room, &elsewhere);
        let counted = self.a.balancer().service().verdicts("over-quota");
        let enough = counted >= as_count(STORM - room);
        self.report.check(
            "`status` gives the reason over-quota",
            format!("{counted} look-ups"),
            enough,
        );
        self.status_agrees();
        self.keep(arrivals);
    }

    fn refusals(&mut self, arrivals: &[Arrival], expected: usize, elsewhere: &Loads) {
        let refused: Vec<_> = arrivals
            .iter()
            .filter(|arrival| arrival.refusal().is_some())
            .collect();
        self.report.check(
            format!("{expected} are refused"),
            refused.len(),
            refused.len() == expected,
        );
        let resets = Quantiles::of(refused.iter().filter_map(|arrival| arrival.refusal()));
        self.report.check(
            "from the SYN to the RST",
            &resets,
            resets.worst() < SECOND_SYN,
        );
        let back = Quantiles::of(refused.iter().map(|arrival| arrival.connecting()));
        self.report.check(
            "from that SYN to a connection with node B",
            &back,
            back.worst() < SECOND_SYN,
        );
        let answered = Quantiles::of(refused.iter().map(|arrival| arrival.took));
        self.report.check(
            "from that SYN to its calls' answers on node B",
            &answered,
            answered.worst() < AGENT_LOOKS_AGAIN,
        );
        let taken = total(elsewhere);
        self.report.check(
            "all of these are in on node B",
            taken,
            taken == refused.len() && are_in(arrivals) == STORM,
        );
        self.report.check(
            "max - min on node B is at most 1",
            spread(elsewhere),
            spread(elsewhere) <= 1,
        );
    }

    /// The configuration names a fourth backend all the time; nobody tells the daemon when it
    /// comes.
    async fn one_more(&mut self) {
        heading(
            "4.",
            &format!("One OAP more starts. Nobody tells the balancer. {QUOTA} clients come."),
        );
        let began = Instant::now();
        self.a.start_oap(4);
        self.a.balancer().wait_active(4);
        let joined = began.elapsed();
        self.report.check(
            "oap-4 has joined, process start included, after",
            format!("{} ms", joined.as_millis()),
            joined < SECOND_SYN,
        );
        let arrivals = self.arrive(QUOTA, A_WHILE, |_| vec![NODE_A]).await;
        let loads = self.picture("4 oap-4 joined");
        self.report.check(
            "all of them are in",
            are_in(&arrivals),
            are_in(&arrivals) == QUOTA,
        );
        self.quotas_are_full(&loads, QUOTA);
        self.status_agrees();
        self.keep(arrivals);
    }

    /// A quota by hand, in force at once, and no further.
    async fn raised(&mut self) {
        heading(
            "5.",
            &format!("All are full. The quota is raised to {RAISED}, live."),
        );
        let before = self.arrive(1, Duration::ZERO, |_| vec![NODE_A]).await;
        self.report.check(
            "the SYN before it is refused",
            outcome(&before),
            before[0].refusal().is_some(),
        );
        let began = Instant::now();
        println!("    $ balancer quota set agents {RAISED}");
        print!(
            "{}",
            indented(
                &self
                    .a
                    .balancer()
                    .must(&["quota", "set", "agents", &RAISED.to_string()])
            )
        );
        let next = self.arrive(1, Duration::ZERO, |_| vec![NODE_A]).await;
        let seen = format!(
            "{}, {} ms after the command was typed",
            outcome(&next),
            began.elapsed().as_millis()
        );
        self.report
            .check("the next SYN is taken", seen, are_in(&next) == 1);
        let room = 4 * (RAISED - QUOTA) - 1;
        let arrivals = self.arrive(room + 5, A_WHILE / 2, |_| vec![NODE_A]).await;
        let loads = self.picture("5 quota raised");
        self.report.check(
            format!("of {} more, {room} are in", room + 5),
            are_in(&arrivals),
            are_in(&arrivals) == room,
        );
        self.quotas_are_full(&loads, RAISED);
        self.status_agrees();
        self.keep(next);
        self.keep(arrivals);
    }

    /// Established connections were never touched, and stay when the balancer goes.
    async fn taken_out(&mut self) {
        heading(
            "Then:",
            "Ctrl-C takes the balancer out of the kernel. Connections stay.",
        );
        let clients = self.clients.len();
        let before = load_generator::still_there(&mut self.clients).await;
        self.report.check(
            format!("{clients} clients make a call on the connection they have"),
            before,
            before == clients,
        );
        let balancer = self.a.balancer();
        let status = balancer.stop(Signal::SIGINT);
        let gone = status.success() && !balancer.is_loaded();
        self.report.check(
            "the daemon ends and leaves nothing in the kernel",
            status,
            gone,
        );
        let after = load_generator::still_there(&mut self.clients).await;
        self.report.check(
            format!("{clients} clients make another call on it"),
            after,
            after == clients,
        );
    }

    async fn arrive(
        &self,
        number: usize,
        over: Duration,
        servers: impl Fn(usize) -> Vec<SocketAddr>,
    ) -> Vec<Arrival> {
        let began = Instant::now();
        load_generator::arrive(number, over, servers, || {
            progress(began.elapsed(), &self.a.loads());
        })
        .await
    }

    fn picture(&mut self, title: &str) -> Loads {
        let loads = self.a.loads();
        self.report.picture(title, &loads);
        loads
    }

    fn everybody_is_in(&mut self, arrivals: &[Arrival], loads: &Loads) {
        let are_in = are_in(arrivals);
        self.report.check(
            "everybody is in",
            are_in,
            are_in == arrivals.len() && total(loads) == are_in,
        );
    }

    fn quotas_are_full(&mut self, loads: &Loads, quota: usize) {
        let seen: Vec<_> = loads.iter().map(|(_, load)| load.to_string()).collect();
        self.report.check(
            format!("every OAP has exactly {quota}"),
            seen.join(" "),
            loads.iter().all(|(_, load)| *load == quota),
        );
    }

    fn status_agrees(&mut self) {
        let (truth, told) = (self.a.loads(), self.a.loads_by_status());
        let seen: Vec<_> = told.iter().map(|(_, load)| load.to_string()).collect();
        self.report.check(
            "`balancer status` agrees with the socket table",
            seen.join(" "),
            told == truth,
        );
    }

    fn keep(&mut self, arrivals: Vec<Arrival>) {
        self.clients
            .extend(arrivals.into_iter().filter_map(|arrival| arrival.client));
    }
}

fn with_quota(oaps: RangeInclusive<u16>, quota: usize) -> String {
    let service = configuration(oaps);
    format!("{service}    quota: {{ per_backend: {quota} }}\n")
}

/// A service of these OAPs without a quota.
pub fn configuration(oaps: RangeInclusive<u16>) -> String {
    let backends: Vec<_> = oaps
        .map(|number| format!("\"{}\"", address(number)))
        .collect();
    format!(
        "services:\n  - name: agents\n    port: {}\n    policy: least-connections\n    backends: [{}]\n",
        NODE_A.port(),
        backends.join(", ")
    )
}

fn are_in(arrivals: &[Arrival]) -> usize {
    arrivals
        .iter()
        .filter(|arrival| arrival.client.is_some())
        .count()
}

fn outcome(arrivals: &[Arrival]) -> &'static str {
    if arrivals.iter().all(|arrival| arrival.refusal().is_some()) {
        "RST"
    } else {
        "taken"
    }
}

fn indented(text: &str) -> String {
    text.lines()
        .flat_map(|line| ["      ", line, "\n"])
        .collect()
}

fn as_count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
