//! What happens to a cluster.

use super::random::Random;
use super::rules::Rule;
use super::world::{Ms, Unevenness, World, period};

/// On which nodes the clients are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// As many on each.
    Even,
    /// Each on a random one.
    Random,
    /// Each on a random one, of which the largest has a hundred times as many as the smallest.
    Uneven,
}

/// How large a cluster is.
#[derive(Clone, Debug)]
pub struct Size {
    pub weights: Vec<u32>,
    pub nodes: usize,
    pub clients: usize,
    pub spread: Spread,
    /// How often endpoints publish, if not as befits the number of nodes.
    pub period: Option<Ms>,
}

impl Size {
    pub fn new(endpoints: usize, nodes: usize, clients: usize, spread: Spread) -> Self {
        Self {
            weights: vec![1; endpoints],
            nodes,
            clients,
            spread,
            period: None,
        }
    }

    fn period(&self) -> Ms {
        self.period.unwrap_or(period(self.nodes))
    }

    /// Until everybody knows what there is.
    fn settles(&self) -> Ms {
        2 * self.period() + 2_000
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Story {
    Storm,
    Arrivals,
    Drained,
    DrainedUneven,
    DrainedSlowly,
    Crash,
    StormThenDrained,
    StormThenCrash,
    RollOut,
    ExcessAsGone,
    ExcessStillCounted,
    AllAsGone,
    AllStillCounted,
    AgentsRestart,
    Churn,
    Anew,
    Burst,
    Fewer,
    Unguarded,
}

impl Story {
    pub const ALL: [Self; 19] = [
        Self::Storm,
        Self::Arrivals,
        Self::Drained,
        Self::DrainedUneven,
        Self::DrainedSlowly,
        Self::Crash,
        Self::StormThenDrained,
        Self::StormThenCrash,
        Self::RollOut,
        Self::ExcessAsGone,
        Self::ExcessStillCounted,
        Self::AllAsGone,
        Self::AllStillCounted,
        Self::AgentsRestart,
        Self::Churn,
        Self::Anew,
        Self::Burst,
        Self::Fewer,
        Self::Unguarded,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Storm => "all connect within 0.2 s",
            Self::Arrivals => "all connect within 120 s",
            Self::Drained => "one is withdrawn and ends, clients back in 0.2 s",
            Self::DrainedUneven => "the same, the others uneven before",
            Self::DrainedSlowly => "the same, clients back in 10 s",
            Self::Crash => "one ends, noticed after 1.5 s; the others uneven",
            Self::StormThenDrained => "a storm, then one is withdrawn and ends",
            Self::StormThenCrash => "a storm, then one ends, noticed after 1.5 s",
            Self::RollOut => "each is replaced, one after the other",
            Self::ExcessAsGone => "one more, the excess told, counted as gone",
            Self::ExcessStillCounted => "one more, the excess told, still counted",
            Self::AllAsGone => "one more, *everybody* told, counted as gone",
            Self::AllStillCounted => "one more, *everybody* told, still counted",
            Self::AgentsRestart => "a fifth of the agents forget all, then one ends",
            Self::Churn => "uneven, then every client connects anew twice in 2 min",
            Self::Anew => "uneven, all lose their connection, back within 3 s",
            Self::Burst => "a third more clients within 0.2 s, uneven before",
            Self::Fewer => "half of the clients go, an eighth comes within 20 s",
            Self::Unguarded => "a third of the nodes without an agent, 10 s",
        }
    }

    /// Whether the balancer never lets it come to that.
    pub const fn is_warning(self) -> bool {
        matches!(self, Self::AllAsGone | Self::AllStillCounted)
    }

    /// How uneven endpoints are afterwards.
    pub fn play(self, size: &Size, rule: Rule, seed: u64) -> Unevenness {
        let mut world = World::new(rule, size.nodes, &size.weights, seed);
        world.publish_every(size.period());
        populate(&mut world, size, seed);
        world.run(size.period() + 2_000);
        self.happen(&mut world, size);
        world.unevenness()
    }

    fn happen(self, world: &mut World, size: &Size) {
        let last = size.weights.len() - 1;
        match self {
            Self::Storm => connect_all(world, 200),
            Self::Arrivals => connect_all(world, 120_000),
            Self::Drained => {
                place_evenly(world, size);
                withdraw_and_end(world, last, 200);
            }
            Self::DrainedUneven | Self::DrainedSlowly => {
                place_at_random(world, size);
                let slowly = self == Self::DrainedSlowly;
                withdraw_and_end(world, last, if slowly { 10_000 } else { 200 });
            }
            Self::Crash => {
                place_at_random(world, size);
                world.end(last, 200, 1_500);
            }
            Self::StormThenDrained | Self::StormThenCrash => {
                connect_all(world, 200);
                world.run(size.settles());
                if self == Self::StormThenDrained {
                    withdraw_and_end(world, last, 200);
                } else {
                    world.end(last, 200, 1_500);
                }
            }
            Self::RollOut => roll_out(world, size),
            Self::ExcessAsGone | Self::ExcessStillCounted => {
                scale_out(world, size, false, self == Self::ExcessAsGone);
            }
            Self::AllAsGone | Self::AllStillCounted => {
                scale_out(world, size, true, self == Self::AllAsGone);
            }
            Self::AgentsRestart => {
                place_at_random(world, size);
                for node in (0..size.nodes).step_by(5) {
                    world.restart_agent(node);
                }
                world.run(1_500);
                world.end(last, 200, 0);
            }
            Self::Churn => churn(world, size),
            Self::Anew => {
                place_at_random(world, size);
                for client in 0..world.clients() {
                    world.leave(client);
                }
                connect_all(world, 3_000);
            }
            Self::Burst => burst(world, size),
            Self::Fewer => fewer(world, size),
            Self::Unguarded => {
                for node in (0..size.nodes).step_by(3) {
                    world.without_agent(node);
                }
                connect_all(world, 10_000);
            }
        }
        world.run(size.settles() + 3_000);
    }
}

fn populate(world: &mut World, size: &Size, seed: u64) {
    let mut random = Random(seed ^ 0xC11E_5715);
    let share = |node: u64| match size.spread {
        Spread::Uneven => (1 + node * 7 % 10).pow(2),
        Spread::Even | Spread::Random => 1,
    };
    let shares: Vec<u64> = (0..size.nodes as u64).map(share).collect();
    let sum: u64 = shares.iter().sum();
    for client in 0..size.clients {
        let mut left = random.below(sum);
        let drawn = shares.iter().position(|share| {
            let is_it = left < *share;
            left = left.saturating_sub(*share);
            is_it
        });
        world.add_client(match size.spread {
            Spread::Even => client % size.nodes,
            Spread::Random | Spread::Uneven => drawn.unwrap(),
        });
    }
}

fn connect_all(world: &mut World, within: Ms) {
    for client in 0..world.clients() {
        world.connect_within(client, within);
    }
    world.run(within);
}

/// The endpoints, each as often as its weight says.
fn by_weight(size: &Size) -> Vec<usize> {
    let weights = size.weights.iter().enumerate();
    let each = weights.flat_map(|(endpoint, weight)| (0..*weight).map(move |_| endpoint));
    each.collect()
}

/// As without the balancer.
fn place_at_random(world: &mut World, size: &Size) {
    let endpoints = by_weight(size);
    for client in 0..world.clients() {
        let endpoint = endpoints[world.random.index(endpoints.len())];
        world.put(client, endpoint, true);
    }
    world.run(size.settles());
}

/// The share of each on it, from any nodes.
fn place_evenly(world: &mut World, size: &Size) {
    let mut clients: Vec<usize> = (0..world.clients()).collect();
    for index in (1..clients.len()).rev() {
        let other = world.random.index(index + 1);
        clients.swap(index, other);
    }
    for (client, endpoint) in clients.into_iter().zip(by_weight(size).into_iter().cycle()) {
        world.put(client, endpoint, true);
    }
    world.run(size.settles());
}

fn withdraw_and_end(world: &mut World, endpoint: usize, within: Ms) {
    world.withdraw(endpoint);
    world.run(1_000);
    world.end(endpoint, within, 0);
    world.run(within);
}

fn roll_out(world: &mut World, size: &Size) {
    place_at_random(world, size);
    for (endpoint, weight) in size.weights.iter().enumerate() {
        world.add_endpoint(*weight);
        world.run(5_000);
        withdraw_and_end(world, endpoint, 500);
        world.run(20_000);
    }
}

/// One more endpoint; clients are told to move, all or those above the new mean.
fn scale_out(world: &mut World, size: &Size, everybody: bool, as_gone: bool) {
    place_evenly(world, size);
    world.add_endpoint(1);
    world.run(size.period() + 3_000);
    let weights = by_weight(size).len() + 1;
    let mut told = Vec::new();
    for endpoint in 0..size.weights.len() {
        let clients = world.clients_of(endpoint);
        let share = world.clients() * size.weights[endpoint] as usize / weights;
        let stay = if everybody {
            0
        } else {
            share.min(clients.len())
        };
        let moved = clients.len() - stay;
        let first = world.random.index(stay + 1);
        if as_gone {
            world.tell(endpoint, moved as u64);
        }
        told.extend(clients.into_iter().skip(first).take(moved));
    }
    if as_gone {
        world.run(size.period() * 11 / 10 + 1_500);
    }
    for client in told {
        world.again(client, 2_000, true);
    }
    world.run(2_000);
}

fn churn(world: &mut World, size: &Size) {
    place_at_random(world, size);
    for _ in 0..2 {
        again_within(world, 60_000);
    }
}

fn again_within(world: &mut World, within: Ms) {
    for client in 0..world.clients() {
        world.again(client, within, false);
    }
    world.run(within);
}

/// Clients come of whom nobody has known.
fn burst(world: &mut World, size: &Size) {
    let endpoints = by_weight(size);
    for client in (0..world.clients()).filter(|client| client % 4 != 0) {
        let endpoint = endpoints[world.random.index(endpoints.len())];
        world.put(client, endpoint, true);
    }
    world.run(130_000);
    for client in (0..world.clients()).step_by(4) {
        world.connect_within(client, 200);
    }
}

fn fewer(world: &mut World, size: &Size) {
    place_at_random(world, size);
    for client in (0..world.clients()).step_by(2) {
        world.leave(client);
    }
    world.run(size.settles());
    for client in (0..world.clients()).step_by(8) {
        world.connect_within(client, 20_000);
    }
    world.run(20_000);
}
