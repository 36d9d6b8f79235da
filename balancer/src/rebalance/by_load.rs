//! Which connections make the bytes a second even.

use super::pick::{Candidates, oldest};
use super::plan::{has_far_too_many, has_too_much_load};
use super::standing::{Standing, Standings};
use super::{Connection, Fitness, Phase, Stay, Why};

/// Who takes more holds less than that part above its share of connections.
const APART: u64 = 10;
/// A move must make both ends more even by that part of the share, or it is not worth its price.
const WORTH: u64 = 50;

/// Which connections should move from a backend, at most so many.
pub fn choose(
    standings: &Standings<'_>,
    from: &Standing<'_>,
    most: u64,
    candidates: &Candidates,
) -> Result<(Vec<u64>, Why), Stay> {
    let is_too_many = has_far_too_many(standings, from);
    let is_too_much = has_too_much_load(from);
    if !is_too_many && !is_too_much {
        return Err(Stay::Even {
            held: from.load.held,
            share: from.load.share,
        });
    }
    if standings.total_load() == 0 {
        return Ok((oldest(candidates, most)?, by_number(from)));
    }
    if candidates.movable.is_empty() {
        return Err(candidates.none_movable());
    }
    let taker = Taker::of(standings, from).ok_or(Stay::NobodyTakes)?;
    let exchange = Exchange {
        from,
        taker: &taker,
    };
    if is_too_many {
        return Ok((exchange.several(most, candidates), by_number(from)));
    }
    let cookie = exchange.one(candidates)?;
    Ok((
        vec![cookie],
        Why::Load {
            load: from.load.held,
            share: from.load.share,
            taker: taker.name,
        },
    ))
}

fn by_number(from: &Standing<'_>) -> Why {
    Why::Connections {
        held: from.count.held,
        share: from.count.share,
    }
}

/// Who is expected to take what moves: the one with the most room.
struct Taker {
    name: String,
    weight: u128,
    load: u64,
    deficit: u64,
}

impl Taker {
    fn of(standings: &Standings<'_>, from: &Standing<'_>) -> Option<Self> {
        let may = |one: &&Standing<'_>| {
            one.backend.name != from.backend.name
                && one.backend.phase == Phase::Ready
                && one.backend.fitness == Fitness::Serves
                && one.count.held < one.count.share + one.count.share / APART
                && one.backend.limit.is_none_or(|limit| one.count.held < limit)
        };
        let all = standings.all.iter().filter(may);
        // Those on their way are expected where there is most room, and fill it evenly.
        let rooms: Vec<_> = all.map(|one| (one.load.deficit(), one)).collect();
        let sum: u64 = rooms.iter().map(|(room, _)| room).sum();
        let part = |room: u64| {
            let part = u128::from(standings.moving_load) * u128::from(room);
            u64::try_from(part / u128::from(sum.max(1)))
                .unwrap_or(u64::MAX)
                .min(room)
        };
        let (room, one) = rooms.into_iter().max_by_key(|(room, _)| *room)?;
        let expected = part(room);
        Some(Self {
            name: one.backend.name.clone(),
            weight: one.backend.weight.into(),
            load: one.load.held + expected,
            deficit: room - expected,
        })
    }
}

struct Exchange<'a> {
    from: &'a Standing<'a>,
    taker: &'a Taker,
}

impl Exchange<'_> {
    /// By how much the taker receives less, for its weight: a connection must be smaller.
    fn gap(&self) -> u64 {
        let weight = u128::from(self.from.backend.weight.max(1));
        let even = u128::from(self.from.load.held) * self.taker.weight / weight;
        u64::try_from(even)
            .unwrap_or(u64::MAX)
            .saturating_sub(self.taker.load)
    }

    /// How far from even the worse of both is when so much has moved.
    fn apart(&self, moved: u64) -> u64 {
        let from = self.from.load.excess().abs_diff(moved);
        from.max(self.taker.deficit.abs_diff(moved))
    }

    /// The connection that makes both even best.
    fn one(&self, candidates: &Candidates) -> Result<u64, Stay> {
        let count = self.from.count;
        // One with a very large client may hold few others, and no less than half of its share.
        if count.held.saturating_sub(1) * 2 < count.share {
            return Err(Stay::NoneFits);
        }
        let gap = self.gap();
        let smaller = candidates.movable.iter().filter(|one| one.load < gap);
        let best = smaller.min_by_key(|one| (self.apart(one.load), one.opened, one.cookie));
        let worth = self.from.load.share / WORTH;
        if let Some(best) = best
            && self.apart(best.load) + worth < self.apart(0)
        {
            return Ok(best.cookie);
        }
        let largest = candidates.movable.iter().max_by_key(|one| one.load);
        Err(match largest {
            Some(Connection { client, load, .. }) if *load >= gap => Stay::Elephant {
                client: *client,
                load: *load,
                gap,
            },
            _ => Stay::NoneFits,
        })
    }

    /// So many, where the number is too large as well: each of a size that, moved as often as the
    /// number asks for, makes the load even. There is at least one.
    fn several(&self, most: u64, candidates: &Candidates) -> Vec<u64> {
        let mut left = candidates.movable.clone();
        let (mut load, mut number) = (self.from.load.excess(), self.from.count.excess());
        let mut chosen = Vec::new();
        let gap = self.gap().max(1);
        while (chosen.len() as u64) < most.min(number.max(1)) && !left.is_empty() {
            let wanted = load / number.max(1);
            let (index, best) = left
                .iter()
                .enumerate()
                .min_by_key(|(_, one)| (one.load >= gap, one.load.abs_diff(wanted), one.opened))
                .map(|(index, one)| (index, *one))
                .expect("it is not empty");
            chosen.push(best.cookie);
            load = load.saturating_sub(best.load);
            number = number.saturating_sub(1);
            left.swap_remove(index);
        }
        chosen
    }
}
