//! What this node has placed on each endpoint, compared with the sockets that were placed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{Address, Endpoint, MAX_ENDPOINTS, Phase, Placed, PlacedRecord, maps};
use tracing::warn;

use super::compare::{Deviation, Drift, LASTING};
use crate::dataplane::loader::Loader;
use crate::dataplane::place_tables::halves;
use crate::dataplane::placing::PlacedSockets;
use crate::dataplane::tables::{shared, word};
use crate::sys::shared::SharedArray;

/// The comparison of PLACED with the sockets that were placed.
#[derive(Debug, Default)]
pub struct PlacedAudit {
    /// What is compared; `None`: nothing was ever placed.
    of: Option<Compared>,
    /// When that failed last.
    failed: Option<Instant>,
    /// Counts that the last pass found off.
    deviations: BTreeMap<(u32, Count), Deviation>,
}

/// How long after a failure it is tried again: loading the iterator takes a while.
const RETRY: Duration = Duration::from_secs(60);

/// The two counts of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Count {
    Established,
    InFlight,
}

/// What a pass has put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// How many counts.
    pub counts: u64,
    /// By how many connections.
    pub connections: u64,
}

impl PlacedAudit {
    /// Begins to compare. Does nothing for a minute after a failure.
    ///
    /// # Errors
    /// When the kernel refuses the iterator over the sockets, or a map can't be opened.
    pub fn begin(&mut self, loader: &mut Loader) -> Result<()> {
        let held_back = self.failed.is_some_and(|at| at.elapsed() < RETRY);
        if self.of.is_none() && !held_back {
            self.failed = Some(Instant::now());
            self.of = Some(Compared::open(loader)?);
            self.failed = None;
        }
        Ok(())
    }

    /// Whether counts are compared.
    pub fn compares(&self) -> bool {
        self.of.is_some()
    }

    /// Whether the last pass saw something that only the next one can tell from a socket on its
    /// way.
    pub fn is_in_doubt(&self) -> bool {
        !self.deviations.is_empty()
    }

    /// Compares, and puts right what stays wrong.
    ///
    /// # Errors
    /// When the sockets can't be read.
    pub fn check(&mut self) -> Result<Repaired> {
        let Some(of) = &self.of else {
            return Ok(Repaired::default());
        };
        let before = of.readings(Reading::before);
        let found = Found::of(&of.sockets.read()?);
        let after = of.readings(Reading::after);
        let last = std::mem::take(&mut self.deviations);
        let mut repaired = Repaired::default();
        for (endpoint, (before, after)) in (0..).zip(before.iter().zip(&after)) {
            if before.generation != after.generation {
                continue;
            }
            let generation = before.generation;
            let found = found.at(endpoint, generation);
            for (count, drift) in found.drifts(before, after) {
                if drift.may_be_none() {
                    continue;
                }
                let key = (endpoint, count);
                let seen = last.get(&key).copied();
                let deviation = Deviation::seen_again(seen, generation, drift);
                if let Some(off) = deviation.lasting() {
                    of.repair(endpoint, count, off);
                    repaired.counts += 1;
                    repaired.connections += off.unsigned_abs();
                } else {
                    self.deviations.insert(key, deviation);
                }
            }
        }
        Ok(repaired)
    }
}

/// The maps that are compared.
#[derive(Debug)]
struct Compared {
    sockets: PlacedSockets,
    endpoints: SharedArray,
    placed: SharedArray,
}

impl Compared {
    fn open(loader: &mut Loader) -> Result<Self> {
        let directory = loader.paths().current();
        Ok(Self {
            sockets: PlacedSockets::load(loader)?,
            endpoints: shared(&directory, "ENDPOINTS", maps::ENDPOINTS)?,
            placed: shared(&directory, "PLACED", maps::PLACED)?,
        })
    }

    fn readings(&self, read: fn(&Self, u32) -> Reading) -> Vec<Reading> {
        let endpoints = 0..u32::try_from(MAX_ENDPOINTS).unwrap_or(u32::MAX);
        endpoints.map(|endpoint| read(self, endpoint)).collect()
    }

    /// Port and generation stand in one word.
    fn port_and_generation(&self, endpoint: u32) -> (u16, u32) {
        let word = self.endpoints.word(endpoint, word!(Endpoint.port));
        let (port, generation) = halves(word.load(Ordering::Acquire));
        (u16::try_from(port).unwrap_or_default(), generation)
    }

    fn count(&self, endpoint: u32, word: usize) -> u32 {
        let count = self.placed.word(endpoint, word).load(Ordering::Acquire);
        u32::try_from(Placed::count(count)).unwrap_or(0)
    }

    fn established(&self, endpoint: u32) -> u32 {
        self.count(endpoint, word!(Placed.established))
    }

    fn in_flight(&self, endpoint: u32) -> u32 {
        self.count(endpoint, word!(Placed.in_flight))
    }

    fn total(&self, endpoint: u32) -> u64 {
        let word = self.placed.word(endpoint, word!(Placed.total));
        word.load(Ordering::Acquire)
    }

    fn repair(&self, endpoint: u32, count: Count, off: i64) {
        let (word, what) = match count {
            Count::Established => (word!(Placed.established), "established"),
            Count::InFlight => (word!(Placed.in_flight), "in flight"),
        };
        let word = self.placed.word(endpoint, word);
        word.fetch_add(off.cast_unsigned(), Ordering::SeqCst);
        warn!(
            "endpoint {}: {off:+} connections that this node has placed there are {what} against \
             the count, for {LASTING} comparisons now: put right. Another sock_ops program may \
             switch state changes off (`balancer doctor` names them)",
            self.name(endpoint)
        );
    }

    /// How a log calls an endpoint.
    fn name(&self, endpoint: u32) -> SocketAddr {
        let address = |first: usize| {
            let word = |word| self.endpoints.word(endpoint, word).load(Ordering::Acquire);
            Address::of_words([word(first), word(first + 1)])
        };
        let v4 = address(word!(Endpoint.v4));
        let address = if v4.is_any() {
            address(word!(Endpoint.v6))
        } else {
            v4
        };
        let (port, _) = self.port_and_generation(endpoint);
        SocketAddr::new(IpAddr::from(address), port)
    }
}

/// What the maps say of an endpoint.
#[derive(Clone, Copy, Debug, Default)]
struct Reading {
    generation: u32,
    established: u32,
    in_flight: u32,
    total: u64,
}

impl Reading {
    /// Before the sockets are read: a connection that becomes established meanwhile is in flight
    /// here, or sends its SYN later.
    fn before(of: &Compared, endpoint: u32) -> Self {
        let (_, generation) = of.port_and_generation(endpoint);
        let total = of.total(endpoint);
        let in_flight = of.in_flight(endpoint);
        Self {
            generation,
            total,
            in_flight,
            established: of.established(endpoint),
        }
    }

    /// After the sockets were read: the SYN of whatever is counted here is in the total.
    fn after(of: &Compared, endpoint: u32) -> Self {
        let established = of.established(endpoint);
        let in_flight = of.in_flight(endpoint);
        let total = of.total(endpoint);
        let (_, generation) = of.port_and_generation(endpoint);
        Self {
            generation,
            established,
            in_flight,
            total,
        }
    }
}

/// The sockets that were placed, by endpoint and generation.
#[derive(Debug, Default)]
struct Found(BTreeMap<(u32, u32), OfEndpoint>);

/// Those of one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OfEndpoint {
    established: u32,
    in_flight: u32,
}

impl Found {
    fn of(records: &[PlacedRecord]) -> Self {
        // include/net/tcp_states.h
        const ESTABLISHED: u8 = 1;
        const SYN_SENT: u8 = 2;
        const SYN_RECV: u8 = 3;
        let mut found = Self::default();
        for record in records {
            let key = (u32::from(record.endpoint), record.generation);
            let of_endpoint = found.0.entry(key).or_default();
            match record.state {
                ESTABLISHED => of_endpoint.established += 1,
                SYN_SENT | SYN_RECV if Phase::from_number(record.phase) == Phase::InFlight => {
                    of_endpoint.in_flight += 1;
                }
                _ => {}
            }
        }
        found
    }

    fn at(&self, endpoint: u32, generation: u32) -> OfEndpoint {
        let found = self.0.get(&(endpoint, generation));
        found.copied().unwrap_or_default()
    }
}

impl OfEndpoint {
    fn drifts(self, before: &Reading, after: &Reading) -> [(Count, Drift); 2] {
        let sent = after.total.wrapping_sub(before.total);
        // As many as may have become established meanwhile.
        let entered = u64::from(before.in_flight).saturating_add(sent);
        let established = Drift::between(
            before.established,
            after.established,
            entered,
            self.established,
        );
        let in_flight = Drift::between(before.in_flight, after.in_flight, sent, self.in_flight);
        [
            (Count::Established, established),
            (Count::InFlight, in_flight),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(phase: Phase, state: u8, generation: u32) -> PlacedRecord {
        PlacedRecord {
            endpoint: 3,
            phase: phase as u8,
            state,
            generation,
        }
    }

    #[test]
    fn sockets_count_by_their_state_and_generation() {
        let found = Found::of(&[
            record(Phase::Established, 1, 7),
            // Its state change went unseen.
            record(Phase::InFlight, 1, 7),
            record(Phase::InFlight, 2, 7),
            record(Phase::InFlight, 3, 7),
            record(Phase::Chosen, 7, 7),
            record(Phase::Chosen, 8, 7),
            record(Phase::Established, 1, 6),
        ]);
        let expected = OfEndpoint {
            established: 2,
            in_flight: 2,
        };
        assert_eq!(found.at(3, 7), expected);
        assert_eq!(found.at(3, 6).established, 1);
        assert_eq!(found.at(4, 7), OfEndpoint::default());
    }

    #[test]
    fn what_may_have_come_or_gone_meanwhile_is_no_drift() {
        let before = Reading {
            generation: 1,
            established: 10,
            in_flight: 2,
            total: 20,
        };
        let after = Reading {
            established: 11,
            in_flight: 1,
            total: 21,
            ..before
        };
        let drifts = |established, in_flight| {
            let found = OfEndpoint {
                established,
                in_flight,
            };
            found
                .drifts(&before, &after)
                .map(|(_, drift)| drift.may_be_none())
        };
        // Two in flight and a third may all be established, or still in flight.
        assert_eq!(drifts(8, 0), [true, true]);
        assert_eq!(drifts(13, 3), [true, true]);
        assert_eq!(drifts(14, 4), [false, false]);
        assert_eq!(drifts(7, 0), [false, true]);
    }
}
