//! Properties of the plan, and what it says in single situations.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::standing::{Standing, Standings};
use super::*;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn client(number: u64) -> IpAddr {
    let number = u32::try_from(number).unwrap();
    std::net::Ipv4Addr::from_bits(0x0A00_0000 + number).into()
}

fn connection(cookie: u64, load: u64) -> Connection {
    Connection {
        cookie,
        client: client(cookie),
        opened: Duration::ZERO,
        load,
        is_movable: true,
    }
}

/// Of each connection its load; the cookies begin with the given one.
fn own(name: &str, first: u64, loads: &[u64]) -> Backend {
    let connections = (first..)
        .zip(loads)
        .map(|(cookie, load)| connection(cookie, *load));
    Backend {
        name: name.to_owned(),
        weight: 1,
        phase: Phase::Ready,
        fitness: Fitness::Serves,
        limit: None,
        counts: Counts::Own {
            established: loads.len() as u64,
            connections: connections.collect(),
        },
    }
}

fn other(name: &str, held: u64) -> Backend {
    Backend {
        counts: Counts::Published(Published {
            held,
            load: held * 100,
            ..Published::default()
        }),
        ..own(name, 0, &[])
    }
}

fn group(backends: Vec<Backend>) -> Group {
    Group {
        is_on: true,
        balance_by: BalanceBy::Connections,
        slow_start: s(30),
        are_refused: false,
        unheard_for: Duration::ZERO,
        backends,
    }
}

/// 133 here and 67 there.
fn uneven() -> Group {
    group(vec![own("a", 1, &[100; 133]), other("b", 67)])
}

fn standing_of<'a>(standings: &'a Standings<'_>, name: &str) -> &'a Standing<'a> {
    let all = standings.all.iter();
    all.into_iter()
        .find(|one| one.backend.name == name)
        .unwrap()
}

/// What is remembered of a group that has been the same for so long.
fn lasting(group: &Group, seconds: u64) -> Memory {
    let mut memory = Memory::default();
    (0..=seconds).for_each(|second| memory.note(group, s(second)));
    memory
}

fn action(group: &Group, memory: &Memory, second: u64) -> Action {
    plan(group, memory, s(second)).remove(0).action
}

/// What the first backend does after a minute.
fn after_a_minute(group: &Group) -> Action {
    action(group, &lasting(group, 60), 60)
}

fn shed(action: Action) -> Vec<u64> {
    match action {
        Action::Shed { cookies, .. } => cookies,
        Action::Stay(stay) => panic!("{stay}"),
    }
}

fn stay(action: Action) -> Stay {
    match action {
        Action::Shed { cookies, why } => panic!("{cookies:?} {why}"),
        Action::Stay(stay) => stay,
    }
}

#[test]
fn what_is_too_much_moves_gently_and_the_oldest_first() {
    let mut group = uneven();
    if let Counts::Own { connections, .. } = &mut group.backends[0].counts {
        connections[99].opened = Duration::ZERO;
        connections[..99]
            .iter_mut()
            .for_each(|one| one.opened = s(1));
    }
    let cookies = shed(after_a_minute(&group));
    assert_eq!(cookies, [100, 101, 102], "2 a second, and one saved up");
}

#[test]
fn nothing_moves_before_it_is_time() {
    let group = uneven();
    let memory = lasting(&group, 10);
    let settling = Stay::ReadySetChanged { ago: s(10) };
    assert_eq!(stay(action(&group, &memory, 10)), settling);
    let mut even = group.clone();
    even.backends[1] = other("b", 133);
    let mut memory = lasting(&even, 60);
    (61..75).for_each(|second| memory.note(&group, s(second)));
    let early = Stay::NotLongEnough { uneven_for: s(13) };
    assert_eq!(stay(action(&group, &memory, 74)), early);
    memory.note(&even, s(75));
    memory.note(&group, s(76));
    let anew = Stay::NotLongEnough { uneven_for: s(0) };
    assert_eq!(stay(action(&group, &memory, 76)), anew);
}

#[test]
fn nothing_moves_where_it_must_not() {
    let off = Group {
        is_on: false,
        ..uneven()
    };
    assert_eq!(stay(after_a_minute(&off)), Stay::Off);
    let refused = Group {
        are_refused: true,
        ..uneven()
    };
    assert_eq!(stay(after_a_minute(&refused)), Stay::Refused);
    let unheard = Group {
        unheard_for: s(11),
        ..uneven()
    };
    let unheard_for = unheard.unheard_for;
    assert_eq!(
        stay(after_a_minute(&unheard)),
        Stay::Unheard { unheard_for }
    );
    let mut old = uneven();
    let age = |group: &mut Group, age| {
        if let Counts::Published(published) = &mut group.backends[1].counts {
            published.age = age;
        }
    };
    for (told, expected) in [(s(41), Some(s(41))), (Duration::MAX, None)] {
        age(&mut old, told);
        let expected = Stay::InputsTooOld {
            backend: "b".to_owned(),
            age: expected,
        };
        assert_eq!(stay(after_a_minute(&old)), expected);
    }
}

#[test]
fn nothing_moves_to_one_that_does_not_take_it() {
    for fitness in [Fitness::Stalled, Fitness::Failing] {
        let mut group = uneven();
        group.backends[1].fitness = fitness;
        assert!(matches!(
            stay(after_a_minute(&group)),
            Stay::Even {
                held: 133,
                share: 133
            }
        ));
    }
    let mut full = uneven();
    full.backends[1].limit = Some(67);
    assert!(matches!(stay(after_a_minute(&full)), Stay::Even { .. }));
    full.backends[0].limit = Some(100);
    assert_eq!(stay(after_a_minute(&full)), Stay::NobodyTakes);
    full.backends[1].limit = Some(69);
    assert_eq!(shed(after_a_minute(&full)).len(), 2, "as many as it takes");
}

#[test]
fn a_new_backend_gets_what_has_grown_of_its_share() {
    let two = group(vec![own("a", 1, &[0; 100])]);
    let mut memory = lasting(&two, 60);
    let slow = Group {
        slow_start: s(1_000),
        backends: vec![two.backends[0].clone(), other("b", 0)],
        ..two
    };
    (61..=161).for_each(|second| memory.note(&slow, s(second)));
    assert_eq!(memory.ready_for("b", s(161)), s(100));
    let standings = Standings::of(&slow, &memory, s(161));
    assert_eq!(
        standing_of(&standings, "b").count.share,
        9,
        "0.1 + 0.9 × 0.1 of 50"
    );
    assert_eq!(standing_of(&standings, "a").count.share, 91);
    // It dies and begins again.
    memory.note(&two, s(162));
    memory.note(&slow, s(163));
    assert_eq!(memory.ready_for("b", s(163)), s(0));
}

#[test]
fn one_that_leaves_is_emptied_at_once() {
    for (phase, are_refused, moves) in [
        (Phase::Draining, false, true),
        (Phase::Draining, true, false),
        (Phase::Terminating, true, true),
    ] {
        let mut group = uneven();
        let mut memory = lasting(&group, 60);
        (group.backends[0].phase, group.are_refused) = (phase, are_refused);
        memory.note(&group, s(61));
        let is_moved = matches!(action(&group, &memory, 61), Action::Shed { .. });
        assert_eq!(is_moved, moves, "{phase:?}");
    }
}

fn candidates(group: &Group, memory: &Memory, second: u64) -> pick::Candidates {
    let Counts::Own { connections, .. } = &group.backends[0].counts else {
        unreachable!()
    };
    let cooling = memory.cooling(group, s(second));
    pick::Candidates::of(&group.backends[0], connections, memory, &cooling)
}

/// Many clients share an address: of what it has opened since, as many connections cool down as
/// were told.
#[test]
fn what_came_back_cools_down_and_other_clients_of_its_address_do_not() {
    let mut group = uneven();
    if let Counts::Own { connections, .. } = &mut group.backends[0].counts {
        for one in connections.iter_mut() {
            one.client = client(1);
            one.opened = if one.cookie < 4 { s(0) } else { s(61) };
        }
    }
    let told = |cookie| Connection {
        client: client(1),
        ..connection(cookie, 0)
    };
    let mut memory = lasting(&group, 60);
    (1..4).for_each(|cookie| memory.told("a", &told(cookie), s(60)));
    (61..=80).for_each(|second| memory.note(&group, s(second)));
    let now = candidates(&group, &memory, 80);
    assert_eq!((now.unmovable, now.cooling), (3, 3));
    assert_eq!(now.movable[0].cookie, 7, "4, 5 and 6 came first");
    memory.note(&group, s(661));
    assert_eq!(candidates(&group, &memory, 661).cooling, 0);
}

/// All clients connect anew while another node moves a few: no more of them cool down than may have
/// come from there.
#[test]
fn no_more_connections_cool_down_than_other_nodes_have_moved() {
    let mut group = uneven();
    let mut memory = lasting(&group, 60);
    if let Counts::Own { connections, .. } = &mut group.backends[0].counts {
        for one in connections {
            one.opened = s(62);
        }
    }
    group.backends[1].counts = Counts::Published(Published {
        held: 1,
        moving: 3,
        age: s(2),
        ..Published::default()
    });
    (61..=75).for_each(|second| memory.note(&group, s(second)));
    let now = candidates(&group, &memory, 80);
    // Those that were on their way at the end as well.
    assert!((3..=6).contains(&now.cooling), "{}", now.cooling);
    assert!(now.movable.len() > 50, "{}", now.movable.len());
}

#[test]
fn a_client_alone_at_its_address_is_told_once_in_its_cooldown() {
    let mut group = uneven();
    let mut memory = lasting(&group, 60);
    let Counts::Own { connections, .. } = &mut group.backends[0].counts else {
        unreachable!()
    };
    memory.told("a", &connections[0], s(60));
    connections[0].cookie = 9_999;
    connections[0].opened = s(63);
    (61..=80).for_each(|second| memory.note(&group, s(second)));
    assert_eq!(candidates(&group, &memory, 80).cooling, 1);
    assert!(!shed(action(&group, &memory, 80)).contains(&9_999));
}

#[test]
fn who_ignores_it_counts_again_and_is_left_alone_for_an_hour() {
    let group = uneven();
    let mut memory = lasting(&group, 60);
    memory.told("a", &connection(1, 5), s(60));
    let published = |memory: &Memory, second| memory.published(&group.backends[0], s(second));
    let now = published(&memory, 61);
    assert_eq!(
        (now.held, now.moving, now.load, now.moving_load),
        (132, 1, 13_200, 5)
    );
    assert_eq!(published(&memory, 76).moving, 0);
    assert_eq!(published(&memory, 121).held, 133);
    for (second, unmovable) in [(3_600, 1), (3_660, 0)] {
        memory.note(&group, s(second));
        let candidates = candidates(&group, &memory, second);
        assert_eq!(candidates.unmovable, unmovable);
    }
}

#[test]
fn what_does_not_help_is_not_repeated_at_once() {
    let group = uneven();
    let mut memory = lasting(&group, 60);
    let mut pauses = Vec::new();
    let mut cookies = 1_000;
    let mut group = group;
    for second in 61..2_000 {
        memory.note(&group, s(second));
        match action(&group, &memory, second) {
            Action::Shed { cookies: told, .. } => {
                let Counts::Own { connections, .. } = &mut group.backends[0].counts else {
                    unreachable!()
                };
                for one in connections
                    .iter_mut()
                    .filter(|one| told.contains(&one.cookie))
                {
                    memory.told("a", one, s(second));
                    // Another process of a large client comes to the same backend.
                    cookies += 1;
                    (one.cookie, one.client) = (cookies, client(cookies));
                }
            }
            Action::Stay(Stay::InVain { pause })
                if pauses.last() != Some(&second.wrapping_sub(1)) =>
            {
                pauses.push(second);
                assert!(pause > s(100));
            }
            Action::Stay(Stay::InVain { .. }) => *pauses.last_mut().unwrap() = second,
            Action::Stay(_) => {}
        }
    }
    assert!(pauses.len() >= 2, "{pauses:?}");
    assert!(cookies < 1_000 + 400, "{cookies}");
}

/// A group of which this node has some backends.
fn any_group() -> impl Strategy<Value = Group> {
    let phase = prop_oneof![
        6 => Just(Phase::Ready),
        1 => Just(Phase::NotReady),
        1 => Just(Phase::Draining),
        1 => Just(Phase::Terminating),
    ];
    let fitness = prop_oneof![
        6 => Just(Fitness::Serves),
        1 => Just(Fitness::Stalled),
        1 => Just(Fitness::Failing),
    ];
    let counts = (
        any::<bool>(),
        0..150_u64,
        prop_oneof![4 => 0..15_u64, 1 => 15..60_u64],
    );
    let limit = prop::option::weighted(0.2, 0..150_u64);
    let backend = (phase, fitness, counts, limit, 0..5_u32);
    let settings = (
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.1),
        any::<bool>(),
    );
    (prop::collection::vec(backend, 1..7), settings).prop_map(|(backends, settings)| {
        let backends = (0_u64..).zip(backends);
        let backends = backends.map(
            |(index, (phase, fitness, (is_own, held, age), limit, weight))| {
                let loads: Vec<u64> = (0..held).map(|one| 1_000 / (1 + one * 7 % 13)).collect();
                let mut backend = own(&format!("backend {index}"), 1 + index * 1_000, &loads);
                if !is_own {
                    backend.counts = Counts::Published(Published {
                        held,
                        moving: held / 50,
                        load: loads.iter().sum(),
                        moving_load: 0,
                        age: s(age),
                    });
                }
                Backend {
                    weight,
                    phase,
                    fitness,
                    limit,
                    ..backend
                }
            },
        );
        let (is_on, are_refused, by_bytes) = settings;
        Group {
            is_on,
            are_refused,
            unheard_for: Duration::ZERO,
            balance_by: if by_bytes {
                BalanceBy::Bytes
            } else {
                BalanceBy::Connections
            },
            ..group(backends.collect())
        }
    })
}

/// Tells who is to be told, and takes the connections away.
fn carry_out(group: &mut Group, memory: &mut Memory, decisions: &[Decision], now: Duration) -> u64 {
    let mut sum = 0;
    for decision in decisions {
        let Action::Shed { cookies, .. } = &decision.action else {
            continue;
        };
        let name = &decision.backend;
        let backend = group
            .backends
            .iter_mut()
            .find(|one| one.name == *name)
            .unwrap();
        let Counts::Own {
            established,
            connections,
        } = &mut backend.counts
        else {
            panic!("{name} is another node's");
        };
        for cookie in cookies {
            let index = connections
                .iter()
                .position(|one| one.cookie == *cookie)
                .unwrap();
            memory.told(name, &connections[index], now);
            connections.swap_remove(index);
            *established -= 1;
            sum += 1;
        }
    }
    sum
}

proptest! {
    #[test]
    fn the_order_of_the_backends_does_not_matter(group in any_group(), by in 0..7_usize) {
        let mut turned = group.clone();
        let by = by % turned.backends.len();
        turned.backends.rotate_left(by);
        let plans = [&group, &turned].map(|group| plan(group, &lasting(group, 60), s(60)));
        prop_assert_eq!(&plans[0], &plans[1]);
    }

    #[test]
    fn nobody_sheds_below_its_share_or_where_it_must_not(group in any_group(), lasts in 0..60_u64) {
        let memory = lasting(&group, lasts);
        let now = s(lasts);
        let standings = Standings::of(&group, &memory, now);
        for decision in plan(&group, &memory, now) {
            let Action::Shed { cookies, why } = decision.action else {
                continue;
            };
            let one = standing_of(&standings, &decision.backend);
            prop_assert!(!cookies.is_empty());
            prop_assert!(group.is_on && one.backend.phase != Phase::NotReady);
            prop_assert!(!group.are_refused || one.backend.phase == Phase::Terminating);
            match why {
                Why::Load { .. } => prop_assert_eq!(cookies.len(), 1),
                _ => prop_assert!(cookies.len() as u64 <= one.count.excess()),
            }
            if !one.backend.phase.is_leaving() {
                prop_assert!(lasts >= 30);
                let ready = standings.all.iter().filter(|one| one.backend.phase == Phase::Ready);
                prop_assert!(ready.into_iter().all(|one| one.known.age <= TOO_OLD));
            }
        }
    }

    #[test]
    fn it_is_of_any_numbers(
        held in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u32>()), 1..6),
        second: u32,
    ) {
        let backends = held.iter().enumerate().map(|(index, (held, load, weight))| Backend {
            weight: *weight,
            counts: Counts::Published(Published {
                held: (*held).into(),
                load: u64::from(*load) << 12,
                ..Published::default()
            }),
            ..other(&index.to_string(), 0)
        });
        let mut group = group(backends.collect());
        group.backends.push(own("own", 1, &[1 << 40; 3]));
        for balance_by in [BalanceBy::Connections, BalanceBy::Bytes] {
            group.balance_by = balance_by;
            let mut memory = lasting(&group, 40);
            let now = s(second.into());
            memory.note(&group, now);
            plan(&group, &memory, now);
        }
    }
}

/// The same on a single node.
fn all_own(mut group: Group) -> Group {
    for (index, backend) in (0..).zip(&mut group.backends) {
        if let Counts::Published(published) = backend.counts {
            let loads = vec![10; usize::try_from(published.held).unwrap()];
            backend.counts = own("", 10_000 + index * 1_000, &loads).counts;
        }
    }
    group
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn it_ends_never_faster_than_the_rate_and_never_tells_one_twice(group in any_group()) {
        let mut group = all_own(group);
        let mut memory = Memory::default();
        let mut told: BTreeMap<u64, u64> = BTreeMap::new();
        let (mut sum, mut last) = (0, 0);
        let is_drain = group.backends.iter().any(|one| one.phase.is_leaving());
        let total: u64 = {
            memory.note(&group, s(0));
            Standings::of(&group, &memory, s(0)).total()
        };
        for second in 1..600 {
            memory.note(&group, s(second));
            let decisions = plan(&group, &memory, s(second));
            for decision in &decisions {
                if let Action::Shed { cookies, .. } = &decision.action {
                    for cookie in cookies {
                        prop_assert!(told.insert(*cookie, second).is_none());
                    }
                }
            }
            let shed = carry_out(&mut group, &mut memory, &decisions, s(second));
            sum += shed;
            if shed > 0 {
                last = second;
            }
            let backends = group.backends.len() as u64;
            let rate = if is_drain { total.max(20) * backends / 20 } else { total.max(100) / 100 };
            // Each backend may have saved up one, and a second's worth.
            prop_assert!(shed <= 2 * rate + 2 * backends, "{shed} in a second");
            prop_assert!(sum <= (second + 2) * (rate + 1) + 2 * backends, "{sum} in {second} s");
        }
        // Nobody comes back here: those who were told are gone, and the rest gets its shares. By
        // bytes one connection more may fit after a while. Where a limit leaves room for one,
        // each waits until the one before should be back.
        let is_limited = group.backends.iter().any(|one| one.limit.is_some());
        let may_last = is_limited || group.balance_by == BalanceBy::Bytes;
        prop_assert!(may_last || last < 550, "{last}");
    }
}
