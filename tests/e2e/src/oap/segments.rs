//! What is expected of the segments that agents send.

use std::collections::BTreeSet;
use std::time::Duration;

/// A Java agent that is cut off in the middle of a call is silent for a minute and a half.
pub const DATA_COMES_BACK_WITHIN: Duration = Duration::from_secs(150);

/// So many segments show that an agent reports; after it was cut off, so many in a row with none
/// missing.
pub const ENOUGH: u32 = 20;

/// Whether there are [`ENOUGH`] numbers in a row after `since`.
pub fn has_run(numbers: &BTreeSet<u32>, since: u32) -> bool {
    let mut run = 0;
    let mut previous = None;
    for number in numbers.range(since + 1..) {
        run = if previous == number.checked_sub(1) {
            run + 1
        } else {
            1
        };
        previous = Some(*number);
        if run >= ENOUGH {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_breaks_a_run() {
        let whole: BTreeSet<u32> = (5..=5 + ENOUGH).collect();
        assert!(has_run(&whole, 5));
        assert!(!has_run(&whole, 6));
        let mut broken = whole.clone();
        broken.remove(&10);
        assert!(!has_run(&broken, 5));
    }
}
