//! The walk over the members of a service.

use crate::abi::{MAX_MEMBERS, MAX_SLOTS, MEMBER_WORDS};
use crate::opaque;

/// Where a walk over a service's bitmap of slots stands.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    /// The words that are still to be looked at, a bit each.
    words: u32,
    /// What is left of the word at hand.
    word: u64,
    /// The first slot of the word at hand.
    first: u32,
}

/// One step of a walk over a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This slot is a member.
    Member(u32),
    /// The last member of a word has gone meanwhile.
    Nobody,
    /// There is no more.
    End,
}

impl Cursor {
    /// Most steps of a walk.
    pub const STEPS: u32 = (MEMBER_WORDS + MAX_MEMBERS + 1) as u32;
    pub(super) const END: Self = Self {
        words: 0,
        word: 0,
        first: 0,
    };

    /// At the beginning; `load` reads a word of the bitmap.
    #[inline(always)]
    pub fn new(load: impl Fn(u32) -> u64) -> Self {
        let mut words = 0;
        let mut index = 0;
        while index < MEMBER_WORDS as u32 {
            let word = load(index);
            // The top bit says whether it is not 0, without a branch, after which the verifier
            // would follow both ways for each word.
            let top = opaque(word | word.wrapping_neg());
            words |= (top >> 63 << index) as u32;
            index += 1;
        }
        Self {
            words,
            word: opaque(0),
            first: 0,
        }
    }

    /// Whether the next step finds the end.
    #[inline(always)]
    pub const fn is_at_end(&self) -> bool {
        self.word == 0 && self.words == 0
    }

    /// The next step; `load` reads a word of the bitmap.
    #[inline(always)]
    pub fn step(&mut self, load: impl FnOnce(u32) -> u64) -> Step {
        if self.word == 0 {
            if self.words == 0 {
                return Step::End;
            }
            let next = self.words.trailing_zeros() & (MEMBER_WORDS as u32 - 1);
            self.words &= self.words - 1;
            self.first = next * 64;
            self.word = load(next);
            if self.word == 0 {
                return Step::Nobody;
            }
        }
        let bit = self.word.trailing_zeros();
        self.word &= self.word - 1;
        Step::Member((self.first + bit) & (MAX_SLOTS as u32 - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// Walks as the kernel half does: so many steps in each call, until a call finds the end.
    fn walk(words: [u64; MEMBER_WORDS], steps_a_call: u32) -> Vec<u32> {
        let mut cursor = Cursor::new(|word| words[word as usize]);
        let mut found = Vec::new();
        for _ in 0..Cursor::STEPS.div_ceil(steps_a_call) {
            for _ in 0..steps_a_call {
                match cursor.step(|word| words[word as usize]) {
                    Step::End => return found,
                    Step::Nobody => {}
                    Step::Member(slot) => found.push(slot),
                }
            }
            if cursor.is_at_end() {
                return found;
            }
        }
        found
    }

    #[test]
    fn every_member_is_found_once_and_in_order() {
        let spread = [0x8001_8001_8001_8001_u64.rotate_left(3) | 0xff00; MEMBER_WORDS];
        let mut dense = [0; MEMBER_WORDS];
        dense[12..].fill(u64::MAX);
        let mut few = [0; MEMBER_WORDS];
        few[0] = 1;
        few[MEMBER_WORDS - 1] = 1 << 63;
        for words in [spread, dense, few, [0; MEMBER_WORDS]] {
            let is_set = |slot: &u32| words[*slot as usize / 64] >> (slot % 64) & 1 == 1;
            let members: Vec<u32> = (0..MAX_SLOTS as u32).filter(is_set).collect();
            assert!(members.len() <= MAX_MEMBERS);
            for steps_a_call in [1, 3, 4] {
                assert_eq!(walk(words, steps_a_call), members, "{steps_a_call}");
            }
        }
    }

    #[test]
    fn members_that_go_meanwhile_cost_no_other() {
        let before = [1_u64; MEMBER_WORDS];
        let mut cursor = Cursor::new(|word| before[word as usize]);
        let mut found = Vec::new();
        for _ in 0..=MEMBER_WORDS {
            match cursor.step(|word| u64::from(word % 2)) {
                Step::Member(slot) => found.push(slot / 64),
                Step::Nobody => {}
                Step::End => break,
            }
        }
        assert!(cursor.is_at_end());
        assert_eq!(found, [1, 3, 5, 7, 9, 11, 13, 15]);
    }
}
