//! The water level: up to which load endpoints should be filled by the connects still to come.

use balancer_common::abi::EndpointGroup;

/// An endpoint that may be chosen, and how full it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Its connections, those of every client.
    pub connections: u64,
    /// Its share beside the others'; 0 gets none.
    pub weight: u32,
}

/// The load, in units of [`EndpointGroup::LOAD_ONE`], below which the endpoints have room for so
/// many connections together: Σ max(0, level - load) × weight = `expected`, rounded up. 0 where
/// no endpoint may be chosen.
pub fn level(endpoints: &[Filled], expected: u64) -> u64 {
    let mut by_load: Vec<_> = endpoints.iter().filter(|one| one.weight > 0).collect();
    by_load.sort_by_key(|one| load(one.connections.into(), one.weight.into()));
    let (mut connections, mut weight, mut level) = (u128::from(expected), 0, u128::MAX);
    for one in by_load {
        // Those from here on are above the level that the less loaded ones are filled to.
        if load(one.connections.into(), one.weight.into()) >= level {
            break;
        }
        connections += u128::from(one.connections);
        weight += u128::from(one.weight);
        level = load(connections, weight);
    }
    match weight {
        0 => 0,
        _ => u64::try_from(level).unwrap_or(u64::MAX),
    }
}

/// Connections by weight, rounded up.
fn load(connections: u128, weight: u128) -> u128 {
    (connections * u128::from(EndpointGroup::LOAD_ONE)).div_ceil(weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: u64 = EndpointGroup::LOAD_ONE;

    fn filled(pairs: &[(u64, u32)]) -> Vec<Filled> {
        let one = |(connections, weight)| Filled {
            connections,
            weight,
        };
        pairs.iter().copied().map(one).collect()
    }

    #[test]
    fn the_least_loaded_are_filled_first() {
        for (endpoints, expected, result) in [
            (&[(10, 1), (10, 1), (10, 1)][..], 0, 10 * ONE),
            (&[(10, 1), (10, 1), (10, 1)], 6, 12 * ONE),
            (&[(100, 1), (100, 1), (40, 1)], 1, 41 * ONE),
            (&[(100, 1), (100, 1), (40, 1)], 90, 110 * ONE),
            (&[(100, 1), (90, 1), (40, 1)], 50, 90 * ONE),
            (&[(30, 3), (0, 1)], 10, 10 * ONE),
            (&[(30, 3), (0, 1)], 30, 15 * ONE),
            (&[(0, 0), (7, 1)], 3, 10 * ONE),
            (&[(5, 0)], 3, 0),
            (&[], 3, 0),
        ] {
            assert_eq!(level(&filled(endpoints), expected), result, "{endpoints:?}");
        }
    }

    proptest! {
        #[test]
        fn the_room_below_the_level_is_what_is_expected(
            endpoints in prop::collection::vec((0..1_u64 << 20, 0..5_000_u32), 1..256),
            expected in 0..1_u64 << 24,
        ) {
            let level = level(&filled(&endpoints), expected);
            let weights: u64 = endpoints.iter().map(|one| u64::from(one.1)).sum();
            prop_assume!(weights > 0);
            let room: u64 = endpoints
                .iter()
                .filter(|one| one.1 > 0)
                .map(|(connections, weight)| {
                    (level * u64::from(*weight)).saturating_sub(connections * ONE)
                })
                .sum();
            // Rounded up, by less than a unit of load of each.
            prop_assert!(room >= expected * ONE, "{room}");
            prop_assert!(room <= expected * ONE + 2 * weights, "{room}");
        }

        #[test]
        fn it_is_of_any_numbers(
            endpoints in prop::collection::vec((any::<u64>(), any::<u32>()), 0..9),
            expected: u64,
        ) {
            level(&filled(&endpoints), expected);
        }
    }
}
