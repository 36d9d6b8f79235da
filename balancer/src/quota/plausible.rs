//! How much of what other nodes say of a backend group is believed. Pure.
//!
//! A node is asked about its own pods alone, but nobody can check what it counts there. So a number
//! that stands out is cut: one node that lies can make quotas a few times too high, and no more.
//! Numbers are cut upwards only, and never the own ones: too low a total would refuse clients.

use std::collections::BTreeMap;

/// So many connections are believed of any node: a group is small at first, and after a restart
/// they may all be on one node.
const ALWAYS: u64 = 1000;
/// Beyond that, a node may have so many times as many connections as all the others together.
const TIMES: u64 = 4;

/// The most that is believed of a node, by what the others count.
pub fn at_most(others: u64) -> u64 {
    others.saturating_mul(TIMES).max(ALWAYS)
}

/// How much is believed of each node; `own`: what this node itself counts, if anything.
///
/// The numbers are taken in order of size, the own one among them. Up to the middle one they are
/// believed: where most nodes are honest, an honest one says as much or more. A larger one is
/// believed up to [`at_most`] of what is believed of the smaller ones.
pub fn believed<K: Ord>(own: Option<u64>, reported: BTreeMap<K, u64>) -> BTreeMap<K, u64> {
    let mut numbers: Vec<(u64, Option<K>)> = reported
        .into_iter()
        .map(|(node, number)| (number, Some(node)))
        .chain(own.map(|own| (own, None)))
        .collect();
    numbers.sort();
    let middle = numbers.get(numbers.len().saturating_sub(1) / 2);
    let middle = middle.map_or(0, |(number, _)| *number);
    let mut smaller = 0_u64;
    let mut believed = BTreeMap::new();
    for (number, node) in numbers {
        let is_cut = node.is_some() && number > middle;
        let number = if is_cut {
            number.min(at_most(smaller))
        } else {
            number
        };
        smaller = smaller.saturating_add(number);
        if let Some(node) = node {
            believed.insert(node, number);
        }
    }
    believed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(own: Option<u64>, reported: &[u64]) -> Vec<u64> {
        let reported = reported.iter().copied().enumerate().collect();
        believed(own, reported).into_values().collect()
    }

    #[test]
    fn what_stands_out_is_cut() {
        assert_eq!(of(Some(100), &[110, 90]), [110, 90]);
        assert_eq!(
            of(None, &[5000]),
            [5000],
            "there is nobody to compare it with"
        );
        assert_eq!(of(None, &[1500, 1500]), [1500, 1500]);
        assert_eq!(
            of(Some(0), &[900, 0]),
            [900, 0],
            "one has all, after a restart"
        );
        assert_eq!(of(Some(100), &[u64::MAX, 110]), [1000, 110]);
        assert_eq!(of(Some(1000), &[u64::MAX, 1100]), [8400, 1100]);
        assert_eq!(of(Some(u64::MAX), &[7]), [7], "the own one is not");
    }

    #[test]
    fn nodes_that_lie_together_get_no_further_than_a_power_of_five() {
        let lies = [u64::MAX; 2];
        assert_eq!(
            of(Some(1000), &[lies[0], lies[1], 1000, 1000]),
            [12000, 60000, 1000, 1000]
        );
    }

    proptest! {
        #[test]
        fn nobody_is_believed_more_than_it_says_and_the_smaller_half_is_believed(
            own in proptest::option::of(0..100_000_u64),
            reported in proptest::collection::vec(0..u64::MAX, 0..9),
        ) {
            let believed = of(own, &reported);
            prop_assert_eq!(believed.len(), reported.len());
            prop_assert!(believed.iter().zip(&reported).all(|(believed, said)| believed <= said));
            let whole = believed.iter().zip(&reported).filter(|(believed, said)| believed == said);
            prop_assert!(2 * (whole.count() + usize::from(own.is_some())) >= reported.len());
        }
    }
}
