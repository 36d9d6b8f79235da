//! Which quota holds.

use balancer_common::abi::{BackendState, SlotPolicy, SlotState};

use super::*;
use crate::quota::in_force::{in_force, written};

const RULE: InForce = InForce {
    quota: Quota::Limited(1),
    source: QuotaSource::Computed,
};

#[test]
fn by_hand_wins_and_for_one_backend_before_for_all() {
    let [two, three] = [2, 3].map(Quota::Limited);
    let held = |backend, service| {
        let source = QuotaSource::Backend;
        let backend = Option::map(backend, |quota| InForce { quota, source });
        let held = in_force(backend, service, RULE);
        (held.quota, held.source)
    };
    assert_eq!(in_force(None, None, RULE), RULE);
    assert_eq!(held(None, Some(two)), (two, QuotaSource::Service));
    assert_eq!(held(Some(three), Some(two)), (three, QuotaSource::Backend));
    let open = Quota::Unlimited;
    assert_eq!(held(Some(open), Some(two)), (open, QuotaSource::Backend));
    let drained = InForce {
        quota: Quota::Limited(0),
        source: QuotaSource::Drained,
    };
    assert_eq!(in_force(Some(drained), Some(two), RULE), drained);
}

#[test]
fn what_was_written_is_of_one_generation_and_tells_where_it_comes_from() {
    let state = |generation| SlotState::new(generation, BackendState::Active);
    for source in [
        QuotaSource::Rule,
        QuotaSource::Computed,
        QuotaSource::Service,
        QuotaSource::Backend,
        QuotaSource::Drained,
    ] {
        for quota in [Quota::Limited(7), Quota::Unlimited] {
            let policy = SlotPolicy::new(4, quota.to_map(), 1, source.flags());
            let expected = InForce { quota, source };
            assert_eq!(written(&policy, state(4)), Some(expected));
            assert_eq!(written(&policy, state(5)), None);
        }
    }
}
