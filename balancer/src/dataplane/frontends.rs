//! What leads to the endpoint groups in the maps, and whose connects are left alone.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::Result;
use balancer_common::abi::{Excluded, Frontend, FrontendKey, MAX_EXCLUDED_NETNS, MAX_FRONTENDS};

use super::place_tables::{PlaceTables, frontend_key};
use crate::place::{GroupPlan, PlacePlan};

/// The daemon's view of FRONTENDS and `EXCLUDED_NETNS`.
#[derive(Debug, Default)]
pub(super) struct Frontends {
    /// What FRONTENDS holds.
    there: BTreeMap<FrontendKey, Frontend>,
    /// What FRONTENDS should hold.
    wanted: BTreeMap<FrontendKey, Frontend>,
    /// What `EXCLUDED_NETNS` holds.
    excluded: BTreeMap<u64, Excluded>,
}

impl Frontends {
    /// What an earlier daemon has left in the maps.
    ///
    /// # Errors
    /// When a map can't be read.
    pub(super) fn adopt(tables: &PlaceTables) -> Result<Self> {
        Ok(Self {
            there: tables.frontends()?,
            wanted: BTreeMap::new(),
            excluded: tables.excluded()?,
        })
    }

    /// Whether nothing leads anywhere.
    pub(super) fn is_empty(&self) -> bool {
        self.there.is_empty()
    }

    /// Works out what FRONTENDS should hold, as far as it fits; returns in words what does not.
    /// `groups` are the indexes of the plan's groups. What clients connect to comes before own
    /// addresses of endpoints, which are many.
    pub(super) fn want(&mut self, plan: &PlacePlan, groups: &[Option<u32>]) -> Vec<String> {
        let dry_run = if plan.dry_run { Frontend::DRY_RUN } else { 0 };
        let placed = || {
            let groups = plan.groups.iter().zip(groups);
            groups.filter_map(|(plan, group)| Some((plan, (*group)?)))
        };
        let mut wanted = Wanted::default();
        for (plan, group) in placed() {
            wanted.add_frontends(plan, group, dry_run);
        }
        for (plan, group) in placed() {
            wanted.add_own_addresses(plan, group, dry_run | Frontend::OWN_ADDRESS);
        }
        self.wanted = wanted.frontends;
        wanted.left_out
    }

    /// Frontends that are to lead nowhere, or to another group, lead nowhere from here on.
    ///
    /// # Errors
    /// When FRONTENDS can't be changed.
    pub(super) fn remove_others(&mut self, tables: &mut PlaceTables) -> Result<()> {
        let gone: Vec<_> = self
            .there
            .iter()
            .filter(|(key, frontend)| self.wanted.get(key) != Some(frontend))
            .map(|(key, _)| *key)
            .collect();
        for key in gone {
            tables.remove_frontend(&key)?;
            self.there.remove(&key);
        }
        Ok(())
    }

    /// Frontends that are wanted lead to their groups from here on.
    ///
    /// # Errors
    /// When FRONTENDS can't be changed.
    pub(super) fn add(&mut self, tables: &mut PlaceTables) -> Result<()> {
        for (key, frontend) in &self.wanted {
            if self.there.get(key) != Some(frontend) {
                tables.set_frontend(*key, *frontend)?;
                self.there.insert(*key, *frontend);
            }
        }
        Ok(())
    }

    /// Leaves the connects of the plan's netns alone, and of no others; returns in words what there
    /// is no room for.
    ///
    /// # Errors
    /// When `EXCLUDED_NETNS` can't be changed.
    pub(super) fn exclude(
        &mut self,
        tables: &mut PlaceTables,
        plan: &BTreeMap<u64, Excluded>,
    ) -> Result<Option<String>> {
        let (wanted, left_out) = excluded(plan);
        let gone: Vec<u64> = self.excluded.keys().copied().collect();
        for netns in gone.iter().filter(|netns| !wanted.contains_key(netns)) {
            tables.include(*netns)?;
            self.excluded.remove(netns);
        }
        for (netns, excluded) in wanted {
            if self.excluded.get(&netns) != Some(&excluded) {
                tables.exclude(netns, excluded)?;
                self.excluded.insert(netns, excluded);
            }
        }
        Ok(left_out)
    }
}

/// What FRONTENDS should hold, and what does not fit, in words.
#[derive(Debug, Default)]
struct Wanted<'a> {
    frontends: BTreeMap<FrontendKey, Frontend>,
    owners: BTreeMap<FrontendKey, &'a str>,
    left_out: Vec<String>,
}

impl<'a> Wanted<'a> {
    fn add_frontends(&mut self, plan: &'a GroupPlan, group: u32, flags: u32) {
        let mut without = 0;
        for address in &plan.frontends {
            let key = frontend_key(*address);
            match self.owners.get(&key) {
                Some(first) if *first != plan.name => {
                    self.left_out.push(twice(*address, first, &plan.name));
                }
                Some(_) => {}
                None => without += usize::from(!self.add(key, plan, Frontend { group, flags })),
            }
        }
        self.note(without, "frontends", plan);
    }

    /// Several groups may have an endpoint: what leads to one already goes on to do so.
    fn add_own_addresses(&mut self, plan: &'a GroupPlan, group: u32, flags: u32) {
        let mut without = 0;
        for address in &plan.own_addresses {
            let key = frontend_key(*address);
            if !self.owners.contains_key(&key) {
                without += usize::from(!self.add(key, plan, Frontend { group, flags }));
            }
        }
        self.note(without, "endpoints' own addresses", plan);
    }

    /// False where there is no room.
    fn add(&mut self, key: FrontendKey, plan: &'a GroupPlan, frontend: Frontend) -> bool {
        let has_room = self.frontends.len() < MAX_FRONTENDS;
        if has_room {
            self.owners.insert(key, &plan.name);
            self.frontends.insert(key, frontend);
        }
        has_room
    }

    fn note(&mut self, without: usize, what: &str, plan: &GroupPlan) {
        if without > 0 {
            self.left_out.push(format!(
                "there is no room for {without} {what} of `{}`: a node has at most \
                 {MAX_FRONTENDS} frontends. Connects to these are left as they are",
                plan.name
            ));
        }
    }
}

fn twice(frontend: SocketAddr, first: &str, second: &str) -> String {
    format!(
        "`{first}` and `{second}` have the frontend {frontend} both: connects to it go to an \
         endpoint of `{first}`"
    )
}

/// As many of them as fit, those first that are left alone at own addresses: servers that would
/// miss each other otherwise.
fn excluded(plan: &BTreeMap<u64, Excluded>) -> (BTreeMap<u64, Excluded>, Option<String>) {
    let of = |wanted: Excluded| {
        plan.iter()
            .filter(move |(_, excluded)| **excluded == wanted)
    };
    let all = of(Excluded::OwnAddresses).chain(of(Excluded::Everywhere));
    let fitting = all.take(MAX_EXCLUDED_NETNS);
    let fitting = fitting
        .map(|(netns, excluded)| (*netns, *excluded))
        .collect();
    let without = plan.len().saturating_sub(MAX_EXCLUDED_NETNS);
    let left_out = (without > 0).then(|| {
        format!(
            "there is no room for {without} pods whose connects are to be left alone: a node has at \
             most {MAX_EXCLUDED_NETNS}. Their connects are placed"
        )
    });
    (fitting, left_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, frontends: &[&str], own_addresses: &[&str]) -> GroupPlan {
        let parse = |all: &[&str]| all.iter().map(|one| one.parse().unwrap()).collect();
        GroupPlan {
            name: name.to_owned(),
            frontends: parse(frontends),
            own_addresses: parse(own_addresses),
            endpoints: Vec::new(),
            rank: (0, 1),
            heard: None,
        }
    }

    fn many(first: &str, number: usize) -> Vec<SocketAddr> {
        let first: std::net::Ipv4Addr = first.parse().unwrap();
        let address = |n| std::net::Ipv4Addr::from(u32::from(first) + n);
        let numbers = 0..u32::try_from(number).unwrap();
        numbers.map(|n| (address(n), 11800).into()).collect()
    }

    fn wanted(groups: Vec<GroupPlan>) -> (BTreeMap<SocketAddr, (u32, u32)>, Vec<String>) {
        let indexes: Vec<_> = (0..).take(groups.len()).map(Some).collect();
        let plan = PlacePlan {
            groups,
            ..PlacePlan::default()
        };
        let mut frontends = Frontends::default();
        let left_out = frontends.want(&plan, &indexes);
        let wanted = frontends.wanted.into_iter().map(|(key, frontend)| {
            let at = super::super::place_tables::frontend_of(&key);
            (at, (frontend.group, frontend.flags))
        });
        (wanted.collect(), left_out)
    }

    #[test]
    fn an_own_address_belongs_to_the_first_group_and_never_in_the_place_of_a_frontend() {
        let (own, at) = ("10.244.1.7:11800", "10.96.0.7:11800");
        let groups = vec![
            group("a", &[], &[own, at]),
            group("b", &[at], &[own]),
            group("c", &[at], &[]),
        ];
        let (wanted, left_out) = wanted(groups);
        let expected = [
            (own.parse().unwrap(), (0, Frontend::OWN_ADDRESS)),
            (at.parse().unwrap(), (1, 0)),
        ];
        assert_eq!(wanted, expected.into());
        assert_eq!(left_out.len(), 1, "{left_out:?}");
        assert!(left_out[0].contains("`b` and `c` have the frontend 10.96.0.7:11800"));
    }

    #[test]
    fn a_group_without_a_place_in_the_maps_has_no_frontends() {
        let plan = PlacePlan {
            groups: vec![group("a", &["10.96.0.7:11800"], &["10.244.1.7:11800"])],
            ..PlacePlan::default()
        };
        let mut frontends = Frontends::default();
        assert_eq!(frontends.want(&plan, &[None]), Vec::<String>::new());
        assert!(frontends.wanted.is_empty());
    }

    #[test]
    fn where_there_is_no_room_for_all_own_addresses_are_left_out_first() {
        let full = GroupPlan {
            own_addresses: many("10.1.0.0", MAX_FRONTENDS + 1),
            ..group("full", &[], &[])
        };
        let late = GroupPlan {
            frontends: many("10.2.0.0", 3),
            ..group("late", &[], &[])
        };
        let (wanted, left_out) = wanted(vec![full, late]);
        assert_eq!(wanted.len(), MAX_FRONTENDS);
        assert_eq!(wanted.values().filter(|(group, _)| *group == 1).count(), 3);
        assert_eq!(left_out.len(), 1, "{left_out:?}");
        let words = "no room for 4 endpoints' own addresses of `full`";
        assert!(left_out[0].contains(words), "{left_out:?}");
    }

    #[test]
    fn servers_that_mean_each_other_come_before_pods_that_are_annotated() {
        let most = MAX_EXCLUDED_NETNS as u64;
        let mut plan: BTreeMap<u64, Excluded> = (0..most)
            .map(|netns| (netns, Excluded::Everywhere))
            .collect();
        assert_eq!(excluded(&plan), (plan.clone(), None));
        plan.insert(most, Excluded::OwnAddresses);
        let (fitting, left_out) = excluded(&plan);
        assert_eq!(fitting.len(), MAX_EXCLUDED_NETNS);
        assert_eq!(fitting.get(&most), Some(&Excluded::OwnAddresses));
        assert!(left_out.unwrap().contains("no room for 1 pods"));
    }
}
