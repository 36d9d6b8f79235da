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
use testkit::fixtures::{Balancer, Machine, Signal, eventually};

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
const SETTLES_WITHIN: Duration = Duration::from_secs(15);
/// How long clients that are not served are waited for at the end.
const GOES_ON_FOR: Duration = Duration::from_secs(15);
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
    /// When clients that are served are counted.
    judged: Duration,
    /// When it ends, if all are served by then.
    ends: Duration,
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// One of three servers fails, once.
const fn one_of_three(name: &'static str, steps: &'static [(Duration, Act)]) -> Failure {
    Failure {
        name,
        servers: 3,
        failing: 1,
        steps,
        judged: seconds(10),
        ends: seconds(10),
    }
}

const STOPPED: Failure = one_of_three(
    "one of three is stopped (SIGSTOP)",
    &[(seconds(0), Act::Signal(Signal::SIGSTOP))],
);
const KILLED: Failure = one_of_three(
    "one of three is killed (SIGKILL)",
    &[(seconds(0), Act::Signal(Signal::SIGKILL))],
);
const CLOSES_AT_ONCE: Failure = one_of_three(
    "one of three accepts and closes at once",
    &[(seconds(0), Act::Tell("close 0"))],
);
const CLOSES_SOON: Failure = one_of_three(
    "one of three closes after 100 ms",
    &[(seconds(0), Act::Tell("close 100"))],
);
const CLOSES_LATE: Failure = Failure {
    judged: seconds(15),
    ends: seconds(15),
    ..one_of_three(
        "one of three closes after 10 s",
        &[(seconds(0), Act::Tell("close 10000"))],
    )
};
const NEVER_READS: Failure = one_of_three(
    "one of three accepts and never reads",
    &[(seconds(0), Act::Tell("ignore"))],
);
const HALF: Failure = Failure {
    servers: 4,
    failing: 2,
    ..one_of_three(
        "two of four accept and close at once",
        &[(seconds(0), Act::Tell("close 0"))],
    )
};
const ALL: Failure = Failure {
    failing: 3,
    judged: seconds(20),
    ends: seconds(20),
    ..one_of_three(
        "all three accept and close at once, for 10 s",
        &[
            (seconds(0), Act::Tell("close 0")),
            (seconds(10), Act::Tell("serve")),
        ],
    )
};
const PAUSES: Failure = Failure {
    ends: seconds(35),
    ..one_of_three(
        "one of three pauses for 3 s every 20 s, as in a collection of garbage",
        &[
            (seconds(0), Act::Signal(Signal::SIGSTOP)),
            (seconds(3), Act::Signal(Signal::SIGCONT)),
            (seconds(20), Act::Signal(Signal::SIGSTOP)),
            (seconds(23), Act::Signal(Signal::SIGCONT)),
        ],
    )
};

static FAILURES: [Failure; 9] = [
    STOPPED,
    KILLED,
    CLOSES_AT_ONCE,
    CLOSES_SOON,
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
    /// Clients that are served when it is judged.
    served: usize,
    /// Since when all are.
    all_since: Option<Duration>,
    /// How many tries each client took, each time that it lost its server; sorted.
    tries: Vec<usize>,
    /// When `status` first said of a failing server that it does not serve, and what.
    named: Option<(Duration, String)>,
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
            } else if self.named.is_none() {
                self.named = Some((after, state.clone()));
            }
        }
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
        write!(f, ", {} tries", self.most_tries())
    }
}

/// What `status` says of a backend that serves.
const SERVING: &str = "serving";

/// What `status` says of the backend with this address in this netns.
fn state(status: &Value, address: &str, netns: u64) -> String {
    let services = status["services"].as_array().into_iter().flatten();
    let mut backends = services
        .filter_map(|service| service["backends"].as_array())
        .flatten();
    let found = backends.find(|backend| backend["address"] == address && backend["netns"] == netns);
    match found {
        None => "gone".to_owned(),
        Some(backend) if backend["state"] != "active" => {
            backend["state"].as_str().unwrap_or("?").to_owned()
        }
        Some(backend) => backend["health"]["state"]
            .as_str()
            .unwrap_or(SERVING)
            .to_owned(),
    }
}

fn status(balancer: &Balancer) -> Value {
    serde_json::from_str(&balancer.must(&["status", "-o", "json"])).expect("JSON")
}

/// Plays one failure.
fn play(
    failure: &Failure,
    servers: &mut [Server],
    clients: &Clients,
    states: impl Fn() -> Vec<String>,
) -> Outcome {
    eventually(SETTLES_WITHIN, || {
        let served = clients.served();
        ensure!(
            served == clients.number(),
            "{served} served before anything fails"
        );
        Ok(())
    });
    clients.begin();
    let began = Instant::now();
    let mut steps = failure.steps.iter().peekable();
    let mut asks_at = Duration::ZERO;
    let mut is_judged = false;
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
        if !is_judged && now >= failure.judged {
            is_judged = true;
            seen.served = served;
        }
        if now >= asks_at {
            seen.note(now, failure.failing, &states());
            asks_at = began.elapsed() + ASKS_STATUS_EVERY;
        }
        let ends = failure.ends <= now && seen.all_since.is_some();
        if ends || now >= failure.ends + GOES_ON_FOR {
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
                .map(|address| state(&status, &address.to_string(), netns))
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

#[test]
#[ignore = "takes three minutes, and prints a table: `cargo xtask failures`"]
fn the_whole_matrix() {
    let table = table::of(&matrix());
    println!("\n{table}");
    if let Some(page) = std::env::var_os(DOCS) {
        let text = fs::read_to_string(&page).expect("the page can be read");
        let text = docs::replace(&text, "failures", &table).expect("the page has the marks");
        fs::write(&page, text).expect("the page can be written");
    }
}
