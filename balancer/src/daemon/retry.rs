//! When a plan is tried again that could not be put in force.

use std::time::{Duration, Instant};

use crate::dataplane::Plan;

/// The pause after the first failure; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A plan that could not be put in force, or only in part.
#[derive(Debug)]
pub struct FailedPlan {
    plan: Plan,
    failures: u32,
    again: Instant,
}

impl FailedPlan {
    /// The plan has failed now, after `before` had.
    pub fn after(before: Option<Self>, plan: Plan) -> Self {
        let before = before.filter(|before| before.plan == plan);
        let failures = before.map_or(0, |before| before.failures.saturating_add(1));
        Self {
            plan,
            failures,
            again: Instant::now() + pause(failures),
        }
    }

    /// Whether it is too early to try this plan. Another one is tried at once.
    pub fn holds_back(&self, plan: &Plan) -> bool {
        self.plan == *plan && Instant::now() < self.again
    }
}

/// How long to wait after so many failures before.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE
        .saturating_mul(1 << failures.min(10))
        .min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let seconds: Vec<u64> = (0..9).map(|failures| pause(failures).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }

    #[test]
    fn only_the_plan_that_failed_waits() {
        let (plan, other) = (
            Plan::default(),
            Plan {
                any_netns: true,
                ..Plan::default()
            },
        );
        let once = FailedPlan::after(None, plan.clone());
        assert!(once.holds_back(&plan) && !once.holds_back(&other));
        let mut again = FailedPlan::after(Some(once), plan.clone());
        assert_eq!(again.failures, 1);
        again.again = Instant::now();
        assert!(!again.holds_back(&plan));
        assert_eq!(FailedPlan::after(Some(again), other).failures, 0);
    }
}
