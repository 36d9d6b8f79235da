//! Rules to choose by: the one that is taken, and those that it was compared with.

use balancer_common::abi::EndpointGroup;
use balancer_common::place::choice::{Draw, Seen, Sum, point};

use super::random::Random;
use crate::place::GroupKnowledge;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Any, by weight.
    Random,
    /// The least loaded as far as is known.
    LeastKnown,
    /// The less loaded of two.
    TwoChoices,
    /// The one with the fewest connections of the node itself, then the least loaded.
    OwnFirst,
    /// The node's own, and of what is known its part of the deviation from the mean.
    OwnAndDeviation,
    /// By lot, in proportion to the room below the water level.
    LevelByLot,
    /// As `LevelByLot`, among those with the fewest of the node itself.
    LevelOwnFirst,
    /// As `LevelOwnFirst`, drawn by rank.
    OwnFirstByRank,
    /// What the kernel half does.
    LevelByRank,
}

impl Rule {
    pub const ALL: [Self; 9] = [
        Self::Random,
        Self::LeastKnown,
        Self::TwoChoices,
        Self::OwnFirst,
        Self::OwnAndDeviation,
        Self::LevelByLot,
        Self::LevelOwnFirst,
        Self::OwnFirstByRank,
        Self::LevelByRank,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::LeastKnown => "least known",
            Self::TwoChoices => "two choices",
            Self::OwnFirst => "own first",
            Self::OwnAndDeviation => "own and deviation",
            Self::LevelByLot => "level by lot",
            Self::LevelOwnFirst => "level, own first",
            Self::OwnFirstByRank => "by rank, own first",
            Self::LevelByRank => "**level by rank**",
        }
    }
}

/// What a node goes by.
pub struct Node<'a> {
    pub seen: &'a [Seen],
    pub knowledge: &'a GroupKnowledge,
    /// It has lost most of its connections.
    pub own_only: bool,
    /// Its draws until now.
    pub draws: u64,
    pub nodes: usize,
}

impl Node<'_> {
    /// The endpoint to connect to.
    pub fn choose(&self, rule: Rule, random: &mut Random) -> Option<usize> {
        match rule {
            Rule::LevelByRank => self.as_in_the_kernel(),
            Rule::Random => by_lot(&self.all(|one| one.weight as f64), random),
            Rule::LeastKnown => self.least(load, random),
            Rule::TwoChoices => {
                let weights = self.all(|one| one.weight as f64);
                let first = by_lot(&weights, random)?;
                let mut others = weights;
                others[first] = 0.0;
                let second = by_lot(&others, random).unwrap_or(first);
                let is_less = load(&self.seen[second]) < load(&self.seen[first]);
                Some(if is_less { second } else { first })
            }
            Rule::OwnFirst => self.least(|one| own(one) * 1e6 + load(one), random),
            Rule::OwnAndDeviation => {
                let loads = self.all(load);
                let mean = loads.iter().sum::<f64>() / self.count().max(1) as f64;
                let lots = self.all(|_| random.fraction());
                let lot_of = |one: &Seen| {
                    let index = self.seen.iter().position(|other| std::ptr::eq(one, other));
                    lots[index.unwrap()] / one.weight as f64
                };
                let deviation = |one: &Seen| (load(one) - mean) / self.nodes as f64;
                let mut random = Random(0);
                self.least(|one| own(one) + lot_of(one) + deviation(one), &mut random)
            }
            Rule::LevelByLot => by_lot(&self.rooms(), random),
            Rule::LevelOwnFirst => by_lot(&self.rooms_of_fewest(), random),
            Rule::OwnFirstByRank => {
                let rooms = self.rooms_of_fewest();
                let left_out = rooms.iter().filter(|room| **room <= 0.0).count();
                let left_out = u32::try_from(left_out).unwrap();
                let point = point(left_out, self.knowledge.start, self.draws);
                at(&rooms, point as f64 / 4_294_967_296.0)
            }
        }
    }

    fn as_in_the_kernel(&self) -> Option<usize> {
        let GroupKnowledge { level, start, .. } = *self.knowledge;
        let mut sum = Sum::EMPTY;
        for one in self.seen {
            sum.add(level, one);
        }
        let mut draw = if self.own_only {
            Draw::by_own(&sum, start, self.draws)
        } else {
            Draw::new(&sum, level, start, self.draws)
        };
        for (index, one) in (0..).zip(self.seen) {
            draw.look(index, one);
        }
        draw.chosen().map(|index| index as usize)
    }

    /// Whether an endpoint may be chosen.
    fn may(&self, one: &Seen) -> bool {
        let all_avoided = self.seen.iter().all(|one| one.avoided || one.weight == 0);
        one.weight > 0 && (!one.avoided || all_avoided)
    }

    fn count(&self) -> usize {
        self.seen.iter().filter(|one| self.may(one)).count()
    }

    /// A value of each that may be chosen, 0 of the others.
    fn all(&self, mut value: impl FnMut(&Seen) -> f64) -> Vec<f64> {
        let value = |one: &Seen| if self.may(one) { value(one) } else { 0.0 };
        self.seen.iter().map(value).collect()
    }

    /// Room below the level; where nobody has any, below the most loaded; else by weight.
    fn rooms(&self) -> Vec<f64> {
        let below = |level: f64| self.all(|one| ((level - load(one)) * one.weight as f64).max(0.0));
        let most = self.all(load).into_iter().fold(0.0, f64::max);
        let level = self.knowledge.level as f64 / EndpointGroup::LOAD_ONE as f64;
        let has_room = |rooms: &Vec<f64>| rooms.iter().sum::<f64>() > 0.01;
        let levels = [level, most, most + 1.0];
        let rooms = levels.map(below).into_iter().find(has_room);
        rooms.unwrap_or_else(|| vec![0.0; self.seen.len()])
    }

    /// The rooms of those with the fewest connections of the node itself.
    fn rooms_of_fewest(&self) -> Vec<f64> {
        let mut rooms = self.rooms();
        let with_room = self
            .seen
            .iter()
            .zip(&rooms)
            .filter(|(_, room)| **room > 0.0);
        let fewest = with_room.map(|(one, _)| own(one)).fold(f64::MAX, f64::min);
        for (room, one) in rooms.iter_mut().zip(self.seen) {
            *room *= f64::from(own(one) < fewest + 1.0);
        }
        rooms
    }

    /// The one with the least value; by lot among equals.
    fn least(&self, value: impl Fn(&Seen) -> f64, random: &mut Random) -> Option<usize> {
        let candidates = || (0..self.seen.len()).filter(|index| self.may(&self.seen[*index]));
        let values = candidates().map(|index| value(&self.seen[index]));
        let least = values.fold(f64::MAX, f64::min);
        let equals: Vec<_> = candidates()
            .filter(|index| value(&self.seen[*index]) <= least)
            .collect();
        let index = random.index(equals.len().max(1));
        equals.get(index).copied()
    }
}

/// In proportion to the weights.
fn by_lot(weights: &[f64], random: &mut Random) -> Option<usize> {
    at(weights, random.fraction())
}

/// At a point of 0..1.
fn at(weights: &[f64], point: f64) -> Option<usize> {
    let mut left = point * weights.iter().sum::<f64>();
    let mut chosen = None;
    for (index, weight) in weights.iter().enumerate() {
        if *weight > 0.0 && (chosen.is_none() || left >= 0.0) {
            chosen = Some(index);
            left -= weight;
        }
    }
    chosen
}

fn load(one: &Seen) -> f64 {
    (one.own + one.others) as f64 / one.weight as f64
}

fn own(one: &Seen) -> f64 {
    one.own as f64 / one.weight as f64
}
