//! Medians, spreads, and numbers that look random and are the same in each run.

use serde::Serialize;

/// A median of several rounds, with the median absolute deviation from it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    /// The middle value.
    pub median: f64,
    /// The median of the distances from it.
    pub spread: f64,
    /// How many values there were.
    pub rounds: usize,
}

impl Summary {
    /// Of these values; not a number where there are none.
    pub fn of(values: &[f64]) -> Self {
        let middle = median(values);
        let distances: Vec<_> = values.iter().map(|value| (value - middle).abs()).collect();
        Self {
            median: middle,
            spread: median(&distances),
            rounds: values.len(),
        }
    }
}

/// The middle value; of an even number the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length.is_multiple_of(2) => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

/// The smallest value that so many percent don't exceed (nearest rank).
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let sorted = sorted(values);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// The largest as a multiple of the mean: 1 is even.
pub fn max_over_mean(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    let max = values.iter().copied().fold(0.0, f64::max);
    max * as_f64(values.len()) / sum
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// A count as a number to calculate with.
#[expect(clippy::cast_precision_loss, reason = "counts here are far below 2^52")]
pub fn as_f64(count: impl TryInto<u64>) -> f64 {
    count.try_into().unwrap_or(u64::MAX) as f64
}

/// Numbers that look random (xorshift64*, Vigna 2014).
pub struct Dice(u64);

impl Dice {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Between 0 and 1.
    pub fn fraction(&mut self) -> f64 {
        as_f64(self.next() >> 12) / as_f64(1_u64 << 52)
    }

    /// In another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let bound = u64::try_from(last + 1).unwrap_or(u64::MAX);
            let other = usize::try_from(self.next() % bound).unwrap_or(0);
            items.swap(last, other);
        }
    }
}

/// Shares that follow Zipf's law with exponent 1 and add up to 1, the largest first.
pub fn zipf(number: usize) -> Vec<f64> {
    let weights: Vec<_> = (1..=number).map(|rank| 1.0 / as_f64(rank)).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::{Dice, Summary, max_over_mean, median, percentile, zipf};

    #[test]
    #[expect(clippy::float_cmp, reason = "small whole numbers are exact")]
    fn the_middle_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        let summary = Summary::of(&[1.0, 2.0, 3.0, 4.0, 100.0]);
        assert_eq!((summary.median, summary.spread), (3.0, 1.0));
        let hundred: Vec<_> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 99), 99.0);
        assert_eq!(percentile(&[7.0], 50), 7.0);
        assert_eq!(max_over_mean(&[2.0, 2.0, 2.0]), 1.0);
        assert_eq!(max_over_mean(&[4.0, 0.0]), 2.0);
    }

    #[test]
    fn dice_are_fair_enough_and_shares_add_up() {
        let mut dice = Dice::new(7);
        let mean = (0..10_000).map(|_| dice.fraction()).sum::<f64>() / 10_000.0;
        assert!((0.48..0.52).contains(&mean), "{mean}");
        let mut items: Vec<_> = (0..100).collect();
        dice.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        assert!((zipf(240).iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }
}
