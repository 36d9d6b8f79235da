//! How the backends of a group stand to each other: what each holds, and what it should hold.

use std::time::Duration;

use super::share::{Claim, shares};
use super::{Backend, Counts, Fitness, Group, Memory, Phase, Published, WHOLE, ramp};

/// What a backend holds, and what it should hold: connections, or bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    pub held: u64,
    pub share: u64,
}

impl Measure {
    pub const fn excess(self) -> u64 {
        self.held.saturating_sub(self.share)
    }

    pub const fn deficit(self) -> u64 {
        self.share.saturating_sub(self.held)
    }
}

/// One backend beside the others.
#[derive(Debug)]
pub struct Standing<'a> {
    pub backend: &'a Backend,
    pub known: Published,
    pub count: Measure,
    pub load: Measure,
}

impl Standing<'_> {
    /// Whether its excess may move, as far as it is concerned.
    pub fn may_shed(&self) -> bool {
        self.backend.phase != Phase::NotReady
    }
}

/// All backends of a group, in the order of their names, so that all nodes see the same.
#[derive(Debug)]
pub struct Standings<'a> {
    pub all: Vec<Standing<'a>>,
    /// Connections that were told to move of late, and bytes a second that they received.
    pub moving: u64,
    pub moving_load: u64,
}

impl<'a> Standings<'a> {
    pub fn of(group: &'a Group, memory: &Memory, now: Duration) -> Self {
        let mut backends: Vec<&Backend> = group.backends.iter().collect();
        backends.sort_by(|a, b| a.name.cmp(&b.name));
        let known = |backend: &&Backend| match &backend.counts {
            Counts::Published(published) => *published,
            Counts::Own { .. } => memory.published(backend, now),
        };
        let known: Vec<Published> = backends.iter().map(known).collect();
        let grown: Vec<u64> = backends
            .iter()
            .map(|backend| ramp(memory.ready_for(&backend.name, now), group.slow_start))
            .collect();
        let of = |held: fn(&Published) -> u64, moving: fn(&Published) -> u64, limited| {
            let held: Vec<u64> = known.iter().map(held).collect();
            measures(
                &backends,
                &grown,
                &held,
                known.iter().map(moving).sum(),
                limited,
            )
        };
        let counts = of(|one| one.held, |one| one.moving, true);
        let loads = of(|one| one.load, |one| one.moving_load, false);
        let all = backends
            .into_iter()
            .zip(&known)
            .zip(counts.into_iter().zip(loads));
        Self {
            all: all
                .map(|((backend, known), (count, load))| Standing {
                    backend,
                    known: *known,
                    count,
                    load,
                })
                .collect(),
            moving: known.iter().map(|one| one.moving).sum(),
            moving_load: known.iter().map(|one| one.moving_load).sum(),
        }
    }

    /// All connections of the group.
    pub fn total(&self) -> u64 {
        self.all.iter().map(|one| one.known.held).sum::<u64>() + self.moving
    }

    /// Bytes a second of the group.
    pub fn total_load(&self) -> u64 {
        self.all.iter().map(|one| one.known.load).sum::<u64>() + self.moving_load
    }

    /// Connections above the shares.
    pub fn excess(&self) -> u64 {
        let shedding = self.all.iter().filter(|one| one.may_shed());
        shedding.map(|one| one.count.excess()).sum()
    }

    /// How many more connections than those on their way there is room for below the shares.
    pub fn room(&self) -> u64 {
        let deficits = self.all.iter().map(|one| one.count.deficit());
        deficits.sum::<u64>().saturating_sub(self.moving)
    }
}

/// Shares of what is held and of what is on its way.
fn measures(
    backends: &[&Backend],
    grown: &[u64],
    held: &[u64],
    moving: u64,
    limited: bool,
) -> Vec<Measure> {
    let stays = |index: usize| backends[index].phase == Phase::NotReady;
    let all = (0..held.len()).filter(|index| !stays(*index));
    let total = all.map(|index| held[index]).sum::<u64>() + moving;
    let mut claims: Vec<Claim> = backends
        .iter()
        .zip(held)
        .map(|(backend, held)| Claim {
            weight: weight(backend),
            held: *held,
            most: most(backend, *held, limited),
        })
        .collect();
    // A new one takes no more than the part of its share that has grown; it never has to shed for
    // it.
    let whole = shares(total, &claims);
    for ((claim, share), grown) in claims.iter_mut().zip(whole).zip(grown) {
        let part = u128::from(share) * u128::from(*grown) / u128::from(WHOLE);
        let part = u64::try_from(part).unwrap_or(u64::MAX).max(claim.held);
        if *grown < WHOLE {
            claim.most = claim.most.min(part);
        }
    }
    let shares = shares(total, &claims);
    let measure = |index: usize| Measure {
        held: held[index],
        share: if stays(index) {
            held[index]
        } else {
            shares[index]
        },
    };
    (0..held.len()).map(measure).collect()
}

fn weight(backend: &Backend) -> u64 {
    match backend.phase {
        Phase::Ready => backend.weight.into(),
        Phase::NotReady | Phase::Draining | Phase::Terminating => 0,
    }
}

/// The most that a backend may come to hold.
fn most(backend: &Backend, held: u64, limited: bool) -> u64 {
    let limit = if limited { backend.limit } else { None };
    match backend.fitness {
        Fitness::Serves => limit.unwrap_or(u64::MAX),
        Fitness::Stalled | Fitness::Failing => held,
    }
}
