//! Shares: what each backend should hold of a total.

/// What the share of a backend depends on.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Its part beside the others'; 0: none.
    pub weight: u64,
    /// What it holds.
    pub held: u64,
    /// The most that it may be given.
    pub most: u64,
}

/// The shares of a total, by weight, in whole numbers. One that may not be given its part gets the
/// most that it may, and the others share the rest. What can't be divided goes to those that hold
/// most already, among equals to the first.
///
/// They add up to the total, or to less where nobody may be given more.
pub fn shares(total: u64, claims: &[Claim]) -> Vec<u64> {
    let mut shares = vec![0; claims.len()];
    let mut open: Vec<usize> = (0..claims.len()).collect();
    open.retain(|index| claims[*index].weight > 0);
    let mut rest = total;
    // Each round closes at least one, or is the last.
    loop {
        let weights: u128 = open
            .iter()
            .map(|index| u128::from(claims[*index].weight))
            .sum();
        let is_full = |index: &usize| {
            let claim = claims[*index];
            u128::from(claim.most) * weights < u128::from(rest) * u128::from(claim.weight)
        };
        let (full, others): (Vec<_>, Vec<_>) = open.into_iter().partition(is_full);
        open = others;
        if full.is_empty() {
            divide(rest, weights, &open, claims, &mut shares);
            return shares;
        }
        for index in full {
            shares[index] = claims[index].most;
            rest = rest.saturating_sub(shares[index]);
        }
    }
}

/// Divides what nobody may have too much of.
fn divide(rest: u64, weights: u128, open: &[usize], claims: &[Claim], shares: &mut [u64]) {
    let mut left = rest;
    for index in open {
        let share = u128::from(rest) * u128::from(claims[*index].weight) / weights.max(1);
        shares[*index] = u64::try_from(share).unwrap_or(u64::MAX);
        left -= shares[*index];
    }
    let mut order = open.to_vec();
    order.retain(|index| shares[*index] < claims[*index].most);
    order.sort_by_key(|index| {
        std::cmp::Reverse(i128::from(claims[*index].held) - i128::from(shares[*index]))
    });
    for index in order
        .into_iter()
        .take(usize::try_from(left).unwrap_or(usize::MAX))
    {
        shares[index] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claim((weight, held, most): (u64, u64, u64)) -> Claim {
        Claim { weight, held, most }
    }

    #[test]
    fn shares_follow_weights_and_what_each_may_be_given() {
        const ALL: u64 = u64::MAX;
        for (total, claims, expected) in [
            (
                9,
                &[(1, 0, ALL), (1, 0, ALL), (1, 0, ALL)][..],
                &[3, 3, 3][..],
            ),
            (10, &[(1, 3, ALL), (1, 4, ALL), (1, 3, ALL)], &[3, 4, 3]),
            (80, &[(1, 0, ALL), (3, 0, ALL)], &[20, 60]),
            (80, &[(0, 50, ALL), (1, 0, ALL)], &[0, 80]),
            (90, &[(1, 0, 10), (1, 0, ALL), (1, 0, ALL)], &[10, 40, 40]),
            (90, &[(1, 0, 10), (1, 0, 35), (1, 0, ALL)], &[10, 35, 45]),
            (90, &[(1, 0, 10), (1, 0, 20)], &[10, 20]),
            (5, &[(0, 5, ALL)], &[0]),
            (5, &[], &[]),
        ] {
            let claims: Vec<_> = claims.iter().copied().map(claim).collect();
            assert_eq!(shares(total, &claims), expected, "{total} {claims:?}");
        }
    }

    proptest! {
        #[test]
        fn they_add_up_and_nobody_gets_more_than_it_may(
            total in 0..1_u64 << 50,
            claims in prop::collection::vec((0..5_000_u64, any::<u64>(), 0..1_u64 << 50), 0..20),
        ) {
            let claims: Vec<_> = claims.into_iter().map(claim).collect();
            let shares = shares(total, &claims);
            let most: u64 = claims.iter().filter(|one| one.weight > 0).map(|one| one.most).sum();
            prop_assert_eq!(shares.iter().sum::<u64>(), total.min(most));
            for (share, claim) in shares.iter().zip(&claims) {
                prop_assert!(*share <= claim.most);
                prop_assert!(claim.weight > 0 || *share == 0);
            }
        }

        #[test]
        fn those_that_are_not_full_are_in_proportion(
            total in 0..1_u64 << 30,
            claims in prop::collection::vec((1..100_u64, any::<u64>(), 0..1_u64 << 28), 1..9),
        ) {
            let claims: Vec<_> = claims.into_iter().map(claim).collect();
            let shares = shares(total, &claims);
            let both = || shares.iter().zip(&claims);
            for (share, one) in both() {
                for (other_share, other) in both().filter(|(share, one)| **share < one.most) {
                    // One more for either makes up for rounding.
                    prop_assert!(share.saturating_sub(1) * other.weight <= (other_share + 1) * one.weight);
                }
            }
        }
    }
}
