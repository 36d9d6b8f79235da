//! What a node remembers of a group from second to second.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::plan::{excess_of, is_uneven, rate};
use super::standing::{Standing, Standings};
use super::{
    Backend, BalanceBy, COMES_BACK, COOLDOWN, Connection, Counts, Group, HOLD, PATIENCE, Phase,
    Published, UNMOVABLE_FOR,
};

/// A connection, in the unit of the credit.
pub(super) const ONE: u64 = 1_000_000_000;
/// For so long credit is saved up.
const SAVED: Duration = Duration::from_secs(1);
/// So many moves are judged together, and must have helped by that part of them.
const JUDGED: u64 = 10;
const HELPS: u64 = 8;
/// How long a backend whose moves did not help is left alone: at first, and at most.
const PAUSE: Duration = Duration::from_secs(120);
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// What a node remembers of an endpoint group.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    noted: Option<Duration>,
    ready_changed: Duration,
    backends: BTreeMap<String, BackendMemory>,
    told: Vec<Told>,
    /// When other nodes have moved connections to even out.
    others_moved: Vec<OthersMoved>,
}

#[derive(Clone, Debug, Default)]
struct BackendMemory {
    readiness: Readiness,
    /// Since when it has held too much.
    uneven_since: Option<Duration>,
    /// How much it may shed, in parts of [`ONE`].
    credit: u64,
    trial: Option<Trial>,
    paused_until: Duration,
    pause: Duration,
}

/// Moves that are judged together, by what has become of the number of connections.
#[derive(Clone, Copy, Debug)]
struct Trial {
    /// What the backend held when it began.
    held: u64,
    /// How many were told since then.
    told: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Readiness {
    #[default]
    Not,
    Since(Duration),
    /// As long as anything is remembered.
    Before,
}

/// A time in which other nodes have moved connections.
#[derive(Clone, Copy, Debug)]
struct OthersMoved {
    /// What they moved may have been opened from then on.
    from: Duration,
    until: Duration,
    /// How many they moved at the most, in parts of [`ONE`].
    moved: u64,
}

/// A connection that was told to move.
#[derive(Clone, Debug)]
struct Told {
    backend: String,
    cookie: u64,
    client: IpAddr,
    load: u64,
    at: Duration,
    /// It was still there when its backend was last looked at.
    is_open: bool,
    /// Its backend was leaving: that starts no cooldown.
    is_drained: bool,
}

impl Memory {
    /// Takes what there is now; to be asked each second, before [`super::plan()`].
    pub fn note(&mut self, group: &Group, now: Duration) {
        self.note_ready(group, now);
        for backend in &group.backends {
            if let Counts::Own { connections, .. } = &backend.counts {
                self.look_for_told(&backend.name, connections);
            }
        }
        self.note_others(group, now);
        self.told.retain(|told| {
            now < told.at + COOLDOWN || told.is_open && now < told.at + UNMOVABLE_FOR
        });
        let elapsed = now.saturating_sub(self.noted.unwrap_or(now));
        let standings = Standings::of(group, self, now);
        for standing in &standings.all {
            if let Some(memory) = self.backends.get_mut(&standing.backend.name)
                && matches!(standing.backend.counts, Counts::Own { .. })
            {
                memory.note(&standings, standing, group.balance_by, now);
                let (per_second, of) = rate(&standings, standing);
                memory.save_up(per_second, of, elapsed);
            }
        }
        self.noted = Some(now);
    }

    /// A connection was told to move.
    pub fn told(&mut self, backend: &str, connection: &Connection, now: Duration) {
        let memory = self.backends.entry(backend.to_owned()).or_default();
        memory.credit = memory.credit.saturating_sub(ONE);
        if let Some(trial) = &mut memory.trial {
            trial.told += 1;
        }
        self.told.push(Told {
            backend: backend.to_owned(),
            cookie: connection.cookie,
            client: connection.client,
            load: connection.load,
            at: now,
            is_open: true,
            is_drained: memory.readiness == Readiness::Not,
        });
    }

    /// What the other nodes should know of a backend of this node.
    pub fn published(&self, backend: &Backend, now: Duration) -> Published {
        let Counts::Own {
            established,
            connections,
        } = &backend.counts
        else {
            return Published::default();
        };
        let told = || self.told.iter().filter(|told| told.backend == backend.name);
        let gone = |told: &&Told| told.is_open && now < told.at + PATIENCE;
        let gone: BTreeSet<u64> = told().filter(gone).map(|told| told.cookie).collect();
        let moving = || told().filter(|told| now < told.at + COMES_BACK);
        let held = connections.iter().filter(|one| !gone.contains(&one.cookie));
        Published {
            held: established.saturating_sub(gone.len() as u64),
            moving: moving().count() as u64,
            load: held.map(|one| one.load).sum(),
            moving_load: moving().map(|told| told.load).sum(),
            age: Duration::ZERO,
        }
    }

    /// For how long a backend has been ready; [`Duration::MAX`]: for longer than is remembered.
    pub fn ready_for(&self, backend: &str, now: Duration) -> Duration {
        match self.backends.get(backend).map(|one| one.readiness) {
            Some(Readiness::Since(since)) => now.saturating_sub(since),
            Some(Readiness::Not) => Duration::ZERO,
            Some(Readiness::Before) | None => Duration::MAX,
        }
    }

    /// How long ago the ready backends were others.
    pub(super) fn ready_set_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.ready_changed)
    }

    /// For how long a backend has held too much.
    pub(super) fn uneven_for(&self, backend: &str, now: Duration) -> Option<Duration> {
        let since = self.backends.get(backend)?.uneven_since?;
        Some(now.saturating_sub(since))
    }

    /// How many more connections of a backend may be told now.
    pub(super) fn credit(&self, backend: &str) -> u64 {
        self.backends.get(backend).map_or(0, |one| one.credit / ONE)
    }

    /// For how much longer nothing is moved from a backend, because it did not help.
    pub(super) fn pause(&self, backend: &str, now: Duration) -> Option<Duration> {
        let left = self.backends.get(backend)?.paused_until.saturating_sub(now);
        (left > Duration::ZERO).then_some(left)
    }

    /// The connections that were told within the hour.
    pub(super) fn told_cookies(&self) -> BTreeSet<u64> {
        self.told.iter().map(|told| told.cookie).collect()
    }

    /// Whether a connection of a backend of this node may be one that came back, and is left alone
    /// for [`COOLDOWN`].
    pub fn is_cooling(&self, group: &Group, cookie: u64, now: Duration) -> bool {
        self.cooling(group, now).0.contains(&cookie)
    }

    /// Which connections may be those that came back, and are in their cooldown.
    pub(super) fn cooling(&self, group: &Group, now: Duration) -> Cooling {
        let mut told: BTreeMap<IpAddr, Vec<Duration>> = BTreeMap::new();
        let counts = |told: &&Told| now < told.at + COOLDOWN && !told.is_drained;
        for one in self.told.iter().filter(counts) {
            told.entry(one.client).or_default().push(one.at);
        }
        let mut cooling = returned(told, group);
        let others_moved = self.others_moved.iter();
        cooling.extend(others_moved.flat_map(|moved| moved.returned(group, now)));
        Cooling(cooling)
    }

    fn note_ready(&mut self, group: &Group, now: Duration) {
        let mut has_changed = self.noted.is_none();
        let names: BTreeSet<&String> = group.backends.iter().map(|one| &one.name).collect();
        self.backends.retain(|name, memory| {
            let is_there = names.contains(name);
            has_changed |= !is_there && memory.readiness != Readiness::Not;
            is_there
        });
        for backend in &group.backends {
            let memory = self.backends.entry(backend.name.clone()).or_default();
            match (backend.phase == Phase::Ready, memory.readiness) {
                (true, Readiness::Not) if self.noted.is_none() => {
                    memory.readiness = Readiness::Before;
                }
                (true, Readiness::Not) => {
                    memory.readiness = Readiness::Since(now);
                    has_changed = true;
                }
                (false, Readiness::Since(_) | Readiness::Before) => {
                    memory.readiness = Readiness::Not;
                    has_changed = true;
                }
                _ => {}
            }
        }
        if has_changed {
            self.ready_changed = now;
            self.backends
                .values_mut()
                .for_each(|memory| memory.trial = None);
        }
    }

    /// Which of a backend's told connections have gone.
    fn look_for_told(&mut self, backend: &str, connections: &[Connection]) {
        let there: BTreeSet<u64> = connections.iter().map(|one| one.cookie).collect();
        let is_of = |told: &&mut Told| told.backend == backend;
        for told in self.told.iter_mut().filter(is_of) {
            told.is_open &= there.contains(&told.cookie);
        }
    }

    /// Notes when other nodes move connections to even out. What comes while one is drained may
    /// come from there, and may have to move again.
    fn note_others(&mut self, group: &Group, now: Duration) {
        self.others_moved
            .retain(|moved| now < moved.until + COOLDOWN);
        let moving = |is_leaving| {
            let of_phase = move |one: &&Backend| one.phase.is_leaving() == is_leaving;
            let published = group.backends.iter().filter(of_phase);
            published.filter_map(|one| match one.counts {
                Counts::Published(published) if published.moving > 0 => Some(published),
                _ => None,
            })
        };
        if moving(true).next().is_some() {
            return;
        }
        let Some(age) = moving(false).map(|one| one.age).max() else {
            return;
        };
        let number = moving(false).map(|one| one.moving);
        let number = number.fold(0, u64::saturating_add).saturating_mul(ONE);
        let from = now.saturating_sub(age.saturating_add(COMES_BACK));
        match self.others_moved.last_mut() {
            Some(last) if last.until >= from => last.goes_on(number, now),
            _ => self.others_moved.push(OthersMoved {
                from,
                until: now,
                moved: number,
            }),
        }
    }
}

impl OthersMoved {
    /// So many more, in parts of [`ONE`], have begun within the last [`COMES_BACK`].
    fn goes_on(&mut self, number: u64, now: Duration) {
        let elapsed = now.saturating_sub(self.until);
        let part = u128::from(number) * elapsed.as_nanos() / COMES_BACK.as_nanos();
        let part = u64::try_from(part).unwrap_or(u64::MAX);
        (self.until, self.moved) = (now, self.moved.saturating_add(part));
    }

    /// The connections that may be those that came back, and are in their cooldown: no more than
    /// were moved. Where very many clients connect at once, most of them come from elsewhere.
    fn returned(&self, group: &Group, now: Duration) -> impl Iterator<Item = u64> {
        let opened = |one: &&Connection| (self.from..=self.until).contains(&one.opened);
        let mut opened: Vec<_> = own_connections(group).filter(opened).collect();
        opened.sort_unstable_by_key(|one| (one.opened, one.cookie));
        let number = usize::try_from(self.moved.div_ceil(ONE)).unwrap_or(usize::MAX);
        let returned = opened.into_iter().take(number);
        returned
            .filter(move |one| now < one.opened + COOLDOWN)
            .map(|one| one.cookie)
    }
}

/// The connections of the backends of this node.
fn own_connections(group: &Group) -> impl Iterator<Item = &Connection> {
    let own = group.backends.iter().map(|backend| match &backend.counts {
        Counts::Own { connections, .. } => connections.as_slice(),
        Counts::Published(_) => &[],
    });
    own.flatten()
}

/// The connections that may be those that came back. Many clients may share an address: after each
/// time that one of them was told, one connection of the address counts, the first that was opened
/// since.
fn returned(mut told: BTreeMap<IpAddr, Vec<Duration>>, group: &Group) -> BTreeSet<u64> {
    if told.is_empty() {
        return BTreeSet::new();
    }
    for times in told.values_mut() {
        times.sort_unstable_by(|a, b| b.cmp(a));
    }
    let mut connections: Vec<_> = own_connections(group).collect();
    connections.sort_unstable_by_key(|one| (one.opened, one.cookie));
    let came_back = |one: &Connection| {
        let times = told.get_mut(&one.client)?;
        times.pop_if(|at| *at <= one.opened).map(|_| one.cookie)
    };
    connections.into_iter().filter_map(came_back).collect()
}

/// Which connections are in their cooldown, by their cookies.
#[derive(Debug)]
pub(super) struct Cooling(BTreeSet<u64>);

impl Cooling {
    pub(super) fn has(&self, connection: &Connection) -> bool {
        self.0.contains(&connection.cookie)
    }
}

impl BackendMemory {
    fn note(
        &mut self,
        standings: &Standings<'_>,
        standing: &Standing<'_>,
        balance_by: BalanceBy,
        now: Duration,
    ) {
        let excess = excess_of(standing, balance_by);
        let has_held = self.uneven_since.is_some_and(|since| now >= since + HOLD);
        if is_uneven(standings, standing, balance_by) {
            self.uneven_since.get_or_insert(now);
        } else if excess == 0 && standings.moving == 0 || !has_held {
            // What is on its way makes shares look larger: one that sheds goes on afterwards.
            self.uneven_since = None;
        }
        if now < self.paused_until {
            self.trial = None;
        } else {
            self.judge(standing.known, now);
        }
    }

    /// Judges moves whose clients should be back: not too many of them, or of those that others
    /// move, may have come back to this backend.
    fn judge(&mut self, known: Published, now: Duration) {
        let Published { held, moving, .. } = known;
        let trial = self.trial.get_or_insert(Trial { held, told: 0 });
        if trial.told == 0 {
            trial.held = held;
        }
        let judged = trial.told.saturating_sub(moving);
        if judged < JUDGED.max(moving) {
            return;
        }
        // Those on their way have gone, and are not back yet.
        let helped = trial.held.saturating_sub(held + moving);
        self.trial = None;
        if helped * HELPS >= judged {
            self.pause = Duration::ZERO;
        } else {
            self.pause = (self.pause * 2).clamp(PAUSE, LONGEST_PAUSE);
            self.paused_until = now + self.pause;
        }
    }

    /// Adds `per_second / of` connections a second.
    fn save_up(&mut self, per_second: u64, of: u64, elapsed: Duration) {
        let saved = |time: Duration| {
            let saved = time.as_nanos() * u128::from(per_second) / u128::from(of.max(1));
            u64::try_from(saved).unwrap_or(u64::MAX)
        };
        let most = saved(SAVED).saturating_add(ONE);
        self.credit = self.credit.saturating_add(saved(elapsed)).min(most);
    }
}
