//! A cluster, simulated: nodes that plan for their backends by counts which are seconds old, and
//! clients that come back with their next call.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use balancer_common::place::choice::{Draw, Seen, Sum};

use super::random::Random;
use crate::place::{EndpointPlan, GroupKnowledge, GroupMemory, GroupPlan, PublishedTotal};
use crate::rebalance::{
    Action, Backend, BalanceBy, Connection, Counts, Fitness, Group, Memory, Phase, Published,
    WHOLE, plan, ramp,
};

/// Milliseconds, in which all times here are.
pub type Ms = u64;

/// How often a node computes.
const TICK: Ms = 1_000;
/// How often a node looks at its connections.
const LOOKS: Ms = 5_000;
/// When a world begins: no publication is from before the start of time.
const BEGINNING: Ms = 100_000;
/// A client that leaves its old connection open has it closed for it after so long.
const CLOSED: Ms = 4_000;

/// What a client does when it is told to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It closes, and connects with its next call.
    Closes,
    /// It connects with its next call, and leaves the old connection open.
    LeavesOpen,
    /// It has one endless call and stays.
    Streams,
    /// It closes, and comes back to the same one.
    Sticks,
}

/// Where a client goes that connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placing {
    /// As nodes place by connections.
    Level,
    /// To the one with the least load, as far as its node knows.
    LeastLoad,
    /// Anywhere: without the balancer at the client's node.
    Chance,
}

#[derive(Clone, Debug)]
pub struct Client {
    node: usize,
    pub kind: Kind,
    every: Ms,
    next: Ms,
    pub load: u64,
    pub at: Option<usize>,
    cookie: u64,
    opened: Ms,
    /// It was told, and has not connected since.
    told: bool,
    /// When it was told.
    pub moves: Vec<Ms>,
}

/// A connection that its client has left open.
struct Left {
    client: usize,
    server: usize,
    cookie: u64,
    opened: Ms,
    until: Ms,
}

pub struct Server {
    weight: u32,
    pub phase: Phase,
    pub limit: Option<u64>,
    pub fitness: Fitness,
    node: usize,
    exists: bool,
    published: Option<(Ms, Published)>,
    next_publication: Ms,
    looked_at: Vec<Connection>,
}

struct Node {
    memory: Memory,
    place: GroupMemory,
    knowledge: Option<GroupKnowledge>,
    members: Vec<usize>,
    draws: u64,
    /// What it has sent where, and when.
    sent: Vec<(Ms, usize, u64)>,
}

/// How a cluster works.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub nodes: usize,
    pub placing: Placing,
    pub balance_by: BalanceBy,
    pub slow_start: Ms,
    /// How often nodes publish.
    pub period: Ms,
    /// How many addresses the clients have together.
    pub addresses: usize,
}

pub struct World {
    pub now: Ms,
    pub random: Random,
    pub settings: Settings,
    pub servers: Vec<Server>,
    pub clients: Vec<Client>,
    /// Whether anything is moved.
    pub is_on: bool,
    nodes: Vec<Node>,
    left: Vec<Left>,
    cookies: u64,
}

impl World {
    pub fn new(settings: Settings, weights: &[u32], seed: u64) -> Self {
        let node = |_| Node {
            memory: Memory::default(),
            place: GroupMemory::default(),
            knowledge: None,
            members: Vec::new(),
            draws: 0,
            sent: Vec::new(),
        };
        let mut world = Self {
            now: BEGINNING,
            random: Random(seed << 32),
            settings,
            servers: Vec::new(),
            clients: Vec::new(),
            is_on: false,
            nodes: (0..settings.nodes).map(node).collect(),
            left: Vec::new(),
            cookies: 0,
        };
        for weight in weights {
            world.add_server(*weight);
        }
        world
    }

    pub fn add_server(&mut self, weight: u32) -> usize {
        let first = self.now + self.random.below(self.settings.period);
        self.servers.push(Server {
            weight,
            phase: Phase::Ready,
            limit: None,
            fitness: Fitness::Serves,
            node: self.servers.len() % self.settings.nodes,
            exists: true,
            published: None,
            next_publication: first,
            looked_at: Vec::new(),
        });
        self.servers.len() - 1
    }

    /// It ends; who is still there loses the connection, and comes back with the next call.
    pub fn end(&mut self, server: usize) {
        self.servers[server].exists = false;
        for client in self.clients.iter_mut().filter(|one| one.at == Some(server)) {
            client.at = None;
        }
        self.left.retain(|left| left.server != server);
    }

    pub fn add_client(&mut self, kind: Kind, every: Ms, load: u64) {
        let next = self.now + self.random.below(every);
        self.clients.push(Client {
            node: self.random.index(self.settings.nodes),
            kind,
            every,
            next,
            load,
            at: None,
            cookie: 0,
            opened: 0,
            told: false,
            moves: Vec::new(),
        });
    }

    pub fn put(&mut self, client: usize, server: usize) {
        self.cookies += 1;
        let one = &mut self.clients[client];
        (one.at, one.cookie, one.opened, one.told) = (Some(server), self.cookies, self.now, false);
    }

    pub fn run(&mut self, for_ms: Ms) {
        let until = self.now + for_ms;
        while self.now < until {
            self.publish();
            let first = self.random.index(self.nodes.len());
            for node in 0..self.nodes.len() {
                let node = (first + node) % self.nodes.len();
                self.learn(node);
                self.rebalance(node);
            }
            self.call();
            self.now += TICK;
        }
    }

    /// Clients call whose time has come.
    fn call(&mut self) {
        let end = self.now + TICK;
        let mut due: Vec<_> = (0..self.clients.len())
            .filter(|client| self.clients[*client].next < end)
            .map(|client| (self.clients[client].next, client))
            .collect();
        due.sort_unstable();
        for (at, client) in due {
            let one = &self.clients[client];
            let moves = one.told && one.kind != Kind::Streams;
            if moves || one.at.is_none() {
                self.connect(client, at);
            }
            let one = &mut self.clients[client];
            one.next += one.every.max(TICK);
        }
        self.left.retain(|left| left.until > end);
    }

    fn connect(&mut self, client: usize, at: Ms) {
        let old = self.clients[client].clone();
        let chosen = match old.kind {
            Kind::Sticks => old.at.or_else(|| self.choose(old.node)),
            _ => self.choose(old.node),
        };
        if old.kind == Kind::LeavesOpen
            && let Some(server) = old.at
        {
            self.left.push(Left {
                client,
                server,
                cookie: old.cookie,
                opened: old.opened,
                until: at + CLOSED,
            });
        }
        self.clients[client].at = None;
        if let Some(server) = chosen {
            self.put(client, server);
            self.nodes[old.node].sent.push((self.now, server, old.load));
        }
    }

    /// Those that have told connections and close at once hold none until their next call.
    fn holds(client: &Client) -> bool {
        client.at.is_some() && !(client.told && matches!(client.kind, Kind::Closes | Kind::Sticks))
    }

    fn connections(&self, server: usize) -> Vec<Connection> {
        let held = self.clients.iter().enumerate();
        let held = held.filter(|(_, one)| one.at == Some(server) && Self::holds(one));
        let connection = |(client, cookie, opened, load): (usize, u64, Ms, u64)| Connection {
            cookie,
            client: address(client % self.settings.addresses),
            opened: ms(opened),
            load,
            is_movable: true,
        };
        let held = held.map(|(index, one)| (index, one.cookie, one.opened, one.load));
        let left = self.left.iter().filter(|left| left.server == server);
        let left = left.map(|left| (left.client, left.cookie, left.opened, 0));
        held.chain(left).map(connection).collect()
    }

    /// All daemons start anew.
    pub fn restart_daemons(&mut self) {
        for node in &mut self.nodes {
            node.memory = Memory::default();
        }
    }

    /// Those that are ready, with their weights.
    pub fn ready_servers(&self) -> impl Iterator<Item = (u32, usize)> {
        let is_ready = |one: &Server| one.exists && one.phase == Phase::Ready;
        let all = self
            .servers
            .iter()
            .enumerate()
            .filter(move |(_, one)| is_ready(one));
        all.map(|(index, one)| (one.weight, index))
    }

    pub fn held(&self, server: usize) -> u64 {
        let at = |one: &&Client| one.at == Some(server) && (!one.told || one.kind == Kind::Streams);
        self.clients.iter().filter(at).count() as u64
    }

    pub fn load(&self, server: usize) -> u64 {
        let at = self
            .clients
            .iter()
            .filter(|one| one.at == Some(server) && !one.told);
        at.map(|one| one.load).sum()
    }

    fn backend(&self, index: usize, node: usize) -> Backend {
        let server = &self.servers[index];
        let counts = if server.node == node {
            Counts::Own {
                established: self.connections(index).len() as u64,
                connections: server.looked_at.clone(),
            }
        } else {
            Counts::Published(self.heard(index))
        };
        Backend {
            name: name(index),
            weight: server.weight,
            phase: server.phase,
            fitness: server.fitness,
            limit: server.limit,
            counts,
        }
    }

    fn heard(&self, index: usize) -> Published {
        let never = Published {
            age: Duration::MAX,
            ..Published::default()
        };
        let published = self.servers[index].published;
        published.map_or(never, |(at, published)| Published {
            age: ms(self.now - at),
            ..published
        })
    }

    fn publish(&mut self) {
        for index in 0..self.servers.len() {
            if self.servers[index].exists && self.servers[index].next_publication <= self.now {
                let backend = self.backend(index, self.servers[index].node);
                let memory = &self.nodes[self.servers[index].node].memory;
                let published = memory.published(&backend, ms(self.now));
                let period = self.settings.period;
                let jitter = self.random.below(period / 5);
                let server = &mut self.servers[index];
                server.published = Some((self.now, published));
                server.next_publication = self.now + period * 9 / 10 + jitter;
            }
        }
    }

    /// What a node's clients go by.
    fn learn(&mut self, node: usize) {
        let servers = 0..self.servers.len();
        let members: Vec<usize> = servers
            .filter(|index| {
                let server = &self.servers[*index];
                server.exists && server.phase == Phase::Ready
            })
            .collect();
        let endpoints = members.iter().map(|index| EndpointPlan {
            name: name(*index),
            v4: None,
            v6: None,
            port: 11800,
            node: None,
            weight: self.grown_weight(*index, node),
            published: self.servers[*index]
                .published
                .map(|(at, published)| PublishedTotal {
                    connections: published.held,
                    age: ms(self.now - at),
                }),
        });
        let number = |number| u32::try_from(number).unwrap();
        let group = GroupPlan {
            name: "agents".to_owned(),
            frontends: Vec::new(),
            own_addresses: Vec::new(),
            endpoints: endpoints.collect(),
            rank: (number(node), number(self.settings.nodes)),
            heard: Some(Duration::ZERO),
        };
        let own: Vec<u64> = members.iter().map(|index| self.own(node, *index)).collect();
        let now = self.now;
        let this = &mut self.nodes[node];
        this.knowledge = Some(this.place.know(&group, &own, ms(now)));
        this.members = members;
        this.sent.retain(|(at, ..)| at + 20_000 > now);
    }

    fn grown_weight(&self, index: usize, node: usize) -> u32 {
        let age = self.nodes[node]
            .memory
            .ready_for(&name(index), ms(self.now));
        let grown = ramp(age, ms(self.settings.slow_start));
        self.servers[index].weight * u32::try_from(grown * 10 / WHOLE).unwrap()
    }

    /// Connections of a node's clients.
    fn own(&self, node: usize, server: usize) -> u64 {
        let is_own = |one: &&Client| one.node == node && one.at == Some(server) && Self::holds(one);
        self.clients.iter().filter(is_own).count() as u64
    }

    fn choose(&mut self, node: usize) -> Option<usize> {
        let members = self.nodes[node].members.clone();
        let is_there = |index: &usize| self.servers[*index].exists;
        let members: Vec<usize> = members.into_iter().filter(is_there).collect();
        match self.settings.placing {
            Placing::Level => self.by_level(node),
            Placing::LeastLoad => {
                let sum: u64 = members.iter().map(|index| self.known(node, *index).0).sum();
                let most = sum * 11 / (10 * members.len() as u64);
                let load = |index: &usize| {
                    let (held, load) = self.known(node, *index);
                    (held > most, load)
                };
                members.into_iter().min_by_key(load)
            }
            Placing::Chance => {
                let weights = members
                    .iter()
                    .map(|index| u64::from(self.servers[*index].weight));
                let mut point = self.random.below(weights.sum());
                members.into_iter().find(|index| {
                    let weight = u64::from(self.servers[*index].weight);
                    let is_it = point < weight;
                    point = point.saturating_sub(weight);
                    is_it
                })
            }
        }
    }

    /// Connections and load by weight of a server, as far as a node knows.
    fn known(&self, node: usize, index: usize) -> (u64, u64) {
        let server = &self.servers[index];
        let (at, known) = server.published.unwrap_or_default();
        let sent = self.nodes[node].sent.iter();
        let sent = sent.filter(|(when, to, _)| *to == index && *when >= at);
        let (mut held, mut load) = (known.held, known.load);
        for (.., sent) in sent {
            held += 1;
            load += sent;
        }
        let weight = u64::from(server.weight);
        (held * 1_000 / weight, load * 1_000 / weight)
    }

    /// As the kernel half does.
    fn by_level(&mut self, node: usize) -> Option<usize> {
        let knowledge = self.nodes[node].knowledge.clone()?;
        let members = self.nodes[node].members.clone();
        let seen: Vec<Seen> = members
            .iter()
            .zip(&knowledge.others)
            .map(|(index, others)| Seen {
                own: self.own(node, *index),
                others: *others,
                weight: self.grown_weight(*index, node).into(),
                avoided: !self.servers[*index].exists,
            })
            .collect();
        let mut sum = Sum::EMPTY;
        for one in &seen {
            sum.add(knowledge.level, one);
        }
        let draws = self.nodes[node].draws;
        let mut draw = Draw::new(&sum, knowledge.level, knowledge.start, draws);
        for (index, one) in (0..).zip(&seen) {
            draw.look(index, one);
        }
        self.nodes[node].draws += 1;
        draw.chosen().map(|index| members[index as usize])
    }

    /// A node plans, and tells.
    fn rebalance(&mut self, node: usize) {
        for index in 0..self.servers.len() {
            if self.servers[index].node == node && self.is_to_be_looked_at(index, node) {
                self.servers[index].looked_at = self.connections(index);
            }
        }
        let existing = (0..self.servers.len()).filter(|index| self.servers[*index].exists);
        let group = Group {
            is_on: self.is_on,
            balance_by: self.settings.balance_by,
            slow_start: ms(self.settings.slow_start),
            are_refused: false,
            unheard_for: Duration::ZERO,
            backends: existing.map(|index| self.backend(index, node)).collect(),
        };
        let now = self.now;
        self.nodes[node].memory.note(&group, ms(now));
        for decision in plan(&group, &self.nodes[node].memory, ms(now)) {
            if let Action::Shed { cookies, .. } = decision.action {
                for cookie in cookies {
                    self.tell(node, &group, &decision.backend, cookie);
                }
            }
        }
    }

    fn is_to_be_looked_at(&self, index: usize, node: usize) -> bool {
        let backend = self.backend(index, node);
        let published = self.nodes[node].memory.published(&backend, ms(self.now));
        self.now.is_multiple_of(LOOKS) || published.moving > 0
    }

    fn tell(&mut self, node: usize, group: &Group, backend: &str, cookie: u64) {
        let lists = group.backends.iter().filter_map(|one| match &one.counts {
            Counts::Own { connections, .. } => Some(connections),
            Counts::Published(_) => None,
        });
        let connection = *lists.flatten().find(|one| one.cookie == cookie).unwrap();
        let there = self
            .clients
            .iter_mut()
            .find(|one| one.cookie == cookie && one.at.is_some());
        // It may have gone since it was looked at.
        if let Some(client) = there.filter(|client| !client.told) {
            self.nodes[node]
                .memory
                .told(backend, &connection, ms(self.now));
            client.told = true;
            client.moves.push(self.now);
        }
    }
}

pub fn name(server: usize) -> String {
    format!("oap-{server:02}")
}

fn address(client: usize) -> IpAddr {
    Ipv4Addr::from_bits(0x0A00_0000 + u32::try_from(client).unwrap()).into()
}

fn ms(ms: Ms) -> Duration {
    Duration::from_millis(ms)
}
