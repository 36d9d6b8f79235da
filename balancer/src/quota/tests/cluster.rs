//! Quotas of a group of a cluster.

use super::*;
use crate::config::{ClusterInput, ClusterQuota};

fn observed(headroom_percent: u32) -> ClusterQuota {
    ClusterQuota::Shared {
        input: ClusterInput::Observed {
            window: Duration::from_secs(600),
        },
        headroom_percent,
        min_quota: 16,
    }
}

fn known(connections: u64, words: &str) -> Known {
    Known {
        total: Some(Total {
            connections,
            words: words.to_owned(),
        }),
        established_elsewhere: 0,
        placed: false,
        refused_for_long: 0,
        unreported: 0,
        silent_for: Duration::ZERO,
        hold_for: Duration::from_secs(300),
    }
}

fn silent(seconds: u64) -> Known {
    Known {
        silent_for: Duration::from_secs(seconds),
        ..known(202, "observed")
    }
}

fn opened(established: u32) -> ReadyBackend {
    ReadyBackend {
        previous: Some(Quota::Unlimited),
        ..ready(1, established, None)
    }
}

#[track_caller]
fn is_open(outcome: &Outcome, sentence: &str) {
    assert!(
        outcome
            .quotas
            .iter()
            .all(|quota| *quota == Quota::Unlimited),
        "{outcome:?}"
    );
    assert_eq!(outcome.sentence, sentence);
    assert!(!outcome.lowering);
}

/// The clients of one that ends find room at the others.
#[test]
fn where_clients_are_placed_one_backend_may_end() {
    let placed = |connections| Known {
        placed: true,
        ..known(connections, "observed")
    };
    let outcome = compute_cluster(&observed(15), &placed(320), &fresh(4), NOW);
    assert_eq!(limits(&outcome), [123; 4]);
    assert_eq!(
        outcome.sentence,
        "ceil(320 connections (observed) × 1.15 / (4 ready - 1)) = 123"
    );
    let outcome = compute_cluster(&observed(0), &placed(320), &fresh(2), NOW);
    assert_eq!(limits(&outcome), [320; 2]);
    let weighted = [ready(1, 0, None), ready(1, 0, None), ready(2, 0, None)];
    let outcome = compute_cluster(&observed(0), &placed(320), &weighted, NOW);
    assert_eq!(limits(&outcome), [160, 160, 320]);
    assert!(
        outcome.sentence.contains("× weight / (4 - 2), 3 ready)"),
        "{}",
        outcome.sentence
    );
}

#[test]
fn without_a_rule_or_with_a_fixed_one_nothing_else_counts() {
    let known = silent(9999);
    let outcome = compute_cluster(&ClusterQuota::Unlimited, &known, &fresh(3), NOW);
    is_open(&outcome, "no quota is set: counting only");
    let outcome = compute_cluster(&ClusterQuota::Fixed(7), &known, &fresh(1), NOW);
    assert_eq!(limits(&outcome), [7]);
    assert_eq!(outcome.sentence, "fixed: 7 for each backend");
}

#[test]
fn is_the_formula_with_where_the_total_comes_from() {
    let outcome = compute_cluster(&observed(15), &known(202, "observed"), &fresh(3), NOW);
    assert_eq!(limits(&outcome), [78; 3]);
    assert_eq!(
        outcome.sentence,
        "ceil(202 connections (observed) × 1.15 / 3 ready) = 78"
    );

    let of_pods = known(213, "180 pods × 1 + 11 pods × 3");
    let outcome = compute_cluster(&observed(15), &of_pods, &fresh(3), NOW);
    assert_eq!(limits(&outcome), [82; 3]);
    assert_eq!(
        outcome.sentence,
        "ceil(213 connections (180 pods × 1 + 11 pods × 3) × 1.15 / 3 ready) = 82"
    );

    let weighted = [ready(1, 0, None), ready(3, 0, None)];
    let outcome = compute_cluster(&observed(0), &known(1, "observed"), &weighted, NOW);
    assert_eq!(
        outcome.sentence,
        "ceil(1 connection (observed) × weight / 4, 2 ready) = 1; at least min_quota 16"
    );
}

#[test]
fn clients_by_number_are_shared_out_as_without_a_cluster() {
    let rule = ClusterQuota::Shared {
        input: ClusterInput::Clients {
            clients: 300,
            connections_per_client: 2,
        },
        headroom_percent: 15,
        min_quota: 16,
    };
    let unknown = Known {
        total: None,
        ..silent(0)
    };
    for backends in [fresh(3), vec![ready(1, 500, Some(900)), ready(2, 3, None)]] {
        for seconds in [0, 30, 60] {
            let waited = Duration::from_secs(seconds);
            assert_eq!(
                compute_cluster(&rule, &unknown, &backends, waited),
                compute(&computed(300, 2, 15), &backends, waited)
            );
        }
    }
}

#[test]
fn nothing_known_is_unlimited() {
    let none = Known {
        total: None,
        ..silent(0)
    };
    let outcome = compute_cluster(&observed(15), &none, &fresh(3), NOW);
    is_open(&outcome, "unlimited: no connection has been observed");
    let pods = ClusterQuota::Shared {
        input: ClusterInput::Pods(Vec::new()),
        headroom_percent: 15,
        min_quota: 16,
    };
    let outcome = compute_cluster(&pods, &known(0, ""), &fresh(3), NOW);
    is_open(&outcome, "unlimited: no pod that `pods` selects is known");
}

#[test]
fn quotas_stay_until_all_ready_backends_are_reported() {
    let known = Known {
        unreported: 1,
        ..known(202, "observed")
    };
    let ready = [ready(1, 5, Some(60)), ready(1, 0, None)];
    let outcome = compute_cluster(&observed(0), &known, &ready, NOW);
    assert_eq!(outcome.quotas, [Quota::Limited(60), Quota::Unlimited]);
    assert_eq!(
        outcome.sentence,
        "as before: the daemons of 1 of 2 ready pods have not told yet"
    );
}

#[test]
fn none_and_one_ready_are_unlimited() {
    let total = known(202, "observed");
    let outcome = compute_cluster(&observed(15), &total, &[], NOW);
    is_open(&outcome, "no backend is ready: nothing to share out");
    let outcome = compute_cluster(&observed(15), &total, &[ready(1, 5, Some(9))], NOW);
    is_open(
        &outcome,
        "unlimited: one backend is ready, a refused client would have nowhere else to go",
    );
}

#[test]
fn holds_while_the_api_server_is_silent_then_opens() {
    // Halved: from 100 each to 78, if it could be known who is there.
    let backends = [
        ready(1, 60, Some(100)),
        ready(1, 60, Some(90)),
        ready(1, 60, None),
    ];
    let at = |seconds| {
        compute_cluster(
            &observed(15),
            &silent(seconds),
            &backends,
            Duration::from_secs(60),
        )
    };
    assert_eq!(limits(&at(15)), [90, 81, 78], "a watch may break");
    assert!(at(15).lowering);

    let outcome = at(16);
    assert_eq!(limits(&outcome), [100, 90, 78]);
    assert!(!outcome.lowering);
    assert_eq!(
        outcome.sentence,
        "held: the API server has not been heard of for 16s; ceil(202 connections (observed) × 1.15 / 3 ready) = 78; not lowered: 78 to 100 now"
    );
    assert_eq!(at(300).quotas, outcome.quotas);

    is_open(
        &at(301),
        "unlimited: the API server has not been heard of for 5m 1s, longer than hold_for (5m)",
    );
}

#[test]
fn what_is_held_may_go_up() {
    let backends = [ready(1, 500, Some(50)), ready(1, 500, Some(2000))];
    let outcome = compute_cluster(&observed(0), &silent(60), &backends, NOW);
    assert_eq!(limits(&outcome), [500, 2000]);
    assert_eq!(
        outcome.sentence,
        "held: the API server has not been heard of for 1m; ceil(202 connections (observed) / 2 ready) = 101; \
         held at 500 because 1000 are established; not lowered: 500 to 2000 now"
    );
    let raised = [ready(1, 5, Some(50)), ready(1, 5, Some(50))];
    let outcome = compute_cluster(&observed(0), &silent(60), &raised, NOW);
    assert_eq!(limits(&outcome), [101, 101]);
    assert!(outcome.sentence.ends_with(" = 101"), "{}", outcome.sentence);
}

#[test]
fn what_was_open_stays_open_while_held() {
    let backends = [opened(5), ready(1, 5, Some(200))];
    let outcome = compute_cluster(&observed(0), &silent(60), &backends, NOW);
    assert_eq!(outcome.quotas, [Quota::Unlimited, Quota::Limited(200)]);
    assert!(
        outcome
            .sentence
            .ends_with(" = 101; not lowered: 200 or unlimited as before"),
        "{}",
        outcome.sentence
    );
    let outcome = compute_cluster(&observed(0), &silent(60), &[opened(5), opened(5)], NOW);
    assert_eq!(outcome.quotas, [Quota::Unlimited; 2]);
    assert!(
        outcome.sentence.ends_with(" = 101; unlimited as before"),
        "{}",
        outcome.sentence
    );
}

#[test]
fn a_short_hold_for_opens_before_the_server_counts_as_silent() {
    let impatient = Known {
        hold_for: Duration::from_secs(10),
        ..silent(11)
    };
    let outcome = compute_cluster(&observed(15), &impatient, &fresh(3), NOW);
    is_open(
        &outcome,
        "unlimited: the API server has not been heard of for 11s, longer than hold_for (10s)",
    );
}

#[test]
fn when_everybody_is_full_everybody_opens() {
    let backends = [
        full(ready(1, 110, Some(100))),
        full(ready(1, 90, Some(90))),
        full(ready(1, 110, None)),
    ];
    let sentence = "unlimited: 310 connections established and none of the 3 ready backends has room for another";
    is_open(
        &compute_cluster(&observed(15), &known(202, "observed"), &backends, NOW),
        sentence,
    );
    let one_with_room = [backends[0], backends[1], ready(1, 60, None)];
    let outcome = compute_cluster(&observed(15), &known(202, "observed"), &one_with_room, NOW);
    assert_eq!(limits(&outcome), [100, 90, 87]);

    // Without a quota nobody is full: only the numbers that would come tell whether it is over.
    let known = known(202, "observed");
    let room = [opened(104), opened(103), ready(1, 103, None)];
    let outcome = compute_cluster(&observed(0), &known, &room, NOW);
    assert_eq!(limits(&outcome), [104; 3], "the second has room");
    let still = [opened(104), opened(104), ready(1, 104, None)];
    is_open(
        &compute_cluster(&observed(0), &known, &still, NOW),
        "unlimited: 312 connections established and none of the 3 ready backends has room for another",
    );
    // A backend that was never opened stays limited until it is said to be full.
    let limited = [ready(1, 104, Some(104)); 3];
    assert_eq!(
        limits(&compute_cluster(&observed(0), &known, &limited, NOW)),
        [104; 3]
    );
}

#[test]
fn a_number_after_unlimited_comes_at_once() {
    let outcome = compute_cluster(
        &observed(15),
        &known(202, "observed"),
        &[opened(60), opened(60), opened(60)],
        NOW,
    );
    assert_eq!(limits(&outcome), [78; 3]);
    assert!(!outcome.lowering);
}

#[test]
fn those_on_backends_that_leave_have_room_on_the_others() {
    let leaving = Known {
        established_elsewhere: 100,
        ..known(150, "observed")
    };
    let backends = [ready(1, 100, None), ready(1, 100, None)];
    let outcome = compute_cluster(&observed(0), &leaving, &backends, NOW);
    assert_eq!(limits(&outcome), [150, 150]);
    assert_eq!(
        outcome.sentence,
        "ceil(150 connections (observed) / 2 ready) = 75; held at 150 because 300 are established (100 on backends not ready)"
    );
}

#[test]
fn who_was_refused_for_long_finds_room_on_every_other_backend() {
    let refused = |connections, long| Known {
        refused_for_long: long,
        ..known(connections, "observed")
    };
    let backends = [
        ready(1, 78, Some(78)),
        ready(1, 77, Some(78)),
        ready(1, 40, None),
    ];
    let outcome = compute_cluster(&observed(15), &refused(202, 2), &backends, NOW);
    assert_eq!(limits(&outcome), [78, 79, 78], "the last has room as it is");
    assert_eq!(
        outcome.sentence,
        "ceil(202 connections (observed) × 1.15 / 3 ready) = 78; every other has room for 2 more: \
         at least so many clients were refused for long"
    );
    assert!(!outcome.lowering);

    let held = [ready(1, 120, Some(80)), ready(1, 80, Some(80))];
    let outcome = compute_cluster(&observed(0), &refused(160, 25), &held, NOW);
    assert_eq!(limits(&outcome), [100, 105]);
    assert_eq!(
        outcome.sentence,
        "ceil(160 connections (observed) / 2 ready) = 80; held at 100 because 200 are established; \
         every other has room for 25 more: at least so many clients were refused for long"
    );
}

#[test]
fn long_words_lose_their_end_and_the_numbers_stay() {
    let classes: Vec<String> = (1..=40)
        .map(|each| format!("{each}000 pods × {each}"))
        .collect();
    let long = known(22_140_000, &classes.join(" + "));
    let backends = [ready(1, 0, Some(20_000_000)), ready(2, 0, None)];
    let outcome = compute_cluster(&observed(15), &long, &backends, NOW);
    assert_eq!(
        outcome.sentence,
        "ceil(22140000 connections (1000 pods × 1 + 2000 pods × 2 + 3000 pods × 3 + 4000 pods × 4 + 5000 pods × 5 + 6000 pods × 6 + …) × 1.15 × weight / 3, 2 ready) \
         = 8487000 to 16974000; lowered by at most 10 % a minute: 16974000 to 20000000 now"
    );
    let one = known(5, &"ä".repeat(300));
    let outcome = compute_cluster(&observed(15), &one, &backends, NOW);
    assert!(outcome.sentence.len() <= 255, "{}", outcome.sentence);
    assert!(
        outcome.sentence.contains("ä…) × 1.15"),
        "{}",
        outcome.sentence
    );
    let lines = known(300, "a\nb\tc\u{1b}");
    let outcome = compute_cluster(&observed(0), &lines, &fresh(2), NOW);
    assert!(
        outcome.sentence.contains("(a b c )"),
        "{}",
        outcome.sentence
    );
}

fn any_cluster_rule() -> impl Strategy<Value = ClusterQuota> {
    let input = prop_oneof![
        (any::<u32>(), any::<u32>()).prop_map(|(clients, connections_per_client)| {
            ClusterInput::Clients {
                clients,
                connections_per_client,
            }
        }),
        Just(ClusterInput::Pods(Vec::new())),
        Just(ClusterInput::Observed {
            window: Duration::from_secs(60)
        }),
    ];
    let shared =
        (input, any::<u32>(), any::<u32>()).prop_map(|(input, headroom_percent, min_quota)| {
            ClusterQuota::Shared {
                input,
                headroom_percent,
                min_quota,
            }
        });
    prop_oneof![
        1 => Just(ClusterQuota::Unlimited),
        1 => any::<u32>().prop_map(ClusterQuota::Fixed),
        8 => shared
    ]
}

prop_compose! {
    fn any_known()(
        total in proptest::option::of((any::<u64>(), "\\PC{0,300}")),
        established_elsewhere: u64,
        placed: bool,
        refused_for_long in prop_oneof![0..10u32, any::<u32>()],
        unreported in prop_oneof![9 => Just(0), 1 => 1..20usize],
        silent_for in prop_oneof![Just(Duration::ZERO), any::<Duration>(), (0..100u64).prop_map(Duration::from_secs)],
        hold_for in prop_oneof![any::<Duration>(), (0..100u64).prop_map(Duration::from_secs)],
    ) -> Known {
        let total = total.map(|(connections, words)| Total { connections, words });
        Known { total, established_elsewhere, placed, refused_for_long, unreported, silent_for, hold_for }
    }
}

prop_compose! {
    fn sane_cluster_rule()(headroom_percent in 0..=200u32, min_quota in 1..64u32) -> ClusterQuota {
        let window = Duration::from_secs(600);
        ClusterQuota::Shared { input: ClusterInput::Observed { window }, headroom_percent, min_quota }
    }
}

prop_compose! {
    fn sane_known()(connections in 1..100_000u64, placed: bool, established_elsewhere in 0..100_000u64, refused_for_long in 0..10u32, silent in 0..=300u64) -> Known {
        Known { established_elsewhere, placed, refused_for_long, silent_for: Duration::from_secs(silent), ..known(connections, "observed") }
    }
}

prop_compose! {
    /// A backend here, with its quota so far, or one of another node.
    fn some_ready()(weight in 1..=1000u32, established in 0..50_000u32, previous in any_sane_quota()) -> ReadyBackend {
        ReadyBackend { previous, ..ready(weight, established, None) }
    }
}

fn any_sane_quota() -> impl Strategy<Value = Option<Quota>> {
    prop_oneof![
        2 => Just(None),
        1 => Just(Some(Quota::Unlimited)),
        4 => (1..100_000u32).prop_map(|limit| Some(Quota::Limited(limit))),
    ]
}

fn sum_of(outcome: &Outcome) -> u64 {
    let limit = |quota: &Quota| quota.limit().map_or(u64::from(u32::MAX), u64::from);
    outcome.quotas.iter().map(limit).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn never_panics_and_the_same_makes_the_same(
        rule in any_cluster_rule(),
        known in any_known(),
        backends in proptest::collection::vec(any_ready(), 0..20),
        since: Duration,
    ) {
        let outcome = compute_cluster(&rule, &known, &backends, since);
        prop_assert_eq!(&outcome, &compute_cluster(&rule, &known.clone(), &backends.clone(), since));
        prop_assert_eq!(outcome.quotas.len(), backends.len());
        prop_assert!(!outcome.sentence.is_empty());
        prop_assert!(!outcome.sentence.contains(char::is_control));
        prop_assert!(outcome.sentence.len() <= 255, "{}", outcome.sentence);
    }

    #[test]
    fn holds_what_is_established_anywhere_and_what_is_needed(
        rule in sane_cluster_rule(),
        known in sane_known(),
        backends in proptest::collection::vec(some_ready(), 2..20),
        since in 0..200u64,
    ) {
        let ClusterQuota::Shared { headroom_percent, min_quota, .. } = rule else {
            unreachable!("sane_cluster_rule shares");
        };
        let outcome = compute_cluster(&rule, &known, &backends, Duration::from_secs(since));
        let here: u64 = backends.iter().map(|ready| u64::from(ready.established)).sum();
        let connections = known.total.map_or(0, |total| total.connections);
        prop_assert!(sum_of(&outcome) >= here + known.established_elsewhere);
        prop_assert!(sum_of(&outcome) * 100 >= connections * u64::from(100 + headroom_percent));
        prop_assert!(outcome.quotas.iter().all(|quota| quota.limit().is_none_or(|limit| limit >= min_quota)));
    }

    #[test]
    fn lowers_by_at_most_a_tenth_a_minute_and_not_at_all_in_silence(
        rule in sane_cluster_rule(),
        known in sane_known(),
        backends in proptest::collection::vec(some_ready(), 2..20),
        millis in 0..200_000u64,
    ) {
        let outcome = compute_cluster(&rule, &known, &backends, Duration::from_millis(millis));
        let silent = known.silent_for > Duration::from_secs(15);
        for (quota, ready) in outcome.quotas.iter().zip(&backends) {
            match (ready.previous, quota) {
                (Some(Quota::Limited(previous)), Quota::Limited(quota)) => {
                    let lowered = u64::from(previous.saturating_sub(*quota));
                    prop_assert!(lowered == 0 || !silent);
                    prop_assert!(lowered * 600_000 <= u64::from(previous) * millis);
                }
                (Some(Quota::Unlimited), Quota::Limited(_)) => prop_assert!(!silent),
                _ => {}
            }
        }
        prop_assert!(!(outcome.lowering && silent));
    }

    #[test]
    fn never_goes_from_open_to_numbers_that_nobody_has_room_under(
        rule in sane_cluster_rule(),
        known in sane_known(),
        backends in proptest::collection::vec(some_ready(), 2..6),
    ) {
        let outcome = compute_cluster(&rule, &known, &backends, NOW);
        let was_open = backends.iter().any(|ready| ready.previous == Some(Quota::Unlimited));
        let room = outcome.quotas.iter().zip(&backends).any(|(quota, ready)| quota.limit().is_none_or(|limit| limit > ready.established));
        prop_assert!(!was_open || room, "{:?}", outcome);
    }

    /// Who tries again and again finds room with one chance in two, and the fullest stay as they
    /// are.
    #[test]
    fn the_starved_have_room_on_half_of_the_backends(
        rule in sane_cluster_rule(),
        known in sane_known(),
        backends in proptest::collection::vec(sane_ready(), 2..20),
    ) {
        prop_assume!(known.refused_for_long > 0);
        let without = Known { refused_for_long: 0, ..known.clone() };
        let forgotten: Vec<ReadyBackend> = backends.iter().map(|ready| ReadyBackend { previous: None, ..*ready }).collect();
        let quotas = limits(&compute_cluster(&rule, &known, &forgotten, NOW));
        let before = limits(&compute_cluster(&rule, &without, &forgotten, NOW));
        let has_room = |(quota, ready): &(&u32, &ReadyBackend)| u64::from(**quota) >= u64::from(ready.established) + u64::from(known.refused_for_long);
        let with_room = quotas.iter().zip(&backends).filter(has_room).count();
        prop_assert!(2 * with_room >= backends.len(), "{quotas:?}");
        let raised = quotas.iter().zip(&before).filter(|(quota, before)| quota > before).count();
        prop_assert!(2 * raised <= backends.len() + 1);
        prop_assert!(quotas.iter().zip(&before).all(|(quota, before)| quota >= before));
    }

    /// But for the room for those who were refused: with more connections it may be due on others.
    #[test]
    fn more_connections_make_no_quota_smaller(
        rule in sane_cluster_rule(),
        known in sane_known(),
        more in 0..10_000u64,
        backends in proptest::collection::vec(sane_ready(), 2..20),
    ) {
        let forgotten: Vec<ReadyBackend> = backends.iter().map(|ready| ReadyBackend { previous: None, ..*ready }).collect();
        let known = Known { refused_for_long: 0, ..known };
        let mut larger = known.clone();
        larger.total.as_mut().expect("sane_known knows").connections += more;
        let before = limits(&compute_cluster(&rule, &known, &forgotten, NOW));
        let after = limits(&compute_cluster(&rule, &larger, &forgotten, NOW));
        prop_assert!(before.iter().zip(&after).all(|(before, after)| before <= after));
    }

    /// What a daemon computes for its own backends is where the others, who know no previous quota
    /// of them, see them going.
    #[test]
    fn every_node_comes_to_the_same(
        rule in sane_cluster_rule(),
        known in sane_known(),
        backends in proptest::collection::vec(sane_ready(), 2..12),
        mine in proptest::collection::vec(any::<bool>(), 12),
    ) {
        let seen = |own: bool| -> Vec<ReadyBackend> {
            let with = |(ready, mine): (&ReadyBackend, &bool)| ReadyBackend { previous: ready.previous.filter(|_| *mine == own), ..*ready };
            backends.iter().zip(&mine).map(with).collect()
        };
        let (here, there) = (seen(true), seen(false));
        let here_says = limits(&compute_cluster(&rule, &known, &here, NOW));
        let there_says = limits(&compute_cluster(&rule, &known, &there, NOW));
        for (index, (here_says, there_says)) in here_says.iter().zip(&there_says).enumerate() {
            let previous = here[index].previous.or(there[index].previous).and_then(Quota::limit);
            let (own, other) = if mine[index] { (here_says, there_says) } else { (there_says, here_says) };
            prop_assert_eq!(*own, previous.unwrap_or_default().max(*other));
        }
    }
}
