//! Which connections of a backend may be told.

use super::memory::Cooling;
use super::{Backend, Connection, Memory, Stay};

/// The connections of a backend that may be told now, and how many may not.
#[derive(Debug)]
pub struct Candidates {
    /// The oldest first: the youngest may have been moved before, by another node.
    pub movable: Vec<Connection>,
    pub unmovable: u64,
    pub cooling: u64,
}

impl Candidates {
    pub fn of(backend: &Backend, all: &[Connection], memory: &Memory, cooling: &Cooling) -> Self {
        let told = memory.told_cookies();
        let mut candidates = Self {
            movable: Vec::new(),
            unmovable: 0,
            cooling: 0,
        };
        for one in all {
            if !one.is_movable || told.contains(&one.cookie) {
                candidates.unmovable += 1;
            } else if cooling.has(one) && !backend.phase.is_leaving() {
                candidates.cooling += 1;
            } else {
                candidates.movable.push(*one);
            }
        }
        candidates
            .movable
            .sort_by_key(|one| (one.opened, one.cookie));
        candidates
    }

    pub fn none_movable(&self) -> Stay {
        Stay::NoneMovable {
            unmovable: self.unmovable,
            cooling: self.cooling,
        }
    }
}

/// So many of the oldest, at least one.
pub fn oldest(candidates: &Candidates, most: u64) -> Result<Vec<u64>, Stay> {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let chosen: Vec<u64> = candidates
        .movable
        .iter()
        .take(most)
        .map(|one| one.cookie)
        .collect();
    if chosen.is_empty() {
        return Err(candidates.none_movable());
    }
    Ok(chosen)
}
