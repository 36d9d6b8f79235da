//! What a node knows of an endpoint group at a time: what the kernel half chooses by.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use balancer_common::hash::mix;

use super::level::{Filled, level};
use super::others::History;
use super::{BELIEVED_FOR, EndpointPlan, GroupPlan, PublishedTotal};
use crate::quota::window::Window;

/// Publications that are older say nothing. At rest a node renews its own each 30 seconds.
const OLD: Duration = Duration::from_secs(40);
/// For how long an endpoint that has come up under the eyes of this node may be silent and is taken
/// for empty.
const NEW: Duration = Duration::from_secs(15);
/// Clients that have gone for longer are not expected back.
const COMES_BACK: Duration = Duration::from_secs(120);

/// What was there within this time may have been lost at once.
const LOST: Duration = Duration::from_secs(10);
/// Of fewer it can't be told: it is an ordinary day when a node loses its only client.
const FEW: u64 = 4;

/// What has come within this time may come again, before anything is heard of it.
const GROWS: Duration = Duration::from_secs(5);

/// Most nodes that are put into an order. More are far apart enough by their hashes alone.
const MOST_IN_ORDER: u32 = 10_000;

/// What the kernel half is told of an endpoint group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupKnowledge {
    /// `EndpointGroup::level`. 0: nothing is known of what other nodes have placed.
    pub level: u64,
    /// `EndpointGroup::start`: a fraction of 2³².
    pub start: u64,
    /// For how much longer the endpoints may be relied upon; `None`: for ever (no cluster).
    pub known_for: Option<Duration>,
    /// `EndpointGroup::lost_below`.
    pub lost_below: u64,
    /// `Published::others`, one for each endpoint of the plan. All 0 with level 0.
    pub others: Vec<u64>,
}

/// What a node remembers of an endpoint group from second to second.
///
/// Times are since some start that the caller keeps to.
#[derive(Clone, Debug)]
pub struct GroupMemory {
    /// When it was first asked.
    since: Option<Duration>,
    /// In the order of the last plan.
    endpoints: Vec<EndpointMemory>,
    /// The nodes that have not counted an endpoint of theirs, and when that was seen last: nobody
    /// counts a new one there either.
    uncounted: BTreeMap<String, Duration>,
    /// Connections of the whole group: the most of late, and all of the last seconds.
    most: Window,
    totals: History,
    /// The most connections of this node of late.
    most_own: Window,
}

/// What a node remembers of an endpoint.
#[derive(Clone, Debug)]
struct EndpointMemory {
    identity: Identity,
    /// When it was first in the plan.
    since: Duration,
    own: History,
}

/// What makes an endpoint the same as in the last plan.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    name: String,
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
    port: u16,
}

impl Identity {
    fn of(plan: &EndpointPlan) -> Self {
        Self {
            name: plan.name.clone(),
            v4: plan.v4,
            v6: plan.v6,
            port: plan.port,
        }
    }

    fn is_of(&self, plan: &EndpointPlan) -> bool {
        (self.v4, self.v6, self.port) == (plan.v4, plan.v6, plan.port) && self.name == plan.name
    }
}

/// What is known of an endpoint's load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    /// Connections of other nodes.
    Known(u64),
    /// It is new: there are none yet.
    New,
    /// Nobody says.
    Unknown,
}

impl Default for GroupMemory {
    fn default() -> Self {
        Self {
            since: None,
            endpoints: Vec::new(),
            uncounted: BTreeMap::new(),
            most: Window::new(COMES_BACK),
            totals: History::default(),
            most_own: Window::new(LOST),
        }
    }
}

impl GroupMemory {
    /// Takes what this node has now: established connections that it has placed, one number for
    /// each endpoint of the plan. The more often (up to five times a second), the better what
    /// others have is known; once a second does.
    pub fn note(&mut self, plan: &GroupPlan, own: &[u64], now: Duration) {
        self.follow(plan, now);
        for (memory, own) in self.endpoints.iter_mut().zip(own) {
            memory.own.note(now, *own);
        }
    }

    /// What the kernel half should be told now; to be asked each second. `own` as for
    /// [`GroupMemory::note`], which it does as well.
    pub fn know(&mut self, plan: &GroupPlan, own: &[u64], now: Duration) -> GroupKnowledge {
        self.note(plan, own, now);
        let known_for = plan.heard.map(|age| BELIEVED_FOR.saturating_sub(age));
        let start = start(plan);
        let lost_below = self.lost_below(own, now);
        let seen: Vec<Others> = plan
            .endpoints
            .iter()
            .zip(&self.endpoints)
            .map(|(plan, memory)| self.others(plan, memory, now))
            .collect();
        self.note_uncounted(plan, &seen, now);
        if !seen.iter().any(|others| matches!(others, Others::Known(_))) {
            return GroupKnowledge {
                level: 0,
                start,
                known_for,
                lost_below,
                others: vec![0; plan.endpoints.len()],
            };
        }
        let others = fill_in(plan, own, &seen);
        let filled: Vec<Filled> = plan
            .endpoints
            .iter()
            .zip(own.iter().zip(&others))
            .map(|(plan, (own, others))| Filled {
                connections: own.saturating_add(*others),
                weight: plan.weight,
            })
            .collect();
        let level = level(&filled, self.expected(&filled, plan.rank.1, now));
        GroupKnowledge {
            level,
            start,
            known_for,
            lost_below,
            others,
        }
    }

    /// A quarter of what this node had of late.
    fn lost_below(&mut self, own: &[u64], now: Duration) -> u64 {
        self.most_own.add(now, own.iter().sum());
        match self.most_own.peak(now) {
            Some((most, _)) if most >= FEW => most / 4,
            _ => 0,
        }
    }

    /// Connects that are still to come before anything is heard of them. One too few would send
    /// everybody to the same endpoint; too many only make the difference smaller that is made. So
    /// it is the most of:
    ///
    /// - the clients there were of late, less those there are;
    /// - as many as have come within the last seconds;
    /// - those of one endpoint, which may end at any time and whose clients come back before the
    ///   cluster has noticed. A few nodes see by themselves what comes: no more than two a node.
    fn expected(&mut self, filled: &[Filled], nodes: u32, now: Duration) -> u64 {
        let total = filled.iter().map(|one| one.connections);
        let total = total.fold(0, u64::saturating_add);
        self.most.add(now, total);
        self.totals.note(now, total);
        let missing = self.most.peak(now).map_or(0, |(most, _)| most - total);
        let growth = total.saturating_sub(self.totals.at(now.saturating_sub(GROWS)));
        let of_one = total.checked_div(filled.len() as u64).unwrap_or(0);
        missing
            .max(growth)
            .max(of_one.min(2 * u64::from(nodes)))
            .max(1)
    }

    fn others(&self, plan: &EndpointPlan, memory: &EndpointMemory, now: Duration) -> Others {
        let fresh = |published: &PublishedTotal| published.age <= OLD;
        if let Some(published) = plan.published.filter(fresh) {
            return Others::Known(memory.own.others(published, now));
        }
        let came_up_here = Some(memory.since) > self.since;
        let may_be_told = plan.published.is_none() && now < memory.since + NEW;
        let uncounted = (plan.node.as_ref()).is_some_and(|node| self.uncounted.contains_key(node));
        if came_up_here && may_be_told && !uncounted {
            return Others::New;
        }
        Others::Unknown
    }

    /// Notes which nodes count their endpoints. What is known of a node outlives a restart of its
    /// endpoint.
    fn note_uncounted(&mut self, plan: &GroupPlan, seen: &[Others], now: Duration) {
        let endpoints = plan.endpoints.iter().zip(&self.endpoints).zip(seen);
        for ((plan, memory), others) in endpoints {
            let Some(node) = &plan.node else { continue };
            match others {
                Others::Known(_) => {
                    self.uncounted.remove(node);
                }
                Others::Unknown if now >= memory.since + NEW => {
                    self.uncounted.insert(node.clone(), now);
                }
                Others::Unknown | Others::New => {}
            }
        }
        self.uncounted.retain(|_, seen| now < *seen + COMES_BACK);
    }

    /// Puts what is remembered into the order of the plan; what has gone is forgotten.
    fn follow(&mut self, plan: &GroupPlan, now: Duration) {
        self.since.get_or_insert(now);
        let same = |(memory, plan): (&EndpointMemory, _)| memory.identity.is_of(plan);
        let in_order = self.endpoints.iter().zip(&plan.endpoints).all(same);
        if in_order && self.endpoints.len() == plan.endpoints.len() {
            return;
        }
        let mut old = std::mem::take(&mut self.endpoints);
        let remembered = |plan: &EndpointPlan| {
            let index = old.iter().position(|memory| memory.identity.is_of(plan));
            index.map_or_else(
                || EndpointMemory {
                    identity: Identity::of(plan),
                    since: now,
                    own: History::default(),
                },
                |index| old.swap_remove(index),
            )
        };
        self.endpoints = plan.endpoints.iter().map(remembered).collect();
    }
}

/// What others have on each endpoint. One of which nobody says anything is taken to be as loaded
/// as the others are on average: it is neither sought nor avoided.
fn fill_in(plan: &GroupPlan, own: &[u64], seen: &[Others]) -> Vec<u64> {
    let (mut connections, mut weights) = (0_u64, 0_u64);
    for ((plan, own), others) in plan.endpoints.iter().zip(own).zip(seen) {
        if let Others::Known(others) = others {
            connections = own.saturating_add(*others).saturating_add(connections);
            weights += u64::from(plan.weight);
        }
    }
    let one = |((plan, own), others): ((&EndpointPlan, &u64), &Others)| match others {
        Others::Known(others) => *others,
        Others::New => 0,
        Others::Unknown => connections
            .saturating_mul(plan.weight.into())
            .checked_div(weights)
            .map_or(0, |average| average.saturating_sub(*own)),
    };
    plan.endpoints.iter().zip(own).zip(seen).map(one).collect()
}

/// Where this node's draws begin, as a fraction of 2³²: nodes are spread evenly, in an order that
/// all nodes with the same knowledge agree on.
///
/// New knowledge spreads them anew. Clients that have lost their endpoint are on nodes that had
/// drawn the same part of the circle; in the old order they would all draw one part again.
fn start(plan: &GroupPlan) -> u64 {
    let (rank, nodes) = (plan.rank.0, plan.rank.1.max(1));
    let knowledge = plan.endpoints.iter().map(|endpoint| {
        let name = endpoint.name.bytes();
        let name = name.fold(0, |hash, byte| mix(hash ^ u64::from(byte) ^ 0x100));
        let published = endpoint
            .published
            .map_or(0, |published| published.connections);
        mix(name ^ published)
    });
    // The order of the endpoints doesn't matter.
    let key = knowledge.fold(0, u64::wrapping_add);
    let place = |rank: u32| (mix(key ^ mix(u64::from(rank) + 1)), rank);
    let own = place(rank % nodes);
    if nodes > MOST_IN_ORDER {
        return own.0 >> 32;
    }
    let before = (0..nodes).filter(|rank| place(*rank) < own).count();
    ((before as u64) << 32) / u64::from(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use balancer_common::abi::EndpointGroup;

    const ONE: u64 = EndpointGroup::LOAD_ONE;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn endpoint(name: &str, published: Option<(u64, u64)>) -> EndpointPlan {
        EndpointPlan {
            name: name.to_owned(),
            v4: None,
            v6: None,
            port: 11800,
            node: Some(format!("node of {name}")),
            weight: 1,
            published: published.map(|(connections, age)| PublishedTotal {
                connections,
                age: s(age),
            }),
        }
    }

    fn group(endpoints: Vec<EndpointPlan>) -> GroupPlan {
        GroupPlan {
            name: "agents".to_owned(),
            frontends: Vec::new(),
            own_addresses: Vec::new(),
            endpoints,
            rank: (1, 4),
            heard: Some(s(1)),
        }
    }

    #[test]
    fn own_connections_count_once_and_those_of_others_as_published() {
        let mut memory = GroupMemory::default();
        let plan = group(vec![
            endpoint("a", Some((10, 2))),
            endpoint("b", Some((4, 2))),
        ]);
        for second in 0..=10 {
            memory.note(&plan, &[3, 4], s(second));
        }
        let known = memory.know(&plan, &[5, 4], s(12));
        assert_eq!(known.others, [7, 0], "those of second 10");
        assert_eq!(
            known.level,
            12 * ONE,
            "b gets eight: each node may have two to come"
        );
        assert_eq!(known.known_for, Some(s(59)));
    }

    #[test]
    fn most_is_lost_with_less_than_a_quarter_of_what_there_was_of_late() {
        let mut memory = GroupMemory::default();
        let plan = group(vec![endpoint("a", None), endpoint("b", None)]);
        let mut lost_below = |own: [u64; 2], at| memory.know(&plan, &own, s(at)).lost_below;
        assert_eq!(lost_below([2, 1], 1), 0, "too few to tell");
        assert_eq!(lost_below([30, 10], 2), 10);
        assert_eq!(lost_below([0, 0], 3), 10, "until it is known to others");
        assert_eq!(lost_below([2, 3], 30), 1);
    }

    #[test]
    fn clients_of_an_endpoint_that_has_gone_are_expected_back() {
        let mut memory = GroupMemory::default();
        let three = group(vec![
            endpoint("a", Some((100, 1))),
            endpoint("b", Some((100, 1))),
            endpoint("c", Some((100, 1))),
        ]);
        memory.know(&three, &[0; 3], s(0));
        let two = group(three.endpoints[1..].to_vec());
        let level = |memory: &mut GroupMemory, at| memory.know(&two, &[0; 2], s(at)).level;
        assert_eq!(level(&mut memory, 1), 150 * ONE);
        assert_eq!(level(&mut memory, 100), 150 * ONE);
        assert_eq!(level(&mut memory, 200), 104 * ONE, "not for ever");
    }

    #[test]
    fn without_a_fresh_publication_own_connections_are_spread_alone() {
        let mut memory = GroupMemory::default();
        let plan = group(vec![endpoint("a", Some((100, 41))), endpoint("b", None)]);
        let known = memory.know(&plan, &[7, 2], s(0));
        assert_eq!((known.level, known.others), (0, vec![0, 0]));
    }

    #[test]
    fn of_whom_nobody_speaks_is_average_and_who_is_new_is_empty() {
        let mut memory = GroupMemory::default();
        let mut plan = group(vec![
            endpoint("a", Some((100, 1))),
            endpoint("b", Some((60, 1))),
            endpoint("old", Some((9, 50))),
        ]);
        let known = memory.know(&plan, &[0, 0, 7], s(0));
        assert_eq!(known.others, [100, 60, 73]);
        plan.endpoints.insert(0, endpoint("new", None));
        let known = memory.know(&plan, &[0, 0, 0, 7], s(5));
        assert_eq!(known.others, [0, 100, 60, 73]);
        let known = memory.know(&plan, &[0, 0, 0, 7], s(20));
        assert_eq!(known.others, [80, 100, 60, 73], "it is silent");
    }

    #[test]
    fn who_is_new_on_a_node_that_counted_none_is_average() {
        let mut memory = GroupMemory::default();
        let mut plan = group(vec![endpoint("a", Some((100, 1))), endpoint("b", None)]);
        memory.know(&plan, &[0, 0], s(0));
        memory.know(&plan, &[0, 0], s(20));
        let restarted = |named: &str, node: &str| EndpointPlan {
            node: Some(format!("node of {node}")),
            ..endpoint(named, None)
        };
        plan.endpoints.remove(1);
        memory.know(&plan, &[0], s(21));
        plan.endpoints.push(restarted("c", "b"));
        plan.endpoints.push(restarted("d", "elsewhere"));
        let known = memory.know(&plan, &[0; 3], s(30));
        assert_eq!(known.others, [100, 100, 0]);
        // It has a daemon now.
        plan.endpoints[1] = EndpointPlan {
            node: Some("node of b".to_owned()),
            ..endpoint("c", Some((60, 1)))
        };
        memory.know(&plan, &[0; 3], s(31));
        plan.endpoints[1] = restarted("e", "b");
        let known = memory.know(&plan, &[0; 3], s(32));
        assert_eq!(known.others, [100, 0, 0]);
    }

    #[test]
    fn a_plan_in_another_order_finds_its_memories() {
        let mut memory = GroupMemory::default();
        let plan = group(vec![
            endpoint("a", Some((9, 1))),
            endpoint("b", Some((9, 1))),
        ]);
        memory.note(&plan, &[3, 5], s(0));
        let plan = group(vec![
            endpoint("b", Some((9, 2))),
            endpoint("a", Some((9, 2))),
        ]);
        let known = memory.know(&plan, &[6, 6], s(2));
        assert_eq!(known.others, [4, 6]);
    }

    #[test]
    fn nodes_begin_evenly_apart_and_in_another_order_with_new_knowledge() {
        let starts = |published: u64| -> Vec<u64> {
            let mut plan = group(vec![endpoint("a", Some((published, 1)))]);
            let start_of = |rank| {
                plan.rank = (rank, 16);
                start(&plan)
            };
            (0..16).map(start_of).collect()
        };
        let evenly: Vec<u64> = (0..16).map(|place| place << 28).collect();
        for published in [0, 1, 70] {
            let mut places = starts(published);
            assert_ne!(places, evenly);
            places.sort_unstable();
            assert_eq!(places, evenly);
        }
        assert_ne!(starts(1), starts(2));
        let mut plan = group(Vec::new());
        plan.rank = (0, 0);
        assert_eq!(start(&plan), 0);
        let far = [0, 1, 2].map(|rank| {
            plan.rank = (rank, u32::MAX);
            start(&plan)
        });
        assert!(far[0] != far[1] && far[1] != far[2]);
        assert!(far.iter().all(|start| *start < 1 << 32), "{far:?}");
    }

    #[test]
    fn every_order_of_the_endpoints_is_the_same_knowledge() {
        let (a, b) = (endpoint("a", Some((9, 1))), endpoint("b", Some((4, 2))));
        assert_eq!(
            start(&group(vec![a.clone(), b.clone()])),
            start(&group(vec![b, a]))
        );
    }

    #[test]
    fn as_many_are_expected_as_have_come_of_late_or_one_endpoint_has() {
        let mut memory = GroupMemory::default();
        let mut expected = |connections, nodes, at| {
            let one = Filled {
                connections,
                weight: 1,
            };
            memory.expected(&[one, one], nodes, s(at))
        };
        assert_eq!(expected(0, 100, 0), 1);
        assert_eq!(expected(50, 100, 4), 100, "they have just come");
        assert_eq!(expected(50, 100, 30), 50, "one endpoint's");
        assert_eq!(expected(50, 3, 30), 6, "a few nodes");
        assert_eq!(expected(0, 100, 31), 100, "they have gone");
    }

    #[test]
    fn an_empty_group_is_no_trouble() {
        let known = GroupMemory::default().know(&group(Vec::new()), &[], s(0));
        assert_eq!((known.level, known.others), (0, Vec::new()));
    }
}
