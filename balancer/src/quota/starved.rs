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
/// In a pause of more than this between two refusals a source may have been served. One alone says
/// nothing, so the longest of them does not count: who is refused in each of two restarts is not
/// starved. A client with long pauses is, at the third refusal.
pub const DOUBTFUL_PAUSE: Duration = Duration::from_secs(60);
/// A source that has been refused within this time may come again at any moment: reports of other
/// nodes are some seconds old.
pub const SOON: Duration = Duration::from_secs(20);
/// The longest pause between two attempts of a client. gRPC waits for 120 s and up to a fifth more
/// (doc/connection-backoff.md), and then for its connect.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(180);
/// How long after it was refused last a source is remembered: a daemon may see every third attempt
/// alone, or fewer.
pub const FORGOTTEN_AFTER: Duration = Duration::from_secs(450);
/// The most sources of a group that are remembered.
pub const MAX_SOURCES: usize = 256;

/// A source that was refused. There may be several clients behind its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The address of the source.
    pub source: IpAddr,
    /// How long ago the source was refused last before `first`, where that is remembered. It was
    /// more than [`LONGEST_PAUSE`] before.
    pub before: Option<Duration>,
    /// How long ago the source was refused first.
    pub first: Duration,
    /// How long ago the source was refused last.
    pub last: Duration,
    /// The longest pause between two refusals, from `first` to `last`.
    pub longest_pause: Duration,
}

impl Refused {
    /// For how long it was refused from `first` to `last`, without the pause that is in doubt.
    pub fn certainly_for(&self) -> Duration {
        certain(self.first.saturating_sub(self.last), self.longest_pause)
    }

    /// Whether both of two moments, so long ago, are between its first and its last refusal.
    fn covers(&self, older: Duration, newer: Duration) -> bool {
        older <= self.first && newer >= self.last
    }
}

/// A time of refusals without a pause that is in doubt.
fn certain(time: Duration, longest_pause: Duration) -> Duration {
    if longest_pause > DOUBTFUL_PAUSE {
        time.saturating_sub(longest_pause)
    } else {
        time
    }
}

/// How many sources are starved. That is how many clients there are at least: several may share an
/// address (NAT), and nothing tells their attempts apart, for each comes from another port.
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
    before: Option<Duration>,
    first: Duration,
    last: Duration,
    longest_pause: Duration,
}

impl Times {
    const fn new(before: Option<Duration>, now: Duration) -> Self {
        Self {
            before,
            first: now,
            last: now,
            longest_pause: Duration::ZERO,
        }
    }

    fn forgotten(self, now: Duration) -> bool {
        now.saturating_sub(self.last) > FORGOTTEN_AFTER
    }

    fn refused(&mut self, now: Duration) {
        let pause = now.saturating_sub(self.last);
        if self.forgotten(now) {
            *self = Self::new(None, now);
        } else if pause > LONGEST_PAUSE {
            *self = Self::new(Some(self.last), now);
        } else {
            self.longest_pause = self.longest_pause.max(pause);
            self.last = self.last.max(now);
        }
    }

    fn seen_at(self, source: IpAddr, now: Duration) -> Refused {
        let ago = |time| now.saturating_sub(time);
        Refused {
            source,
            before: self.before.map(ago),
            first: ago(self.first),
            last: ago(self.last),
            longest_pause: self.longest_pause,
        }
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
    /// Takes a refusal. Of more than [`MAX_SOURCES`] sources the one goes that was refused for the
    /// shortest time, and of several such the one that was refused last the longest time ago: who
    /// sends from addresses without number takes nobody's place.
    pub fn refused(&mut self, group: &K, source: IpAddr, now: Duration) {
        let sources = self.groups.entry(group.clone()).or_default();
        match sources.get_mut(&source) {
            Some(times) => times.refused(now),
            None => {
                sources.insert(source, Times::new(None, now));
            }
        }
        if sources.len() > MAX_SOURCES {
            let least = sources
                .iter()
                .filter(|(other, _)| **other != source)
                .min_by_key(|(_, times)| (times.last.saturating_sub(times.first), times.last))
                .map(|(least, _)| *least);
            least.and_then(|least| sources.remove(&least));
        }
    }

    /// The sources of a group that were refused of late, by address, whether served meanwhile or
    /// not.
    pub fn of(&self, group: &K, now: Duration) -> Vec<Refused> {
        let sources = self.groups.get(group).into_iter().flatten();
        sources
            .filter(|(_, times)| !times.forgotten(now))
            .map(|(source, times)| times.seen_at(*source, now))
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

/// How many sources are starved, by what several daemons say of one group.
pub fn count(refused: impl IntoIterator<Item = Refused>) -> Starved {
    let mut by_source: BTreeMap<IpAddr, Vec<Refused>> = BTreeMap::new();
    for refused in refused {
        by_source.entry(refused.source).or_default().push(refused);
    }
    let mut starved = Starved::default();
    for seen in by_source.values() {
        let time = refused_for(seen);
        starved.sources += u32::from(time >= STARVED_AFTER);
        starved.long += u32::from(time >= ROOM_AFTER);
    }
    starved
}

/// For how long a source has certainly been refused, by what several daemons have seen of it; zero
/// where it has found a backend or given up since.
fn refused_for(seen: &[Refused]) -> Duration {
    let mut moments: Vec<Duration> = seen
        .iter()
        .flat_map(|refused| [Some(refused.last), Some(refused.first), refused.before])
        .flatten()
        .collect();
    moments.sort_unstable();
    let Some(last) = moments.first().copied() else {
        return Duration::ZERO;
    };
    // Backwards, as far as no pause is longer than any client's.
    let (mut first, mut longest_pause) = (last, Duration::ZERO);
    for older in moments {
        let within = seen.iter().filter(|refused| refused.covers(older, first));
        let pauses = within.map(|refused| refused.longest_pause);
        let pause = pauses.fold(older.saturating_sub(first), Duration::min);
        if pause > LONGEST_PAUSE {
            break;
        }
        first = older;
        longest_pause = longest_pause.max(pause);
    }
    // The next pause may be 2.4 times as long: gRPC's grow by 1.6, each a fifth shorter or longer.
    let awaited = (longest_pause * 5 / 2).clamp(SOON, LONGEST_PAUSE);
    if last > awaited {
        return Duration::ZERO;
    }
    certain(first.saturating_sub(last), longest_pause)
}
