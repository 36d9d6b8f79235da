//! Sources that are refused and come back, again and again: no backend serves them. Pure: the
//! caller says what time it is.
//!
//! A refused client tries again, and elsewhere: each daemon sees a part of the refusals, and only
//! all of them together tell who is starved. So a daemon reports every source that it refused of
//! late, and [`count`] decides for the union.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

/// For how long a source must have been refused, from the first time to the last: who finds another
/// backend at the next try is served.
pub const STARVED_AFTER: Duration = Duration::from_secs(5);
/// Who has been refused for this long is not left to the Kubernetes Service's choice, which may
/// fall on a full backend again and again: there is room on every one.
pub const ROOM_AFTER: Duration = Duration::from_secs(20);
/// How long after it was refused last a source counts: by then it has found a backend or given up.
pub const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);
/// The most sources of a group that are remembered.
pub const MAX_SOURCES: usize = 256;

/// A source that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The address of the source.
    pub source: IpAddr,
    /// How long ago the source was refused first.
    pub first: Duration,
    /// How long ago the source was refused last.
    pub last: Duration,
}

impl Refused {
    /// Whether the source was refused for so long, and of late.
    fn for_as_long_as(&self, time: Duration) -> bool {
        self.last <= FORGOTTEN_AFTER && self.first.saturating_sub(self.last) >= time
    }
}

/// How many sources are starved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Starved {
    /// All starved sources: refused for [`STARVED_AFTER`] or longer.
    pub sources: u32,
    /// The starved sources for which every backend gets room: refused for [`ROOM_AFTER`] or longer.
    pub long: u32,
}

/// The sources that were refused of late, by group.
///
/// Times are since some start that the caller keeps to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusals<K> {
    groups: BTreeMap<K, BTreeMap<IpAddr, Times>>,
}

/// When a source was refused, in time since the caller's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    first: Duration,
    last: Duration,
}

impl Times {
    fn forgotten(self, now: Duration) -> bool {
        now.saturating_sub(self.last) > FORGOTTEN_AFTER
    }
}

impl<K> Default for Refusals<K> {
    fn default() -> Self {
        Self {
            groups: BTreeMap::new(),
        }
    }
}

impl<K: Ord + Clone> Refusals<K> {
    /// Takes a refusal. Of more than [`MAX_SOURCES`] sources the one goes that was refused last the
    /// longest time ago.
    pub fn refused(&mut self, group: &K, source: IpAddr, now: Duration) {
        let sources = self.groups.entry(group.clone()).or_default();
        let times = sources.entry(source).or_insert(Times {
            first: now,
            last: now,
        });
        if times.forgotten(now) {
            times.first = now;
        }
        times.last = times.last.max(now);
        if sources.len() > MAX_SOURCES {
            let oldest = sources
                .iter()
                .filter(|(other, _)| **other != source)
                .min_by_key(|(_, times)| times.last)
                .map(|(oldest, _)| *oldest);
            oldest.and_then(|oldest| sources.remove(&oldest));
        }
    }

    /// The sources of a group that were refused of late, by address, whether served meanwhile or
    /// not.
    pub fn of(&self, group: &K, now: Duration) -> Vec<Refused> {
        let sources = self.groups.get(group).into_iter().flatten();
        sources
            .filter(|(_, times)| !times.forgotten(now))
            .map(|(source, times)| Refused {
                source: *source,
                first: now.saturating_sub(times.first),
                last: now.saturating_sub(times.last),
            })
            .collect()
    }

    /// The groups that refused somebody of late.
    pub fn groups(&self) -> impl Iterator<Item = &K> {
        self.groups.keys()
    }

    /// Forgets who was not refused of late, and groups that are not `known` any more.
    pub fn tidy(&mut self, now: Duration, known: impl Fn(&K) -> bool) {
        self.groups.retain(|group, sources| {
            sources.retain(|_, times| !times.forgotten(now));
            known(group) && !sources.is_empty()
        });
    }
}

/// What several daemons say of one group, by source: refused since the first time that any of them
/// knows of, until the last. Who was forgotten is left out.
pub fn merge(refused: impl IntoIterator<Item = Refused>) -> BTreeMap<IpAddr, Refused> {
    let mut merged: BTreeMap<IpAddr, Refused> = BTreeMap::new();
    for refused in refused {
        if refused.last > FORGOTTEN_AFTER {
            continue;
        }
        merged
            .entry(refused.source)
            .and_modify(|known| {
                known.first = known.first.max(refused.first);
                known.last = known.last.min(refused.last);
            })
            .or_insert(refused);
    }
    merged
}

/// How many sources are starved, by what several daemons say of one group.
pub fn count(refused: impl IntoIterator<Item = Refused>) -> Starved {
    let mut starved = Starved::default();
    for refused in merge(refused).values() {
        starved.sources += u32::from(refused.for_as_long_as(STARVED_AFTER));
        starved.long += u32::from(refused.for_as_long_as(ROOM_AFTER));
    }
    starved
}
