//! Candidates that nobody confirms: the kernel must not keep memory for their connections for ever.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{BackendId, BackendState};
use tracing::info;

use crate::dataplane::{SlotView, Writer};

/// A pod may listen before the API server tells of it, and a netns may have to be searched for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Since when each candidate has been seen.
#[derive(Debug, Default)]
pub struct Strangers(HashMap<BackendId, Instant>);

impl Strangers {
    /// Gives up the candidates that have waited for a minute: connections that they accept from now
    /// on are not counted, and take no memory for it. Should one be confirmed later, the audit
    /// counts those from the socket table.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn give_up(&mut self, writer: &Writer) -> Result<()> {
        let mut slots = writer.tables.slots()?;
        slots.retain(|view| view.state() == BackendState::Candidate);
        let overdue = self.overdue(slots.iter().map(SlotView::id), Instant::now());
        let mut given_up = 0;
        for view in slots.iter().filter(|view| overdue.contains(&view.id())) {
            if !writer.tables.is_disowned(view) {
                writer.tables.disown(view);
                given_up += 1;
            }
        }
        if given_up > 0 {
            info!(
                "{given_up} listeners on ports of services belong to nobody: their connections are \
                 not counted any more"
            );
        }
        Ok(())
    }

    /// Those of the candidates at this time that have waited for long enough.
    fn overdue(
        &mut self,
        candidates: impl Iterator<Item = BackendId>,
        now: Instant,
    ) -> Vec<BackendId> {
        let known = |id| (id, self.0.get(&id).copied().unwrap_or(now));
        self.0 = candidates.map(known).collect();
        let waited = |since: &Instant| now.duration_since(*since) >= PATIENCE;
        let overdue = self.0.iter().filter(|(_, since)| waited(since));
        overdue.map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_candidate_is_given_up_after_a_minute_and_its_successor_begins_anew() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let id = |slot, generation| BackendId { slot, generation };
        let mut strangers = Strangers::default();
        let mut overdue = |candidates: &[BackendId], now| {
            let mut overdue = strangers.overdue(candidates.iter().copied(), now);
            overdue.sort();
            overdue
        };
        let both = [id(1, 7), id(2, 7)];
        assert_eq!(overdue(&both, at(0)), []);
        assert_eq!(overdue(&both, at(59)), []);
        // The first was confirmed, and another took its slot.
        assert_eq!(overdue(&both[1..], at(59)), []);
        let now = [id(1, 8), id(2, 7)];
        assert_eq!(overdue(&now, at(60)), [id(2, 7)]);
        assert_eq!(overdue(&now, at(119)), [id(2, 7)]);
        assert_eq!(overdue(&now, at(120)), now);
    }
}
