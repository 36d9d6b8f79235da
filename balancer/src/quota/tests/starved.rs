//! Sources that nobody serves.

use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::quota::starved::{
    FORGOTTEN_AFTER, LONGEST_PAUSE, MAX_SOURCES, Refusals, Refused, Starved, count,
};

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn source(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0000 + number).into()
}

/// Refused again and again from the first time to the last.
fn refused(number: u32, first: u64, last: u64) -> Refused {
    Refused {
        source: source(number),
        before: None,
        first: seconds(first),
        last: seconds(last),
        longest_pause: Duration::ZERO,
    }
}

/// How many sources are starved, and for long, where one source was refused at these seconds.
fn starved_at(now: u64, moments: &[u64]) -> (u32, u32) {
    let mut refusals = Refusals::default();
    for at in moments {
        refusals.refused(&(), source(1), seconds(*at));
    }
    let starved = count(refusals.of(&(), seconds(now)));
    (starved.sources, starved.long)
}

#[test]
fn is_who_was_refused_for_five_seconds_and_may_come_again() {
    let mut refusals = Refusals::default();
    for at in [10, 12, 15] {
        refusals.refused(&"agents", source(1), seconds(at));
    }
    refusals.refused(&"agents", source(2), seconds(10));
    refusals.refused(&"agents", source(2), seconds(14));
    refusals.refused(&"als", source(3), seconds(15));
    let of = |group, at| refusals.of(&group, seconds(at));
    let times = |refused: &Refused| (refused.first, refused.last, refused.longest_pause);
    let seen: Vec<_> = of("agents", 20).iter().map(times).collect();
    let expected = [[10, 5, 3], [10, 6, 4]].map(|times| times.map(seconds));
    assert_eq!(
        seen,
        expected.map(|[first, last, pause]| (first, last, pause))
    );
    let sources = |group, at| count(of(group, at)).sources;
    assert_eq!(sources("agents", 20), 1, "the second for 4 seconds only");
    assert_eq!(sources("als", 20), 0);
    assert_eq!(of("other", 20), []);
    assert_eq!(sources("agents", 35), 1);
    assert_eq!(sources("agents", 36), 0, "it would have come again");
}

#[test]
fn for_long_is_from_twenty_seconds_on() {
    let at = |first| count([refused(1, first, 1)]);
    assert_eq!((at(20).sources, at(20).long), (1, 0));
    assert_eq!((at(21).sources, at(21).long), (1, 1));
    assert_eq!(count([refused(1, 90, 21)]), Starved::default());
}

#[test]
fn a_client_that_comes_every_two_minutes_is_starved_at_its_third_refusal() {
    assert_eq!(
        starved_at(111, &[0, 110]),
        (0, 0),
        "it may have been served between"
    );
    assert_eq!(starved_at(221, &[0, 110, 220]), (1, 1));
    assert_eq!(starved_at(331, &[0, 110, 220, 330]), (1, 1));
    assert_eq!(
        starved_at(509, &[0, 110, 220, 330]),
        (1, 1),
        "the next is due"
    );
    assert_eq!(starved_at(511, &[0, 110, 220, 330]), (0, 0));
    assert_eq!(starved_at(289, &[0, 144, 288]), (1, 1));
    assert_eq!(
        starved_at(363, &[0, 181, 362]),
        (0, 0),
        "no client waits so long"
    );
    // The Java agent's look, every 30 s.
    assert_eq!(starved_at(31, &[0, 30]), (1, 1));
}

#[test]
fn who_is_refused_in_each_of_two_restarts_is_not_starved_for_long() {
    assert_eq!(starved_at(98, &[0, 1, 3, 95, 96, 98]), (1, 0));
    assert_eq!(starved_at(91, &[0, 90, 91]), (0, 0));
    assert_eq!(starved_at(64, &[0, 1, 2, 3, 64]), (0, 0));
}

#[test]
fn daemons_together_know_more_than_each() {
    // Each sees every third attempt, or only one.
    let daemons = |all: &[&[u64]], now| {
        let seen = all.iter().flat_map(|moments| {
            let mut refusals = Refusals::default();
            for at in *moments {
                refusals.refused(&(), source(1), seconds(*at));
            }
            refusals.of(&(), seconds(now))
        });
        let starved = count(seen);
        (starved.sources, starved.long)
    };
    assert_eq!(daemons(&[&[0, 330], &[110], &[220]], 331), (1, 1));
    assert_eq!(daemons(&[&[0], &[110], &[220], &[330]], 331), (1, 1));
    assert_eq!(daemons(&[&[0, 220], &[110, 330]], 331), (1, 1));
    assert_eq!(
        daemons(&[&[0, 330]], 331),
        (0, 0),
        "no client waits so long"
    );
    assert_eq!(daemons(&[&[300, 310], &[306, 325]], 326), (1, 1));
    let one = [refused(1, 9, 6), refused(2, 30, 2), refused(3, 400, 181)];
    let other = [refused(1, 4, 1), refused(2, 20, 1), refused(4, 3, 3)];
    let starved = |sources, long| Starved { sources, long };
    assert_eq!(count(one), starved(1, 1));
    assert_eq!(count(other), starved(1, 0));
    let together = one.into_iter().chain(other);
    assert_eq!(count(together), starved(2, 1), "once each");
}

#[test]
fn of_too_many_sources_the_one_refused_for_the_shortest_time_goes() {
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
    // A flood of addresses that are seen once takes nobody's place who is refused again and again.
    for number in 0..10 * most {
        refusals.refused(&(), source(1000 + number), seconds(2));
    }
    assert!(
        refusals
            .of(&(), seconds(2))
            .iter()
            .any(|refused| refused.source == source(0))
    );
}

#[test]
fn tidying_leaves_what_still_counts() {
    let mut refusals = Refusals::default();
    refusals.refused(&"old", source(1), seconds(0));
    refusals.refused(&"gone", source(1), seconds(50));
    refusals.refused(&"agents", source(1), seconds(0));
    refusals.refused(&"agents", source(2), seconds(50));
    refusals.tidy(seconds(500), |group| *group != "gone");
    let groups: Vec<_> = refusals.groups().copied().collect();
    assert_eq!(groups, ["agents"]);
    assert_eq!(refusals.of(&"agents", seconds(500)), [refused(2, 450, 450)]);
}

fn any_refused() -> impl Strategy<Value = Refused> {
    let pause = prop_oneof![Just(0), 0..200u64];
    (0..6u32, 0..200u64, 0..200u64, pause).prop_map(|(number, one, other, pause)| Refused {
        longest_pause: seconds(pause.min(one.abs_diff(other))),
        ..refused(number, one.max(other), one.min(other))
    })
}

/// The attempts of a gRPC client (doc/connection-backoff.md) in milliseconds: pauses that grow by
/// 1.6 from one second to two minutes, each a fifth shorter or longer.
fn attempts(jitter: &[f64]) -> Vec<Duration> {
    let (mut now, mut pause) = (0.0, 1.0);
    let mut attempts = Vec::new();
    for jitter in jitter {
        attempts.push(Duration::from_secs_f64(now));
        now += pause * (0.8 + 0.4 * jitter);
        pause = f64::min(pause * 1.6, 120.0);
    }
    attempts
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
            prop_assert!(list.iter().all(|refused| refused.longest_pause <= LONGEST_PAUSE && refused.last <= FORGOTTEN_AFTER));
            prop_assert!(list.is_sorted_by_key(|refused| refused.source));
        }
    }

    #[test]
    fn the_order_of_daemons_makes_no_difference_and_none_counts_twice(
        list in proptest::collection::vec(any_refused(), 0..20),
        more in proptest::collection::vec(any_refused(), 0..20),
    ) {
        let together = count(list.iter().chain(&more).copied());
        prop_assert_eq!(together, count(more.iter().chain(&list).copied()));
        prop_assert_eq!(together, count(list.iter().chain(&more).chain(&list).copied()));
        prop_assert!(together.sources >= together.long && together.sources <= 6);
    }

    /// Wherever its attempts go, and however seldom they have become.
    #[test]
    fn a_grpc_client_that_nobody_serves_is_starved_for_long_after_a_minute(
        steps in proptest::collection::vec((0.0..=1.0f64, 0..10usize), 16..24),
        daemons in 1..=10usize,
    ) {
        let (jitter, choices): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
        let mut seen: Vec<Refusals<()>> = vec![Refusals::default(); daemons];
        let attempts = attempts(&jitter);
        for (index, (attempt, choice)) in attempts.iter().zip(choices).enumerate() {
            seen[choice % daemons].refused(&(), source(1), *attempt);
            // Just before the next attempt.
            if let Some(next) = attempts.get(index + 1).filter(|next| **next > seconds(60)) {
                let told = seen.iter().flat_map(|refusals| refusals.of(&(), *next));
                prop_assert_eq!(count(told).long, 1, "{} attempts, {:?}", index + 1, next);
            }
        }
    }

    /// However often it is refused in the few seconds of two restarts.
    #[test]
    fn a_client_that_is_served_between_two_restarts_is_not_starved_for_long(
        first in proptest::collection::vec(0..9_000u64, 1..6),
        second in proptest::collection::vec(0..9_000u64, 1..6),
        served in 61..400u64,
        daemons in 1..=10usize,
    ) {
        let mut moments: Vec<u64> = first;
        let next = moments.iter().max().copied().unwrap_or(0) + served * 1000;
        moments.extend(second.into_iter().map(|at| next + at));
        moments.sort_unstable();
        let mut seen: Vec<Refusals<()>> = vec![Refusals::default(); daemons];
        for (index, at) in moments.iter().enumerate() {
            seen[index % daemons].refused(&(), source(1), Duration::from_millis(*at));
        }
        let now = Duration::from_millis(moments.last().copied().unwrap_or(0));
        prop_assert_eq!(count(seen.iter().flat_map(|refusals| refusals.of(&(), now))).long, 0);
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
