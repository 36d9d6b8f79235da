use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::QuotaRule;

mod cluster;
mod in_force;
mod simulation;
mod starved;
mod window;

const NOW: Duration = Duration::ZERO;

fn computed(clients: u32, per_client: u32, headroom: u32) -> QuotaRule {
    QuotaRule::Computed {
        clients: Some(clients),
        connections_per_client: per_client,
        headroom_percent: headroom,
        min_quota: 16,
    }
}

fn ready(weight: u32, established: u32, previous: Option<u32>) -> ReadyBackend {
    ReadyBackend {
        weight,
        established,
        previous: previous.map(Quota::Limited),
        full: false,
        unhealthy_for: None,
        wants_trial: false,
    }
}

fn full(backend: ReadyBackend) -> ReadyBackend {
    ReadyBackend {
        full: true,
        ..backend
    }
}

fn unhealthy(backend: ReadyBackend, seconds: u64) -> ReadyBackend {
    ReadyBackend {
        unhealthy_for: Some(Duration::from_secs(seconds)),
        ..backend
    }
}

fn fresh(count: usize) -> Vec<ReadyBackend> {
    vec![ready(1, 0, None); count]
}

fn limits(outcome: &Outcome) -> Vec<u32> {
    outcome
        .quotas
        .iter()
        .map(|quota| quota.limit().expect("a limited quota"))
        .collect()
}

#[test]
fn no_rule_is_unlimited() {
    let outcome = compute(&QuotaRule::Unlimited, &fresh(3), NOW);
    assert_eq!(outcome.quotas, [Quota::Unlimited; 3]);
    assert_eq!(outcome.sentence, "no quota is set: steering only");
}

#[test]
fn fixed_is_taken_as_it_is_weight_or_not() {
    let backends = [ready(1, 500, Some(1000)), ready(7, 500, None)];
    let outcome = compute(&QuotaRule::Fixed(100), &backends, NOW);
    assert_eq!(limits(&outcome), [100, 100]);
    assert_eq!(outcome.sentence, "fixed: 100 for each backend");
    assert_eq!(limits(&compute(&QuotaRule::Fixed(5), &fresh(1), NOW)), [5]);
}

#[test]
fn computed_is_the_formula_rounded_up() {
    let outcome = compute(&computed(300, 2, 15), &fresh(3), NOW);
    assert_eq!(limits(&outcome), [230, 230, 230]);
    assert_eq!(
        outcome.sentence,
        "ceil(300 clients × 2 × 1.15 / 3 ready) = 230"
    );
    assert!(!outcome.lowering);

    let outcome = compute(&computed(100, 1, 0), &fresh(3), NOW);
    assert_eq!(limits(&outcome), [34, 34, 34]);
    assert_eq!(outcome.sentence, "ceil(100 clients × 1 / 3 ready) = 34");
}

#[test]
fn one_ready_backend_or_unknown_clients_are_unlimited() {
    let one = compute(&computed(300, 2, 15), &fresh(1), NOW);
    assert_eq!(one.quotas, [Quota::Unlimited]);
    assert!(
        one.sentence.starts_with("unlimited: one backend is ready"),
        "{}",
        one.sentence
    );

    let rule = QuotaRule::Computed {
        clients: None,
        connections_per_client: 2,
        headroom_percent: 15,
        min_quota: 16,
    };
    let unknown = compute(&rule, &fresh(3), NOW);
    assert_eq!(unknown.quotas, [Quota::Unlimited; 3]);
    assert!(
        unknown
            .sentence
            .contains("how many clients there are is not known")
    );

    let none = compute(&computed(300, 2, 15), &[], NOW);
    assert!(none.quotas.is_empty());
    assert_eq!(none.sentence, "no backend is ready: nothing to share out");
}

#[test]
fn shares_are_in_proportion_to_weight() {
    let backends = [ready(1, 0, None), ready(2, 0, None), ready(1, 0, None)];
    let outcome = compute(&computed(300, 2, 15), &backends, NOW);
    assert_eq!(limits(&outcome), [173, 345, 173]);
    assert_eq!(
        outcome.sentence,
        "ceil(300 clients × 2 × 1.15 × weight / 4, 3 ready) = 173 to 345"
    );
}

#[test]
fn no_quota_is_below_min_quota() {
    let outcome = compute(&computed(9, 1, 0), &fresh(3), NOW);
    assert_eq!(limits(&outcome), [16; 3]);
    assert_eq!(
        outcome.sentence,
        "ceil(9 clients × 1 / 3 ready) = 3; at least min_quota 16"
    );
}

#[test]
fn the_sum_is_never_below_what_is_established() {
    let backends = [ready(1, 300, None), ready(1, 600, None), ready(1, 1, None)];
    let outcome = compute(&computed(300, 1, 0), &backends, NOW);
    assert_eq!(limits(&outcome), [301; 3]);
    assert_eq!(
        outcome.sentence,
        "ceil(300 clients × 1 / 3 ready) = 100; held at 301 because 901 are established"
    );
}

#[test]
fn when_everybody_is_full_everybody_opens() {
    let rule = computed(100, 1, 10);
    let limited = [ready(1, 55, Some(55)), ready(1, 54, Some(55))];
    assert_eq!(limits(&compute(&rule, &limited, NOW)), [55, 55]);
    let all = limited.map(full);
    let outcome = compute(&rule, &all, NOW);
    assert_eq!(outcome.quotas, [Quota::Unlimited; 2]);
    assert_eq!(
        outcome.sentence,
        "unlimited: 109 connections established and none of the 2 ready backends has room for another"
    );
    let only_one = [full(limited[0]), limited[1]];
    assert_eq!(limits(&compute(&rule, &only_one, NOW)), [55, 55]);
    // Without a quota nobody is full: the numbers that would come tell whether it is over.
    let opened = |established| ReadyBackend {
        previous: Some(Quota::Unlimited),
        ..ready(1, established, None)
    };
    let outcome = compute(&rule, &[opened(100), opened(100)], NOW);
    assert_eq!(outcome.quotas, [Quota::Unlimited; 2]);
    let outcome = compute(&rule, &[opened(100), opened(99)], NOW);
    assert_eq!(limits(&outcome), [100, 100]);
    // What somebody wrote down is taken as it is.
    assert_eq!(limits(&compute(&QuotaRule::Fixed(55), &all, NOW)), [55, 55]);
}

#[test]
fn who_is_unhealthy_for_ten_seconds_gives_its_share_to_the_others() {
    let rule = computed(300, 1, 0);
    let backends = |seconds| {
        let sick = unhealthy(ready(1, 90, Some(100)), seconds);
        [ready(1, 100, Some(100)), ready(1, 100, Some(100)), sick]
    };
    assert_eq!(limits(&compute(&rule, &backends(9), NOW)), [100; 3]);
    let outcome = compute(&rule, &backends(10), NOW);
    assert_eq!(limits(&outcome), [150, 150, 90]);
    let mut tried = backends(10);
    tried[2].wants_trial = true;
    assert_eq!(limits(&compute(&rule, &tried, NOW)), [150, 150, 91]);
    assert_eq!(
        outcome.sentence,
        "ceil(300 clients × 1 / 2 ready) = 150; 1 unhealthy without a share"
    );
    // Its clients have room on the others, however many they are.
    let many = [
        ready(1, 100, None),
        ready(1, 100, None),
        unhealthy(ready(1, 300, None), 60),
    ];
    let outcome = compute(&rule, &many, NOW);
    assert_eq!(limits(&outcome), [250, 250, 300]);
    assert_eq!(
        outcome.sentence,
        "ceil(300 clients × 1 / 2 ready) = 150; held at 250 because 500 are established \
         (300 on backends not ready or unhealthy); 1 unhealthy without a share"
    );
}

#[test]
fn the_last_healthy_one_is_open_and_where_most_are_unhealthy_all_are_alike() {
    let rule = computed(100, 1, 0);
    let sick = unhealthy(ready(1, 0, Some(50)), 30);
    let outcome = compute(&rule, &[ready(1, 50, Some(50)), sick], NOW);
    assert_eq!(outcome.quotas, [Quota::Unlimited, Quota::Limited(1)]);
    assert!(
        (outcome.sentence).starts_with("unlimited: one backend is ready and healthy"),
        "{}",
        outcome.sentence
    );
    let outcome = compute(&rule, &[ready(1, 50, Some(50)), sick, sick], NOW);
    assert_eq!(limits(&outcome), [50; 3]);
    // The one that is open to those who try it is not what everybody waits for.
    let all_full = [full(ready(1, 50, Some(50))), full(ready(1, 50, Some(50)))];
    let outcome = compute(&rule, &[all_full[0], all_full[1], sick], NOW);
    assert_eq!(outcome.quotas[..2], [Quota::Unlimited; 2]);
}

#[test]
fn a_higher_quota_comes_at_once() {
    let backends = [ready(1, 100, Some(100)), ready(1, 100, Some(100))];
    let outcome = compute(&computed(300, 2, 0), &backends, NOW);
    assert_eq!(limits(&outcome), [300, 300]);
    assert!(!outcome.lowering);
}

#[test]
fn a_lower_quota_comes_by_a_tenth_a_minute() {
    let backends = [
        ready(1, 0, Some(345)),
        ready(1, 0, Some(345)),
        ready(1, 0, None),
    ];
    let rule = computed(300, 2, 15);
    let at = |seconds| compute(&rule, &backends, Duration::from_secs(seconds));

    assert_eq!(limits(&at(0)), [345, 345, 230]);
    assert_eq!(limits(&at(6)), [345, 345, 230], "not worth a step yet");
    assert_eq!(limits(&at(7)), [341, 341, 230]);
    assert_eq!(limits(&at(60)), [311, 311, 230]);
    assert_eq!(
        limits(&at(86_400)),
        [311, 311, 230],
        "waiting longer doesn't save up"
    );
    assert!(at(60).lowering);
    assert_eq!(
        at(60).sentence,
        "ceil(300 clients × 2 × 1.15 / 3 ready) = 230; lowered by at most 10 % a minute: 230 to 311 now"
    );
}

/// The caller's part, as the documentation of `compute` asks for it, in ticks of one second.
fn run_until_settled(
    rule: &QuotaRule,
    mut backends: Vec<ReadyBackend>,
    limit: u64,
) -> (Vec<u32>, u64) {
    let mut waiting = Duration::ZERO;
    for second in 0..limit {
        let outcome = compute(rule, &backends, waiting);
        if !outcome.lowering {
            return (limits(&outcome), second);
        }
        let changed = backends
            .iter()
            .zip(&outcome.quotas)
            .any(|(ready, quota)| ready.previous != Some(*quota));
        for (ready, quota) in backends.iter_mut().zip(&outcome.quotas) {
            ready.previous = Some(*quota);
        }
        waiting = if changed { Duration::ZERO } else { waiting };
        waiting += Duration::from_secs(1);
    }
    panic!("not settled after {limit} seconds: {backends:?}");
}

#[test]
fn ticks_of_a_second_lower_by_a_tenth_a_minute_in_all() {
    // ln(500 / 1000) / (10 % a minute) is just below 7 minutes when each step is taken of what is
    // left.
    let backends = vec![ready(1, 0, Some(1000)), ready(1, 0, Some(1000))];
    let (settled, seconds) = run_until_settled(&computed(1000, 1, 0), backends, 3600);
    assert_eq!(settled, [500, 500]);
    assert!((415..=470).contains(&seconds), "{seconds} seconds");
}

#[test]
fn even_the_smallest_quota_goes_down_in_time() {
    let rule = QuotaRule::Computed {
        clients: Some(2),
        connections_per_client: 1,
        headroom_percent: 0,
        min_quota: 1,
    };
    let backends = vec![ready(1, 0, Some(5)), ready(1, 0, Some(2))];
    let (settled, seconds) = run_until_settled(&rule, backends, 7200);
    assert_eq!(settled, [1, 1]);
    // 10 minutes / 5, / 4, / 3 and / 2 in turn, for one connection each.
    assert!(seconds >= 120 + 150 + 200 + 300, "{seconds} seconds");
}

#[test]
fn a_small_quota_goes_down_beside_a_large_one() {
    let backends = vec![
        ready(1000, 0, Some(20_000)),
        ready(1, 0, Some(20)),
        ready(1, 0, Some(3)),
    ];
    let rule = QuotaRule::Computed {
        clients: Some(10_000),
        connections_per_client: 1,
        headroom_percent: 0,
        min_quota: 1,
    };
    let (settled, _) = run_until_settled(&rule, backends, 7200);
    assert_eq!(settled, [9981, 10, 10]);
}

fn any_rule() -> impl Strategy<Value = QuotaRule> {
    let computed = (
        any::<Option<u32>>(),
        any::<u32>(),
        any::<u32>(),
        any::<u32>(),
    )
        .prop_map(
            |(clients, connections_per_client, headroom_percent, min_quota)| QuotaRule::Computed {
                clients,
                connections_per_client,
                headroom_percent,
                min_quota,
            },
        );
    prop_oneof![
        Just(QuotaRule::Unlimited),
        any::<u32>().prop_map(QuotaRule::Fixed),
        computed
    ]
}

fn any_quota() -> impl Strategy<Value = Option<Quota>> {
    proptest::option::of(prop_oneof![
        Just(Quota::Unlimited),
        any::<u32>().prop_map(Quota::Limited)
    ])
}

prop_compose! {
    fn any_ready()(weight: u32, established: u32, previous in any_quota(), full: bool, unhealthy_for: Option<Duration>) -> ReadyBackend {
        ReadyBackend { weight, established, previous, full, unhealthy_for, wants_trial: established % 2 == 0 }
    }
}

prop_compose! {
    /// What the configuration allows and a machine may hold.
    fn sane_ready()(weight in 1..=1000u32, established in 0..200_000u32, limit in proptest::option::of(1..200_000u32)) -> ReadyBackend {
        ready(weight, established, limit)
    }
}

prop_compose! {
    fn sane_rule()(clients in 1..100_000u32, per_client in 1..8u32, headroom in 0..=200u32, min_quota in 1..64u32) -> QuotaRule {
        QuotaRule::Computed {
            clients: Some(clients),
            connections_per_client: per_client,
            headroom_percent: headroom,
            min_quota,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn never_panics(
        rule in any_rule(),
        backends in proptest::collection::vec(any_ready(), 0..20),
        since: u64,
        nanos in 0..1_000_000_000u32,
    ) {
        let outcome = compute(&rule, &backends, Duration::new(since, nanos));
        prop_assert_eq!(outcome.quotas.len(), backends.len());
        prop_assert!(!outcome.sentence.is_empty());
        prop_assert!(!outcome.sentence.contains('\n'));
        prop_assert!(outcome.sentence.len() <= 255, "{}", outcome.sentence);
    }

    #[test]
    fn holds_what_is_established_and_what_is_needed(
        rule in sane_rule(),
        backends in proptest::collection::vec(sane_ready(), 2..20),
        since in 0..200u64,
    ) {
        let QuotaRule::Computed { clients: Some(clients), connections_per_client, headroom_percent, min_quota } = rule else {
            unreachable!("sane_rule makes computed rules");
        };
        let quotas = limits(&compute(&rule, &backends, Duration::from_secs(since)));
        let sum: u64 = quotas.iter().map(|quota| u64::from(*quota)).sum();
        let established: u64 = backends.iter().map(|ready| u64::from(ready.established)).sum();
        let needed = u64::from(clients) * u64::from(connections_per_client) * u64::from(100 + headroom_percent);
        prop_assert!(sum >= established);
        prop_assert!(sum * 100 >= needed);
        prop_assert!(quotas.iter().all(|quota| *quota >= min_quota));
    }

    #[test]
    fn the_healthy_have_the_shares_of_the_unhealthy(
        rule in sane_rule(),
        backends in proptest::collection::vec((sane_ready(), any::<bool>()), 2..20),
    ) {
        let backends: Vec<ReadyBackend> = backends
            .into_iter()
            .map(|(ready, sick)| if sick { unhealthy(ready, 10) } else { ready })
            .collect();
        let outcome = compute(&rule, &backends, NOW);
        let is_sick = |backend: &&ReadyBackend| backend.unhealthy_for.is_some();
        let sick: Vec<ReadyBackend> = backends.iter().filter(is_sick).copied().collect();
        if sick.is_empty() || 2 * sick.len() > backends.len() {
            let well: Vec<ReadyBackend> = backends.iter().map(|ready| ReadyBackend { unhealthy_for: None, ..*ready }).collect();
            prop_assert_eq!(outcome, compute(&rule, &well, NOW));
        } else {
            let pairs = || backends.iter().zip(&outcome.quotas);
            for (backend, quota) in pairs().filter(|(backend, _)| backend.unhealthy_for.is_some()) {
                prop_assert_eq!(*quota, backend.without_share());
            }
            let theirs = pairs().filter(|(backend, _)| backend.unhealthy_for.is_none());
            let theirs: u64 = theirs.map(|(_, quota)| quota.limit().map_or(u64::from(u32::MAX), u64::from)).sum();
            let established: u64 = backends.iter().map(|ready| u64::from(ready.established)).sum();
            prop_assert!(theirs >= established);
        }
    }

    #[test]
    fn lowers_by_at_most_a_tenth_a_minute(
        rule in sane_rule(),
        backends in proptest::collection::vec(sane_ready(), 2..20),
        millis in 0..200_000u64,
    ) {
        let quotas = limits(&compute(&rule, &backends, Duration::from_millis(millis)));
        for (quota, ready) in quotas.iter().zip(&backends) {
            if let Some(Quota::Limited(previous)) = ready.previous {
                let lowered = u64::from(previous.saturating_sub(*quota));
                prop_assert!(lowered * 600_000 <= u64::from(previous) * millis);
                prop_assert!(lowered <= u64::from(previous / 10).max(1));
            }
        }
    }

    #[test]
    fn raises_at_once_and_settles_where_a_fresh_start_would(
        rule in sane_rule(),
        backends in proptest::collection::vec(sane_ready(), 2..20),
        since in 0..200u64,
    ) {
        let forgotten: Vec<ReadyBackend> = backends.iter().map(|ready| ReadyBackend { previous: None, ..*ready }).collect();
        let targets = limits(&compute(&rule, &forgotten, NOW));
        let outcome = compute(&rule, &backends, Duration::from_secs(since));
        let quotas = limits(&outcome);
        for (quota, target) in quotas.iter().zip(&targets) {
            prop_assert!(quota >= target);
        }
        prop_assert_eq!(outcome.lowering, quotas != targets);
        for ((quota, target), ready) in quotas.iter().zip(&targets).zip(&backends) {
            let was_higher = matches!(ready.previous, Some(Quota::Limited(previous)) if previous > *target);
            prop_assert!(was_higher || quota == target);
        }
    }

    #[test]
    fn is_in_proportion_to_weight(
        clients in 1..1_000_000u32,
        weights in proptest::collection::vec(1..=1000u32, 2..20),
    ) {
        let rule = QuotaRule::Computed { clients: Some(clients), connections_per_client: 1, headroom_percent: 0, min_quota: 1 };
        let backends: Vec<ReadyBackend> = weights.iter().map(|weight| ready(*weight, 0, None)).collect();
        let sum: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        for (quota, weight) in limits(&compute(&rule, &backends, NOW)).into_iter().zip(weights) {
            let exact = u64::from(clients) * u64::from(weight);
            prop_assert!(u64::from(quota) * sum >= exact, "rounded up");
            prop_assert!((u64::from(quota) - 1) * sum < exact, "by less than one");
        }
    }

    #[test]
    fn the_sentence_names_every_number_that_matters(
        rule in sane_rule(),
        backends in proptest::collection::vec(sane_ready(), 2..20),
    ) {
        let outcome = compute(&rule, &backends, NOW);
        let quotas = limits(&outcome);
        for extreme in [quotas.iter().min(), quotas.iter().max()] {
            let number = extreme.expect("at least two").to_string();
            prop_assert!(outcome.sentence.split(|c: char| !c.is_ascii_digit()).any(|word| word == number), "{}", outcome.sentence);
        }
        prop_assert_eq!(outcome.sentence.contains("lowered by"), outcome.lowering);
    }
}
