//! The endpoints in the maps, what leads to them, and what is known of them.
//!
//! Readers in the kernel never see half of it. What goes is taken out first: frontends, then bits.
//! What comes is written from the other end: an endpoint before its bit, frontends last. An
//! endpoint that leaves keeps its element until no connection is counted on it any more.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{
    Address, Endpoint, EndpointGroup, EndpointGroupInfo, EndpointInfo, MAX_ENDPOINT_GROUPS,
    MAX_ENDPOINTS, MAX_MEMBERS, Placed, Published,
};

use super::frontends::Frontends;
use super::place_tables::{PlaceTables, every_endpoint, every_group};
use super::tables::{padded, text};
use crate::place::{EndpointPlan, GroupPlan, PlacePlan};

/// What left is given away only after so long: a connect that has just chosen it may still be on
/// its way through the kernel.
const QUARANTINE: Duration = Duration::from_secs(1);

/// Says nothing and is no group.
const NO_GROUP: EndpointGroup = EndpointGroup {
    level: 0,
    start: 0,
    known_until_ns: 0,
    lost_below: 0,
};

/// What makes an endpoint the same over reloads and restarts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Identity {
    /// As far as it fits into the map.
    name: String,
    v4: Address,
    v6: Address,
    port: u32,
}

impl Identity {
    fn of_plan(plan: &EndpointPlan) -> Self {
        Self {
            name: text(&padded::<NAME>(&plan.name)),
            v4: plan
                .v4
                .map_or(Address::ANY, |v4| Address::of_packet(v4.into())),
            v6: plan
                .v6
                .map_or(Address::ANY, |v6| Address::of_packet(v6.into())),
            port: plan.port.into(),
        }
    }

    fn of_map(endpoint: &Endpoint, info: &EndpointInfo) -> Self {
        Self {
            name: text(&info.name),
            v4: endpoint.v4,
            v6: endpoint.v6,
            port: endpoint.port,
        }
    }
}

/// Bytes of an endpoint's and of a group's name in the maps.
const NAME: usize = size_of::<EndpointInfo>() - size_of::<u32>();
const GROUP_NAME: usize = size_of::<EndpointGroupInfo>() - 2 * size_of::<u32>();

/// Where a group of the plan is in the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assigned {
    /// The index of the group; `None`: there is no room for it.
    pub group: Option<u32>,
    /// The index of each endpoint, in the order of the plan; `None`: there is no room for it.
    pub endpoints: Vec<Option<u32>>,
}

/// What the kernel half should know of a group beside its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// How to choose.
    pub group: EndpointGroup,
    /// What others have placed, for each endpoint in the order of the plan.
    pub published: Vec<Published>,
}

/// An element that is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Taken {
    identity: Identity,
    /// The group that it is of, or was last.
    group: u32,
}

/// The daemon's view of the endpoints in the maps.
#[derive(Debug, Default)]
pub struct Endpoints {
    /// What leads to them, and whose connects are left alone.
    frontends: Frontends,
    /// The names of the groups that there are.
    groups: BTreeMap<u32, String>,
    /// When groups that have left left.
    groups_left: BTreeMap<u32, Instant>,
    /// The elements that are taken.
    taken: BTreeMap<u32, Taken>,
    /// Since when endpoints that no group has have had no connection.
    empty: BTreeMap<u32, Instant>,
    /// What there is no room for, in words.
    left_out: Vec<String>,
}

impl Endpoints {
    /// What an earlier daemon has left in the maps.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn adopt(tables: &PlaceTables) -> Result<Self> {
        let mut adopted = Self {
            frontends: Frontends::adopt(tables)?,
            ..Self::default()
        };
        for group in every_group() {
            let name = text(&tables.group_info(group)?.name);
            if !name.is_empty() {
                adopted.groups.insert(group, name);
            }
        }
        for index in every_endpoint() {
            let endpoint = tables.endpoint(index);
            if endpoint.port != 0 {
                let info = tables.endpoint_info(index)?;
                let identity = Identity::of_map(&endpoint, &info);
                let group = info.group;
                adopted.taken.insert(index, Taken { identity, group });
            }
        }
        Ok(adopted)
    }

    /// What there was no room for at the last [`Endpoints::assign`], in words.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Whether nothing leads anywhere and nothing is counted.
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.groups.is_empty() && self.taken.is_empty()
    }

    /// Takes out what the plan does not have, and finds an element for what it has. Nothing new is
    /// chosen before [`Endpoints::put_in_force`].
    ///
    /// # Errors
    /// When a map can't be changed.
    pub fn assign(&mut self, tables: &mut PlaceTables, plan: &PlacePlan) -> Result<Vec<Assigned>> {
        self.left_out.clear();
        let groups = self.assign_groups(&plan.groups);
        self.left_out.extend(self.frontends.want(plan, &groups));
        self.frontends.remove_others(tables)?;
        self.free(tables)?;
        let assigned = self.assign_endpoints(&plan.groups, groups);
        self.leave(tables, &assigned);
        self.follow_groups(tables, &assigned)?;
        Ok(assigned)
    }

    /// Lets the kernel half choose by the plan. `known` is for each group, in the order of the
    /// plan.
    ///
    /// # Errors
    /// When a map can't be changed.
    pub fn put_in_force(
        &mut self,
        tables: &mut PlaceTables,
        plan: &PlacePlan,
        assigned: &[Assigned],
        known: &[Known],
    ) -> Result<()> {
        let left_out = self.frontends.exclude(tables, &plan.excluded_netns)?;
        self.left_out.extend(left_out);
        for ((plan, assigned), known) in plan.groups.iter().zip(assigned).zip(known) {
            self.write_group(tables, plan, assigned, known)?;
        }
        self.frontends.add(tables)
    }

    /// A group keeps its index by its name.
    fn assign_groups(&mut self, plans: &[GroupPlan]) -> Vec<Option<u32>> {
        self.groups_left
            .retain(|_, left| left.elapsed() < QUARANTINE);
        let mut indexes: HashMap<String, u32> = HashMap::new();
        for (index, name) in &self.groups {
            indexes.insert(name.clone(), *index);
        }
        let wanted: Vec<String> = plans.iter().map(group_name).collect();
        let mut used: BTreeSet<u32> = self.groups_left.keys().copied().collect();
        used.extend(self.groups.keys());
        let mut seen = BTreeSet::new();
        let mut assign = |name: &String| {
            if !seen.insert(name.clone()) {
                return None;
            }
            let index = indexes.get(name).copied();
            let index = index.or_else(|| every_group().find(|index| !used.contains(index)))?;
            used.insert(index);
            Some(index)
        };
        let assigned: Vec<_> = wanted.iter().map(&mut assign).collect();
        for (plan, _) in plans.iter().zip(&assigned).filter(|(_, at)| at.is_none()) {
            self.left_out.push(format!(
                "there is no room for the endpoint group `{}`: a node has at most \
                 {MAX_ENDPOINT_GROUPS} groups, each with a name of its own",
                plan.name
            ));
        }
        assigned
    }

    /// An endpoint keeps its element by its name, its addresses and its port.
    fn assign_endpoints(&mut self, plans: &[GroupPlan], groups: Vec<Option<u32>>) -> Vec<Assigned> {
        let by_identity = self.taken.iter();
        let mut indexes: HashMap<Identity, u32> = by_identity
            .map(|(index, taken)| (taken.identity.clone(), *index))
            .collect();
        let mut free = every_endpoint().filter(|index| !self.taken.contains_key(index));
        let mut assigned = Vec::new();
        let mut left_out = Vec::new();
        for (plan, group) in plans.iter().zip(groups) {
            let mut members = HashSet::new();
            let mut assign = |endpoint: &EndpointPlan| {
                let identity = Identity::of_plan(endpoint);
                let known = indexes.get(&identity).copied();
                if !members.contains(&identity) && members.len() == MAX_MEMBERS {
                    return None;
                }
                members.insert(identity.clone());
                let index = known.or_else(|| free.next())?;
                indexes.insert(identity, index);
                Some(index)
            };
            let endpoints: Vec<_> = match group {
                Some(_) => plan.endpoints.iter().map(&mut assign).collect(),
                None => vec![None; plan.endpoints.len()],
            };
            let without = endpoints.iter().filter(|index| index.is_none()).count();
            if group.is_some() && without > 0 {
                left_out.push(format!(
                    "there is no room for {without} endpoints of `{}`: a group has at most \
                     {MAX_MEMBERS}, a node {MAX_ENDPOINTS}, and those that were removed keep their \
                     place until their last connection is gone. The others take the connections",
                    plan.name
                ));
            }
            assigned.push(Assigned { group, endpoints });
        }
        self.left_out.extend(left_out);
        assigned
    }

    /// Takes the bits away of what is not in the plan.
    fn leave(&self, tables: &PlaceTables, assigned: &[Assigned]) {
        for group in self.groups.keys() {
            let here = assigned.iter().find(|one| one.group == Some(*group));
            let wanted: BTreeSet<u32> = here
                .into_iter()
                .flat_map(|one| one.endpoints.iter().flatten().copied())
                .collect();
            for index in self.taken.keys().filter(|one| !wanted.contains(one)) {
                tables.leave(*group, *index);
            }
            if here.is_none() {
                tables.set_group(*group, NO_GROUP);
            }
        }
    }

    /// Notes which group an endpoint is of, and gives up groups that are not in the plan, once the
    /// last of their endpoints is freed.
    fn follow_groups(&mut self, tables: &mut PlaceTables, assigned: &[Assigned]) -> Result<()> {
        let mut groups_of: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for one in assigned {
            for index in one.endpoints.iter().flatten() {
                groups_of.entry(*index).or_default().extend(one.group);
            }
        }
        for (index, taken) in &mut self.taken {
            let groups = groups_of.get(index).map_or(&[][..], Vec::as_slice);
            if let Some(first) = groups.first()
                && !groups.contains(&taken.group)
            {
                taken.group = *first;
                let info = endpoint_info(&taken.identity.name, *first);
                tables.set_endpoint_info(*index, info)?;
            }
        }
        let mut kept: BTreeSet<u32> = self.taken.values().map(|taken| taken.group).collect();
        kept.extend(assigned.iter().filter_map(|one| one.group));
        let gone: Vec<u32> = self
            .groups
            .keys()
            .filter(|group| !kept.contains(group))
            .copied()
            .collect();
        for group in gone {
            tables.set_group_info(group, group_info("", (0, 0)))?;
            self.groups.remove(&group);
            self.groups_left.insert(group, Instant::now());
        }
        Ok(())
    }

    /// Frees the elements of endpoints that no group has and no connection is counted on.
    fn free(&mut self, tables: &mut PlaceTables) -> Result<()> {
        let mut members = BTreeSet::new();
        for group in self.groups.keys() {
            members.extend(indexes_of(&tables.members(*group)));
        }
        let now = Instant::now();
        let all: Vec<u32> = self.taken.keys().copied().collect();
        for index in all {
            let placed = tables.placed(index);
            let has_any = Placed::count(placed.established) + Placed::count(placed.in_flight) > 0;
            if members.contains(&index) || has_any {
                self.empty.remove(&index);
                continue;
            }
            let since = *self.empty.entry(index).or_insert(now);
            if now.duration_since(since) >= QUARANTINE {
                self.free_one(tables, index)?;
            }
        }
        Ok(())
    }

    fn free_one(&mut self, tables: &mut PlaceTables, index: u32) -> Result<()> {
        let generation = tables.endpoint(index).generation.wrapping_add(1);
        tables.set_endpoint(index, &free_endpoint(generation));
        tables.forget_placed(index);
        tables.set_published(index, Published::default());
        tables.set_endpoint_info(index, endpoint_info("", 0))?;
        self.taken.remove(&index);
        self.empty.remove(&index);
        Ok(())
    }

    fn write_group(
        &mut self,
        tables: &mut PlaceTables,
        plan: &GroupPlan,
        assigned: &Assigned,
        known: &Known,
    ) -> Result<()> {
        let Some(group) = assigned.group else {
            return Ok(());
        };
        let info = group_info(&plan.name, plan.rank);
        if !self.groups.contains_key(&group) {
            tables.forget_verdicts(group)?;
        }
        if tables.group_info(group)? != info {
            tables.set_group_info(group, info)?;
            self.groups.insert(group, text(&info.name));
        }
        let endpoints = plan.endpoints.iter().zip(&assigned.endpoints);
        for ((plan, index), published) in endpoints.zip(&known.published) {
            if let Some(index) = *index {
                self.write_endpoint(tables, plan, group, index, *published)?;
            }
        }
        tables.set_group(group, known.group);
        for index in assigned.endpoints.iter().flatten() {
            tables.join(group, *index);
        }
        Ok(())
    }

    fn write_endpoint(
        &mut self,
        tables: &mut PlaceTables,
        plan: &EndpointPlan,
        group: u32,
        index: u32,
        published: Published,
    ) -> Result<()> {
        tables.set_published(index, published);
        if self.taken.contains_key(&index) {
            tables.set_weight(index, plan.weight);
            return Ok(());
        }
        let identity = Identity::of_plan(plan);
        tables.forget_placed(index);
        tables.set_endpoint_info(index, endpoint_info(&plan.name, group))?;
        tables.set_endpoint(
            index,
            &Endpoint {
                v4: identity.v4,
                v6: identity.v6,
                port: identity.port,
                generation: tables.endpoint(index).generation,
                weight: plan.weight.into(),
            },
        );
        self.taken.insert(index, Taken { identity, group });
        Ok(())
    }
}

fn group_name(plan: &GroupPlan) -> String {
    text(&padded::<GROUP_NAME>(&plan.name))
}

fn group_info(name: &str, (rank, nodes): (u32, u32)) -> EndpointGroupInfo {
    EndpointGroupInfo {
        name: padded(name),
        rank,
        nodes,
    }
}

fn endpoint_info(name: &str, group: u32) -> EndpointInfo {
    EndpointInfo {
        name: padded(name),
        group,
    }
}

const fn free_endpoint(generation: u32) -> Endpoint {
    Endpoint {
        v4: Address::ANY,
        v6: Address::ANY,
        port: 0,
        generation,
        weight: 0,
    }
}

/// The indexes whose bits are set.
fn indexes_of(words: &[u64]) -> impl Iterator<Item = u32> {
    words.iter().zip(0..).flat_map(|(word, at): (_, u32)| {
        (0..64)
            .filter(move |bit| word & (1 << bit) != 0)
            .map(move |bit| at * 64 + bit)
    })
}
