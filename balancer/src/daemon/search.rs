//! The network namespaces that are not where they were expected: when they are looked for again,
//! and the search for them, of which each round of the daemon does a piece.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::discover::{FoundNetns, NetnsHint, Place, Progress, Search};

/// A netns that is not found is looked for again after so long, and each time after twice as long.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// The longest time until a netns is looked for again.
const LONGEST_RETRY: Duration = Duration::from_secs(64);
/// The part of the time that searches may take is one in this many.
const SHARE: u32 = 10;
/// The shortest rest between two searches.
const SHORTEST_REST: Duration = Duration::from_millis(100);

/// The search for network namespaces: one at a time, for all that are lost.
pub struct NetnsSearch {
    /// The network namespaces that are put off, by their cookies.
    put_off: HashMap<u64, PutOff>,
    /// Those that the next search is for, by their cookies.
    lost: HashMap<u64, NetnsHint>,
    under_way: Option<Search>,
    /// How long the search under way has taken.
    took: Duration,
    /// The next search does not begin before.
    next: Instant,
}

struct PutOff {
    /// Where it was not; elsewhere it is looked for at once. `None`: wherever it may be.
    places: Option<Vec<Place>>,
    pause: Duration,
    until: Instant,
}

impl NetnsSearch {
    /// Nothing is lost.
    pub fn new() -> Self {
        Self {
            put_off: HashMap::new(),
            lost: HashMap::new(),
            under_way: None,
            took: Duration::ZERO,
            next: Instant::now(),
        }
    }

    /// Whether it is time to look for a netns at the places where it may be.
    pub fn is_due(&self, cookie: u64, places: &[Place]) -> bool {
        self.put_off.get(&cookie).is_none_or(|put_off| {
            let elsewhere = |before: &Vec<Place>| before != places;
            Instant::now() >= put_off.until || put_off.places.as_ref().is_some_and(elsewhere)
        })
    }

    /// Puts off a netns with which something has failed; says whether that is the first time.
    pub fn put_off(&mut self, cookie: u64) -> bool {
        self.put_off_at(cookie, None)
    }

    fn put_off_at(&mut self, cookie: u64, places: Option<Vec<Place>>) -> bool {
        let before = self.put_off.get(&cookie);
        let again = before.filter(|before| before.places == places);
        let longer = |before: &PutOff| (before.pause * 2).min(LONGEST_RETRY);
        let pause = again.map_or(RETRY_AFTER, longer);
        let until = Instant::now() + pause;
        let put_off = PutOff {
            places,
            pause,
            until,
        };
        self.put_off.insert(cookie, put_off).is_none()
    }

    /// A netns is at none of its places.
    pub fn lose(&mut self, hint: NetnsHint) {
        self.put_off_at(hint.cookie, Some(hint.places.clone()));
        self.lost.insert(hint.cookie, hint);
    }

    /// Forgets all network namespaces but these.
    pub fn retain(&mut self, cookies: &HashSet<u64>) {
        self.put_off.retain(|cookie, _| cookies.contains(cookie));
        self.lost.retain(|cookie, _| cookies.contains(cookie));
    }

    /// Whether there is a search that goes on at once.
    pub const fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Searches until then, or until a netns is found. `gone` gets those of which it is certain
    /// that no process has them.
    ///
    /// # Errors
    /// When the search can't be done now; then it is begun anew later.
    pub fn go_on(&mut self, until: Instant, gone: &mut Vec<u64>) -> Result<Option<FoundNetns>> {
        let begin = Instant::now();
        if self.under_way.is_none() && !self.lost.is_empty() && begin >= self.next {
            let hints: Vec<NetnsHint> = self.lost.drain().map(|(_, hint)| hint).collect();
            self.took = Duration::ZERO;
            self.under_way = Some(Search::new(&hints)?);
        }
        let Some(search) = &mut self.under_way else {
            return Ok(None);
        };
        let progress = search.go_on(until);
        self.took += begin.elapsed();
        match progress {
            Ok(Progress::Found(found)) => {
                self.put_off.remove(&found.open.cookie);
                return Ok(Some(found));
            }
            Ok(Progress::Interrupted) => return Ok(None),
            Ok(Progress::AtEnd) if search.is_certain() => gone.extend(search.missing()),
            Ok(Progress::AtEnd) | Err(_) => {}
        }
        self.under_way = None;
        self.next = Instant::now() + (self.took * SHARE).max(SHORTEST_REST);
        progress.map(|_| None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discover::Thread;

    const COOKIE: u64 = u64::MAX;

    fn hint(tid: u32) -> NetnsHint {
        let pid = u32::MAX;
        NetnsHint {
            cookie: COOKIE,
            places: vec![Place::Thread(Thread { pid, tid })],
        }
    }

    #[test]
    fn what_is_lost_is_put_off_until_it_may_be_elsewhere() {
        let mut search = NetnsSearch::new();
        let is_due = |search: &NetnsSearch, hint: &NetnsHint| search.is_due(COOKIE, &hint.places);
        assert!(is_due(&search, &hint(1)));
        search.lose(hint(1));
        assert!(!is_due(&search, &hint(1)) && is_due(&search, &hint(2)));
        assert!(!search.put_off(COOKIE));
        assert!(!is_due(&search, &hint(1)) && !is_due(&search, &hint(2)));
        search.retain(&HashSet::new());
        assert!(is_due(&search, &hint(1)));
    }

    #[test]
    fn a_netns_that_stays_lost_is_looked_for_ever_more_seldom() {
        let mut search = NetnsSearch::new();
        let mut pauses = Vec::new();
        for _ in 0..7 {
            search.lose(hint(1));
            pauses.push(search.put_off[&COOKIE].pause.as_secs());
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 64]);
        search.lose(hint(2));
        assert_eq!(search.put_off[&COOKIE].pause, RETRY_AFTER);
    }

    #[test]
    fn a_search_goes_on_in_pieces_and_then_rests() {
        let mut search = NetnsSearch::new();
        search.lose(hint(1));
        let mut gone = Vec::new();
        let mut pieces = 0;
        loop {
            let found = search.go_on(Instant::now(), &mut gone);
            assert!(found.expect("processes can be listed").is_none());
            if !search.is_under_way() {
                break;
            }
            pieces += 1;
        }
        assert!(pieces > 1);
        assert_eq!(gone, [COOKIE]);
        search.lose(hint(1));
        let found = search.go_on(Instant::now(), &mut gone);
        assert!(found.expect("nothing is looked at").is_none() && !search.is_under_way());
    }
}
