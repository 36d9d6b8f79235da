//! The slow start of a new backend, and what whole connections can reach.

use std::time::Duration;

/// A whole share, or a load that is even: factors are in thousandths.
pub const WHOLE: u64 = 1000;
/// With which part of its share a new backend begins.
const FIRST: u64 = WHOLE / 10;

/// Which part of its share a backend gets that has been ready for so long, in thousandths: linear
/// from a tenth to the whole over `slow_start`. 0 is no slow start.
pub fn ramp(ready_for: Duration, slow_start: Duration) -> u64 {
    if ready_for >= slow_start {
        return WHOLE;
    }
    let grown = ready_for.as_nanos() * u128::from(WHOLE - FIRST) / slow_start.as_nanos();
    u64::try_from(grown).map_or(WHOLE, |grown| FIRST + grown)
}

/// What the most loaded of so many equal backends has at least by the mean, in thousandths, rounded
/// up, when the largest client's connection is moved as a whole: `max(1, share × backends)`.
pub fn bound_of_whole_connections(largest: u64, total: u64, backends: u64) -> u64 {
    let bound = u128::from(largest) * u128::from(backends) * u128::from(WHOLE);
    let bound = bound.div_ceil(u128::from(total.max(1)));
    u64::try_from(bound).unwrap_or(u64::MAX).max(WHOLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_share_grows_from_a_tenth_to_the_whole() {
        for (age, slow_start, factor) in [
            (0, 30, 100),
            (10, 30, 400),
            (20, 30, 700),
            (30, 30, 1000),
            (99, 30, 1000),
            (0, 0, 1000),
        ] {
            assert_eq!(ramp(s(age), s(slow_start)), factor, "{age} of {slow_start}");
        }
    }

    #[test]
    fn a_client_with_half_of_the_load_is_half_as_much_again_as_the_mean_of_three() {
        assert_eq!(bound_of_whole_connections(50, 100, 3), 1500);
        assert_eq!(bound_of_whole_connections(10, 100, 3), 1000);
        assert_eq!(bound_of_whole_connections(1, 3, 4), 1334);
        assert_eq!(bound_of_whole_connections(0, 0, 0), 1000);
    }

    proptest! {
        #[test]
        fn it_never_falls_and_is_of_any_times(a: Duration, b: Duration, slow_start: Duration) {
            let (earlier, later) = (a.min(b), a.max(b));
            prop_assert!(ramp(earlier, slow_start) <= ramp(later, slow_start));
            prop_assert!((FIRST..=WHOLE).contains(&ramp(a, slow_start)));
        }
    }
}
