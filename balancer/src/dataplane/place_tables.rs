//! The pinned maps of placing, opened and typed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use balancer_common::abi::{
    Address, Endpoint, EndpointGroup, EndpointGroupInfo, EndpointGroupState, EndpointInfo,
    Excluded, Frontend, FrontendKey, MAX_ENDPOINT_GROUPS, MAX_ENDPOINTS, MEMBER_WORDS,
    PLACE_REASON_SLOTS, Placed, Published, maps,
};
use balancer_common::place::PlaceReason;
use bytes::Buf as _;

use super::plain::Plain;
use super::tables::{read, shared, sum_of_cpus, typed, word, write, zero_on_cpus};
use crate::sys::shared::SharedArray;

/// The maps of placing of one data plane.
pub struct PlaceTables {
    frontends: HashMap<MapData, Plain<FrontendKey>, Plain<Frontend>>,
    excluded: HashMap<MapData, u64, u32>,
    group_info: Array<MapData, Plain<EndpointGroupInfo>>,
    endpoint_info: Array<MapData, Plain<EndpointInfo>>,
    verdicts: PerCpuArray<MapData, u64>,
    groups: SharedArray,
    group_states: SharedArray,
    members: SharedArray,
    endpoints: SharedArray,
    placed: SharedArray,
    published: SharedArray,
}

/// The indexes of all endpoints.
#[expect(clippy::cast_possible_truncation, reason = "a constant far below 4 Gi")]
pub fn every_endpoint() -> impl Iterator<Item = u32> {
    0..MAX_ENDPOINTS as u32
}

/// The indexes of all endpoint groups.
#[expect(clippy::cast_possible_truncation, reason = "a constant far below 4 Gi")]
pub fn every_group() -> impl Iterator<Item = u32> {
    0..MAX_ENDPOINT_GROUPS as u32
}

/// The key of a frontend.
pub fn frontend_key(address: SocketAddr) -> FrontendKey {
    FrontendKey::new(address.ip().into(), address.port())
}

/// The frontend of a key.
#[expect(clippy::cast_possible_truncation, reason = "written from 16 bits")]
pub fn frontend_of(key: &FrontendKey) -> SocketAddr {
    SocketAddr::new(key.address.into(), key.port as u16)
}

impl PlaceTables {
    /// Opens the pins of a directory.
    pub fn open(directory: &Path) -> Result<Self> {
        Ok(Self {
            frontends: typed(directory, "FRONTENDS", Map::HashMap)?,
            excluded: typed(directory, "EXCLUDED_NETNS", Map::HashMap)?,
            group_info: typed(directory, "ENDPOINT_GROUP_INFO", Map::Array)?,
            endpoint_info: typed(directory, "ENDPOINT_INFO", Map::Array)?,
            verdicts: typed(directory, "PLACE_VERDICTS", Map::PerCpuArray)?,
            groups: shared(directory, "ENDPOINT_GROUPS", maps::ENDPOINT_GROUPS)?,
            group_states: shared(
                directory,
                "ENDPOINT_GROUP_STATE",
                maps::ENDPOINT_GROUP_STATE,
            )?,
            members: shared(directory, "ENDPOINT_MEMBERS", maps::ENDPOINT_MEMBERS)?,
            endpoints: shared(directory, "ENDPOINTS", maps::ENDPOINTS)?,
            placed: shared(directory, "PLACED", maps::PLACED)?,
            published: shared(directory, "PUBLISHED", maps::PUBLISHED)?,
        })
    }

    /// The frontends, and where they lead.
    pub fn frontends(&self) -> Result<BTreeMap<FrontendKey, Frontend>> {
        let entries = self.frontends.iter();
        let entries = entries.map(|entry| entry.map(|(key, value)| (key.0, value.0)));
        let entries = entries.collect::<Result<_, _>>();
        entries.context("cannot read FRONTENDS")
    }

    /// Adds a frontend, or leads it elsewhere.
    pub fn set_frontend(&mut self, key: FrontendKey, frontend: Frontend) -> Result<()> {
        let set = self.frontends.insert(Plain(key), Plain(frontend), 0);
        set.with_context(|| format!("cannot add the frontend {}", frontend_of(&key)))
    }

    /// Removes a frontend.
    pub fn remove_frontend(&mut self, key: &FrontendKey) -> Result<()> {
        match self.frontends.remove(&Plain(*key)) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error)
                .with_context(|| format!("cannot remove the frontend {}", frontend_of(key))),
        }
    }

    /// The cookies of the netns that have connects which are left alone, and which.
    pub fn excluded(&self) -> Result<BTreeMap<u64, Excluded>> {
        let entries = self.excluded.iter();
        let entries = entries
            .map(|entry| entry.map(|(netns, value)| (netns, Excluded::from_number(value))))
            .collect::<Result<_, _>>();
        entries.context("cannot read EXCLUDED_NETNS")
    }

    /// Leaves connects of a netns alone.
    pub fn exclude(&mut self, netns: u64, excluded: Excluded) -> Result<()> {
        let set = self.excluded.insert(netns, excluded as u32, 0);
        set.context("cannot write EXCLUDED_NETNS (is it full?)")
    }

    /// Places all connects of a netns again.
    pub fn include(&mut self, netns: u64) -> Result<()> {
        match self.excluded.remove(&netns) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error).context("cannot write EXCLUDED_NETNS"),
        }
    }

    /// What user space knows of a group; its name is empty where there is no such group.
    pub fn group_info(&self, group: u32) -> Result<EndpointGroupInfo> {
        let info = self.group_info.get(&group, 0);
        Ok(info.context("cannot read ENDPOINT_GROUP_INFO")?.0)
    }

    /// Says what user space knows of a group.
    pub fn set_group_info(&mut self, group: u32, info: EndpointGroupInfo) -> Result<()> {
        let set = self.group_info.set(group, Plain(info), 0);
        set.context("cannot write ENDPOINT_GROUP_INFO")
    }

    /// What user space knows of an endpoint.
    pub fn endpoint_info(&self, endpoint: u32) -> Result<EndpointInfo> {
        let info = self.endpoint_info.get(&endpoint, 0);
        Ok(info.context("cannot read ENDPOINT_INFO")?.0)
    }

    /// Says what user space knows of an endpoint.
    pub fn set_endpoint_info(&mut self, endpoint: u32, info: EndpointInfo) -> Result<()> {
        let set = self.endpoint_info.set(endpoint, Plain(info), 0);
        set.context("cannot write ENDPOINT_INFO")
    }

    /// How to choose in a group.
    pub fn group(&self, group: u32) -> EndpointGroup {
        read!(
            self.groups,
            group,
            EndpointGroup {
                level,
                start,
                known_until_ns,
                lost_below
            }
        )
    }

    /// Says how to choose in a group.
    pub fn set_group(&self, group: u32, value: EndpointGroup) {
        write!(
            self.groups,
            group,
            value,
            EndpointGroup {
                level,
                start,
                known_until_ns,
                lost_below
            }
        );
    }

    /// What the kernel half keeps of a group.
    pub fn group_state(&self, group: u32) -> EndpointGroupState {
        read!(
            self.group_states,
            group,
            EndpointGroupState {
                draws,
                own_only_until_ns
            }
        )
    }

    /// The bitmap of a group's endpoints.
    pub fn members(&self, group: u32) -> [u64; MEMBER_WORDS] {
        std::array::from_fn(|word| self.members.word(group, word).load(Ordering::Acquire))
    }

    fn member_bit(&self, group: u32, endpoint: u32) -> (&AtomicU64, u64) {
        let word = self.members.word(group, (endpoint / 64) as usize);
        (word, 1 << (endpoint % 64))
    }

    /// Lets an endpoint be chosen in a group.
    pub fn join(&self, group: u32, endpoint: u32) {
        let (word, bit) = self.member_bit(group, endpoint);
        if word.load(Ordering::Acquire) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Lets an endpoint not be chosen in a group any more.
    pub fn leave(&self, group: u32, endpoint: u32) {
        let (word, bit) = self.member_bit(group, endpoint);
        if word.load(Ordering::Acquire) & bit != 0 {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    /// An endpoint; port 0: the element is free.
    pub fn endpoint(&self, endpoint: u32) -> Endpoint {
        let word = |at: usize| self.endpoints.word(endpoint, at).load(Ordering::Acquire);
        let v4 = word!(Endpoint.v4);
        let v6 = word!(Endpoint.v6);
        let (port, generation) = halves(word(word!(Endpoint.port)));
        Endpoint {
            v4: Address::of_words([word(v4), word(v4 + 1)]),
            v6: Address::of_words([word(v6), word(v6 + 1)]),
            port,
            generation,
            weight: word(word!(Endpoint.weight)),
        }
    }

    /// Writes an endpoint that no group has.
    pub fn set_endpoint(&self, endpoint: u32, value: &Endpoint) {
        let store = |at: usize, word: u64| {
            let place = self.endpoints.word(endpoint, at);
            place.store(word, Ordering::SeqCst);
        };
        for (at, address) in [
            (word!(Endpoint.v4), value.v4),
            (word!(Endpoint.v6), value.v6),
        ] {
            let (first, second) = address.words();
            store(at, first);
            store(at + 1, second);
        }
        store(word!(Endpoint.weight), value.weight);
        store(word!(Endpoint.port), joined(value.port, value.generation));
    }

    /// Gives an endpoint another weight.
    pub fn set_weight(&self, endpoint: u32, weight: u32) {
        let word = self.endpoints.word(endpoint, word!(Endpoint.weight));
        if word.load(Ordering::Acquire) != u64::from(weight) {
            word.store(weight.into(), Ordering::SeqCst);
        }
    }

    /// What this node has placed on an endpoint.
    pub fn placed(&self, endpoint: u32) -> Placed {
        read!(
            self.placed,
            endpoint,
            Placed {
                established,
                in_flight,
                total,
                failed,
                avoidance
            }
        )
    }

    /// Forgets the past of an endpoint, for another one in its place. What it has now is the kernel
    /// half's to count.
    pub fn forget_placed(&self, endpoint: u32) {
        for word in [
            word!(Placed.total),
            word!(Placed.failed),
            word!(Placed.avoidance),
        ] {
            self.placed.word(endpoint, word).store(0, Ordering::SeqCst);
        }
    }

    /// What others have placed on an endpoint.
    pub fn published(&self, endpoint: u32) -> Published {
        read!(
            self.published,
            endpoint,
            Published {
                others,
                connections,
                counted_ns
            }
        )
    }

    /// Says what others have placed on an endpoint.
    pub fn set_published(&self, endpoint: u32, value: Published) {
        write!(
            self.published,
            endpoint,
            value,
            Published {
                others,
                connections,
                counted_ns
            }
        );
    }

    /// How often each reason was given in a group, all CPUs together.
    pub fn verdicts(&self, group: u32) -> Result<Vec<(PlaceReason, u64)>> {
        let count = |reason: &PlaceReason| -> Result<(PlaceReason, u64)> {
            let index = verdict_at(group, reason.index())?;
            Ok((*reason, sum_of_cpus(&self.verdicts, index)?))
        };
        PlaceReason::ALL.iter().map(count).collect()
    }

    /// Sets a group's verdict counters to zero, for a new group with a used index.
    pub fn forget_verdicts(&mut self, group: u32) -> Result<()> {
        let first = verdict_at(group, 0)?;
        zero_on_cpus(
            &mut self.verdicts,
            first..verdict_at(group, PLACE_REASON_SLOTS)?,
        )
    }
}

fn verdict_at(group: u32, reason: usize) -> Result<u32> {
    let index = group as usize * PLACE_REASON_SLOTS + reason;
    Ok(u32::try_from(index)?)
}

/// A word as two numbers, in the order in which they stand in memory.
pub fn halves(word: u64) -> (u32, u32) {
    let mut bytes = &word.to_ne_bytes()[..];
    (bytes.get_u32_ne(), bytes.get_u32_ne())
}

/// The word of two numbers, in the order in which they stand in memory.
fn joined(first: u32, second: u32) -> u64 {
    let mut bytes = [0; size_of::<u64>()];
    let (low, high) = bytes.split_at_mut(size_of::<u32>());
    low.copy_from_slice(&first.to_ne_bytes());
    high.copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_numbers_make_a_word() {
        assert_eq!(halves(joined(11_800, 7)), (11_800, 7));
    }

    #[test]
    fn a_frontend_is_known_by_its_key() {
        for text in ["10.0.0.9:11800", "[fd00::9]:11800"] {
            let address = text.parse().unwrap();
            assert_eq!(frontend_of(&frontend_key(address)), address);
        }
    }
}
