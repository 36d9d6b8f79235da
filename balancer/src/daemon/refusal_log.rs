//! What the log says of refusals: a line for each service now and then, however many there are.
//! Pure: the caller says what time it is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use balancer_common::Reason;

use crate::dataplane::RefusedSource;

/// There is at most one line about a service in this time.
const EVERY: Duration = Duration::from_secs(10);
/// So many sources are counted apart between two lines.
const MAX_SOURCES: usize = 1024;
/// So many sources are named in a line.
const NAMED: usize = 3;

/// The refusals that the log has yet to tell of, by the id of the service. Times are since some
/// start that the caller keeps to.
#[derive(Debug, Default)]
pub struct RefusalLog(BTreeMap<u16, Untold>);

#[derive(Debug, Default)]
struct Untold {
    /// When the last line was written.
    told: Option<Duration>,
    /// When the first refusal was that is yet to be told.
    since: Duration,
    count: u64,
    sources: HashMap<IpAddr, u64>,
    /// Some sources were too many to be counted apart.
    more_sources: bool,
    reasons: BTreeSet<usize>,
}

impl RefusalLog {
    /// Takes refusals of a source.
    pub fn add(&mut self, refused: &RefusedSource, now: Duration) {
        let untold = self.0.entry(refused.service).or_default();
        let first = now.saturating_sub(refused.first);
        if untold.count == 0 {
            untold.since = first;
        }
        untold.since = untold.since.min(first);
        untold.count = untold.count.saturating_add(refused.count);
        untold.reasons.extend(refused.reason.map(Reason::index));
        let has_room = untold.sources.len() < MAX_SOURCES;
        match untold.sources.get_mut(&refused.source) {
            Some(count) => *count = count.saturating_add(refused.count),
            None if has_room => {
                untold.sources.insert(refused.source, refused.count);
            }
            None => untold.more_sources = true,
        }
    }

    /// The lines that are due, each with the id of its service: the first of a burst at once.
    pub fn lines(&mut self, now: Duration) -> Vec<(u16, String)> {
        let is_due =
            |told: Option<Duration>| told.is_none_or(|told| now.saturating_sub(told) >= EVERY);
        self.0
            .retain(|_, untold| untold.count > 0 || !is_due(untold.told));
        let due = self
            .0
            .iter_mut()
            .filter(|(_, untold)| untold.count > 0 && is_due(untold.told));
        let line = |(service, untold): (&u16, &mut Untold)| {
            let line = untold.line(now);
            *untold = Untold {
                told: Some(now),
                ..Untold::default()
            };
            (*service, line)
        };
        due.map(line).collect()
    }
}

impl Untold {
    fn line(&self, now: Duration) -> String {
        let count = match self.count {
            1 => "refused a connection".to_owned(),
            count => {
                let seconds = now.saturating_sub(self.since).as_secs() + 1;
                format!("refused {count} connections within {seconds} s")
            }
        };
        format!("{count}, {}: {}", self.from(), self.why())
    }

    /// The sources: the loudest by name.
    fn from(&self) -> String {
        let mut sources: Vec<_> = self
            .sources
            .iter()
            .map(|(source, count)| (Reverse(*count), *source))
            .collect();
        sources.sort_unstable();
        let least = if self.more_sources { "at least " } else { "" };
        if let [(_, source)] = sources.as_slice() {
            return format!("from {source}");
        }
        let named = sources.iter().take(NAMED);
        let named: Vec<_> = named
            .map(|(count, source)| format!("{source} ({})", count.0))
            .collect();
        let more = if sources.len() > NAMED { ", …" } else { "" };
        format!(
            "from {least}{} sources ({}{more})",
            sources.len(),
            named.join(", ")
        )
    }

    fn why(&self) -> String {
        let reasons = self
            .reasons
            .iter()
            .filter_map(|index| Reason::from_index(*index));
        let words: Vec<_> = reasons
            .map(|reason| format!("{} ({})", reason.name(), reason.meaning()))
            .collect();
        if words.is_empty() {
            "unknown".to_owned()
        } else {
            words.join("; ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(service: u16, source: u32, count: u64, ago: Duration) -> RefusedSource {
        RefusedSource {
            service,
            netns: 1,
            source: std::net::Ipv4Addr::from_bits(0x0a00_0000 + source).into(),
            count,
            first: ago,
            last: Duration::ZERO,
            reason: Some(Reason::OverQuota),
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_is_told_at_once_and_the_rest_every_ten_seconds() {
        let mut log = RefusalLog::default();
        assert!(log.lines(SECOND).is_empty());
        log.add(&refused(3, 7, 1, Duration::ZERO), SECOND);
        let meaning = Reason::OverQuota.meaning();
        let first = format!("refused a connection, from 10.0.0.7: over-quota ({meaning})");
        assert_eq!(log.lines(SECOND), [(3, first)]);
        for (source, count) in [(7, 5), (8, 40), (9, 2), (10, 1), (7, 6)] {
            log.add(&refused(3, source, count, SECOND), 4 * SECOND);
        }
        assert!(log.lines(10 * SECOND).is_empty());
        let rest = format!(
            "refused 54 connections within 9 s, from 4 sources (10.0.0.8 (40), 10.0.0.7 (11), \
             10.0.0.9 (2), …): over-quota ({meaning})"
        );
        assert_eq!(log.lines(11 * SECOND), [(3, rest)]);
        assert!(log.lines(21 * SECOND).is_empty(), "nothing happened since");
        assert!(log.0.is_empty(), "and nothing is kept");
        // Another service has lines of its own.
        log.add(&refused(3, 7, 1, Duration::ZERO), 22 * SECOND);
        assert_eq!(log.lines(22 * SECOND).len(), 1);
        log.add(&refused(4, 7, 1, Duration::ZERO), 23 * SECOND);
        assert_eq!(log.lines(23 * SECOND).len(), 1);
    }

    #[test]
    fn a_hundred_refusals_a_second_make_few_lines_and_name_who_is_refused_seldom() {
        let mut log = RefusalLog::default();
        let (mut lines, mut with_second) = (0, 0);
        for second in 0..120 {
            let now = second * SECOND;
            log.add(&refused(0, 1, 100, SECOND), now);
            if second % 10 == 5 {
                log.add(&refused(0, 2, 1, Duration::ZERO), now);
            }
            for (_, line) in log.lines(now) {
                lines += 1;
                with_second += usize::from(line.contains("10.0.0.2 (1)"));
            }
        }
        assert_eq!((lines, with_second), (12, 11));
    }

    #[test]
    fn sources_are_counted_in_bounded_memory() {
        let mut log = RefusalLog::default();
        for source in 0..5000 {
            log.add(&refused(0, source, 1, Duration::ZERO), SECOND);
        }
        let line = &log.lines(SECOND)[0].1;
        assert!(
            line.starts_with("refused 5000 connections within 1 s, from at least 1024 sources ("),
            "{line}"
        );
        assert!(line.len() < 400, "{line}");
    }

    proptest! {
        #[test]
        fn there_are_few_lines_and_none_is_lost(
            steps in proptest::collection::vec((0..3_000_u64, 0..2_u16, 0..5_u32, 1..9_u64), 1..200),
        ) {
            let (mut log, mut now) = (RefusalLog::default(), Duration::ZERO);
            let mut told: BTreeMap<u16, Vec<Duration>> = BTreeMap::new();
            for (wait, service, source, count) in steps {
                now += Duration::from_millis(wait);
                log.add(&refused(service, source, count, Duration::ZERO), now);
                for (service, _) in log.lines(now) {
                    told.entry(service).or_default().push(now);
                }
                let is_new = |service| !told.contains_key(&service) && log.0.contains_key(&service);
                prop_assert!(!is_new(0) && !is_new(1), "the first is told at once");
            }
            for times in told.values() {
                prop_assert!(times.windows(2).all(|pair| pair[1] >= pair[0] + EVERY));
            }
            log.lines(now + EVERY);
            prop_assert!(log.0.values().all(|untold| untold.count == 0));
        }
    }
}
