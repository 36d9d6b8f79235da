//! Sources that nobody serves.

use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::quota::starved::{MAX_SOURCES, Refusals, Refused, Starved, count, merge};

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn source(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 + number).into()
}

fn refused(number: u32, first: u64, last: u64) -> Refused {
    Refused {
        source: source(number),
        first: seconds(first),
        last: seconds(last),
    }
}

#[test]
fn is_who_was_refused_for_five_seconds_and_within_the_last_minute() {
    let mut refusals = Refusals::default();
    for at in [10, 12, 15] {
        refusals.refused(&"agents", source(1), seconds(at));
    }
    refusals.refused(&"agents", source(2), seconds(10));
    refusals.refused(&"agents", source(2), seconds(14));
    refusals.refused(&"als", source(3), seconds(15));
    let of = |group, at| refusals.of(&group, seconds(at));
    assert_eq!(of("agents", 20), [refused(1, 10, 5), refused(2, 10, 6)]);
    let sources = |group, at| count(of(group, at)).sources;
    assert_eq!(sources("agents", 20), 1, "the second for 4 seconds only");
    assert_eq!(sources("als", 20), 0);
    assert_eq!(of("other", 20), []);
    assert_eq!(sources("agents", 75), 1);
    assert_eq!(of("agents", 76), []);
}

#[test]
fn for_long_is_from_twenty_seconds_on() {
    let at = |first| count([refused(1, first, 1)]);
    assert_eq!((at(20).sources, at(20).long), (1, 0));
    assert_eq!((at(21).sources, at(21).long), (1, 1));
    assert_eq!(count([refused(1, 90, 61)]), Starved::default());
}

#[test]
fn a_refusal_long_after_another_is_a_new_beginning() {
    let mut refusals = Refusals::default();
    for at in [0, 61, 62] {
        refusals.refused(&(), source(1), seconds(at));
    }
    assert_eq!(refusals.of(&(), seconds(62)), [refused(1, 1, 0)]);
    refusals.refused(&(), source(1), seconds(122));
    assert_eq!(refusals.of(&(), seconds(122)), [refused(1, 61, 0)]);
}

#[test]
fn of_too_many_sources_the_oldest_goes() {
    let mut refusals = Refusals::default();
    let most = u32::try_from(MAX_SOURCES).unwrap();
    for number in 0..most {
        refusals.refused(&(), source(number), Duration::from_millis(number.into()));
    }
    refusals.refused(&(), source(0), seconds(1));
    refusals.refused(&(), source(most), seconds(1));
    let left: Vec<IpAddr> = refusals
        .of(&(), seconds(1))
        .into_iter()
        .map(|refused| refused.source)
        .collect();
    assert_eq!(left.len(), MAX_SOURCES);
    assert!(left.contains(&source(0)) && left.contains(&source(most)));
    assert!(!left.contains(&source(1)));
}

#[test]
fn tidying_leaves_what_still_counts() {
    let mut refusals = Refusals::default();
    refusals.refused(&"old", source(1), seconds(0));
    refusals.refused(&"gone", source(1), seconds(50));
    refusals.refused(&"agents", source(1), seconds(0));
    refusals.refused(&"agents", source(2), seconds(50));
    refusals.tidy(seconds(100), |group| *group != "gone");
    let groups: Vec<_> = refusals.groups().copied().collect();
    assert_eq!(groups, ["agents"]);
    assert_eq!(refusals.of(&"agents", seconds(100)), [refused(2, 50, 50)]);
}

#[test]
fn daemons_together_know_more_than_each() {
    let one = [refused(1, 9, 6), refused(2, 30, 2), refused(3, 400, 61)];
    let other = [refused(1, 4, 1), refused(2, 20, 1), refused(4, 3, 3)];
    let merged: Vec<Refused> = merge(one.into_iter().chain(other)).into_values().collect();
    assert_eq!(
        merged,
        [refused(1, 9, 1), refused(2, 30, 1), refused(4, 3, 3)]
    );
    let starved = |sources, long| Starved { sources, long };
    assert_eq!(count(one), starved(1, 1));
    assert_eq!(count(other), starved(1, 0));
    assert_eq!(
        count(one.into_iter().chain(other)),
        starved(2, 1),
        "once each"
    );
}

fn any_refused() -> impl Strategy<Value = Refused> {
    (0..6u32, 0..90u64, 0..90u64)
        .prop_map(|(number, one, other)| refused(number, one.max(other), one.min(other)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn keeps_no_more_than_it_may_and_orders_its_times(
        steps in proptest::collection::vec((0..600u32, 0..3u8, 0..2000u64), 0..1500),
    ) {
        let mut refusals = Refusals::default();
        let mut now = Duration::ZERO;
        let mut last = None;
        for (number, group, wait) in steps {
            now += Duration::from_millis(wait / 50);
            refusals.refused(&group, source(number), now);
            last = Some((group, source(number)));
        }
        if let Some((group, source)) = last {
            prop_assert!(refusals.of(&group, now).iter().any(|refused| refused.source == source && refused.last.is_zero()));
        }
        for group in refusals.groups() {
            let list = refusals.of(group, now);
            prop_assert!(list.len() <= MAX_SOURCES);
            prop_assert!(list.iter().all(|refused| refused.first >= refused.last && refused.first <= now));
            prop_assert!(list.is_sorted_by_key(|refused| refused.source));
        }
    }

    #[test]
    fn the_order_of_daemons_makes_no_difference_and_one_more_takes_nothing_away(
        list in proptest::collection::vec(any_refused(), 0..20),
        more in proptest::collection::vec(any_refused(), 0..20),
    ) {
        let together = merge(list.iter().chain(&more).copied());
        prop_assert_eq!(&together, &merge(more.iter().chain(&list).copied()));
        prop_assert_eq!(&together, &merge(together.values().copied()));
        let (all, fewer) = (count(together.values().copied()), count(list));
        prop_assert!(all.sources >= fewer.sources && all.long >= fewer.long);
        prop_assert!(all.sources >= all.long);
    }

    #[test]
    fn never_panics(steps in proptest::collection::vec((0..3u32, any::<Duration>()), 0..50), at: Duration) {
        let mut refusals = Refusals::default();
        for (number, now) in steps {
            refusals.refused(&(), source(number), now);
            let _ = count(refusals.of(&(), at));
        }
        refusals.tidy(at, |()| true);
    }
}
