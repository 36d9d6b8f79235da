//! A node that places, without a daemon: the programs of a [`Writer`] of this process, and maps
//! that the test writes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::ensure;
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use balancer::dataplane::{Lock, Paths, Placing, Writer};
use balancer::sys::clock;
use balancer::sys::shared::SharedArray;
use balancer_common::abi::{
    Address, Endpoint, EndpointGroup, Excluded, MAX_ENDPOINT_GROUPS, Members, PLACE_REASON_SLOTS,
    Placed, Published, maps,
};
use balancer_common::place::PlaceReason;
use testkit::fixtures::tcp::{Listen, Listener};
use testkit::fixtures::{Balancer, Machine, eventually};

/// Where clients connect to. No route leads there: who is not placed gets an error at once.
pub const FRONTEND: &str = "10.99.0.1:11800";
/// The same for IPv6.
pub const FRONTEND_V6: &str = "[fd99::1]:11800";
/// The port of the endpoint number 0; the others follow.
pub const FIRST_PORT: u16 = 21_800;
/// The group of the endpoints, unless a test says otherwise.
pub const GROUP: u32 = 0;
/// How long counts may take to follow the socket table.
const SETTLES_WITHIN: Duration = Duration::from_secs(5);

/// See the module.
pub struct Node<'a> {
    /// `None` for a moment, while it is replaced.
    writer: Option<Writer>,
    paths: Paths,
    frontends: HashMap<MapData, [u8; 20], [u8; 8]>,
    excluded: HashMap<MapData, [u8; 8], [u8; 4]>,
    verdicts: PerCpuArray<MapData, u64>,
    groups: SharedArray,
    members: SharedArray,
    endpoints: SharedArray,
    placed: SharedArray,
    published: SharedArray,
    /// Takes the pins away at the end.
    balancer: Balancer<'a>,
}

/// Which word of a map's value a field is.
macro_rules! word {
    ($value:ident . $field:ident) => {
        std::mem::offset_of!($value, $field) / size_of::<u64>()
    };
}

impl<'a> Node<'a> {
    /// One that counts, and attaches nothing that places.
    pub fn counting(machine: &'a Machine) -> Self {
        let balancer = Balancer::prepare(machine, "services: [{name: agents, port: 11800}]");
        let paths = Paths::new(balancer.state());
        let writer = start(&paths, &balancer);
        let map = |name: &str| MapData::from_pin(paths.map(name)).expect("a pinned map");
        let shared = |name: &str, shape: maps::MapShape| {
            SharedArray::open(map(name).fd(), shape.value as usize, shape.entries).expect("mapped")
        };
        let hash = |name: &str| Map::HashMap(map(name));
        let verdicts = Map::PerCpuArray(map("PLACE_VERDICTS"));
        let node = Self {
            writer: Some(writer),
            frontends: HashMap::try_from(hash("FRONTENDS")).expect("a hash"),
            excluded: HashMap::try_from(hash("EXCLUDED_NETNS")).expect("a hash"),
            verdicts: PerCpuArray::try_from(verdicts).expect("an array"),
            groups: shared("ENDPOINT_GROUPS", maps::ENDPOINT_GROUPS),
            members: shared("ENDPOINT_MEMBERS", maps::ENDPOINT_MEMBERS),
            endpoints: shared("ENDPOINTS", maps::ENDPOINTS),
            placed: shared("PLACED", maps::PLACED),
            published: shared("PUBLISHED", maps::PUBLISHED),
            paths,
            balancer,
        };
        node.beat(Duration::from_secs(3_600));
        node.know(GROUP, Duration::from_secs(3_600));
        node
    }

    /// One that places connects to [`FRONTEND`] and [`FRONTEND_V6`] on the endpoints of [`GROUP`],
    /// so many of each family.
    pub fn placing(machine: &'a Machine, endpoints: u32) -> Self {
        let mut node = Self::counting(machine);
        assert_eq!(node.set_placing(true), Placing::On);
        node.add_frontend(FRONTEND, GROUP, 0);
        node.add_frontend(FRONTEND_V6, GROUP, 0);
        for endpoint in 0..endpoints {
            node.add_endpoint(endpoint, endpoint_at(endpoint), 1);
        }
        node.set_members(GROUP, 0..endpoints);
        node
    }

    /// Attaches or detaches what places.
    pub fn set_placing(&mut self, on: bool) -> Placing {
        self.writer().set_placing(on).expect("no error")
    }

    pub fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().expect("it is there")
    }

    /// Lets go of everything, as a daemon that is killed, and adopts it again, as the next one.
    pub fn begin_anew(&mut self) {
        self.writer = None;
        self.writer = Some(start(&self.paths, &self.balancer));
    }

    /// A heartbeat, which holds for that long.
    pub fn beat(&self, limit: Duration) {
        let writer = self.writer.as_ref().expect("it is there");
        writer.tables.pulse().beat(limit);
    }

    /// What is known of a group holds for that long.
    pub fn know(&self, group: u32, holds: Duration) {
        let until = clock::monotonic_ns() + u64::try_from(holds.as_nanos()).expect("short");
        let word = word!(EndpointGroup.known_until_ns);
        self.groups.word(group, word).store(until, Ordering::SeqCst);
    }

    /// With fewer connections the node has lost most of those it had.
    pub fn set_lost_below(&self, group: u32, connections: u64) {
        let word = word!(EndpointGroup.lost_below);
        let word = self.groups.word(group, word);
        word.store(connections, Ordering::SeqCst);
    }

    pub fn add_frontend(&mut self, at: &str, group: u32, flags: u32) {
        let value: Vec<u8> = [group, flags]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        let value: [u8; 8] = value.try_into().expect("its size");
        self.frontends
            .insert(frontend_key(at), value, 0)
            .expect("written");
    }

    pub fn remove_frontend(&mut self, at: &str) {
        self.frontends.remove(&frontend_key(at)).expect("removed");
    }

    /// Makes an endpoint, of one address or one of each family.
    pub fn add_endpoint(
        &self,
        index: u32,
        addresses: impl IntoIterator<Item = SocketAddr>,
        weight: u64,
    ) {
        let (mut v4, mut v6, mut port) = (Address::ANY, Address::ANY, 0);
        for address in addresses {
            match address.ip() {
                IpAddr::V4(_) => v4 = address.ip().into(),
                IpAddr::V6(_) => v6 = address.ip().into(),
            }
            port = address.port();
        }
        let set = |word: usize, value: u64| {
            self.endpoints
                .word(index, word)
                .store(value, Ordering::SeqCst);
        };
        for (first, address) in [(word!(Endpoint.v4), v4), (word!(Endpoint.v6), v6)] {
            let (high, low) = address.words();
            set(first, high);
            set(first + 1, low);
        }
        self.set_generation(index, port, 1);
        set(word!(Endpoint.weight), weight);
    }

    /// Gives an endpoint's element to another one.
    pub fn set_generation(&self, index: u32, port: u16, generation: u32) {
        let mut halves = [0; 8];
        halves[..4].copy_from_slice(&u32::from(port).to_ne_bytes());
        halves[4..].copy_from_slice(&generation.to_ne_bytes());
        let word = self.endpoints.word(index, word!(Endpoint.port));
        word.store(u64::from_ne_bytes(halves), Ordering::SeqCst);
    }

    pub fn set_members(&self, group: u32, members: impl IntoIterator<Item = u32>) {
        let mut words = [0_u64; size_of::<Members>() / size_of::<u64>()];
        for member in members {
            words[member as usize / 64] |= 1 << (member % 64);
        }
        for (index, word) in words.into_iter().enumerate() {
            self.members
                .word(group, index)
                .store(word, Ordering::SeqCst);
        }
    }

    pub fn set_others(&self, endpoint: u32, others: u64) {
        let word = self.published.word(endpoint, word!(Published.others));
        word.store(others, Ordering::SeqCst);
    }

    /// Leaves connects of a netns alone.
    pub fn exclude(&mut self, netns: u64, excluded: Excluded) {
        let value = (excluded as u32).to_ne_bytes();
        let inserted = self.excluded.insert(netns.to_ne_bytes(), value, 0);
        inserted.expect("written");
    }

    pub fn placed(&self, endpoint: u32) -> Placed {
        let load = |word| self.placed.word(endpoint, word).load(Ordering::SeqCst);
        Placed {
            established: load(word!(Placed.established)),
            in_flight: load(word!(Placed.in_flight)),
            total: load(word!(Placed.total)),
            failed: load(word!(Placed.failed)),
            avoidance: load(word!(Placed.avoidance)),
        }
    }

    /// Changes counts behind everybody's back.
    pub fn miscount(&self, endpoint: u32, established: i64, in_flight: i64) {
        for (word, off) in [
            (word!(Placed.established), established),
            (word!(Placed.in_flight), in_flight),
        ] {
            let word = self.placed.word(endpoint, word);
            word.fetch_add(off.cast_unsigned(), Ordering::SeqCst);
        }
    }

    /// Established and in flight of the first endpoints.
    pub fn counts(&self, endpoints: u32) -> Vec<(u64, u64)> {
        let counts = |endpoint| {
            let placed = self.placed(endpoint);
            (placed.established, placed.in_flight)
        };
        (0..endpoints).map(counts).collect()
    }

    /// Waits until the first endpoints have these counts of established connections, and none in
    /// flight.
    #[track_caller]
    pub fn agree(&self, established: &[usize]) {
        let endpoints = u32::try_from(established.len()).expect("few");
        eventually(SETTLES_WITHIN, || {
            let expected: Vec<_> = established.iter().map(|count| (*count as u64, 0)).collect();
            let counted = self.counts(endpoints);
            ensure!(counted == expected, "counted {counted:?}, not {expected:?}");
            Ok(())
        });
    }

    /// How often each reason was given to connects to a group; those that never were are left out.
    pub fn reasons(&self, group: u32) -> BTreeMap<&'static str, u64> {
        assert!((group as usize) < MAX_ENDPOINT_GROUPS);
        let of_reason = |(index, reason): (u32, &PlaceReason)| {
            let index = group * u32::try_from(PLACE_REASON_SLOTS).expect("few") + index;
            let counters = self.verdicts.get(&index, 0).expect("a counter");
            (reason.name(), counters.iter().sum())
        };
        let reasons = (0..).zip(PlaceReason::ALL).map(of_reason);
        reasons.filter(|(_, count)| *count != 0).collect()
    }

    /// Where it is pinned.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take()
            && let Err(error) = writer.loader.remove()
        {
            eprintln!("the data plane could not be removed: {error:#}");
        }
    }
}

fn frontend_key(at: &str) -> [u8; 20] {
    let at: SocketAddr = at.parse().expect("an address with a port");
    let Address(words) = Address::from(at.ip());
    let words = words.into_iter().chain([u32::from(at.port())]);
    let key: Vec<u8> = words.flat_map(u32::to_ne_bytes).collect();
    key.try_into().expect("its size")
}

fn start(paths: &Paths, balancer: &Balancer<'_>) -> Writer {
    let lock = Lock::for_daemon(paths).expect("nobody else has it");
    Writer::start(paths.clone(), lock, &balancer.cgroup()).expect("the kernel takes it")
}

/// Tells threads to end, also when the test panics that waits for them.
pub struct End<'a>(pub &'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Where an endpoint of both families listens.
pub fn endpoint_at(endpoint: u32) -> [SocketAddr; 2] {
    let port = FIRST_PORT + u16::try_from(endpoint).expect("few");
    [format!("127.0.0.1:{port}"), format!("[::1]:{port}")].map(|at| at.parse().expect("an address"))
}

/// Servers at the endpoints, for both families each.
pub fn open_servers(endpoints: u32) -> Vec<[Listener; 2]> {
    let open = |endpoint| endpoint_at(endpoint).map(|at| Listen::on(&at).open());
    (0..endpoints).map(open).collect()
}

/// The socket table's established connections of each server.
pub fn loads(servers: &mut [[Listener; 2]]) -> Vec<usize> {
    let load = |[v4, v6]: &mut [Listener; 2]| v4.established() + v6.established();
    servers.iter_mut().map(load).collect()
}
