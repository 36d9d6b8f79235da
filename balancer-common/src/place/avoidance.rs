//! Failure teaches: an endpoint that a connect has failed on is avoided for a while, twice as long
//! each time.
//!
//! The word `Placed::avoidance`: how often in a row it was avoided (4 bits) | tick until which it
//! is avoided << 20; 0: never.

use crate::abi::{beside, stamped, tick_of, ticks_of_ms};

/// How long an endpoint is avoided for the first time.
const FIRST: u64 = ticks_of_ms(1_000);
/// How long it is avoided at most.
const LONGEST: u64 = ticks_of_ms(30_000);
/// For how long after an avoidance its end is remembered: a failure later begins anew.
const MEMORY: u64 = ticks_of_ms(60_000);
/// Doublings that are counted.
const MOST_DOUBLINGS: u64 = 15;

/// Whether an endpoint is avoided.
#[inline(always)]
pub const fn is_avoided(word: u64, now: u64) -> bool {
    now < tick_of(word)
}

/// The tick until which it is avoided.
#[inline(always)]
pub const fn avoided_until(word: u64) -> u64 {
    tick_of(word)
}

/// The tick since which it is avoided.
#[inline(always)]
pub const fn avoided_since(word: u64) -> u64 {
    let doublings = beside(word);
    tick_of(word).saturating_sub(span(if doublings == 0 { 0 } else { doublings - 1 }))
}

/// How long it is avoided after so many doublings.
#[inline(always)]
const fn span(doublings: u64) -> u64 {
    let span = FIRST << if doublings < 5 { doublings } else { 5 };
    if span < LONGEST { span } else { LONGEST }
}

/// The word after a connect has failed. One that was under way when the endpoint was avoided
/// already says nothing new.
#[inline(always)]
pub const fn after_failure(word: u64, now: u64) -> u64 {
    if is_avoided(word, now) {
        return word;
    }
    let doublings = if word != 0 && now - tick_of(word) < MEMORY {
        beside(word)
    } else {
        0
    };
    let span = span(doublings);
    let next = doublings + 1;
    let next = if next < MOST_DOUBLINGS {
        next
    } else {
        MOST_DOUBLINGS
    };
    stamped(now + span, next)
}

/// The word after a connect has succeeded that began while the endpoint was avoided: it is avoided
/// no longer. How often it was is remembered, should it fail again soon. A connect that began
/// before the avoidance did says nothing of what has happened since: it changes nothing.
#[inline(always)]
pub const fn after_success(word: u64, now: u64) -> u64 {
    if is_avoided(word, now) {
        stamped(now, beside(word))
    } else {
        word
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_success_ends_an_avoidance_and_the_next_failure_doubles_it_all_the_same() {
        let first = after_failure(0, 1_000_000);
        let ended = after_success(first, 1_000_100);
        assert!(!is_avoided(ended, 1_000_100));
        assert_eq!(after_success(ended, 1_000_200), ended, "nothing to end");
        let second = after_failure(ended, 1_000_300);
        assert_eq!(avoided_until(second), 1_000_300 + 2 * FIRST);
        assert_eq!(after_success(0, 1_000_000), 0);
    }

    #[test]
    fn each_failure_in_a_row_doubles_the_time_up_to_thirty_seconds() {
        let (mut word, mut now) = (0, 1_000_000);
        let mut spans = Vec::new();
        for _ in 0..8 {
            word = after_failure(word, now);
            spans.push((avoided_until(word) - now) * 1_048_576 / 1_000_000_000);
            assert_eq!(avoided_since(word), now);
            now = avoided_until(word);
        }
        assert_eq!(spans, [0, 1, 3, 7, 15, 29, 29, 29]);
        let later = after_failure(word, now + MEMORY);
        assert_eq!(avoided_until(later), now + MEMORY + FIRST, "begins anew");
    }

    proptest! {
        #[test]
        fn it_is_never_avoided_for_longer_than_the_longest(word: u64, now in 0..1_u64 << 43) {
            let after = after_failure(word, now);
            prop_assert!(is_avoided(after, now));
            prop_assert!(is_avoided(word, now) || avoided_until(after) <= now + LONGEST);
            prop_assert_eq!(after_failure(after, now), after, "told twice");
        }
    }
}
