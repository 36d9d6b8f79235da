//! Which connections of this node's backends should move so that backends are even.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{BackendId, BackendState, HealthState, ticks};

use super::attach::GuardedNetns;
use crate::config::MoveRule;
use crate::dataplane::{SlotView, Writer};
use crate::rebalance::{
    Action, Backend, BalanceBy, COOLDOWN, Connection, Counts, Decision, Fitness, Group, Memory,
    Phase, Stay, plan,
};
use crate::sys::clock;
use crate::sys::sock_diag::Socket;

/// Connections are looked at so often while nothing moves.
const LOOKS_AGAIN: Duration = Duration::from_secs(5);
/// And not at all once nothing has moved for so long and all is even.
const AT_REST_AFTER: Duration = Duration::from_secs(120);
/// When a daemon starts, by the times of its memories: what it finds then was opened before
/// anything that it may hear of others' moves.
const LONG_BEFORE: Duration = Duration::from_secs(3600);
/// Nothing moves for so long after somebody was refused.
pub const AFTER_REFUSAL: Duration = Duration::from_secs(10);

/// The backends that share the clients of a service.
pub struct BackendGroup {
    /// What the log calls it. No other one is called so.
    pub name: String,
    /// All of them as the rule takes them, those of this node without their connections.
    pub group: Group,
    /// Why nothing is evened out, where that is not its configuration.
    pub kept: Option<&'static str>,
    /// Whether its clients reach backends of this node alone.
    pub own_node_only: bool,
    /// How its connections are moved; `None`: as the others of its port.
    pub rule: Option<MoveRule>,
    /// Those of this node.
    pub own: Vec<OwnBackend>,
    /// What people call backends whose name says more.
    pub shown: BTreeMap<String, String>,
}

/// A backend of this node: a listener, in a cluster those of a pod.
pub struct OwnBackend {
    /// Its name in the group.
    pub name: String,
    /// Where it listens, and where it has connections.
    pub listeners: Vec<SlotView>,
}

impl BackendGroup {
    /// A group that is evened out by connections, all of whose backends are of this node.
    pub fn new(name: String, backends: Vec<Backend>, own: Vec<OwnBackend>) -> Self {
        Self {
            name,
            group: Group {
                is_on: true,
                balance_by: BalanceBy::Connections,
                slow_start: Duration::ZERO,
                are_refused: false,
                unheard_for: Duration::ZERO,
                backends,
            },
            kept: None,
            own_node_only: false,
            rule: None,
            own,
            shown: BTreeMap::new(),
        }
    }

    /// What people call a backend.
    fn shown(&self, backend: &str) -> String {
        let shown = self.shown.get(backend);
        shown.map_or(backend, String::as_str).to_owned()
    }

    /// What people call the backends of this node whose name says more, by their listeners.
    pub fn names(&self) -> impl Iterator<Item = (BackendId, &String)> {
        self.own.iter().flat_map(|own| {
            let shown = self.shown.get(&own.name).into_iter();
            shown.flat_map(|shown| own.listeners.iter().map(move |view| (view.id(), shown)))
        })
    }

    /// How connections of this node's backends are moved, by their listeners.
    pub fn rules(&self) -> impl Iterator<Item = (BackendId, MoveRule)> {
        let listeners = self.own.iter().flat_map(|own| &own.listeners);
        listeners.filter_map(|view| Some((view.id(), self.rule?)))
    }

    /// The listeners of backends that end while others are there for their clients.
    pub fn ending(&self) -> impl Iterator<Item = &SlotView> {
        let is = |own: &OwnBackend, phase| self.group.phase(&own.name) == Some(phase);
        let others = if self.own_node_only {
            self.own.iter().any(|own| is(own, Phase::Ready))
        } else {
            self.group.has_ready()
        };
        let ending = self.own.iter();
        let ending = ending.filter(move |own| others && is(own, Phase::Terminating));
        ending.flat_map(|own| &own.listeners)
    }

    /// Why nothing is evened out, in a sentence.
    fn why_kept(&self) -> Option<String> {
        let kept = self.kept?;
        Some(format!("{}: nothing moves to even out: {kept}", self.name))
    }

    /// The sentence of a decision.
    fn sentence(&self, decision: &Decision) -> String {
        let mut shown = decision.clone();
        shown.backend = self.shown(&decision.backend);
        if let Action::Stay(Stay::InputsTooOld { backend, .. }) = &mut shown.action {
            *backend = self.shown(backend);
        }
        format!("{}: {shown}", self.name)
    }
}

/// A backend of this node as the rule takes it; its connections are still to be looked at.
pub fn own_backend(name: String, weight: u32, phase: Phase, listeners: &[SlotView]) -> Backend {
    let now = ticks(clock::monotonic_ns());
    // Where one of its sockets serves, the server lives.
    let states = listeners.iter().map(|view| view.unhealthy(now));
    let states: Option<Vec<HealthState>> = states.map(|seen| Some(seen?.0)).collect();
    let limits = listeners.iter().map(|view| Some(u64::from(view.limit()?)));
    let counted = listeners.iter().map(|view| u64::from(view.counted()));
    Backend {
        name,
        weight,
        phase,
        fitness: (states.and_then(|states| states.first().copied()))
            .map_or(Fitness::Serves, Fitness::from),
        limit: limits.sum(),
        counts: Counts::Own {
            established: counted.sum(),
            connections: Vec::new(),
        },
    }
}

/// Whether a listener may get connections, or has some.
pub fn matters(view: &SlotView) -> bool {
    view.slot_state().is(BackendState::Active) || view.counted() > 0
}

/// The connections that a listener is to shed, and why.
pub struct Shedding {
    /// The listener.
    pub view: SlotView,
    /// The connections.
    pub sockets: Vec<Socket>,
    /// Why, in words.
    pub why: String,
}

/// What is remembered of each group, and what was decided last.
pub struct Rebalancing {
    started: Instant,
    groups: BTreeMap<String, Remembered>,
    /// Why nothing is evened out, a sentence for each group of which that is so.
    kept: Vec<String>,
}

#[derive(Default)]
struct Remembered {
    memory: Memory,
    /// When somebody was refused last.
    refused: Option<Instant>,
    /// When connections were looked at last.
    looked: Option<Instant>,
    /// When some were to move last.
    shed: Option<Instant>,
    connections: BTreeMap<BackendId, Vec<Connection>>,
    /// When each connection was first seen, by its cookie.
    opened: HashMap<u64, Duration>,
    /// The names of this node's backends, by their listeners.
    own: BTreeMap<BackendId, String>,
    /// What was decided on last, with the connections of this node.
    group: Option<Group>,
    decisions: Vec<Decision>,
    sentences: Vec<String>,
}

impl Default for Rebalancing {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            groups: BTreeMap::new(),
            kept: Vec::new(),
        }
    }
}

impl Rebalancing {
    /// Notes that a client of a service was refused.
    pub fn note_refusal(&mut self, service: &str) {
        if let Some(group) = self.groups.get_mut(service) {
            group.refused = Some(Instant::now());
        }
    }

    /// The time of the memories.
    fn now(&self) -> Duration {
        LONG_BEFORE + self.started.elapsed()
    }

    /// Notes that a connection is moved which the rule has not asked for.
    pub fn note_told(&mut self, backend: BackendId, socket: &Socket) {
        let now = self.now();
        for group in self.groups.values_mut() {
            if let Some(name) = group.own.get(&backend) {
                let connection = connection(socket, &mut group.opened, now);
                group.memory.told(name, &connection, now);
            }
        }
    }

    /// Decides what should move now; to be asked once a second. Where nothing `moves`, it is only
    /// said. With what was decided comes the first error: a map or the socket table that can't be
    /// read for one group keeps no other from its turn.
    pub fn decide(
        &mut self,
        guarded: &GuardedNetns,
        writer: &Writer,
        groups: &[BackendGroup],
        moves: bool,
    ) -> (Vec<Shedding>, Result<()>) {
        let wanted = || groups.iter().filter(|group| group.group.is_on);
        (self.groups).retain(|name, _| wanted().any(|group| group.name == *name));
        self.kept = groups.iter().filter_map(BackendGroup::why_kept).collect();
        let now = self.now();
        let (mut shedding, mut decided) = (Vec::new(), Ok(()));
        for group in wanted() {
            let known = self.groups.entry(group.name.clone()).or_default();
            match known.turn(guarded, writer, group, moves, now) {
                Ok(more) => shedding.extend(more),
                Err(error) => decided = decided.and(Err(error)),
            }
        }
        (shedding, decided)
    }

    /// What was decided last of a connection that can be moved, or of its backend; `None`: nothing
    /// is evened out there.
    pub fn sentence_of(&self, backend: BackendId, cookie: u64) -> Option<String> {
        let mut groups = self.groups.values();
        let (group, name) = groups.find_map(|group| Some((group, group.own.get(&backend)?)))?;
        let is_cooling = |of: &Group| group.memory.is_cooling(of, cookie, self.now());
        if group.group.as_ref().is_some_and(is_cooling) {
            return Some(format!(
                "it may have come back from a move, and is left alone for {} minutes",
                COOLDOWN.as_secs() / 60
            ));
        }
        let mut decided = group.decisions.iter().zip(&group.sentences);
        let decided = decided.find(|(decision, _)| decision.backend == *name);
        decided.map(|(_, sentence)| sentence.clone())
    }

    /// What was decided last, a sentence for each backend, and why groups are left as they are.
    pub fn sentences(&self) -> Vec<String> {
        let sentences = self.groups.values().flat_map(|group| &group.sentences);
        sentences.chain(&self.kept).cloned().collect()
    }
}

impl Remembered {
    /// What one group should shed now.
    fn turn(
        &mut self,
        guarded: &GuardedNetns,
        writer: &Writer,
        group: &BackendGroup,
        moves: bool,
        now: Duration,
    ) -> Result<Vec<Shedding>> {
        self.look(guarded, writer, group, now)?;
        self.decide(group, now);
        if moves {
            self.shedding(guarded, writer, group, now)
        } else {
            Ok(Vec::new())
        }
    }

    /// Looks at the connections where that is due: at rest nobody asks for them.
    fn look(
        &mut self,
        guarded: &GuardedNetns,
        writer: &Writer,
        group: &BackendGroup,
        now: Duration,
    ) -> Result<()> {
        let listeners = || group.own.iter().flat_map(|own| &own.listeners);
        let named = group.own.iter().flat_map(|own| {
            let listeners = own.listeners.iter();
            listeners.map(|view| (view.id(), own.name.clone()))
        });
        self.own = named.collect();
        let moving = |view: &SlotView| writer.tables.moves(view.id()).under_way() > 0;
        let moving = listeners().any(moving);
        let at_rest = self.decisions.iter().all(is_even)
            && self.shed.is_none_or(|at| at.elapsed() >= AT_REST_AFTER);
        let looked = self.looked.is_some_and(|at| at.elapsed() < LOOKS_AGAIN);
        if !moving && (at_rest || looked) {
            return Ok(());
        }
        // What is there at the first look was opened at any time before.
        let seen = if self.looked.is_some() {
            now
        } else {
            Duration::ZERO
        };
        self.looked = Some(Instant::now());
        self.connections.clear();
        let listeners: Vec<SlotView> = listeners().copied().collect();
        for (backend, sockets) in guarded.connections(writer, &listeners)? {
            let sockets = sockets.iter();
            let connections = sockets.map(|socket| connection(socket, &mut self.opened, seen));
            self.connections.insert(backend, connections.collect());
        }
        let there = self.connections.values().flatten().map(|one| one.cookie);
        let there: BTreeSet<u64> = there.collect();
        self.opened.retain(|cookie, _| there.contains(cookie));
        Ok(())
    }

    fn decide(&mut self, of: &BackendGroup, now: Duration) {
        let mut group = of.group.clone();
        group.are_refused |= self.refused.is_some_and(|at| at.elapsed() < AFTER_REFUSAL);
        for own in &of.own {
            let mut backends = group.backends.iter_mut();
            let backend = backends.find(|backend| backend.name == own.name);
            if let Some(Counts::Own { connections, .. }) = backend.map(|one| &mut one.counts) {
                *connections = self.connections_of(own);
            }
        }
        self.memory.note(&group, now);
        self.decisions = plan(&group, &self.memory, now);
        let sentences = self.decisions.iter().map(|decision| of.sentence(decision));
        self.sentences = sentences.collect();
        self.group = Some(group);
    }

    fn connections_of(&self, own: &OwnBackend) -> Vec<Connection> {
        let listeners = own.listeners.iter();
        let known = listeners.filter_map(|view| self.connections.get(&view.id()));
        known.flatten().copied().collect()
    }

    /// What the decisions mean, and notes that it is done. A backend that is leaving sheds without
    /// them.
    fn shedding(
        &mut self,
        guarded: &GuardedNetns,
        writer: &Writer,
        of: &BackendGroup,
        now: Duration,
    ) -> Result<Vec<Shedding>> {
        let is_leaving =
            |own: &OwnBackend| of.group.phase(&own.name).is_some_and(Phase::is_leaving);
        let sheds = |own: &&OwnBackend| !is_leaving(own) && self.sheds(own).is_some();
        let shedding: Vec<&OwnBackend> = of.own.iter().filter(sheds).collect();
        if shedding.is_empty() {
            return Ok(Vec::new());
        }
        self.shed = Some(Instant::now());
        let listeners = shedding.iter().flat_map(|own| &own.listeners).copied();
        let mut there = guarded.connections(writer, &listeners.collect::<Vec<_>>())?;
        let mut all = Vec::new();
        for own in shedding {
            let Some((cookies, why)) = self.sheds(own) else {
                continue;
            };
            for connection in self.connections_of(own) {
                if cookies.contains(&connection.cookie) {
                    self.memory.told(&own.name, &connection, now);
                }
            }
            for view in own.listeners.iter().copied() {
                let mut sockets = there.remove(&view.id()).unwrap_or_default();
                sockets.retain(|socket| cookies.contains(&socket.cookie));
                let why = why.clone();
                all.push(Shedding { view, sockets, why });
            }
        }
        all.retain(|shedding| !shedding.sockets.is_empty());
        Ok(all)
    }

    /// Which connections a backend should shed, and why.
    fn sheds(&self, own: &OwnBackend) -> Option<(BTreeSet<u64>, String)> {
        let mut decisions = self.decisions.iter();
        let decision = decisions.find(|decision| decision.backend == own.name)?;
        match &decision.action {
            Action::Shed { cookies, why } => {
                Some((cookies.iter().copied().collect(), why.to_string()))
            }
            Action::Stay(_) => None,
        }
    }
}

fn connection(socket: &Socket, opened: &mut HashMap<u64, Duration>, now: Duration) -> Connection {
    Connection {
        cookie: socket.cookie,
        client: socket.remote.ip(),
        opened: *opened.entry(socket.cookie).or_insert(now),
        load: 0,
        is_movable: true,
    }
}

fn is_even(decision: &Decision) -> bool {
    matches!(decision.action, Action::Stay(Stay::Even { .. } | Stay::Off))
}

#[cfg(test)]
mod tests {
    use super::*;
    use balancer_common::abi::{self, Health, SlotPolicy, SlotState};
    use balancer_common::decision::member::Member;

    fn listener(slot: u32) -> SlotView {
        SlotView {
            member: Member {
                slot,
                backend: abi::Backend {
                    slot_state: SlotState::new(0, BackendState::Active).0,
                    ..abi::Backend::EMPTY
                },
                policy: SlotPolicy::new(0, 50, 1, 0),
                counts: abi::Counts::ZERO,
                health: Health::UNKNOWN,
            },
            regards_health: true,
        }
    }

    /// How many listeners are to be emptied of a node with these pods, beside a ready one
    /// elsewhere.
    fn ending(own_node_only: bool, phases: &[Phase]) -> usize {
        let own = |slot: u32, phase: &Phase| own_backend(slot.to_string(), 1, *phase, &[]);
        let mut backends: Vec<Backend> = (0..)
            .zip(phases)
            .map(|(slot, phase)| own(slot, phase))
            .collect();
        backends.push(own(99, &Phase::Ready));
        let of_slot = |slot: u32| OwnBackend {
            name: slot.to_string(),
            listeners: vec![listener(slot)],
        };
        let own = (0..).zip(phases).map(|(slot, _)| of_slot(slot)).collect();
        let mut group = BackendGroup::new("agents".to_owned(), backends, own);
        group.own_node_only = own_node_only;
        group.ending().count()
    }

    #[test]
    fn who_ends_is_emptied_where_its_clients_can_go_elsewhere() {
        assert_eq!(ending(false, &[Phase::Terminating]), 1);
        assert_eq!(ending(false, &[Phase::Ready]), 0);
        assert_eq!(
            ending(true, &[Phase::Terminating]),
            0,
            "they stay on the node"
        );
        assert_eq!(ending(true, &[Phase::Terminating, Phase::Ready]), 1);
    }
}
