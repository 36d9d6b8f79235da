use super::*;
use proptest::prelude::*;

const ONE: u64 = EndpointGroup::LOAD_ONE;

fn seen(own: u64, others: u64, weight: u64) -> Seen {
    Seen {
        own,
        others,
        weight,
        avoided: false,
    }
}

fn choose(endpoints: &[Seen], level: u64, start: u64, draws: u64) -> Option<usize> {
    let mut sum = Sum::EMPTY;
    for one in endpoints {
        sum.add(level, one);
    }
    let mut draw = Draw::new(&sum, level, start, draws);
    for (index, one) in endpoints.iter().enumerate() {
        draw.look(index as u32, one);
    }
    draw.chosen().map(|index| index as usize)
}

/// How often each is chosen in so many draws, of which nothing is counted in between.
fn tally(endpoints: &[Seen], level: u64, start: u64, draws: u64) -> Vec<u64> {
    let mut tally = vec![0; endpoints.len()];
    for draw in 0..draws {
        tally[choose(endpoints, level, start, draw).unwrap()] += 1;
    }
    tally
}

fn endpoints() -> impl Strategy<Value = Vec<Seen>> {
    let one = (0..1_u64 << 20, 0..1_u64 << 20, 0..5_000_u64, any::<bool>());
    let one = one.prop_map(|(own, others, weight, avoided)| Seen {
        own,
        others,
        weight,
        avoided,
    });
    prop::collection::vec(one, 0..256)
}

#[test]
fn each_gets_its_share_of_the_room_below_the_level() {
    let endpoints = [seen(0, 10, 1), seen(5, 15, 1), seen(0, 40, 1)];
    // Room 30, 20 and 0.
    let tally = tally(&endpoints, 40 * ONE, 0x1234_5678, 1_000);
    assert!(tally[0].abs_diff(600) <= 3 && tally[2] == 0, "{tally:?}");
}

#[test]
fn alone_a_node_spreads_its_own_exactly() {
    for weights in [[1, 1, 1, 1], [1, 2, 3, 4], [100, 100, 100, 100]] {
        for start in [0, 1 << 31, 0xffff_ffff] {
            let mut endpoints = weights.map(|weight| seen(0, 0, weight));
            let round: u64 = weights.iter().sum();
            for draw in 0..20 * round {
                endpoints[choose(&endpoints, 0, start, draw).unwrap()].own += 1;
                let load = |one: &Seen| one.own * round / one.weight;
                let loads = endpoints.each_ref().map(load);
                let apart = loads.iter().max().unwrap() - loads.iter().min().unwrap();
                assert!(apart <= 2 * round, "{draw}: {endpoints:?}");
            }
            let own = endpoints.map(|one| one.own);
            assert_eq!(own, weights.map(|weight| 20 * weight));
        }
    }
}

#[test]
fn draws_of_which_nobody_sees_the_others_are_even_all_the_same() {
    let endpoints = [seen(7, 0, 1); 4];
    for start in (0..64).map(|part| part << 26) {
        let tally = tally(&endpoints, 0, start, 200);
        let apart = tally.iter().max().unwrap() - tally.iter().min().unwrap();
        assert!(apart <= 2, "{tally:?}");
    }
}

#[test]
fn without_room_the_others_catch_up_with_the_most_loaded() {
    let endpoints = [seen(5, 0, 1), seen(5, 3, 1), seen(1, 4, 1)];
    let tally = tally(&endpoints, 2 * ONE, 0, 600);
    assert_eq!(tally[1], 0);
    assert!(tally[0].abs_diff(300) <= 3, "{tally:?}");
}

#[test]
fn nodes_whose_endpoint_does_not_answer_scatter_over_the_others() {
    let mut endpoints = [seen(0, 100, 1); 4];
    let mut first = [0; 4];
    let mut second = [0; 4];
    for start in (0..400).map(|rank| (rank << 32) / 400) {
        endpoints[3].avoided = false;
        let chosen = choose(&endpoints, 110 * ONE, start, 0).unwrap();
        first[chosen] += 1;
        if chosen == 3 {
            endpoints[3].avoided = true;
            second[choose(&endpoints, 110 * ONE, start, 1).unwrap()] += 1;
        }
    }
    assert_eq!(first, [100; 4]);
    assert!(
        second[..3].iter().all(|count| (28..=39).contains(count)),
        "{second:?}"
    );
}

#[test]
fn what_filled_up_between_the_walks_leaves_somebody_to_choose() {
    let before = [seen(0, 0, 1), seen(0, 0, 1)];
    let mut sum = Sum::EMPTY;
    for one in &before {
        sum.add(2 * ONE, one);
    }
    let mut draw = Draw::new(&sum, 2 * ONE, 0xffff_ffff, 0);
    draw.look(0, &seen(9, 0, 1));
    draw.look(1, &seen(9, 0, 1));
    assert_eq!(draw.chosen(), Some(0));
    assert_eq!(Draw::new(&Sum::EMPTY, 0, 0, 0).chosen(), None);
}

fn choose_by_own(endpoints: &[Seen], start: u64, draws: u64) -> Option<usize> {
    let mut sum = Sum::EMPTY;
    for one in endpoints {
        sum.add(7 * ONE, one);
    }
    let mut draw = Draw::by_own(&sum, start, draws);
    for (index, one) in endpoints.iter().enumerate() {
        draw.look(index as u32, one);
    }
    draw.chosen().map(|index| index as usize)
}

#[test]
fn who_has_lost_most_spreads_its_own_whatever_others_are_said_to_have() {
    for weights in [[1, 1, 1, 1], [1, 2, 3, 4]] {
        let round: u64 = weights.iter().sum();
        for start in [0, 1 << 31, 0xffff_ffff] {
            let mut others = 0;
            let mut endpoints = weights.map(|weight| {
                others += 50;
                seen(0, others, weight)
            });
            for draw in 0..20 * round {
                endpoints[choose_by_own(&endpoints, start, draw).unwrap()].own += 1;
            }
            let own = endpoints.map(|one| one.own);
            assert_eq!(own, weights.map(|weight| 20 * weight));
        }
    }
}

#[test]
fn most_is_lost_below_a_number_of_connections_of_all_that_may_be_chosen() {
    let mut sum = Sum::EMPTY;
    let avoided = Seen {
        avoided: true,
        ..seen(9, 0, 1)
    };
    for one in [avoided, seen(1, 50, 1), seen(2, 50, 1)] {
        sum.add(0, &one);
    }
    assert!(sum.has_lost_most(4) && !sum.has_lost_most(3) && !sum.has_lost_most(0));
}

proptest! {
    #[test]
    fn by_own_counts_it_is_one_with_the_fewest(
        endpoints in endpoints(),
        start in 0..1_u64 << 32,
        draws: u64,
    ) {
        let may: Vec<&Seen> = endpoints.iter().filter(|one| one.weight > 0).collect();
        let sound = may.iter().any(|one| !one.avoided);
        match choose_by_own(&endpoints, start, draws) {
            None => prop_assert!(may.is_empty()),
            Some(index) => {
                let chosen = endpoints[index];
                let others = may.iter().filter(|one| !(sound && one.avoided));
                let fewer = |one: &&&Seen| one.own * chosen.weight < chosen.own * one.weight;
                prop_assert_eq!(others.filter(fewer).count(), 0);
                prop_assert!(chosen.weight > 0 && !(sound && chosen.avoided));
            }
        }
    }

    #[test]
    fn who_has_no_weight_or_is_avoided_is_not_chosen(
        endpoints in endpoints(),
        level in 0..1_u64 << 40,
        start in 0..1_u64 << 32,
        draws: u64,
    ) {
        let sound = endpoints.iter().any(|one| one.weight > 0 && !one.avoided);
        let any = endpoints.iter().any(|one| one.weight > 0);
        match choose(&endpoints, level, start, draws) {
            None => prop_assert!(!any),
            Some(index) => {
                prop_assert!(endpoints[index].weight > 0);
                prop_assert!(!(sound && endpoints[index].avoided));
            }
        }
        let mut sum = Sum::EMPTY;
        for one in &endpoints {
            sum.add(level, one);
        }
        prop_assert_eq!(sum.are_all_avoided(), any && !sound);
    }

    #[test]
    fn the_sum_does_not_depend_on_the_order(
        mut endpoints in endpoints(),
        level in 0..1_u64 << 40,
        by in 0..256_usize,
    ) {
        let sum = |endpoints: &[Seen]| {
            let mut sum = Sum::EMPTY;
            for one in endpoints {
                sum.add(level, one);
            }
            let (level, room, full) = sum.level_and_room(level);
            (level, room, full, sum.avoided, sum.has_sound)
        };
        let before = sum(&endpoints);
        if !endpoints.is_empty() {
            let by = by % endpoints.len();
            endpoints.rotate_left(by);
        }
        prop_assert_eq!(before, sum(&endpoints));
    }

    #[test]
    fn who_has_room_is_chosen_before_who_has_none(
        endpoints in endpoints(),
        level in 0..1_u64 << 37,
        start in 0..1_u64 << 32,
        draws: u64,
    ) {
        let may = |one: &&Seen| one.weight > 0 && !one.avoided;
        let has_room = endpoints.iter().filter(may).any(|one| one.room(level) > 0);
        if has_room {
            let index = choose(&endpoints, level, start, draws).unwrap();
            prop_assert!(endpoints[index].room(level) > 0);
        }
    }

    #[test]
    fn a_run_of_draws_is_as_even_as_the_rooms(
        loads in prop::collection::vec(0..200_u64, 2..20),
        start in 0..1_u64 << 32,
        first in 0..1_u64 << 40,
    ) {
        let endpoints: Vec<_> = loads.iter().map(|load| seen(0, *load, 1)).collect();
        let level = 200 * ONE;
        let room: u64 = loads.iter().map(|load| 200 - load).sum();
        let mut tally = vec![0_u64; loads.len()];
        for draw in 0..1_000 {
            tally[choose(&endpoints, level, start, first + draw).unwrap()] += 1;
        }
        for (load, count) in loads.iter().zip(tally) {
            let share = 1_000 * (200 - load) / room;
            prop_assert!(count.abs_diff(share) <= 6, "{count} of {share}");
        }
    }

    #[test]
    fn any_numbers_are_no_trouble(
        numbers in prop::collection::vec(any::<(u64, u64, u64, bool)>(), 0..8),
        level: u64,
        start: u64,
        draws: u64,
    ) {
        let endpoints: Vec<_> = numbers
            .iter()
            .map(|(own, others, weight, avoided)| Seen {
                avoided: *avoided,
                ..seen(*own, *others, *weight)
            })
            .collect();
        let any = endpoints.iter().any(|one| one.weight > 0);
        prop_assert_eq!(choose(&endpoints, level, start, draws).is_some(), any);
        prop_assert_eq!(choose_by_own(&endpoints, start, draws).is_some(), any);
    }
}
