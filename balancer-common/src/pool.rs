//! How many slots rules for any netns may give away: whoever can make a netns can ask for them.

use crate::abi::{
    MAX_CANDIDATES, MAX_CANDIDATES_BESIDE_CONFIRMED, MAX_CANDIDATES_OF_NETNS,
    MAX_SLOTS_OF_ANY_NETNS,
};

/// The slots that rules for any netns have given away, as one more listener finds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pool {
    /// All of them.
    all: u32,
    /// Those that the daemon has not confirmed, also where they are closed.
    unconfirmed: u32,
    /// Unconfirmed ones of the listener's netns.
    unconfirmed_here: u32,
    /// Confirmed ones of the listener's netns.
    confirmed_here: u32,
}

impl Pool {
    /// Counts a slot that a rule for any netns has given away; `here`: to the listener's netns.
    #[inline(always)]
    pub fn add(&mut self, confirmed: bool, here: bool) {
        self.all += 1;
        self.unconfirmed += u32::from(!confirmed);
        self.unconfirmed_here += u32::from(!confirmed & here);
        self.confirmed_here += u32::from(confirmed & here);
    }

    /// Whether rules for any netns may give away one more, to whomever.
    #[inline(always)]
    pub const fn has_any(&self) -> bool {
        self.all < MAX_SLOTS_OF_ANY_NETNS
    }

    /// Whether the listener may have one more. A netns with a confirmed backend has room of its
    /// own, which strangers can't take.
    #[inline(always)]
    pub const fn has_room(&self) -> bool {
        if !self.has_any() {
            return false;
        }
        if self.confirmed_here > 0 {
            return self.unconfirmed_here < MAX_CANDIDATES_BESIDE_CONFIRMED;
        }
        self.unconfirmed_here < MAX_CANDIDATES_OF_NETNS && self.unconfirmed < MAX_CANDIDATES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many listeners find room, one after the other, where each stays unconfirmed.
    fn admitted(mut pool: Pool, here: bool) -> u32 {
        let mut admitted = 0;
        while pool.has_room() {
            pool.add(false, here);
            admitted += 1;
        }
        admitted
    }

    fn with(mut pool: Pool, number: u32, confirmed: bool, here: bool) -> Pool {
        for _ in 0..number {
            pool.add(confirmed, here);
        }
        pool
    }

    #[test]
    fn strangers_share_a_small_pool() {
        let empty = Pool::default();
        assert_eq!(admitted(empty, true), MAX_CANDIDATES_OF_NETNS);
        assert_eq!(admitted(empty, false), MAX_CANDIDATES);
        let strangers = with(empty, MAX_CANDIDATES, false, false);
        assert!(!strangers.has_room());
        let beside_confirmed = with(strangers, 1, true, true);
        assert_eq!(
            admitted(beside_confirmed, true),
            MAX_CANDIDATES_BESIDE_CONFIRMED
        );
    }

    #[test]
    fn named_namespaces_always_find_slots() {
        let confirmed = with(Pool::default(), MAX_SLOTS_OF_ANY_NETNS, true, true);
        assert!(!confirmed.has_room());
    }
}
