//! What is established moves, while calls go on: a server joins, and then all of them are
//! restarted, one after the other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use standin::Client;
use testkit::fixtures::Machine;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::node::{Loads, Node, address};
use crate::report::{Report, heading, progress, spread, total};
use crate::scenario::{NODE_A, configuration};

const CLIENTS: usize = 200;
/// 400 calls a second in all.
const CALL_EVERY: Duration = Duration::from_millis(500);
/// What the balancer promises after anything that happens.
const EVEN_WITHIN: Duration = Duration::from_secs(120);
const WATCH_EVERY: Duration = Duration::from_secs(10);

/// Plays it, and adds what was seen to the report.
pub async fn run(machine: &Machine, report: &mut Report) {
    let mut node = Node::start(machine, 1..=3);
    node.balance(&configuration(1..=4));
    let callers = Callers::start().await;
    joins(report, &mut node).await;
    is_without_error(report, &callers);
    restarts(report, &mut node).await;
    is_without_error(report, &callers);
}

async fn joins(report: &mut Report, node: &mut Node<'_>) {
    heading(
        "8.",
        &format!(
            "{CLIENTS} clients on three OAPs make 400 calls a second. A fourth starts. Nobody tells the balancer."
        ),
    );
    node.start_oap(4);
    node.balancer().wait_active(4);
    even(report, node, "8 a fourth has joined").await;
}

async fn restarts(report: &mut Report, node: &mut Node<'_>) {
    heading(
        "9.",
        "Each of the four is drained and started again, one after the other.",
    );
    for number in 1..=4 {
        restart(report, node, number).await;
    }
    even(report, node, "9 all were restarted").await;
}

async fn restart(report: &mut Report, node: &mut Node<'_>, number: u16) {
    let drained = address(number).to_string();
    let began = Instant::now();
    println!("    $ balancer drain {drained} --timeout 30s");
    let mut drain = node
        .balancer()
        .command(&["drain", &drained, "--timeout", "30s"]);
    // Clients that move need this thread.
    let said = tokio::task::spawn_blocking(move || drain.output());
    let said = said.await.expect("no panic").expect("the verb can be run");
    let held = held_by(&node.loads(), number);
    report.check(
        format!("oap-{number} is empty"),
        format!(
            "{held} connections after {:.1} s",
            began.elapsed().as_secs_f64()
        ),
        held == 0 && said.status.success(),
    );
    node.kill_oap(number);
    node.start_oap(number);
    node.balancer().wait_active(4);
}

fn held_by(loads: &Loads, number: u16) -> usize {
    let name = format!("oap-{number}");
    let held = loads.iter().find(|(owner, _)| *owner == name);
    held.map_or(0, |(_, held)| *held)
}

/// Waits until the OAPs are even, and says how long that took.
async fn even(report: &mut Report, node: &mut Node<'_>, title: &str) {
    let began = Instant::now();
    let mut shown = began;
    let mut loads = node.loads();
    while !is_even(&loads) && began.elapsed() < EVEN_WITHIN {
        if shown.elapsed() >= WATCH_EVERY {
            progress(began.elapsed(), &loads);
            shown = Instant::now();
        }
        sleep(Duration::from_millis(500)).await;
        loads = node.loads();
    }
    if !is_even(&loads) {
        print!("{}", node.balancer().must(&["rebalance", "--dry-run"]));
    }
    report.picture(title, &loads);
    report.check(
        "all of them are even, max - min at most 2, after",
        format!("{:.0} s", began.elapsed().as_secs_f64()),
        is_even(&loads),
    );
}

fn is_even(loads: &Loads) -> bool {
    total(loads) == CLIENTS && spread(loads) <= 2
}

fn is_without_error(report: &mut Report, callers: &Callers) {
    let answered = callers.seen.answered.load(Ordering::Relaxed);
    let failed = callers.seen.failed();
    let first = failed.first().map(|why| format!(", the first: {why}"));
    report.check(
        "calls that failed so far",
        format!(
            "{} of {answered}{}",
            failed.len(),
            first.unwrap_or_default()
        ),
        failed.is_empty(),
    );
}

/// Clients that make a call every half second, on the connection that they have; they end when this
/// is dropped.
struct Callers {
    seen: Arc<Seen>,
    _tasks: JoinSet<()>,
}

/// What all of them have seen.
#[derive(Default)]
struct Seen {
    answered: AtomicU64,
    failed: Mutex<Vec<String>>,
}

impl Seen {
    fn failed(&self) -> Vec<String> {
        let failed = self.failed.lock();
        failed.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, outcome: Result<(), impl std::fmt::Debug>) {
        match outcome {
            Ok(()) => {
                self.answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(status) => {
                let failed = self.failed.lock();
                let mut failed = failed.unwrap_or_else(PoisonError::into_inner);
                failed.push(format!("{status:?}"));
            }
        }
    }
}

impl Callers {
    /// Starts them; returns once each has a connection.
    async fn start() -> Self {
        let seen = Arc::new(Seen::default());
        let mut tasks = JoinSet::new();
        for number in 0..CLIENTS {
            let (client, _) = Client::connect(format!("caller-{number}"), vec![NODE_A]).await;
            let client = client.expect("there is no quota");
            tasks.spawn(call(client, Arc::clone(&seen)));
        }
        Self {
            seen,
            _tasks: tasks,
        }
    }
}

async fn call(mut client: Client, seen: Arc<Seen>) {
    let mut calls = interval(CALL_EVERY);
    calls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        calls.tick().await;
        seen.note(client.ping().await);
    }
}
