//! Connections of a backend that are moved for one reason.

use std::collections::BTreeMap;
use std::time::Instant;

use tracing::{info, warn};

use super::super::log_limit::BY_HAND;
use crate::moving::Outcome;

/// Connections of a backend that are moved for one reason.
pub struct Batch {
    /// The backend, as the log calls it.
    pub name: String,
    pub cause: Cause,
    began: Instant,
    /// When one was ordered last.
    pub ordered: Instant,
    /// What the backend had when it began.
    pub had: usize,
    left: usize,
    stay: BTreeMap<String, usize>,
}

/// Why connections of a backend are moved: what outranks another comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// It has more than its share.
    Uneven,
    /// Somebody wants so many more to move.
    ByHand(usize),
    /// All move: it is drained.
    Drained,
    /// All move: it ends.
    Ends,
}

impl Cause {
    /// The cause as the log has it.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Uneven => "it holds more than its share",
            Self::ByHand(_) => "by hand",
            Self::Drained => "it is drained",
            Self::Ends => "its pod is ending",
        }
    }
}

impl Batch {
    /// Moves that begin now, of a backend that has so many connections.
    pub fn new(name: String, cause: Cause, had: usize) -> Self {
        let now = Instant::now();
        Self {
            name,
            cause,
            began: now,
            ordered: now,
            had,
            left: 0,
            stay: BTreeMap::new(),
        }
    }

    /// Says in the log that they begin.
    pub fn tell_beginning(&self, why: &str) {
        let Self { name, had, .. } = self;
        match self.cause {
            Cause::Uneven => info!("{name}: moving connections: {why}"),
            Cause::Ends => info!("{name}: moving all {had} connections: {why}"),
            Cause::Drained => {
                info!(target: BY_HAND, "{name}: moving all {had} connections: {why}");
            }
            Cause::ByHand(_) => info!(target: BY_HAND, "{name}: moving connections: {why}"),
        }
    }

    /// Takes in what has become of one.
    pub fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Left | Outcome::Closed => self.left += 1,
            Outcome::Gone => {}
            Outcome::Stays(why) => *self.stay.entry(why.to_string()).or_default() += 1,
        }
    }

    /// Says in the log what has become of them.
    pub fn tell(&self) {
        let Self { name, left, .. } = self;
        info!(
            "{name}: moved {left} connections in {:.0} s",
            self.began.elapsed().as_secs_f64()
        );
        for (why, number) in &self.stay {
            warn!("{name}: {number} connections were left where they are: {why}");
        }
    }
}
