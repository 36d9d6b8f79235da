//! The quota of a server, shared by the sockets that it listens with. Pure.
//!
//! A server is a process, or in a cluster a pod. It may listen with several sockets
//! (`SO_REUSEPORT`, or one for each of its addresses), and each of these is a backend. The quota is
//! the server's, and the kernel half knows one for each backend.

use super::model::Quota;

/// A listening socket of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The connections that count against the quota, with those that are about to be established.
    pub used: u32,
    /// Its part of the quota so far; `None`: it has none yet.
    pub part: Option<Quota>,
}

impl Listener {
    /// How many connections it may come to hold under its part so far.
    fn may_hold(&self) -> u32 {
        let limit = self.part.and_then(Quota::limit).unwrap_or_default();
        limit.max(self.used)
    }

    fn is_full(&self) -> bool {
        self.used >= self.part.and_then(Quota::limit).unwrap_or_default()
    }
}

/// The parts of a server's quota, one for each of its listeners.
///
/// What the listeners may come to hold adds up to no more than the quota, or than before where that
/// was more. So parts go down first, and go up in a later round, when what was on its way to the
/// others has arrived. Called again and again, it gives parts that add up to the quota exactly.
pub fn parts(quota: Quota, listeners: &[Listener]) -> Vec<Quota> {
    let Quota::Limited(total) = quota else {
        return vec![Quota::Unlimited; listeners.len()];
    };
    let wanted = wanted(total, listeners);
    let held = listeners
        .iter()
        .map(|listener| u64::from(listener.may_hold()));
    let mut free = u64::from(total).saturating_sub(held.sum());
    let part = |(listener, wanted): (&Listener, u32)| {
        let now = listener.part.and_then(Quota::limit).unwrap_or_default();
        let held = u64::from(listener.may_hold());
        let raised = u64::from(wanted).saturating_sub(held).min(free);
        free -= raised;
        // Up to what it holds it may go without taking anything from the others.
        let most = u32::try_from(held + raised).unwrap_or(u32::MAX);
        Quota::Limited(if wanted <= now {
            wanted
        } else {
            wanted.min(most)
        })
    };
    listeners.iter().zip(wanted).map(part).collect()
}

/// Where the parts should be: what is used, and of the room that is left an even part. They stay as
/// they are while nobody wants more than its part.
fn wanted(total: u32, listeners: &[Listener]) -> Vec<u32> {
    let used = || listeners.iter().map(|listener| listener.used);
    let sum: u64 = used().map(u64::from).sum();
    let Some(room) = u64::from(total).checked_sub(sum) else {
        return capped(total, &used().collect::<Vec<_>>());
    };
    let now: Option<Vec<u32>> = listeners
        .iter()
        .map(|listener| listener.part?.limit())
        .collect();
    let fits = |now: &Vec<u32>| {
        let sum: u64 = now.iter().map(|part| u64::from(*part)).sum();
        sum == u64::from(total) && now.iter().zip(used()).all(|(part, used)| *part >= used)
    };
    let is_wanted = room > 0 && listeners.iter().any(Listener::is_full);
    if let Some(now) = now.filter(fits)
        && !is_wanted
    {
        return now;
    }
    let count = listeners.len().max(1) as u64;
    let mut order: Vec<usize> = (0..listeners.len()).collect();
    order.sort_by_key(|index| listeners[*index].used);
    let mut wanted: Vec<u32> = used().collect();
    for (place, index) in order.into_iter().enumerate() {
        let part = room / count + u64::from((place as u64) < room % count);
        wanted[index] += u32::try_from(part).unwrap_or(u32::MAX);
    }
    wanted
}

/// Parts of a quota that is used up or exceeded: nobody has room, and those with the most give
/// first.
fn capped(total: u32, used: &[u32]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..used.len()).collect();
    order.sort_by_key(|index| used[*index]);
    let mut parts = vec![0; used.len()];
    let (mut left, mut count) = (total, used.len());
    for index in order {
        let even = u32::try_from(count).map_or(0, |count| left / count);
        parts[index] = used[index].min(even);
        left -= parts[index];
        count -= 1;
    }
    parts
}

/// The largest weight of a listener beside others: one of a machine's connections still counts.
const MOST: u64 = 1000;

/// The weights of the listeners of each server, given its own weight and how many listeners it has:
/// a server gets as many connections with several as with one.
pub fn weights(servers: &[(u32, u32)]) -> Vec<u32> {
    let counts = || {
        servers
            .iter()
            .map(|(_, listeners)| u64::from((*listeners).max(1)))
    };
    let exact = counts().fold(1, lcm);
    let of = |scale: u64| {
        let weight =
            move |((weight, _), count): (&(u32, u32), u64)| u64::from(*weight) * scale / count;
        servers.iter().zip(counts()).map(weight)
    };
    if counts().all(|count| Some(count) == counts().next()) {
        return servers.iter().map(|(weight, _)| *weight).collect();
    }
    let scale = if of(exact).all(|weight| weight <= MOST) {
        exact
    } else {
        MOST
    };
    of(scale)
        .map(|weight| u32::try_from(weight.max(1)).unwrap_or(u32::MAX))
        .collect()
}

fn lcm(one: u64, other: u64) -> u64 {
    let (mut high, mut low) = (one, other);
    while low != 0 {
        (high, low) = (low, high % low);
    }
    (one / high).saturating_mul(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn listeners(all: &[(u32, Option<u32>)]) -> Vec<Listener> {
        let listener = |(used, part): &(u32, Option<u32>)| Listener {
            used: *used,
            part: part.map(Quota::Limited),
        };
        all.iter().map(listener).collect()
    }

    fn limits(parts: &[Quota]) -> Vec<u32> {
        parts
            .iter()
            .map(|part| part.limit().expect("limited"))
            .collect()
    }

    fn of(total: u32, all: &[(u32, Option<u32>)]) -> Vec<u32> {
        limits(&parts(Quota::Limited(total), &listeners(all)))
    }

    #[test]
    fn a_quota_is_shared_evenly_and_its_parts_add_up_to_it() {
        assert_eq!(of(10, &[(0, None); 4]), [3, 3, 2, 2]);
        assert_eq!(of(2, &[(0, None); 4]), [1, 1, 0, 0]);
        assert_eq!(of(10, &[(7, None)]), [10]);
        let open = parts(Quota::Unlimited, &listeners(&[(3, Some(3)), (0, None)]));
        assert_eq!(open, [Quota::Unlimited; 2]);
    }

    #[test]
    fn a_listener_that_joins_gets_its_part_once_the_first_has_given_it() {
        let first = of(10, &[(3, Some(10)), (0, None)]);
        assert_eq!(first, [6, 0], "ten might come to the first meanwhile");
        assert_eq!(of(10, &[(3, Some(6)), (0, Some(0))]), [6, 4]);
        // Those of the first alone fill it: nobody more, until some of them leave.
        assert_eq!(of(10, &[(10, Some(10)), (0, None)]), [10, 0]);
        assert_eq!(of(10, &[(8, Some(10)), (0, Some(0))]), [9, 0]);
        assert_eq!(of(10, &[(8, Some(9)), (0, Some(0))]), [9, 1]);
    }

    #[test]
    fn room_goes_where_the_clients_come() {
        // All of them to one address: the other's part is of no use to them.
        let mut parts = vec![5, 5];
        for _ in 0..10 {
            let used = parts[0];
            parts = of(10, &[(used, Some(parts[0])), (0, Some(parts[1]))]);
        }
        assert_eq!(parts, [9, 1]);
        // While nobody wants more than it has, nothing changes.
        assert_eq!(of(10, &[(4, Some(5)), (1, Some(5))]), [5, 5]);
    }

    #[test]
    fn a_quota_that_goes_down_is_taken_from_those_with_the_most() {
        assert_eq!(
            of(6, &[(5, Some(5)), (3, Some(3)), (1, Some(2))]),
            [3, 2, 1]
        );
        assert_eq!(of(0, &[(5, Some(5)), (3, Some(3))]), [0, 0]);
    }

    #[test]
    fn a_server_weighs_the_same_with_several_listeners() {
        assert_eq!(weights(&[(1, 4), (1, 1)]), [1, 4]);
        assert_eq!(weights(&[(2, 3), (1, 2)]), [4, 3]);
        assert_eq!(weights(&[(2, 4), (1, 4)]), [2, 1], "nothing to make up for");
        assert_eq!(
            weights(&[(1, 7), (1, 11), (1, 13), (1, 17)]),
            [142, 90, 76, 58]
        );
        assert!(weights(&[]).is_empty());
    }

    fn any_listener() -> impl Strategy<Value = (u32, Option<u32>)> {
        (0..200_u32, proptest::option::of(0..200_u32))
    }

    proptest! {
        #[test]
        fn no_more_may_come_than_the_quota_or_than_before(
            total in 0..1000_u32,
            all in proptest::collection::vec(any_listener(), 1..9),
        ) {
            let before: u32 = listeners(&all).iter().map(Listener::may_hold).sum();
            let after: u32 = of(total, &all)
                .iter()
                .zip(listeners(&all))
                .map(|(part, listener)| (*part).max(listener.may_hold()))
                .sum();
            prop_assert!(after <= before.max(total), "{after} of {total}, {before} before");
        }

        #[test]
        fn after_a_few_rounds_the_parts_add_up_and_hold_what_is_used(
            total in 0..1000_u32,
            all in proptest::collection::vec(any_listener(), 1..9),
        ) {
            let used: Vec<u32> = all.iter().map(|(used, _)| *used).collect();
            let mut now = of(total, &all);
            for _ in 0..3 {
                let next: Vec<_> = used.iter().copied().zip(now.iter().copied().map(Some)).collect();
                now = of(total, &next);
            }
            let again: Vec<_> = used.iter().copied().zip(now.iter().copied().map(Some)).collect();
            prop_assert_eq!(&of(total, &again), &now, "it settles");
            let sum: u32 = used.iter().sum();
            prop_assert_eq!(now.iter().sum::<u32>(), total);
            let fits = |(part, used): (&u32, &u32)| if sum <= total { part >= used } else { part <= used };
            prop_assert!(now.iter().zip(&used).all(fits), "{now:?} for {used:?}");
        }

        /// Room that is left is found: whoever wants it, it is not with one that has none to give.
        #[test]
        fn a_listener_that_is_full_gets_room_while_there_is_more_than_one_for_each(
            total in 1..300_u32,
            parts in proptest::collection::vec(0..50_u32, 2..6),
        ) {
            let mut all: Vec<_> = parts.iter().map(|part| (*part / 2, Some(*part))).collect();
            for _ in 0..40 {
                let now = of(total, &all);
                all = all.iter().zip(&now).map(|((used, _), part)| (*used, Some(*part))).collect();
                all[0].0 = all[0].0.max(now[0].min(total));
            }
            let sum: u32 = all.iter().map(|(used, _)| used).sum();
            let idle = u32::try_from(all.len()).expect("a few");
            prop_assert!(sum + idle >= total, "{all:?}");
        }

        #[test]
        fn weights_are_in_proportion(
            servers in proptest::collection::vec((1..=1000_u32, 1..=256_u32), 1..8),
        ) {
            let weights = weights(&servers);
            prop_assert_eq!(weights.len(), servers.len());
            prop_assert!(weights.iter().all(|weight| (1..=1_000_000).contains(weight)));
        }

        #[test]
        fn never_panics(total: u32, all in proptest::collection::vec((any::<u32>(), any::<Option<u32>>()), 0..9)) {
            prop_assert_eq!(parts(Quota::Limited(total), &listeners(&all)).len(), all.len());
        }
    }
}
