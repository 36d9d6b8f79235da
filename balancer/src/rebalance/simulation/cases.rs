//! What happens to a cluster, and what becomes of it.

use super::random::Random;
use super::world::{Kind, Ms, Placing, Settings, World};
use crate::rebalance::share::{Claim, shares};
use crate::rebalance::{BalanceBy, Phase};

/// What happens.
#[derive(Clone, Debug)]
pub enum Story {
    /// Clients are even; so many more backends become ready.
    ScaleOut(usize),
    /// Clients are even; so many backends are drained, and end when they are empty.
    Drain(usize),
    /// Clients are even; each backend ends 30 s after its pod began to, another is ready after 30 s
    /// more, and after 60 s more the next begins.
    RollingRestart,
    /// All but the last have the clients: so it is after one has come back, or after an install.
    OneEmpty,
    /// The first one has as many of ten clients, and the rest is anywhere.
    Skewed(u64),
    /// Clients are anywhere, in equal parts by chance.
    Chance,
}

/// Which clients there are, of a hundred.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mix {
    pub streams: u64,
    pub sticks: u64,
    /// They call at least so often.
    pub every: Ms,
    /// Loads are as 1, 1/2, 1/3 … to the power of 1.1; otherwise equal.
    pub zipf: bool,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub name: &'static str,
    pub story: Story,
    pub weights: Vec<u32>,
    pub clients: usize,
    pub mix: Mix,
    pub settings: Settings,
}

/// What became of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// The most by the mean, of connections or bytes: before, 2 minutes after, and in the end.
    pub before: f64,
    pub after: f64,
    pub end: f64,
    /// The most less the fewest connections by weight: 2 minutes after, and in the end.
    pub apart: f64,
    pub apart_end: f64,
    /// The most by the mean of connections, in the end, whatever should be even.
    pub numbers: f64,
    /// After how many seconds it was even for good.
    pub even_after: f64,
    /// Connections that were told, and how many had to be.
    pub moves: f64,
    pub least: f64,
    /// Clients that were told twice within the cooldown, unless a drain told them.
    pub twice: f64,
    /// Told in the last five of fifteen minutes.
    pub late: f64,
    /// Left on the backend when it ended.
    pub lost: f64,
    /// The most that were told in ten seconds, each second.
    pub fastest: f64,
}

const SEEN: Ms = 120_000;
const END: Ms = 900_000;

impl Case {
    pub fn play(&self, seed: u64) -> Outcome {
        let mut world = World::new(self.settings, &self.weights, seed);
        self.populate(&mut world, seed);
        world.run(60_000);
        let mut outcome = Outcome::default();
        let start = world.now;
        world.is_on = true;
        let lasts = self.begin(&mut world, &mut outcome);
        let began = world.now;
        outcome.before = self.unevenness(&world).0;
        outcome.least += least(&world);
        outcome.even_after = f64::NAN;
        let mut even_since = None;
        while world.now < began + END {
            world.run(1_000);
            self.finish_drain(&mut world);
            let (by_mean, apart) = self.unevenness(&world);
            let is_even = by_mean <= 1.05 || self.is_by_number() && apart <= 2.0;
            even_since = is_even.then(|| even_since.unwrap_or(world.now));
            if world.now == began + SEEN {
                (outcome.after, outcome.apart) = (by_mean, apart);
            }
        }
        (outcome.end, outcome.apart_end) = self.unevenness(&world);
        outcome.numbers = numbers(&world);
        if let Some(since) = even_since {
            outcome.even_after = (since - began) as f64 / 1_000.0;
        }
        count_moves(&world, start, lasts, &mut outcome);
        outcome
    }

    fn is_by_number(&self) -> bool {
        self.settings.balance_by == BalanceBy::Connections
    }

    fn populate(&self, world: &mut World, seed: u64) {
        let mut random = Random(seed ^ 0xC11E);
        let mut ranks: Vec<usize> = (0..self.clients).collect();
        for index in (1..ranks.len()).rev() {
            ranks.swap(index, random.index(index + 1));
        }
        for (client, rank) in ranks.into_iter().enumerate() {
            let kind = match random.below(100) {
                below if below < self.mix.streams => Kind::Streams,
                below if below < self.mix.streams + self.mix.sticks => Kind::Sticks,
                odd if odd % 2 == 1 => Kind::Closes,
                _ => Kind::LeavesOpen,
            };
            // As many call each 0.1 s as each second and each 10 s.
            let every = self.mix.every / [1, 3, 10, 30, 100][random.index(5)];
            let load = if self.mix.zipf {
                1_000_000.0 / ((rank + 1) as f64).powf(1.1)
            } else {
                1_000.0
            };
            world.add_client(kind, every.max(100), whole(load));
            let server = self.first_server(client, world.servers.len(), &mut random);
            world.put(client, server);
        }
    }

    fn first_server(&self, client: usize, servers: usize, random: &mut Random) -> usize {
        match self.story {
            Story::Skewed(of_ten) if random.below(10) < of_ten => 0,
            Story::Chance | Story::Skewed(_) => random.index(servers),
            Story::OneEmpty => client % (servers - 1),
            _ => {
                let weights = self.weights.iter().enumerate();
                let slots: Vec<usize> = weights
                    .flat_map(|(server, weight)| (0..*weight).map(move |_| server))
                    .collect();
                slots[client % slots.len()]
            }
        }
    }

    /// Returns until when clients of leaving backends were told.
    fn begin(&self, world: &mut World, outcome: &mut Outcome) -> bool {
        match self.story {
            Story::ScaleOut(more) => {
                for _ in 0..more {
                    world.add_server(1);
                }
                false
            }
            Story::Drain(fewer) => {
                for server in 0..fewer {
                    world.servers[server].phase = Phase::Draining;
                }
                true
            }
            Story::RollingRestart => {
                for server in 0..self.weights.len() {
                    outcome.least += world.held(server) as f64;
                    world.servers[server].phase = Phase::Terminating;
                    world.run(30_000);
                    outcome.lost += world.held(server) as f64;
                    world.end(server);
                    world.run(30_000);
                    world.add_server(self.weights[server]);
                    world.run(60_000);
                }
                true
            }
            Story::OneEmpty | Story::Skewed(_) | Story::Chance => {
                world.restart_daemons();
                false
            }
        }
    }

    fn finish_drain(&self, world: &mut World) {
        if let Story::Drain(fewer) = self.story {
            for server in 0..fewer {
                if world.held(server) == 0 && world.servers[server].phase == Phase::Draining {
                    world.servers[server].phase = Phase::NotReady;
                }
            }
        }
    }

    /// The most by the mean, and how far apart they are.
    fn unevenness(&self, world: &World) -> (f64, f64) {
        let of = |server| match self.settings.balance_by {
            BalanceBy::Connections => world.held(server),
            BalanceBy::Bytes => world.load(server),
        };
        by_mean_and_apart(world, of)
    }
}

/// How many must move at least: by number.
fn least(world: &World) -> f64 {
    let claims = world.ready_servers().map(|(weight, server)| Claim {
        weight: weight.into(),
        held: world.held(server),
        most: u64::MAX,
    });
    let claims: Vec<Claim> = claims.collect();
    let (mut least, mut total) = (0, 0);
    for server in 0..world.servers.len() {
        total += world.held(server);
        if world.servers[server].phase == Phase::Draining {
            least += world.held(server);
        }
    }
    for (share, claim) in shares(total, &claims).iter().zip(&claims) {
        least += claim.held.saturating_sub(*share);
    }
    least as f64
}

fn whole(load: f64) -> u64 {
    format!("{load:.0}").parse().unwrap()
}

fn numbers(world: &World) -> f64 {
    by_mean_and_apart(world, |server| world.held(server)).0
}

fn by_mean_and_apart(world: &World, of: impl Fn(usize) -> u64) -> (f64, f64) {
    let ready: Vec<_> = world.ready_servers().collect();
    let weights: f64 = ready.iter().map(|(weight, _)| f64::from(*weight)).sum();
    let sum: f64 = ready.iter().map(|(_, server)| of(*server) as f64).sum();
    let mean = sum / weights;
    let loads = || {
        ready
            .iter()
            .map(|(weight, server)| of(*server) as f64 / f64::from(*weight))
    };
    let most = loads().fold(0.0, f64::max);
    (most / mean, most - loads().fold(f64::MAX, f64::min))
}

fn count_moves(world: &World, start: Ms, by_drain: bool, outcome: &mut Outcome) {
    let mut seconds = std::collections::BTreeMap::new();
    for client in &world.clients {
        outcome.moves += client.moves.len() as f64;
        let twice = client
            .moves
            .windows(2)
            .filter(|two| two[1] < two[0] + 600_000);
        outcome.twice += if by_drain { 0.0 } else { twice.count() as f64 };
        for at in &client.moves {
            *seconds.entry((at - start) / 10_000).or_insert(0.0) += 0.1;
            outcome.late += f64::from(u8::from(at + 300_000 > world.now));
        }
    }
    outcome.fastest = seconds.into_values().fold(0.0, f64::max);
}

pub fn settings(nodes: usize, placing: Placing) -> Settings {
    Settings {
        nodes,
        placing,
        balance_by: BalanceBy::Connections,
        slow_start: 30_000,
        period: 2_000,
        addresses: usize::MAX,
    }
}
