//! The most within the last minutes, in bounded memory. Pure: the caller says what time it is.

use std::{collections::BTreeMap, time::Duration};

/// Into how many parts a window is divided.
const PARTS: u32 = 30;

/// The largest of the values seen within a time.
///
/// A value counts for the length of the window, and for up to a thirtieth of it longer: values of
/// one thirtieth go together, with the last of them.
///
/// Times are since some start that the caller keeps to.
#[derive(Clone, Debug)]
pub struct Window {
    /// The length of the window in milliseconds.
    length: i64,
    /// The length of a part in milliseconds.
    part: i64,
    /// The largest value of each part, by the part's number counted from the start; at most as
    /// many as a window has, and the two at its ends.
    parts: BTreeMap<i64, Most>,
}

/// The largest value of one part, and when it was, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Most {
    value: u64,
    at: i64,
}

impl Window {
    /// A window of this length in which nothing has been seen.
    pub fn new(length: Duration) -> Self {
        Self {
            length: milliseconds(length),
            part: milliseconds(length / PARTS).max(1),
            parts: BTreeMap::new(),
        }
    }

    /// Takes a value that holds now.
    pub fn add(&mut self, now: Duration, value: u64) {
        let at = milliseconds(now);
        let seen = Most { value, at };
        self.parts
            .entry(at.div_euclid(self.part))
            .and_modify(|most| *most = seen.max(*most))
            .or_insert(seen);
        self.forget(at);
    }

    /// The largest value within the window and how long ago that was (of several times: the last).
    pub fn peak(&self, now: Duration) -> Option<(u64, Duration)> {
        let now = milliseconds(now);
        let most = self
            .parts
            .iter()
            .filter(|(part, _)| !self.is_over(**part, now))
            .map(|(_, most)| most)
            .max()?;
        let age = u64::try_from(now.saturating_sub(most.at)).unwrap_or_default();
        Some((most.value, Duration::from_millis(age)))
    }

    /// Drops what doesn't count any more.
    fn forget(&mut self, now: i64) {
        while let Some((oldest, _)) = self.parts.first_key_value()
            && (self.is_over(*oldest, now) || self.parts.len() > PARTS as usize + 2)
        {
            self.parts.pop_first();
        }
    }

    /// Whether every value of this part is older than the window is long.
    fn is_over(&self, part: i64, now: i64) -> bool {
        let end = part.saturating_add(1).saturating_mul(self.part);
        end <= now.saturating_sub(self.length)
    }

    #[cfg(test)]
    pub(super) fn parts(&self) -> usize {
        self.parts.len()
    }
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
