//! What each backend of this node should do now, and why.

use std::time::Duration;

use super::pick::{Candidates, oldest};
use super::standing::{Standing, Standings};
use super::{
    Action, BalanceBy, Counts, Decision, Group, HOLD, Memory, Phase, SETTLES, Stay, TOO_OLD,
    UNHEARD, Why, by_load,
};

/// A backend holds too much with more than a share's so many-th part above the share.
const TOLERATED: u64 = 20;
/// By load, numbers of connections may be a tenth above the share.
const TOLERATED_BY_LOAD: u64 = 10;
/// Which part of all connections may move in a second: to even out, and to leave a backend.
const GENTLE: u64 = 100;
const DRAIN: u64 = 20;

/// What to do about each backend of this node, in the order of their names. Nothing is remembered
/// of it: that is for [`Memory::told`].
pub fn plan(group: &Group, memory: &Memory, now: Duration) -> Vec<Decision> {
    let standings = Standings::of(group, memory, now);
    let cooling = memory.cooling(group, now);
    let plan = |standing: &Standing<'_>| {
        let Counts::Own { connections, .. } = &standing.backend.counts else {
            return None;
        };
        let candidates = Candidates::of(standing.backend, connections, memory, &cooling);
        let planner = Planner {
            group,
            memory,
            now,
            standings: &standings,
            standing,
        };
        Some(Decision {
            backend: standing.backend.name.clone(),
            action: match planner.plan(&candidates) {
                Ok((cookies, why)) => Action::Shed { cookies, why },
                Err(stay) => Action::Stay(stay),
            },
        })
    };
    standings.all.iter().filter_map(plan).collect()
}

struct Planner<'a> {
    group: &'a Group,
    memory: &'a Memory,
    now: Duration,
    standings: &'a Standings<'a>,
    standing: &'a Standing<'a>,
}

impl Planner<'_> {
    fn plan(&self, candidates: &Candidates) -> Result<(Vec<u64>, Why), Stay> {
        if !self.group.is_on {
            return Err(Stay::Off);
        }
        let phase = self.standing.backend.phase;
        if excess_of(self.standing, self.group.balance_by) == 0 || phase == Phase::NotReady {
            return Err(self.even());
        }
        // The connections of one that ends are lost if they stay.
        if self.group.are_refused && phase != Phase::Terminating {
            return Err(Stay::Refused);
        }
        if !phase.is_leaving() {
            self.is_time()?;
        }
        if phase != Phase::Terminating {
            self.is_not_in_vain()?;
        }
        if self.group.balance_by == BalanceBy::Bytes && !phase.is_leaving() {
            return by_load::choose(self.standings, self.standing, self.most()?, candidates);
        }
        Ok((oldest(candidates, self.most()?)?, self.why()))
    }

    fn even(&self) -> Stay {
        let measure = match self.group.balance_by {
            BalanceBy::Connections => self.standing.count,
            BalanceBy::Bytes => self.standing.load,
        };
        Stay::Even {
            held: measure.held,
            share: measure.share,
        }
    }

    /// Whether it has been uneven for long enough, by counts that are young enough.
    fn is_time(&self) -> Result<(), Stay> {
        let name = &self.standing.backend.name;
        let Some(uneven_for) = self.memory.uneven_for(name, self.now) else {
            return Err(self.even());
        };
        let unheard_for = self.group.unheard_for;
        if unheard_for > UNHEARD {
            return Err(Stay::Unheard { unheard_for });
        }
        let ready = self.standings.all.iter();
        let ready = ready.filter(|one| one.backend.phase == Phase::Ready);
        if let Some(old) = ready.max_by_key(|one| one.known.age)
            && old.known.age > TOO_OLD
        {
            return Err(Stay::InputsTooOld {
                backend: old.backend.name.clone(),
                age: Some(old.known.age).filter(|age| *age < Duration::MAX),
            });
        }
        let ago = self.memory.ready_set_for(self.now);
        if ago < SETTLES {
            return Err(Stay::ReadySetChanged { ago });
        }
        if uneven_for < HOLD {
            return Err(Stay::NotLongEnough { uneven_for });
        }
        Ok(())
    }

    fn is_not_in_vain(&self) -> Result<(), Stay> {
        let pause = self.memory.pause(&self.standing.backend.name, self.now);
        pause.map_or(Ok(()), |pause| Err(Stay::InVain { pause }))
    }

    /// How many connections may be told: this backend's part of those there is room for, as many
    /// as the rate allows.
    fn most(&self) -> Result<u64, Stay> {
        let has_room = self.standings.all.iter().any(|one| {
            let has_room = one.count.deficit() > 0 || one.load.deficit() > 0;
            has_room && one.backend.name != self.standing.backend.name
        });
        if !has_room {
            return Err(Stay::NobodyTakes);
        }
        let credit = self.memory.credit(&self.standing.backend.name);
        let by_load = self.group.balance_by == BalanceBy::Bytes;
        let excess = self.standing.count.excess();
        let most = if by_load && !self.standing.backend.phase.is_leaving() {
            credit.min(excess.max(1))
        } else {
            let all = u128::from(self.standings.excess().max(1));
            let part = u128::from(self.standings.room()) * u128::from(excess) / all;
            let part = u64::try_from(part).unwrap_or(u64::MAX).min(excess);
            if part == 0 {
                return Err(Stay::NobodyTakes);
            }
            credit.min(part)
        };
        if most == 0 {
            return Err(Stay::RateLimit);
        }
        Ok(most)
    }

    fn why(&self) -> Why {
        let count = self.standing.count;
        match self.standing.backend.phase {
            phase if phase.is_leaving() => Why::Leaves {
                held: count.held,
                terminating: phase == Phase::Terminating,
            },
            _ => Why::Connections {
                held: count.held,
                share: count.share,
            },
        }
    }
}

/// What a backend holds too much: connections, or by load also bytes a second.
pub(super) fn excess_of(standing: &Standing<'_>, balance_by: BalanceBy) -> u64 {
    match balance_by {
        BalanceBy::Connections => standing.count.excess(),
        BalanceBy::Bytes => standing.count.excess().max(standing.load.excess()),
    }
}

/// Whether a backend holds so much more than its share that moves are worth it.
pub(super) fn is_uneven(
    standings: &Standings<'_>,
    standing: &Standing<'_>,
    balance_by: BalanceBy,
) -> bool {
    if !standing.may_shed() {
        return false;
    }
    match balance_by {
        BalanceBy::Connections => has_too_many(standings, standing, TOLERATED),
        BalanceBy::Bytes => {
            has_too_much_load(standing) || has_too_many(standings, standing, TOLERATED_BY_LOAD)
        }
    }
}

/// By load: whether its number alone is more than is tolerated.
pub(super) fn has_far_too_many(standings: &Standings<'_>, standing: &Standing<'_>) -> bool {
    has_too_many(standings, standing, TOLERATED_BY_LOAD)
}

pub(super) fn has_too_much_load(standing: &Standing<'_>) -> bool {
    standing.load.excess() * TOLERATED > standing.load.share
}

/// One too many is enough where another has two too few: they are three apart.
fn has_too_many(standings: &Standings<'_>, standing: &Standing<'_>, tolerated: u64) -> bool {
    let excess = standing.count.excess();
    let is_far_below = || standings.all.iter().any(|one| one.count.deficit() >= 2);
    excess * tolerated > standing.count.share && (excess >= 2 || excess == 1 && is_far_below())
}

/// How many connections a second a backend may shed, as a fraction: of one in a hundred of the
/// group its part by its excess, so that all nodes together keep to it.
pub(super) fn rate(standings: &Standings<'_>, standing: &Standing<'_>) -> (u64, u64) {
    let total = standings.total();
    if standing.backend.phase.is_leaving() {
        return (total.max(DRAIN), DRAIN);
    }
    let (own, all) = match (standing.count.excess(), standings.excess()) {
        (0, _) | (_, 0) => (1, standings.all.len() as u64),
        both => both,
    };
    (total.max(GENTLE).saturating_mul(own), GENTLE * all)
}
