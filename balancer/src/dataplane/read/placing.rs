//! Placing as the maps show it: groups, their endpoints, and which one the next draw takes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use balancer_common::abi::{
    Address, Endpoint, EndpointGroup, EndpointGroupInfo, EndpointGroupState, EndpointInfo,
    Frontend, Placed, Published, ticks,
};
use balancer_common::place::PlaceReason;
use balancer_common::place::avoidance::{avoided_since, avoided_until, is_avoided};
use balancer_common::place::choice::{Draw, Seen, Sum};

use super::super::place_tables::{PlaceTables, every_endpoint, every_group, frontend_of};
use super::super::tables::{span_of, text};
use crate::place::GroupPlan;

/// What the maps hold of an endpoint group.
#[derive(Clone, Debug)]
pub struct GroupContents {
    /// Its index.
    pub index: u32,
    /// The element of `ENDPOINT_GROUP_INFO`.
    pub info: EndpointGroupInfo,
    /// The element of `ENDPOINT_GROUPS`.
    pub group: EndpointGroup,
    /// What the kernel half keeps of it.
    pub state: EndpointGroupState,
    /// The endpoints that may be chosen, a bit each.
    pub members: Vec<u64>,
    /// The frontends that lead to it, but for endpoints' own addresses.
    pub frontends: Vec<SocketAddr>,
    /// The endpoints' own addresses that do.
    pub own_addresses: Vec<SocketAddr>,
    /// A frontend is in dry-run.
    pub dry_run: bool,
    /// How often each reason was given.
    pub verdicts: Vec<(PlaceReason, u64)>,
}

/// What the maps hold of an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct EndpointContents {
    /// Its index.
    pub index: u32,
    /// The element of ENDPOINTS.
    pub endpoint: Endpoint,
    /// The element of `ENDPOINT_INFO`.
    pub info: EndpointInfo,
    /// The element of PLACED.
    pub placed: Placed,
    /// The element of PUBLISHED.
    pub published: Published,
}

/// What the maps hold of placing, as it stands there.
#[derive(Clone, Debug, Default)]
pub struct PlacingContents {
    /// The groups that have a name.
    pub groups: Vec<GroupContents>,
    /// The endpoints that are taken.
    pub endpoints: Vec<EndpointContents>,
}

/// An endpoint group.
#[derive(Clone, Debug)]
pub struct EndpointGroupSnapshot {
    /// Its name: that of the service, in a cluster with the Kubernetes Service's.
    pub name: String,
    /// What clients connect to, but for endpoints' own addresses.
    pub frontends: Vec<SocketAddr>,
    /// Endpoints' own addresses, where connects to these are placed as well.
    pub own_addresses: Vec<SocketAddr>,
    /// Whether destinations are left as they are, and it is only counted.
    pub dry_run: bool,
    /// This node's rank among those that place, from 0, and how many they are; `None`: nodes know
    /// nothing of each other.
    pub rank: Option<(u32, u32)>,
    /// For how much longer the endpoints may be relied upon: zero: not any more. `None`: for ever.
    pub known_for: Option<Duration>,
    /// Whether the kernel half goes by what other nodes have placed.
    pub knows_others: bool,
    /// Its endpoints, in the order in which the kernel half looks at them, then those that leave.
    pub endpoints: Vec<EndpointSnapshot>,
    /// How often each reason was given.
    pub verdicts: Vec<(PlaceReason, u64)>,
    /// How the kernel half chooses.
    pub group: EndpointGroup,
    /// The number of the next draw.
    pub draws: u64,
    /// Whether the node has lost most of its connections a moment ago.
    pub has_lost_most: bool,
}

/// An endpoint.
#[derive(Clone, Debug)]
pub struct EndpointSnapshot {
    /// Its index in the maps.
    pub index: u32,
    /// Its name: the pod's with its namespace, or the address.
    pub name: String,
    /// Its addresses with the port, IPv4 first.
    pub addresses: Vec<SocketAddr>,
    /// Its share beside the others'; 0: no new ones.
    pub weight: u64,
    /// It is removed: no new ones, and it stays until its last connection is gone.
    pub leaving: bool,
    /// Connections that this node has placed, in ESTABLISHED.
    pub established: u64,
    /// Connections that this node has placed, whose SYN is not answered yet.
    pub in_flight: u64,
    /// Connections that this node has ever placed.
    pub total: u64,
    /// Of these, those that failed before they were established, or whose SYN had to be sent again.
    pub failed: u64,
    /// Connections that others have placed, as far as is known.
    pub others: u64,
    /// What it was last said to have, those of every client, and how long ago that was counted.
    pub published: Option<(u64, Duration)>,
    /// It is avoided: since when, and for how much longer.
    pub avoided: Option<(Duration, Duration)>,
}

impl EndpointSnapshot {
    /// Why endpoints are avoided.
    pub const WHY_AVOIDED: &'static str = "a connect was refused, or not answered in time";

    /// Its load: connections by weight.
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    pub fn load(&self) -> f64 {
        self.seen().load() as f64 / EndpointGroup::LOAD_ONE as f64
    }

    /// Its address of a family.
    pub fn address(&self, is_ipv4: bool) -> Option<SocketAddr> {
        let mut addresses = self.addresses.iter();
        addresses.find(|one| one.is_ipv4() == is_ipv4).copied()
    }

    const fn seen(&self) -> Seen {
        Seen {
            own: self.established.saturating_add(self.in_flight),
            others: self.others,
            weight: self.weight,
            avoided: self.avoided.is_some(),
        }
    }
}

impl EndpointGroupSnapshot {
    /// Nothing leads to it any more, and connections of it are left.
    pub const fn is_removed(&self) -> bool {
        self.frontends.is_empty() && self.own_addresses.is_empty()
    }

    /// Whether connects to an address are placed in it.
    pub fn has_frontend(&self, at: &SocketAddr) -> bool {
        self.frontends.contains(at) || self.own_addresses.contains(at)
    }

    /// The load up to which endpoints should be filled by the connects still to come.
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    pub fn level(&self) -> f64 {
        self.group.level as f64 / EndpointGroup::LOAD_ONE as f64
    }

    /// The endpoints that the kernel half looks at for a connect of a family.
    pub fn candidates(&self, is_ipv4: bool) -> impl Iterator<Item = &EndpointSnapshot> {
        let fits = move |one: &&EndpointSnapshot| !one.leaving && one.address(is_ipv4).is_some();
        self.endpoints.iter().filter(fits)
    }

    /// Which endpoint the next draw takes, and why: the choice of the kernel half. `None`: none may
    /// be chosen.
    pub fn next(&self, is_ipv4: bool) -> (PlaceReason, Option<&EndpointSnapshot>) {
        let level = self.group.level;
        let mut sum = Sum::EMPTY;
        for endpoint in self.candidates(is_ipv4) {
            sum.add(level, &endpoint.seen());
        }
        let start = self.group.start;
        let mut draw = if self.has_lost_most {
            Draw::by_own(&sum, start, self.draws)
        } else {
            Draw::new(&sum, level, start, self.draws)
        };
        for endpoint in self.candidates(is_ipv4) {
            draw.look(endpoint.index, &endpoint.seen());
        }
        let chosen = draw.chosen();
        let chosen = self.endpoints.iter().find(|one| Some(one.index) == chosen);
        let reason = match chosen {
            None => PlaceReason::NoEndpoint,
            Some(_) if self.dry_run => PlaceReason::DryRun,
            Some(_) if sum.are_all_avoided() => PlaceReason::PlacedOnAvoided,
            Some(_) => PlaceReason::Placed,
        };
        (reason, chosen)
    }
}

/// Reads what the maps hold of placing.
pub fn contents(tables: &PlaceTables) -> Result<PlacingContents> {
    let mut frontends: BTreeMap<u32, Vec<(SocketAddr, u32)>> = BTreeMap::new();
    for (key, frontend) in tables.frontends()? {
        let of_group = frontends.entry(frontend.group).or_default();
        of_group.push((frontend_of(&key), frontend.flags));
    }
    let mut contents = PlacingContents::default();
    for index in every_group() {
        let info = tables.group_info(index)?;
        if info.name[0] == 0 {
            continue;
        }
        let mut frontends = frontends.remove(&index).unwrap_or_default();
        frontends.sort_unstable();
        let of = |is_own: bool| {
            let is_wanted =
                |one: &&(SocketAddr, u32)| (one.1 & Frontend::OWN_ADDRESS != 0) == is_own;
            frontends
                .iter()
                .filter(is_wanted)
                .map(|one| one.0)
                .collect()
        };
        contents.groups.push(GroupContents {
            index,
            info,
            group: tables.group(index),
            state: tables.group_state(index),
            members: tables.members(index).to_vec(),
            dry_run: frontends.iter().any(|one| one.1 & Frontend::DRY_RUN != 0),
            own_addresses: of(true),
            frontends: of(false),
            verdicts: tables.verdicts(index)?,
        });
    }
    for index in every_endpoint() {
        let endpoint = tables.endpoint(index);
        if endpoint.port != 0 {
            contents.endpoints.push(EndpointContents {
                index,
                endpoint,
                info: tables.endpoint_info(index)?,
                placed: tables.placed(index),
                published: tables.published(index),
            });
        }
    }
    Ok(contents)
}

/// Makes sense of what the maps hold, whatever that is; `now_ns` is of `CLOCK_MONOTONIC`.
pub fn groups(contents: &PlacingContents, now_ns: u64) -> Vec<EndpointGroupSnapshot> {
    let groups = contents.groups.iter();
    groups
        .map(|group| snapshot(group, contents, now_ns))
        .collect()
}

fn snapshot(
    group: &GroupContents,
    contents: &PlacingContents,
    now_ns: u64,
) -> EndpointGroupSnapshot {
    let has = |group: &GroupContents, index: u32| {
        let word = group.members.get(index as usize / 64);
        word.is_some_and(|word| word & (1 << (index % 64)) != 0)
    };
    let is_member = |one: &&EndpointContents| has(group, one.index);
    let of_any = |index| contents.groups.iter().any(|group| has(group, index));
    let all = contents.endpoints.iter();
    let chosen = all.clone().filter(is_member).map(|one| (one, false));
    let leaving = all.filter(|one| one.info.group == group.index && !of_any(one.index));
    let leaving = leaving.map(|one| (one, true));
    let endpoints = chosen.chain(leaving);
    let endpoints: Vec<_> = endpoints
        .map(|(one, leaving)| endpoint(one, leaving, now_ns))
        .collect();
    let mut sum = Sum::EMPTY;
    for one in endpoints.iter().filter(|one| !one.leaving) {
        sum.add(group.group.level, &one.seen());
    }
    let has_lost_most =
        sum.has_lost_most(group.group.lost_below) || now_ns < group.state.own_only_until_ns;
    let (rank, nodes) = (group.info.rank, group.info.nodes);
    EndpointGroupSnapshot {
        name: text(&group.info.name),
        frontends: group.frontends.clone(),
        own_addresses: group.own_addresses.clone(),
        dry_run: group.dry_run,
        rank: (nodes != GroupPlan::BY_LOT).then_some((rank, nodes)),
        known_for: (group.group.known_until_ns != u64::MAX)
            .then(|| Duration::from_nanos(group.group.known_until_ns.saturating_sub(now_ns))),
        knows_others: group.group.level != 0 && !has_lost_most,
        has_lost_most,
        endpoints,
        verdicts: group.verdicts.clone(),
        group: group.group,
        draws: group.state.draws,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "written from 16 bits")]
fn endpoint(contents: &EndpointContents, leaving: bool, now_ns: u64) -> EndpointSnapshot {
    let EndpointContents {
        index,
        endpoint,
        info,
        placed,
        published,
    } = contents;
    let now = ticks(now_ns);
    let address = |one: &Address| {
        (!one.is_any()).then(|| SocketAddr::new(IpAddr::from(*one), endpoint.port as u16))
    };
    let word = placed.avoidance;
    EndpointSnapshot {
        index: *index,
        name: text(&info.name),
        addresses: [&endpoint.v4, &endpoint.v6]
            .into_iter()
            .filter_map(address)
            .collect(),
        weight: endpoint.weight,
        leaving,
        established: Placed::count(placed.established),
        in_flight: Placed::count(placed.in_flight),
        total: placed.total,
        failed: placed.failed,
        others: published.others,
        published: (published.counted_ns != 0).then(|| {
            let age = now_ns.saturating_sub(published.counted_ns);
            (published.connections, Duration::from_nanos(age))
        }),
        avoided: is_avoided(word, now).then(|| {
            let since = now.saturating_sub(avoided_since(word));
            (span_of(since), span_of(avoided_until(word) - now))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use balancer_common::place::avoidance::after_failure;

    const NOW_NS: u64 = 1 << 50;

    fn group_of(level: u64, members: u64) -> GroupContents {
        let mut name = [0; 192];
        name[..6].copy_from_slice(b"agents");
        GroupContents {
            index: 2,
            info: EndpointGroupInfo {
                name,
                rank: 1,
                nodes: 4,
            },
            group: EndpointGroup {
                level,
                start: 0,
                known_until_ns: NOW_NS + 3_000_000_000,
                lost_below: 0,
            },
            state: EndpointGroupState::default(),
            members: vec![members],
            frontends: vec!["10.0.0.9:11800".parse().unwrap()],
            own_addresses: Vec::new(),
            dry_run: false,
            verdicts: Vec::new(),
        }
    }

    fn endpoint_of(index: u32, group: u32, placed: Placed, others: u64) -> EndpointContents {
        EndpointContents {
            index,
            endpoint: Endpoint {
                v4: Address::of_packet(format!("10.0.0.{index}").parse().unwrap()),
                v6: Address::ANY,
                port: 11800,
                generation: 1,
                weight: 1,
            },
            info: EndpointInfo {
                name: [b'e'; 128],
                group,
            },
            placed,
            published: Published {
                others,
                connections: others,
                counted_ns: u64::from(others != 0) * (NOW_NS - 2_000_000_000),
            },
        }
    }

    fn established(count: u64) -> Placed {
        Placed {
            established: count,
            ..Placed::default()
        }
    }

    #[test]
    fn the_next_draw_takes_whom_the_kernel_half_would() {
        let contents = PlacingContents {
            groups: vec![group_of(0, 0b1110)],
            endpoints: vec![
                endpoint_of(1, 2, established(3), 0),
                endpoint_of(2, 2, established(1), 0),
                endpoint_of(3, 2, established(2), 0),
                endpoint_of(9, 2, established(0), 0),
            ],
        };
        let group = &groups(&contents, NOW_NS)[0];
        let (reason, chosen) = group.next(true);
        assert_eq!(
            (reason, chosen.map(|one| one.index)),
            (PlaceReason::Placed, Some(2))
        );
        assert_eq!(group.next(false).0, PlaceReason::NoEndpoint);
        let leaving = group.endpoints.iter().find(|one| one.leaving);
        assert_eq!(leaving.map(|one| one.index), Some(9));
        assert_eq!(group.known_for, Some(Duration::from_secs(3)));
        assert_eq!(group.rank, Some((1, 4)));
    }

    #[test]
    fn by_the_level_others_count_too() {
        let contents = PlacingContents {
            groups: vec![group_of(10 * EndpointGroup::LOAD_ONE, 0b110)],
            endpoints: vec![
                endpoint_of(1, 2, established(0), 10),
                endpoint_of(2, 2, established(8), 1),
            ],
        };
        let group = &groups(&contents, NOW_NS)[0];
        assert_eq!(group.next(true).1.map(|one| one.index), Some(2));
        let published = group.endpoints[0].published;
        assert_eq!(published, Some((10, Duration::from_secs(2))));
        assert!((group.endpoints[1].load() - 9.0).abs() < 0.001);
    }

    #[test]
    fn who_is_avoided_says_since_when_and_for_how_long() {
        let before = ticks(NOW_NS - 200_000_000);
        let avoided = Placed {
            avoidance: after_failure(0, before),
            ..established(0)
        };
        let contents = PlacingContents {
            groups: vec![group_of(0, 0b10)],
            endpoints: vec![endpoint_of(1, 2, avoided, 0)],
        };
        let group = &groups(&contents, NOW_NS)[0];
        let (since, left) = group.endpoints[0].avoided.unwrap();
        assert!((190..210).contains(&since.as_millis()), "{since:?}");
        assert!((780..810).contains(&left.as_millis()), "{left:?}");
        assert_eq!(group.next(true).0, PlaceReason::PlacedOnAvoided);
    }

    #[test]
    fn whatever_the_maps_hold_it_is_shown() {
        let mut contents = PlacingContents {
            groups: vec![group_of(u64::MAX, u64::MAX)],
            endpoints: vec![endpoint_of(63, 7, established(u64::MAX), u64::MAX)],
        };
        contents.groups[0].group.known_until_ns = 0;
        contents.endpoints[0].placed.avoidance = u64::MAX;
        contents.endpoints[0].endpoint.weight = u64::MAX;
        let group = &groups(&contents, NOW_NS)[0];
        assert_eq!(group.known_for, Some(Duration::ZERO));
        assert_eq!(group.endpoints[0].established, 0);
        group.next(true);
    }
}
