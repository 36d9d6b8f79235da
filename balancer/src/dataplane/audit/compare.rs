//! By how much a count is off, from the socket table and from how often that was seen.

/// So many passes in a row must find a count off before that is more than a socket on its way.
pub const LASTING: u32 = 3;

/// By how much a count is too low (or, negative, too high), as far as the socket table can tell
/// while connections come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    /// The lowest number of connections that may be missing in the count.
    least: i64,
    /// The highest number of connections that may be missing in the count.
    most: i64,
}

impl Drift {
    /// From a count before and after the table was read, how many connections were counted as
    /// entering meanwhile, and how many the table has. A connection that came or went meanwhile may
    /// or may not be in the table.
    pub fn between(before: u32, after: u32, entered: u64, found: u32) -> Self {
        let (before, after, found) = (i64::from(before), i64::from(after), i64::from(found));
        let entered = i64::try_from(entered).unwrap_or(i64::MAX / 2);
        Self {
            least: found - (before + entered).max(after),
            most: found - (after - entered).min(before),
        }
    }

    /// Whether the count may be right.
    pub const fn may_be_none(self) -> bool {
        self.least <= 0 && self.most >= 0
    }

    /// What lasts of it if a later pass has found `later`: what both allow or, where it grows or
    /// shrinks meanwhile, the smaller one of the two, unless they are off to different sides.
    fn lasting(self, later: Self) -> Option<Self> {
        let both = Self {
            least: self.least.max(later.least),
            most: self.most.min(later.most),
        };
        if both.least <= both.most {
            return Some(both);
        }
        let (before, after) = (self.at_least(), later.at_least());
        let smaller = if before.abs() < after.abs() {
            self
        } else {
            later
        };
        (before.signum() == after.signum()).then_some(smaller)
    }

    /// The smallest drift that there can be where there is any: never more than what is really off.
    const fn at_least(self) -> i64 {
        if self.least > 0 {
            self.least
        } else {
            self.most
        }
    }
}

/// A count that the last passes found off.
#[derive(Clone, Copy, Debug)]
pub struct Deviation {
    /// The generation of the slot that the count is of.
    generation: u32,
    /// What of the drift has lasted over these passes.
    drift: Drift,
    /// How many passes in a row have found the count off.
    passes: u32,
}

impl Deviation {
    /// The deviation after one more pass.
    pub fn seen_again(before: Option<Self>, generation: u32, drift: Drift) -> Self {
        let first = Self {
            generation,
            drift,
            passes: 1,
        };
        let Some(before) = before.filter(|before| before.generation == generation) else {
            return first;
        };
        before.drift.lasting(drift).map_or(first, |drift| Self {
            generation,
            drift,
            passes: before.passes + 1,
        })
    }

    /// By how much the count has been off for long enough, and never more than it is; `None`: not
    /// for long enough.
    pub fn lasting(&self) -> Option<i64> {
        (self.passes >= LASTING).then(|| self.drift.at_least())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drift(least: i64, most: i64) -> Drift {
        Drift { least, most }
    }

    #[test]
    fn a_quiet_slot_is_compared_exactly() {
        assert_eq!(Drift::between(7, 7, 0, 7), drift(0, 0));
        assert_eq!(Drift::between(7, 7, 0, 5), drift(-2, -2));
        assert!(!Drift::between(7, 7, 0, 8).may_be_none());
    }

    #[test]
    fn only_what_lasts_is_drift() {
        let off = drift(2, 5);
        let first = Deviation::seen_again(None, 1, off);
        let second = Deviation::seen_again(Some(first), 1, drift(1, 3));
        assert_eq!(second.lasting(), None);
        let third = Deviation::seen_again(Some(second), 1, drift(3, 9));
        assert_eq!(third.lasting(), Some(3));
        let grown = Deviation::seen_again(Some(second), 1, drift(7, 9));
        assert_eq!((grown.lasting(), grown.drift), (Some(2), drift(2, 3)));
        let shrunk = Deviation::seen_again(Some(second), 1, drift(1, 1));
        assert_eq!((shrunk.lasting(), shrunk.drift), (Some(1), drift(1, 1)));
        let elsewhere = Deviation::seen_again(Some(second), 1, drift(-4, -1));
        assert_eq!((elsewhere.passes, elsewhere.drift), (1, drift(-4, -1)));
        let another = Deviation::seen_again(Some(second), 2, off);
        assert_eq!(another.passes, 1);
    }

    #[test]
    fn a_drift_that_grows_is_put_right_by_what_has_lasted() {
        for side in [1, -1] {
            let seen = [10, 20, 30].map(|off| drift(side * off - 2, side * off + 2));
            let last = seen.into_iter().fold(None, |before, drift| {
                Some(Deviation::seen_again(before, 1, drift))
            });
            let last = last.expect("three were seen");
            assert_eq!(last.lasting(), Some(side * 8));
        }
    }

    proptest! {
        /// However many come and go while the table is read, and whichever of them it shows: a
        /// count that is right is never found off, and one that is wrong never by more than it is.
        #[test]
        fn the_true_drift_is_within_the_bounds(
            standing in 0..1_000_u32,
            entered in 0..200_u32,
            left in 0..200_u32,
            shown in 0..400_u32,
            off in -50..50_i64,
        ) {
            let left = left.min(standing + entered);
            let remaining = standing + entered - left;
            prop_assume!(i64::from(standing) + off >= 0 && i64::from(remaining) + off >= 0);
            let counted = |true_count: u32| u32::try_from(i64::from(true_count) + off).unwrap();
            // Those that stood throughout are in the table, and of the rest some.
            let throughout = standing.saturating_sub(left);
            let found = throughout + shown.min(standing - throughout + entered);
            let (before, after) = (counted(standing), counted(remaining));
            let drift = Drift::between(before, after, entered.into(), found);
            prop_assert!(drift.least <= -off && -off <= drift.most, "{drift:?} {off}");
        }
    }
}
