//! Rosters: where a service has so many backends that a few, drawn by lot, may stand for all.

use anyhow::Result;
use balancer_common::abi::{Backend, Cookies, Roster, ticks};
use balancer_common::decision::admission::cookies_state;
use balancer_common::decision::scan::Member;

use super::tables::SlotView;
use super::writer::Writer;
use crate::sys::clock;

/// With fewer backends all of them are looked at for each SYN.
const DRAWN_FROM: usize = 32;

impl Writer {
    /// Draws up the rosters of all services anew where anything has changed. The kernel half gives one up by itself as soon as its
    /// members are others.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn draw_up_rosters(&self) -> Result<()> {
        let services: Vec<u16> = self.service_ids()?.into_values().collect();
        // Before the slots are read: a listener that comes meanwhile is not in it.
        let words: Vec<_> = services.iter().map(|id| self.tables.members(*id)).collect();
        let slots = self.slots()?;
        let now = ticks(clock::monotonic_ns());
        for (service, words) in services.into_iter().zip(words) {
            let members: Vec<&Member> = slots
                .iter()
                .map(|SlotView { member }| member)
                .filter(|member| is_in(&words, member.slot) && member.is_ready())
                .collect();
            let roster = if may_be_drawn(&members, now) {
                Roster::new(words, members.iter().map(|member| member.slot))
            } else {
                Roster::EMPTY
            };
            if self.tables.roster(service) != roster {
                self.tables.write_roster(service, &roster);
            }
        }
        Ok(())
    }
}

fn is_in(words: &[u64], slot: u32) -> bool {
    words[slot as usize / 64] >> (slot % 64) & 1 != 0
}

/// Lots are even: so must the weights be. While SYN cookies are about, all backends are looked at.
fn may_be_drawn(members: &[&Member], now: u32) -> bool {
    members.len() >= DRAWN_FROM
        && members.iter().all(|member| {
            member.weight() == members[0].weight()
                && member.backend.flags & Backend::UNSTEERABLE == 0
                && cookies_state(member.counts.cookies, now) == Cookies::Off
        })
}

#[cfg(test)]
mod tests {
    use balancer_common::abi::{Counts, SlotPolicy};

    use super::*;

    const NOW: u32 = 5_000;

    fn members(count: u32) -> Vec<Member> {
        let member = |slot| Member {
            slot,
            backend: Backend::EMPTY,
            policy: SlotPolicy::new(0, 10, 2, 0),
            counts: Counts::ZERO,
        };
        (0..count).map(member).collect()
    }

    fn drawn(members: &[Member]) -> bool {
        may_be_drawn(&members.iter().collect::<Vec<_>>(), NOW)
    }

    #[test]
    fn only_many_that_are_alike_are_drawn_from() {
        assert!(!drawn(&[]));
        assert!(!drawn(&members(31)));
        let alike = members(32);
        assert!(drawn(&alike));
        let with = |change: fn(&mut Member)| {
            let mut members = alike.clone();
            change(&mut members[31]);
            drawn(&members)
        };
        assert!(!with(|member| member.policy = SlotPolicy::new(0, 10, 3, 0)));
        assert!(!with(|member| member.backend.flags = Backend::UNSTEERABLE));
        assert!(!with(
            |member| member.counts.cookies = 2 << 32 | u64::from(NOW + 1)
        ));
        assert!(with(
            |member| member.counts.cookies = 2 << 32 | u64::from(NOW - 1)
        ));
    }

    #[test]
    fn a_slot_is_in_the_word_that_has_its_bit() {
        let words = [1 << 63, 0, 1];
        let inside: Vec<u32> = (0..192).filter(|slot| is_in(&words, *slot)).collect();
        assert_eq!(inside, [63, 128]);
    }
}
