//! Servers that fail under clients that come back: where the clients are then, and what `status`
//! shows. Each test is a cell of the matrix that `cargo xtask failures` plays as a whole.

pub mod clients;
mod cluster;
pub mod server;
mod table;

use std::collections::{BTreeSet, VecDeque};
use std::fmt::{self, Display};
use std::fs;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::Value;
use testkit::docs;
use testkit::fixtures::{Balancer, Machine, Signal, eventually, patiently};

use self::clients::{Client, Clients};
use self::server::{Act, Server};
use crate::support::{agents, backend, source, virtual_port};

/// Names the page that the table goes into.
const DOCS: &str = "BALANCER_TEST_DOCS";
/// How many clients a cell has, if it is not said otherwise.
const CLIENTS: usize = 60;
/// Cells that are played side by side: two processors have to do for their programs.
const SIDE_BY_SIDE: usize = 6;
/// All clients are served so soon where no server fails.
const SETTLES_WITHIN: Duration = Duration::from_secs(30);
/// How long clients that are not served are waited for at the end.
const GOES_ON_FOR: Duration = Duration::from_secs(30);
const LOOKS_EVERY: Duration = Duration::from_millis(50);
const ASKS_STATUS_EVERY: Duration = Duration::from_millis(500);

/// A row of the matrix.
struct Failure {
    name: &'static str,
    servers: usize,
    /// How many of the servers fail: the first ones.
    failing: usize,
    /// What is done to these, and when.
    steps: &'static [(Duration, Act)],
    /// What `status` says of these; nothing: it must not name them.
    named: &'static [&'static str],
    /// Whether that may be too short for a look at `status`.
    is_short: bool,
    /// When clients that are served are counted.
    judged: Duration,
    /// When it ends, if all are served by then.
    ends: Duration,
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// One of three servers fails, once.
const fn one_of_three(
    name: &'static str,
    named: &'static [&'static str],
    steps: &'static [(Duration, Act)],
) -> Failure {
    Failure {
        name,
        servers: 3,
        failing: 1,
        named,
        is_short: false,
        steps,
        judged: seconds(10),
        ends: seconds(10),
    }
}

const STOPPED: Failure = one_of_three(
    "one of three is stopped (SIGSTOP)",
    &["stalled", "hung"],
    &[(seconds(0), Act::Signal(Signal::SIGSTOP))],
);
const KILLED: Failure = one_of_three(
    "one of three is killed (SIGKILL)",
    &["closed", "down", "gone"],
    &[
        (seconds(0), Act::Signal(Signal::SIGKILL)),
        (seconds(2), Act::Leave),
    ],
);
const CLOSES_AT_ONCE: Failure = one_of_three(
    "one of three accepts and closes at once",
    &["failing"],
    &[(seconds(0), Act::Tell("close 0"))],
);
const CLOSES_SOON: Failure = one_of_three(
    "one of three closes after 100 ms, without a word",
    &["failing"],
    &[(seconds(0), Act::Tell("close 100 silently"))],
);
const ANSWERS_AND_CLOSES: Failure = one_of_three(
    "one of three answers, and closes after 100 ms",
    &["failing"],
    &[(seconds(0), Act::Tell("close 100"))],
);
const CLOSES_LATE: Failure = Failure {
    judged: seconds(15),
    ends: seconds(15),
    ..one_of_three(
        "one of three closes after 10 s",
        &[],
        &[(seconds(0), Act::Tell("close 10000"))],
    )
};
const NEVER_READS: Failure = one_of_three(
    "one of three accepts and never reads",
    &["hung"],
    &[(seconds(0), Act::Tell("ignore"))],
);
const HALF: Failure = Failure {
    servers: 4,
    failing: 2,
    ..one_of_three(
        "two of four accept and close at once",
        &["failing"],
        &[(seconds(0), Act::Tell("close 0"))],
    )
};
const ALL: Failure = Failure {
    failing: 3,
    judged: seconds(20),
    ends: seconds(20),
    ..one_of_three(
        "all three accept and close at once, for 10 s",
        &["failing"],
        &[
            (seconds(0), Act::Tell("close 0")),
            (seconds(10), Act::Tell("serve")),
        ],
    )
};
const PAUSES: Failure = Failure {
    is_short: true,
    ends: seconds(35),
    ..one_of_three(
        "one of three pauses for 3 s every 20 s, as in a collection of garbage",
        &["stalled", "hung"],
        &[
            (seconds(0), Act::Signal(Signal::SIGSTOP)),
            (seconds(3), Act::Signal(Signal::SIGCONT)),
            (seconds(20), Act::Signal(Signal::SIGSTOP)),
            (seconds(23), Act::Signal(Signal::SIGCONT)),
        ],
    )
};

static FAILURES: [Failure; 10] = [
    STOPPED,
    KILLED,
    CLOSES_AT_ONCE,
    CLOSES_SOON,
    ANSWERS_AND_CLOSES,
    CLOSES_LATE,
    NEVER_READS,
    HALF,
    ALL,
    PAUSES,
];

/// The settings of a virtual port: a column of the matrix.
#[derive(Clone, Copy)]
struct Setting {
    name: &'static str,
    policy: &'static str,
}

const fn policy(policy: &'static str) -> Setting {
    Setting {
        name: policy,
        policy,
    }
}

const LEAST_CONNECTIONS: Setting = policy("least-connections");

static SETTINGS: [Setting; 3] = [
    LEAST_CONNECTIONS,
    policy("round-robin"),
    policy("source-hash"),
];

/// What was seen in a cell.
#[derive(Default)]
struct Outcome {
    clients: usize,
    /// Whether its servers have shares of a quota: that of one that fails is left to it for a
    /// while.
    have_shares: bool,
    /// Clients that are served when it is judged.
    served: usize,
    /// Clients that are served at the end.
    at_end: usize,
    /// Since when all are.
    all_since: Option<Duration>,
    /// How many tries each client took, each time that it lost its server; sorted.
    tries: Vec<usize>,
    /// When `status` first said of one that fails that it does not serve.
    named_after: Option<Duration>,
    /// What it said of those that fail.
    names: BTreeSet<String>,
    /// What it said of the other servers.
    falsely_named: BTreeSet<String>,
}

impl Outcome {
    /// Takes down what `status` says of the servers, of which the first `failing` ones fail.
    fn note(&mut self, after: Duration, failing: usize, states: &[String]) {
        for (server, state) in states
            .iter()
            .enumerate()
            .filter(|(_, state)| *state != SERVING)
        {
            if server >= failing {
                self.falsely_named.insert(state.clone());
            } else {
                self.named_after.get_or_insert(after);
                self.names.insert(state.clone());
            }
        }
    }

    /// What is not as it has to be.
    fn complaints(&self, failure: &Failure) -> Vec<String> {
        let mut complaints = Vec::new();
        if !self.have_shares && self.served < self.clients {
            complaints.push(format!("{} are served", self.served));
        }
        if self.at_end * 6 < self.clients * 5 {
            complaints.push(format!("{} are served at the end", self.at_end));
        }
        if !self.falsely_named.is_empty() {
            complaints.push(format!(
                "servers that serve are said to be {:?}",
                self.falsely_named
            ));
        }
        let others = self
            .names
            .iter()
            .filter(|name| !failure.named.contains(&name.as_str()));
        complaints.extend(others.map(|name| format!("those that fail are said to be {name}")));
        if self.names.is_empty() && !failure.named.is_empty() && !failure.is_short {
            complaints.push("nothing is said of those that fail".to_owned());
        }
        complaints
    }

    fn most_tries(&self) -> usize {
        self.tries.last().copied().unwrap_or(0)
    }
}

impl Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.served, self.clients)?;
        if let Some(since) = self.all_since {
            write!(f, ", all after {:.1} s", since.as_secs_f64())?;
        }
        match self.most_tries() {
            1 => write!(f, ", 1 try"),
            tries => write!(f, ", {tries} tries"),
        }
    }
}

/// What `status` says of a backend that serves.
const SERVING: &str = "serving";

/// What `status` says of a backend that listens on an address in a netns, and is named by one.
fn state(status: &Value, listens: &str, netns: u64, named: &str) -> String {
    let of = |key: &'static str| {
        let services = status["services"].as_array().into_iter().flatten();
        services
            .filter_map(move |service| service[key].as_array())
            .flatten()
    };
    if of("down").any(|down| down["address"] == named) {
        return "down".to_owned();
    }
    let is_it = |backend: &&Value| backend["address"] == listens && backend["netns"] == netns;
    let Some(backend) = of("backends").find(is_it) else {
        return "gone".to_owned();
    };
    let word = |value: &Value| value.as_str().expect("a word").to_owned();
    match word(&backend["state"]) {
        // None where health is not regarded.
        state if state == "active" => {
            let health = backend["health"].get("state");
            health.map_or(SERVING.to_owned(), word)
        }
        other => other,
    }
}

fn status(balancer: &Balancer) -> Value {
    serde_json::from_str(&balancer.must(&["status", "-o", "json"])).expect("JSON")
}

/// Plays one failure.
fn play(
    failure: &Failure,
    servers: &mut [Server<'_>],
    clients: &Clients,
    states: impl Fn() -> Vec<String>,
) -> Outcome {
    eventually(SETTLES_WITHIN, || {
        let (served, states) = (clients.served(), states());
        ensure!(
            served == clients.number() && states.iter().all(|state| state == SERVING),
            "{served} are served before anything fails, by servers that are {states:?}"
        );
        Ok(())
    });
    clients.begin();
    let began = Instant::now();
    let mut steps = failure.steps.iter().peekable();
    let mut asks_at = Duration::ZERO;
    let mut is_judged = false;
    // Clients that a busy machine has held up are waited for.
    let grace = patiently(seconds(2)).saturating_sub(seconds(2));
    let mut seen = Outcome {
        clients: clients.number(),
        ..Outcome::default()
    };
    loop {
        let now = began.elapsed();
        while let Some((_, act)) = steps.next_if(|(at, _)| *at <= now) {
            servers[..failure.failing]
                .iter_mut()
                .for_each(|server| server.suffer(*act));
        }
        let served = clients.served();
        if served == seen.clients {
            seen.all_since.get_or_insert(now);
        } else if !is_judged {
            seen.all_since = None;
        }
        let is_late = now >= failure.judged + grace;
        if !is_judged && now >= failure.judged && (served == seen.clients || is_late) {
            is_judged = true;
            seen.served = served;
        }
        if now >= asks_at {
            seen.note(now, failure.failing, &states());
            asks_at = began.elapsed() + ASKS_STATUS_EVERY;
        }
        let ends = failure.ends <= now && seen.all_since.is_some();
        if ends || now >= failure.ends + GOES_ON_FOR {
            seen.at_end = served;
            seen.tries = clients.tries();
            return seen;
        }
        thread::sleep(LOOKS_EVERY);
    }
}

/// A cell behind a virtual port, in a netns of its own.
fn on_a_virtual_port(failure: &Failure, setting: Setting, clients: usize) -> Outcome {
    let machine = Machine::new();
    machine.run(|| {
        let yaml = virtual_port(setting.policy, failure.servers, &[]);
        let balancer = Balancer::start(&machine, &yaml);
        let addresses = || (0..failure.servers).map(backend);
        let mut servers: Vec<_> = addresses().map(Server::start).collect();
        balancer.wait_active(failure.servers);
        let netns = balancer::sys::netns::cookie().expect("the netns has a cookie");
        let client = |number| Client {
            from: source(number),
            to: vec![agents()],
        };
        let clients = Clients::start((0..clients).map(client).collect());
        play(failure, &mut servers, &clients, || {
            let status = status(&balancer);
            addresses()
                .map(|address| address.to_string())
                .map(|address| state(&status, &address, netns, &address))
                .collect()
        })
    })
}

/// The whole matrix: by failure, the outcome with each setting of a virtual port, and that on the
/// pods' own port.
fn matrix() -> Vec<(&'static Failure, Vec<Outcome>)> {
    let cells = FAILURES.iter().enumerate().rev();
    let cells = cells
        .flat_map(|(row, failure)| SETTINGS.iter().map(move |setting| (row, failure, *setting)));
    let cells = Mutex::new(cells.collect::<VecDeque<_>>());
    let seen = Mutex::new(Vec::new());
    let next = || cells.lock().expect("no panic").pop_front();
    let own_port = thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                while let Some((row, failure, setting)) = next() {
                    let outcome = on_a_virtual_port(failure, setting, CLIENTS);
                    eprintln!("{}, {}: {outcome}", failure.name, setting.name);
                    seen.lock()
                        .expect("no panic")
                        .push((row, setting.name, outcome));
                }
            });
        }
        cluster::on_own_ports(&FAILURES, CLIENTS)
    });
    let mut seen = seen.into_inner().expect("no panic");
    let column = |name| SETTINGS.iter().position(|setting| setting.name == name);
    seen.sort_by_key(|(row, name, _)| (*row, column(*name)));
    let mut seen = seen.into_iter().map(|(_, _, outcome)| outcome);
    let rows = FAILURES.iter().zip(own_port).map(|(failure, own_port)| {
        let mut outcomes: Vec<_> = seen.by_ref().take(SETTINGS.len()).collect();
        outcomes.push(own_port);
        (failure, outcomes)
    });
    rows.collect()
}

/// Plays a failure, and holds what is seen against what has to be.
#[track_caller]
fn hold(failure: &Failure, setting: Setting, clients: usize) -> Outcome {
    let outcome = on_a_virtual_port(failure, setting, clients);
    let complaints = outcome.complaints(failure);
    assert!(complaints.is_empty(), "{complaints:#?}; {outcome}");
    outcome
}

#[test]
fn nobody_waits_for_a_server_that_is_stopped() {
    hold(&STOPPED, LEAST_CONNECTIONS, 300);
}

#[test]
fn nobody_waits_for_a_server_that_never_reads() {
    hold(&NEVER_READS, policy("source-hash"), CLIENTS);
}

#[test]
fn a_server_that_closes_at_once_is_left_after_three_tries() {
    let outcome = hold(&CLOSES_AT_ONCE, LEAST_CONNECTIONS, CLIENTS);
    let late = outcome.tries.iter().filter(|tries| **tries > 3).count();
    assert!(
        late <= 3,
        "{late} clients took more than three tries: {outcome}"
    );
}

#[test]
fn half_of_the_servers_may_close_at_once() {
    hold(&HALF, LEAST_CONNECTIONS, CLIENTS);
}

#[test]
fn all_servers_may_close_at_once_and_serve_again() {
    hold(&ALL, LEAST_CONNECTIONS, CLIENTS);
}

#[test]
fn a_server_that_pauses_is_passed_by_and_does_not_count_as_failing() {
    hold(&PAUSES, LEAST_CONNECTIONS, CLIENTS);
}

#[test]
#[ignore = "takes three minutes, and prints a table: `cargo xtask failures`"]
fn the_whole_matrix() {
    let matrix = matrix();
    let table = table::of(&matrix);
    println!("\n{table}");
    if let Some(page) = std::env::var_os(DOCS) {
        let text = fs::read_to_string(&page).expect("the page can be read");
        let text = docs::replace(&text, "failures", &table).expect("the page has the marks");
        fs::write(&page, text).expect("the page can be written");
    }
    let complaints = matrix.iter().flat_map(|(failure, outcomes)| {
        let complaints = outcomes
            .iter()
            .flat_map(|outcome| outcome.complaints(failure));
        complaints.map(|complaint| format!("{}: {complaint}", failure.name))
    });
    let complaints: Vec<_> = complaints.collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}
