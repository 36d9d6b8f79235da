//! Small clusters, simulated: nodes that know each other's numbers late, clients that are sent to
//! OAPs at random and come back more and more seldom.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::config::{ClusterInput, ClusterQuota, DEFAULT_MIN_QUOTA};
use crate::quota::starved::{Refusals, count};
use crate::quota::window::Window;

/// The clock's step in milliseconds.
const STEP: u64 = 250;
/// How old the numbers of other nodes are, in milliseconds.
const LATE: u64 = 3000;

/// Numbers that look random, and are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// So many milliseconds, a fifth more or less.
    fn about(&mut self, milliseconds: u64) -> u64 {
        milliseconds * 4 / 5 + self.below(milliseconds * 2 / 5 + 1)
    }
}

/// An OAP with the daemon of its node.
struct Oap {
    quota: Option<Quota>,
    waits_since: u64,
    refusals: Refusals<()>,
    window: Window,
    /// Connections, and the room for more, as published at each second.
    published: Vec<(u64, u32, bool)>,
}

impl Oap {
    fn new() -> Self {
        Self {
            quota: None,
            waits_since: 0,
            refusals: Refusals::default(),
            window: Window::new(Duration::from_secs(600)),
            published: Vec::new(),
        }
    }

    /// What the other nodes know of it.
    fn reported(&self, now: u64) -> (u32, bool) {
        let known = self
            .published
            .iter()
            .rev()
            .find(|(at, ..)| at + LATE <= now);
        known.map_or((0, false), |(_, connections, full)| (*connections, *full))
    }

    fn is_full(&self, connections: u32) -> bool {
        self.quota
            .and_then(Quota::limit)
            .is_some_and(|limit| connections >= limit)
    }
}

struct Client {
    source: IpAddr,
    at: Option<usize>,
    /// When it tries next.
    next: u64,
    /// Its next pause; that of SkyWalking's Java agent is always the same.
    pause: u64,
    is_java: bool,
    waits_since: Option<u64>,
}

struct Cluster {
    now: u64,
    rule: ClusterQuota,
    random: Random,
    /// All that ever were; those that are ready by their index.
    oaps: BTreeMap<usize, Oap>,
    clients: Vec<Client>,
    /// The longest wait of a client from its first refusal on.
    longest_wait: u64,
}

impl Cluster {
    fn new(oaps: usize, clients: usize, rule: ClusterQuota, seed: u64) -> Self {
        let mut random = Random(seed);
        let client = |number: usize| Client {
            source: Ipv4Addr::from_bits(0x0a00_0000 + u32::try_from(number).unwrap()).into(),
            at: None,
            next: random.below(5000),
            pause: 1000,
            is_java: random.below(2) == 0,
            waits_since: None,
        };
        let clients = (0..clients).map(client).collect();
        Self {
            now: 0,
            rule,
            random,
            oaps: (0..oaps).map(|index| (index, Oap::new())).collect(),
            clients,
            longest_wait: 0,
        }
    }

    fn connections(&self, oap: usize) -> u32 {
        let here = self.clients.iter().filter(|client| client.at == Some(oap));
        u32::try_from(here.count()).unwrap()
    }

    /// What each daemon computes, once a second, by its own counts and late reports of the others.
    fn compute(&mut self) {
        let now = Duration::from_millis(self.now);
        let counts: BTreeMap<usize, u32> = self
            .oaps
            .keys()
            .map(|oap| (*oap, self.connections(*oap)))
            .collect();
        let refused: Vec<_> = self
            .oaps
            .values()
            .flat_map(|oap| oap.refusals.of(&(), now))
            .collect();
        let starved = count(refused);
        let reported: BTreeMap<usize, (u32, bool)> = self
            .oaps
            .iter()
            .map(|(index, oap)| (*index, oap.reported(self.now)))
            .collect();
        for (index, oap) in &mut self.oaps {
            let own = ReadyBackend {
                previous: oap.quota,
                full: oap.is_full(counts[index]),
                ..ready(1, counts[index], None)
            };
            let others = reported.iter().filter(|(other, _)| *other != index);
            let others = others.map(|(_, (connections, full))| ReadyBackend {
                full: *full,
                ..ready(1, *connections, None)
            });
            let all: Vec<ReadyBackend> = std::iter::once(own).chain(others).collect();
            let sum: u64 = all.iter().map(|ready| u64::from(ready.established)).sum();
            oap.window.add(now, sum + u64::from(starved.sources));
            let connections = match &self.rule {
                ClusterQuota::Shared {
                    input: ClusterInput::Observed { .. },
                    ..
                } => oap.window.peak(now).map_or(0, |(peak, _)| peak),
                _ => u64::try_from(self.clients.len()).unwrap(),
            };
            let known = Known {
                total: Some(Total {
                    connections,
                    words: "simulated".to_owned(),
                }),
                established_elsewhere: 0,
                placed: false,
                refused_for_long: starved.long,
                unreported: 0,
                silent_for: Duration::ZERO,
                hold_for: Duration::from_secs(300),
            };
            let waited = Duration::from_millis(self.now - oap.waits_since);
            let outcome = compute_cluster(&self.rule, &known, &all, waited);
            if oap.quota != Some(outcome.quotas[0]) || !outcome.lowering {
                oap.waits_since = self.now;
            }
            oap.quota = Some(outcome.quotas[0]);
            let full = oap.is_full(counts[index]);
            oap.published.push((self.now, counts[index], full));
        }
    }

    /// A client is sent to an OAP at random.
    fn attempt(&mut self, index: usize) {
        let ready: Vec<usize> = self.oaps.keys().copied().collect();
        let chosen = ready[usize::try_from(self.random.below(ready.len() as u64)).unwrap()];
        let connections = self.connections(chosen);
        let client = &mut self.clients[index];
        let oap = self.oaps.get_mut(&chosen).unwrap();
        if oap.is_full(connections) {
            oap.refusals
                .refused(&(), client.source, Duration::from_millis(self.now));
            client.waits_since.get_or_insert(self.now);
            let pause = if client.is_java { 30_000 } else { client.pause };
            client.next = self.now + self.random.about(pause);
            client.pause = (client.pause * 8 / 5).min(120_000);
        } else {
            client.at = Some(chosen);
            client.pause = 1000;
            let waited = client
                .waits_since
                .take()
                .map_or(0, |since| self.now - since);
            self.longest_wait = self.longest_wait.max(waited);
        }
    }

    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds * 1000 / STEP {
            if self.now.is_multiple_of(1000) {
                self.compute();
            }
            for index in 0..self.clients.len() {
                let client = &self.clients[index];
                if client.at.is_none() && client.next <= self.now {
                    self.attempt(index);
                }
            }
            self.now += STEP;
        }
    }

    fn start_oap(&mut self, index: usize) {
        self.oaps.insert(index, Oap::new());
    }

    fn end_oap(&mut self, oap: usize) {
        self.oaps.remove(&oap);
        for client in self
            .clients
            .iter_mut()
            .filter(|client| client.at == Some(oap))
        {
            client.at = None;
            client.next = self.now + self.random.below(2000);
        }
    }

    /// The clients are replaced one after the other.
    fn restart_clients(&mut self) {
        for index in 0..self.clients.len() {
            self.clients[index].at = None;
            self.clients[index].next = self.now;
            self.run(5);
        }
    }

    /// How far the connections of the OAPs are apart; `None`: a client is without.
    fn spread(&self) -> Option<u32> {
        let counts = || self.oaps.keys().map(|oap| self.connections(*oap));
        let all_in = self.clients.iter().all(|client| client.at.is_some());
        all_in.then(|| counts().max().unwrap() - counts().min().unwrap())
    }
}

#[derive(Clone, Copy, Debug)]
enum Story {
    /// All clients connect within seconds.
    Start,
    /// Each OAP is replaced, the new one up before the old one goes.
    RollOut,
    /// An OAP ends and comes back, and then the clients are replaced.
    Restart,
}

/// The spread in the end, and the longest wait of a client, in milliseconds.
fn play(story: Story, oaps: usize, clients: usize, rule: &ClusterQuota, seed: u64) -> (u32, u64) {
    let mut cluster = Cluster::new(oaps, clients, rule.clone(), seed);
    cluster.run(60);
    match story {
        Story::Start => {}
        Story::RollOut => {
            for oap in 0..oaps {
                cluster.start_oap(oaps + oap);
                cluster.run(20);
                cluster.end_oap(oap);
                cluster.run(40);
            }
        }
        Story::Restart => {
            cluster.end_oap(0);
            cluster.run(30);
            cluster.start_oap(0);
            cluster.run(10);
            cluster.restart_clients();
        }
    }
    cluster.run(300);
    let spread = cluster.spread();
    let spread = spread
        .unwrap_or_else(|| panic!("{story:?} {oaps} {clients} {seed}: a client is locked out"));
    (spread, cluster.longest_wait)
}

fn of_pods(min_quota: u32) -> ClusterQuota {
    ClusterQuota::Shared {
        input: ClusterInput::Pods(Vec::new()),
        headroom_percent: 15,
        min_quota,
    }
}

fn of_observed() -> ClusterQuota {
    ClusterQuota::Shared {
        input: ClusterInput::Observed {
            window: Duration::from_secs(600),
        },
        headroom_percent: 15,
        min_quota: DEFAULT_MIN_QUOTA,
    }
}

const STORIES: [Story; 3] = [Story::Start, Story::RollOut, Story::Restart];

/// Mean and largest spread, and the longest wait, over so many runs of each story.
fn play_all(oaps: usize, clients: usize, rule: &ClusterQuota, seeds: u64) -> (f64, u32, u64) {
    let runs = STORIES
        .iter()
        .flat_map(|story| (0..seeds).map(|seed| play(*story, oaps, clients, rule, seed)));
    let runs: Vec<(u32, u64)> = runs.collect();
    let sum: u32 = runs.iter().map(|(spread, _)| spread).sum();
    let mean = f64::from(sum) / f64::from(u32::try_from(runs.len()).unwrap());
    let most = runs.iter().map(|(spread, _)| *spread).max().unwrap();
    let wait = runs.iter().map(|(_, wait)| *wait).max().unwrap();
    (mean, most, wait)
}

#[test]
fn ten_clients_of_two_oaps_are_two_apart_at_most() {
    let (with_floor, ..) = play_all(2, 10, &of_pods(16), 8);
    for rule in [of_pods(DEFAULT_MIN_QUOTA), of_observed()] {
        let (mean, most, _) = play_all(2, 10, &rule, 8);
        assert!(mean <= 2.0, "{rule}: {mean:.1} apart on average");
        assert!(
            mean + 1.0 < with_floor,
            "{mean:.1}, with a floor {with_floor:.1}"
        );
        // What was observed may be too much for a while: a client that moves counts twice until
        // the next report.
        let bound = if rule == of_observed() { 4 } else { 2 };
        assert!(most <= bound, "{rule}: {most} apart");
    }
}

#[test]
fn no_client_of_a_small_cluster_is_locked_out() {
    for (oaps, clients) in [
        (2, 5),
        (2, 40),
        (3, 10),
        (5, 20),
        (5, 40),
        (10, 5),
        (10, 40),
    ] {
        for rule in [of_pods(DEFAULT_MIN_QUOTA), of_observed()] {
            let (.., wait) = play_all(oaps, clients, &rule, 3);
            assert!(
                wait < 300_000,
                "{oaps} OAPs, {clients} clients, {rule}: {wait} ms"
            );
        }
    }
}
