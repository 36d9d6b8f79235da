//! Which connections of this host's services should move so that their backends are even.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{BackendId, BackendState, HealthState, ticks};

use super::attach::GuardedNetns;
use super::moves::is_drained;
use crate::config::MoveRule;
use crate::dataplane::{Plan, ServicePlan, SlotView, Writer, services};
use crate::rebalance::{
    Action, Backend, BalanceBy, Connection, Counts, Decision, Fitness, Group, Memory, Phase, Stay,
    plan,
};
use crate::sys::clock;
use crate::sys::sock_diag::Socket;

/// Connections are looked at so often while nothing moves.
const LOOKS_AGAIN: Duration = Duration::from_secs(5);
/// And not at all once nothing has moved for so long and all is even.
const AT_REST_AFTER: Duration = Duration::from_secs(120);
/// Nothing moves for so long after somebody was refused.
const AFTER_REFUSAL: Duration = Duration::from_secs(10);

/// The backends that are to shed connections, which ones, and why.
pub struct Shedding {
    /// The backend.
    pub view: SlotView,
    /// The connections.
    pub sockets: Vec<Socket>,
    /// Why, in words.
    pub why: String,
}

/// What is remembered of each service, and what was decided last.
pub struct Rebalancing {
    started: Instant,
    services: BTreeMap<String, Service>,
}

#[derive(Default)]
struct Service {
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
    decisions: Vec<Decision>,
}

impl Default for Rebalancing {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            services: BTreeMap::new(),
        }
    }
}

impl Rebalancing {
    /// Notes that a client of a service was refused.
    pub fn note_refusal(&mut self, service: &str) {
        if let Some(service) = self.services.get_mut(service) {
            service.refused = Some(Instant::now());
        }
    }

    /// Decides what should move now; to be asked once a second.
    ///
    /// # Errors
    /// When a map or the socket table can't be read.
    pub fn decide(
        &mut self,
        guarded: &GuardedNetns,
        writer: &Writer,
        plan: Option<&Plan>,
        slots: &[SlotView],
    ) -> Result<Vec<Shedding>> {
        let wanted: Vec<&ServicePlan> = plan
            .into_iter()
            .flat_map(|plan| &plan.services)
            .filter(|service| service.moving != MoveRule::Off && service.rebalance)
            .collect();
        let is_wanted = |name: &String| wanted.iter().any(|service| service.name == *name);
        self.services.retain(|name, _| is_wanted(name));
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let ids = services::ids(&writer.tables)?;
        let now = self.started.elapsed();
        let mut shedding = Vec::new();
        for service in wanted {
            let Some(id) = ids.get(&service.name) else {
                continue;
            };
            let of_service = slots.iter().copied();
            let backends: Vec<SlotView> = of_service
                .filter(|view| view.member.backend.service == *id && matters(view))
                .collect();
            let known = self.services.entry(service.name.clone()).or_default();
            known.look(guarded, writer, &backends, now)?;
            known.decide(&backends, now);
            shedding.extend(known.shedding(guarded, writer, &backends, now)?);
        }
        Ok(shedding)
    }

    /// What was decided last, a sentence for each backend.
    pub fn sentences(&self) -> Vec<String> {
        let decisions = |(name, service): (&String, &Service)| {
            let sentence = |decision: &Decision| format!("{name}: {decision}");
            service.decisions.iter().map(sentence).collect::<Vec<_>>()
        };
        self.services.iter().flat_map(decisions).collect()
    }
}

impl Service {
    /// Looks at the connections where that is due: at rest nobody asks for them.
    fn look(
        &mut self,
        guarded: &GuardedNetns,
        writer: &Writer,
        backends: &[SlotView],
        now: Duration,
    ) -> Result<()> {
        let moving = |view: &SlotView| writer.tables.moves(view.id()).under_way() > 0;
        let moving = backends.iter().any(moving);
        let at_rest = self.decisions.iter().all(is_even)
            && self.shed.is_none_or(|at| at.elapsed() >= AT_REST_AFTER);
        let looked = self.looked.is_some_and(|at| at.elapsed() < LOOKS_AGAIN);
        if !moving && (at_rest || looked) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        self.connections.clear();
        for (backend, sockets) in guarded.connections(writer, backends)? {
            let connections = sockets.iter().map(|socket| Connection {
                cookie: socket.cookie,
                client: socket.remote.ip(),
                opened: *self.opened.entry(socket.cookie).or_insert(now),
                load: 0,
                is_movable: true,
            });
            self.connections.insert(backend, connections.collect());
        }
        let there = self.connections.values().flatten().map(|one| one.cookie);
        let there: BTreeSet<u64> = there.collect();
        self.opened.retain(|cookie, _| there.contains(cookie));
        Ok(())
    }

    fn decide(&mut self, backends: &[SlotView], now: Duration) {
        let group = self.group(backends);
        self.memory.note(&group, now);
        self.decisions = plan(&group, &self.memory, now);
    }

    /// What the decisions mean, and notes that it is done. A drained backend sheds without them.
    fn shedding(
        &mut self,
        guarded: &GuardedNetns,
        writer: &Writer,
        backends: &[SlotView],
        now: Duration,
    ) -> Result<Vec<Shedding>> {
        let sheds = |view: &&SlotView| !is_drained(view) && self.sheds(view).is_some();
        let shedding: Vec<SlotView> = backends.iter().filter(sheds).copied().collect();
        if shedding.is_empty() {
            return Ok(Vec::new());
        }
        self.shed = Some(Instant::now());
        let mut connections = guarded.connections(writer, &shedding)?;
        let mut all = Vec::new();
        for view in shedding {
            let Some((cookies, why)) = self.sheds(&view) else {
                continue;
            };
            let mut sockets = connections.remove(&view.id()).unwrap_or_default();
            sockets.retain(|socket| cookies.contains(&socket.cookie));
            let known = self.connections.get(&view.id()).into_iter().flatten();
            for connection in known.filter(|one| cookies.contains(&one.cookie)) {
                self.memory.told(&view.name(), connection, now);
            }
            all.push(Shedding { view, sockets, why });
        }
        Ok(all)
    }

    /// Which connections a backend should shed, and why.
    fn sheds(&self, view: &SlotView) -> Option<(Vec<u64>, String)> {
        let name = view.name();
        let mut decisions = self.decisions.iter();
        let decision = decisions.find(|decision| decision.backend == name)?;
        match &decision.action {
            Action::Shed { cookies, why } => Some((cookies.clone(), why.to_string())),
            Action::Stay(_) => None,
        }
    }

    fn group(&self, backends: &[SlotView]) -> Group {
        let refused = self.refused.is_some_and(|at| at.elapsed() < AFTER_REFUSAL);
        Group {
            is_on: true,
            balance_by: BalanceBy::Connections,
            slow_start: Duration::ZERO,
            are_refused: refused,
            backends: backends.iter().map(|view| self.backend(view)).collect(),
        }
    }

    fn backend(&self, view: &SlotView) -> Backend {
        let unhealthy = view.unhealthy(ticks(clock::monotonic_ns()));
        Backend {
            name: view.name(),
            weight: view.member.weight(),
            phase: match view.slot_state().is(BackendState::Active) {
                false => Phase::NotReady,
                true if is_drained(view) => Phase::Draining,
                true => Phase::Ready,
            },
            fitness: match unhealthy.map(|(state, _)| state) {
                None | Some(HealthState::Serving) => Fitness::Serves,
                Some(HealthState::Stalled | HealthState::Hung) => Fitness::Stalled,
                Some(HealthState::Failing) => Fitness::Failing,
            },
            limit: view.limit().map(u64::from),
            counts: Counts::Own {
                established: view.counted().into(),
                connections: self
                    .connections
                    .get(&view.id())
                    .cloned()
                    .unwrap_or_default(),
            },
        }
    }
}

fn is_even(decision: &Decision) -> bool {
    matches!(decision.action, Action::Stay(Stay::Even { .. } | Stay::Off))
}

/// It may get connections, or has some.
fn matters(view: &SlotView) -> bool {
    view.slot_state().is(BackendState::Active) || view.counted() > 0
}
