//! What the log says of backends that don't serve: a line for each change, and for one that changes
//! all the time a line a minute.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use balancer_common::abi::{BackendId, HealthState};

use super::words::in_words;

/// So many lines there are at most about one backend within [`WINDOW`].
const LINES: u32 = 6;
const WINDOW: Duration = Duration::from_secs(60);

/// The states that the log has told of.
#[derive(Debug, Default)]
pub struct HealthChanges(BTreeMap<BackendId, Told>);

#[derive(Debug)]
struct Told {
    /// What a line calls it.
    name: String,
    state: HealthState,
    /// When it came into that state.
    since: Duration,
    /// When the window began, in which there were so many changes.
    window: Duration,
    changes: u32,
}

/// The state of a backend at one moment.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The backend.
    pub id: BackendId,
    /// What a line calls it.
    pub name: String,
    /// Its state of health.
    pub state: HealthState,
    /// How long it has been in that state, unless it serves.
    pub age: Duration,
}

/// A line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A backend does not serve.
    Bad(String),
    /// One serves again.
    Good(String),
}

impl HealthChanges {
    /// Takes in how all backends are at the time `now`, of any clock; what the log should say.
    pub fn update(&mut self, now: Duration, seen: &[Seen]) -> Vec<Line> {
        let mut lines = Vec::new();
        let ids: HashSet<BackendId> = seen.iter().map(|one| one.id).collect();
        self.0.retain(|id, _| ids.contains(id));
        for one in seen {
            let told = self.0.entry(one.id).or_insert_with(|| Told {
                name: one.name.clone(),
                state: HealthState::Serving,
                since: now,
                window: now,
                changes: 0,
            });
            lines.extend(told.end_window(now));
            lines.extend(told.follow(now, one));
        }
        lines
    }
}

impl Told {
    /// What to say of the changes that were left out in a window that is over.
    fn end_window(&mut self, now: Duration) -> Option<Line> {
        if now.saturating_sub(self.window) < WINDOW {
            return None;
        }
        let left_out = self.changes.saturating_sub(LINES);
        (self.window, self.changes) = (now, 0);
        (left_out > 0).then(|| {
            Line::Bad(format!(
                "{} goes from one state to another all the time: {left_out} changes more within a \
                 minute, now {}",
                self.name,
                self.state.name()
            ))
        })
    }

    fn follow(&mut self, now: Duration, seen: &Seen) -> Option<Line> {
        if seen.state == self.state {
            return None;
        }
        let lasted = now.saturating_sub(self.since).as_secs();
        let before = std::mem::replace(&mut self.state, seen.state);
        self.since = now.saturating_sub(seen.age);
        self.changes = self.changes.saturating_add(1);
        if self.changes > LINES {
            return None;
        }
        let name = &self.name;
        let since = format_args!("{} s", seen.age.as_secs());
        Some(match in_words(seen.state, since) {
            Some(words) => Line::Bad(format!("{name} is {words}")),
            None => Line::Good(format!(
                "{name} serves again: it was {} for {lasted} s",
                before.name()
            )),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(slot: u32, state: HealthState, age: u64) -> Seen {
        Seen {
            id: BackendId {
                slot,
                generation: 1,
            },
            name: format!("agents: 127.0.0.1:{slot}"),
            state,
            age: Duration::from_secs(age),
        }
    }

    #[test]
    fn a_change_is_a_line_and_what_stays_is_none() {
        let mut changes = HealthChanges::default();
        let mut at = |second, seen: &[Seen]| changes.update(Duration::from_secs(second), seen);
        let healthy = seen(1, HealthState::Serving, 0);
        assert_eq!(at(1, std::slice::from_ref(&healthy)), []);
        let stalled = [seen(1, HealthState::Stalled, 2)];
        let [Line::Bad(line)] = &at(5, &stalled)[..] else {
            panic!("one line")
        };
        assert!(
            line.starts_with("agents: 127.0.0.1:1 is stalled since 2 s: connections wait"),
            "{line}"
        );
        assert_eq!(at(6, &stalled), []);
        let again = "agents: 127.0.0.1:1 serves again: it was stalled for 9 s";
        assert_eq!(at(12, &[healthy]), [Line::Good(again.to_owned())]);
        // Another backend in the slot begins as one that serves.
        assert_eq!(at(13, &[]), []);
        assert_eq!(at(14, &[seen(1, HealthState::Hung, 3)]).len(), 1);
    }

    #[test]
    fn one_that_changes_all_the_time_gets_a_line_a_minute() {
        let mut changes = HealthChanges::default();
        let mut lines = Vec::new();
        for second in 0..300_u64 {
            let state = if second % 2 == 0 {
                HealthState::Serving
            } else {
                HealthState::Failing
            };
            let other = seen(2, HealthState::Serving, 0);
            let now = Duration::from_secs(second);
            lines.extend(changes.update(now, &[seen(1, state, 0), other]));
        }
        let per_minute = usize::try_from(LINES).expect("few") + 1;
        assert!(
            (4 * per_minute..=5 * per_minute).contains(&lines.len()),
            "{lines:#?}"
        );
        let summary = "agents: 127.0.0.1:1 goes from one state to another all the time: 53 changes";
        let is_summary =
            |line: &&Line| matches!(line, Line::Bad(text) if text.starts_with(summary));
        assert!(lines.iter().any(|line| is_summary(&line)), "{lines:#?}");
    }
}
