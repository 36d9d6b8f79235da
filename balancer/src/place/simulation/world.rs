//! A cluster, simulated: nodes with clients, endpoints that publish what they have, and the time
//! that it takes until everybody knows.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use balancer_common::abi::ticks;
use balancer_common::place::avoidance;
use balancer_common::place::choice::{self, Seen};

use super::random::Random;
use super::rules::{self, Rule};

use crate::place::{EndpointPlan, GroupKnowledge, GroupMemory, GroupPlan, PublishedTotal};

/// Milliseconds, in which all times here are.
pub type Ms = u64;

/// When a world begins: no publication is from before the start of time.
const BEGINNING: Ms = 100_000;
/// How long news are on their way: the least, and how much more at most.
const ON_THE_WAY: (Ms, Ms) = (50, 250);
/// How often a daemon computes.
const TICK: Ms = 1_000;

/// A server.
struct Endpoint {
    weight: u32,
    /// Whether connects may be sent to it: it is in the plans, as soon as a node hears of it.
    ready: bool,
    alive: bool,
    /// Its connections.
    total: u64,
    /// Of these, those whose clients were told to move, if that counts as gone.
    told: u64,
    /// When and what it has published.
    reports: Vec<(Ms, u64)>,
}

/// A node with clients, and its agent.
struct Node {
    /// Its connections, by endpoint: those that its kernel half has counted.
    own: Vec<u64>,
    avoidance: Vec<u64>,
    memory: GroupMemory,
    /// The endpoints of its plan.
    members: Vec<usize>,
    plan: GroupPlan,
    knowledge: GroupKnowledge,
    draws: u64,
    own_only_until: Ms,
    /// Without an agent connects go to a random endpoint, and nobody counts.
    has_agent: bool,
}

/// A client keeps one connection.
struct Client {
    node: usize,
    at: Option<usize>,
    /// Its node's agent has counted its connection.
    counted: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Report(usize),
    Tick(usize, bool),
    Leave(usize),
    Again(usize),
    Withdraw(usize),
    Connect(usize),
}

pub struct World {
    now: Ms,
    pub random: Random,
    endpoints: Vec<Endpoint>,
    nodes: Vec<Node>,
    clients: Vec<Client>,
    rule: Rule,
    /// How often an endpoint publishes.
    period: Ms,
    events: BinaryHeap<Reverse<(Ms, u64, Event)>>,
    sequence: u64,
}

/// How often endpoints publish in a cluster of so many nodes.
pub fn period(nodes: usize) -> Ms {
    (nodes as Ms * 10).clamp(2_000, 10_000)
}

impl World {
    pub fn new(rule: Rule, nodes: usize, weights: &[u32], seed: u64) -> Self {
        let mut world = Self {
            now: BEGINNING,
            random: Random(seed),
            endpoints: Vec::new(),
            nodes: Vec::new(),
            clients: Vec::new(),
            rule,
            period: period(nodes),
            events: BinaryHeap::new(),
            sequence: 0,
        };
        for _ in 0..nodes {
            world.nodes.push(Node::new());
        }
        for weight in weights {
            world.add_endpoint(*weight);
        }
        for node in 0..nodes {
            let at = world.now + world.random.below(TICK);
            world.push(at, Event::Tick(node, true));
            world.learn(node);
        }
        world
    }

    /// Publish so often instead of as befits the number of nodes.
    pub fn publish_every(&mut self, period: Ms) {
        self.period = period;
    }

    fn push(&mut self, at: Ms, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    /// A new endpoint, ready.
    pub fn add_endpoint(&mut self, weight: u32) -> usize {
        self.endpoints.push(Endpoint {
            weight,
            ready: true,
            alive: true,
            total: 0,
            told: 0,
            reports: Vec::new(),
        });
        let index = self.endpoints.len() - 1;
        for node in &mut self.nodes {
            node.own.push(0);
            node.avoidance.push(0);
        }
        let at = self.now + self.random.below(self.period);
        self.push(at, Event::Report(index));
        self.tell_everybody();
        index
    }

    /// The endpoint gets no new connections any more.
    pub fn withdraw(&mut self, endpoint: usize) {
        self.endpoints[endpoint].ready = false;
        self.tell_everybody();
    }

    /// The endpoint ends. Its clients come back within that time. The cluster notices so much
    /// later.
    pub fn end(&mut self, endpoint: usize, within: Ms, noticed: Ms) {
        self.endpoints[endpoint].alive = false;
        if noticed == 0 {
            self.withdraw(endpoint);
        } else {
            self.push(self.now + noticed, Event::Withdraw(endpoint));
        }
        for client in self.clients_of(endpoint) {
            self.leave(client);
            self.connect_within(client, within);
        }
    }

    fn tell_everybody(&mut self) {
        for node in 0..self.nodes.len() {
            let at = self.now + ON_THE_WAY.0 + self.random.below(ON_THE_WAY.1);
            self.push(at, Event::Tick(node, false));
        }
    }

    /// A new client on a node, not connected.
    pub fn add_client(&mut self, node: usize) -> usize {
        let (at, counted) = (None, false);
        self.clients.push(Client { node, at, counted });
        self.clients.len() - 1
    }

    /// Connects a client to an endpoint, whatever the rule says.
    pub fn put(&mut self, client: usize, endpoint: usize, counted: bool) {
        let node = &mut self.nodes[self.clients[client].node];
        node.own[endpoint] += u64::from(counted);
        self.endpoints[endpoint].total += 1;
        (self.clients[client].at, self.clients[client].counted) = (Some(endpoint), counted);
    }

    pub fn connect_within(&mut self, client: usize, within: Ms) {
        let at = self.now + self.random.below(within.max(1));
        self.push(at, Event::Connect(client));
    }

    pub fn clients_of(&self, endpoint: usize) -> Vec<usize> {
        let here = |client: &usize| self.clients[*client].at == Some(endpoint);
        (0..self.clients.len()).filter(here).collect()
    }

    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// The client closes its connection.
    pub fn leave(&mut self, client: usize) {
        let Client { node, at, counted } = self.clients[client];
        if let Some(endpoint) = at {
            self.endpoints[endpoint].total -= 1;
            self.nodes[node].own[endpoint] -= u64::from(counted);
            self.clients[client].at = None;
        }
    }

    /// The client leaves, and connects again within that time; it leaves first or, told to move,
    /// when the new connection is there.
    pub fn again(&mut self, client: usize, within: Ms, told: bool) {
        let at = self.now + self.random.below(within.max(1));
        self.push(
            at,
            if told {
                Event::Leave(client)
            } else {
                Event::Again(client)
            },
        );
    }

    /// So many clients of the endpoint are published as gone from now on.
    pub fn tell(&mut self, endpoint: usize, clients: u64) {
        self.endpoints[endpoint].told += clients;
    }

    /// The node's agent begins anew: connections that there are have no storage.
    pub fn restart_agent(&mut self, node: usize) {
        for client in self.clients.iter_mut().filter(|client| client.node == node) {
            client.counted = false;
        }
        self.nodes[node].own.fill(0);
        self.nodes[node].memory = GroupMemory::default();
        self.learn(node);
    }

    pub fn without_agent(&mut self, node: usize) {
        self.nodes[node].has_agent = false;
    }

    /// Time goes on.
    pub fn run(&mut self, for_ms: Ms) {
        let until = self.now + for_ms;
        while let Some(Reverse((at, _, event))) = self.events.peek().copied()
            && at <= until
        {
            self.events.pop();
            self.now = at;
            self.happen(event);
        }
        self.now = until;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Report(endpoint) => self.report(endpoint),
            Event::Tick(node, again) => {
                self.learn(node);
                if again {
                    self.push(self.now + TICK, event);
                }
            }
            Event::Leave(client) => self.replace(client),
            Event::Again(client) => {
                self.leave(client);
                self.connect(client);
            }
            Event::Withdraw(endpoint) => self.withdraw(endpoint),
            Event::Connect(client) => self.connect(client),
        }
    }

    fn report(&mut self, index: usize) {
        let endpoint = &mut self.endpoints[index];
        if endpoint.alive {
            let connections = endpoint.total.saturating_sub(endpoint.told);
            endpoint.reports.push((self.now, connections));
            // A tenth earlier or later.
            let jitter = self.random.below(self.period / 5);
            self.push(
                self.now + self.period * 9 / 10 + jitter,
                Event::Report(index),
            );
        }
    }

    /// A client that was told to move leaves its old endpoint when the new connection is there.
    fn replace(&mut self, client: usize) {
        let Client { node, at, counted } = self.clients[client];
        self.connect(client);
        if let Some(old) = at {
            let endpoint = &mut self.endpoints[old];
            endpoint.total -= 1;
            endpoint.told = endpoint.told.saturating_sub(1);
            self.nodes[node].own[old] -= u64::from(counted);
        }
    }

    /// The daemon of a node computes.
    fn learn(&mut self, node: usize) {
        let nodes = self.nodes.len();
        let members: Vec<usize> = (0..self.endpoints.len())
            .filter(|index| self.endpoints[*index].ready)
            .collect();
        let now = self.now;
        let this = &mut self.nodes[node];
        if this.members != members {
            this.plan = plan(&members, &self.endpoints, (node, nodes));
            this.members = members;
        }
        for (member, endpoint) in this.members.iter().zip(&mut this.plan.endpoints) {
            endpoint.published = heard(&self.endpoints[*member].reports, node, now);
        }
        let own: Vec<u64> = this.members.iter().map(|index| this.own[*index]).collect();
        this.knowledge = this
            .memory
            .know(&this.plan, &own, Duration::from_millis(now));
    }

    fn connect(&mut self, client: usize) {
        let chosen = self.choose(self.clients[client].node);
        let Some(endpoint) = chosen else {
            self.clients[client].at = None;
            return self.connect_later(client);
        };
        let now = ticks(self.now * 1_000_000);
        if self.endpoints[endpoint].alive {
            let counted = self.nodes[self.clients[client].node].has_agent;
            self.put(client, endpoint, counted);
        } else {
            let word = &mut self.nodes[self.clients[client].node].avoidance[endpoint];
            *word = avoidance::after_failure(*word, now);
            self.clients[client].at = None;
            self.connect_later(client);
        }
    }

    fn connect_later(&mut self, client: usize) {
        let at = self.now + 100 + self.random.below(900);
        self.push(at, Event::Connect(client));
    }

    fn choose(&mut self, node: usize) -> Option<usize> {
        let now = ticks(self.now * 1_000_000);
        let nodes = self.nodes.len();
        let node = &mut self.nodes[node];
        let has_agent = node.has_agent;
        let seen: Vec<Seen> = node
            .members
            .iter()
            .zip(&node.knowledge.others)
            .map(|(member, others)| Seen {
                own: node.own[*member],
                others: *others,
                weight: self.endpoints[*member].weight.into(),
                avoided: has_agent && avoidance::is_avoided(node.avoidance[*member], now),
            })
            .collect();
        let own: u64 = seen.iter().map(|one| one.own).sum();
        if own < node.knowledge.lost_below {
            node.own_only_until = self.now + choice::OWN_ONLY_NS / 1_000_000;
        }
        let goes_by = rules::Node {
            seen: &seen,
            own_only: self.now < node.own_only_until,
            knowledge: &node.knowledge,
            draws: node.draws,
            nodes,
        };
        let rule = if has_agent { self.rule } else { Rule::Random };
        let index = goes_by.choose(rule, &mut self.random)?;
        node.draws += 1;
        Some(node.members[index])
    }

    /// How uneven the connections are among those that are ready.
    pub fn unevenness(&self) -> Unevenness {
        let ready = || self.endpoints.iter().filter(|one| one.ready);
        let connections: u64 = ready().map(|one| one.total).sum();
        let weights: u32 = ready().map(|one| one.weight).sum();
        let of_share = |one: &Endpoint| {
            let share = connections as f64 * f64::from(one.weight) / f64::from(weights);
            (one.total as f64 - share, one.total as f64 / share.max(1e-9))
        };
        let most = |value: fn((f64, f64)) -> f64| {
            ready().map(of_share).map(value).fold(f64::MIN, f64::max)
        };
        let apart = most(|(apart, _)| apart) + most(|(apart, _)| -apart);
        Unevenness {
            apart,
            max_by_mean: most(|(_, by_mean)| by_mean),
        }
    }
}

/// How uneven endpoints are.
#[derive(Clone, Copy, Debug)]
pub struct Unevenness {
    /// The most connections above the share, and the most below it, added up: max - min, with
    /// equal weights.
    pub apart: f64,
    /// The largest multiple of the share.
    pub max_by_mean: f64,
}

impl Node {
    fn new() -> Self {
        Self {
            own: Vec::new(),
            avoidance: Vec::new(),
            memory: GroupMemory::default(),
            members: Vec::new(),
            plan: GroupPlan {
                name: String::new(),
                frontends: Vec::new(),
                own_addresses: Vec::new(),
                endpoints: Vec::new(),
                rank: (0, 1),
                heard: None,
            },
            knowledge: GroupKnowledge {
                level: 0,
                start: 0,
                known_for: None,
                lost_below: 0,
                others: Vec::new(),
            },
            draws: 0,
            own_only_until: 0,
            has_agent: true,
        }
    }
}

fn plan(members: &[usize], endpoints: &[Endpoint], rank: (usize, usize)) -> GroupPlan {
    let endpoint = |index: &usize| EndpointPlan {
        name: format!("oap-{index}"),
        v4: None,
        v6: None,
        port: 11800,
        node: None,
        weight: endpoints[*index].weight,
        published: None,
    };
    let number = |number| u32::try_from(number).unwrap();
    GroupPlan {
        name: "agents".to_owned(),
        frontends: Vec::new(),
        own_addresses: Vec::new(),
        endpoints: members.iter().map(endpoint).collect(),
        rank: (number(rank.0), number(rank.1)),
        heard: Some(Duration::ZERO),
    }
}

/// The newest publication that has arrived at a node.
fn heard(reports: &[(Ms, u64)], node: usize, now: Ms) -> Option<PublishedTotal> {
    let arrived = |(at, _): &&(Ms, u64)| {
        // Each on a way of its own, the same at every look.
        let way = Random(*at ^ (node as u64) << 40).below(ON_THE_WAY.1);
        at + ON_THE_WAY.0 + way <= now
    };
    let (at, connections) = reports.iter().rev().find(arrived)?;
    Some(PublishedTotal {
        connections: *connections,
        age: Duration::from_millis(now - at),
    })
}
