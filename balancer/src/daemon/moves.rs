//! Moves of established connections: which are ordered, and what has become of them.

mod batch;
mod history;

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use balancer_common::abi::{BackendId, BackendState, SlotMoves};

use self::batch::{Batch, Cause};
use self::history::{History, canonical};
use super::attach::GuardedNetns;
use super::quotas::{drain, undrain};
use super::rebalancing::{BackendGroup, Rebalancing, Shedding};
use crate::config::MoveRule;
use crate::dataplane::{Found, MovingSockets, Plan, SlotView, Writer, services};
use crate::moving::{Manner, Mover, Order, Outcome, Report};
use crate::quota::QuotaSource;
use crate::quota::in_force::written;
use crate::rebalance::COMES_BACK;
use crate::sys::sock_diag::Socket;

/// In a second, one connection in so many of a backend is moved, so that its clients don't all
/// connect at once.
const PART_A_SECOND: usize = 20;
/// But at least so many.
const LEAST_A_SECOND: usize = 5;
/// One that ends is empty after so many seconds, as far as its clients go: its pod has half a
/// minute, where nothing else is said.
const EMPTY_AFTER: usize = 10;
/// A backend that has been uneven is taken for even when nothing was ordered for so long.
const QUIET: Duration = Duration::from_secs(10);
/// What could not be loaded is not tried again before.
const RELOAD: Duration = Duration::from_secs(60);

/// The moves of this node's connections.
#[derive(Default)]
pub struct Moves {
    /// The thread that moves; `None`: nothing was to be moved yet.
    mover: Option<Mover>,
    /// When the program that tells clients could not be loaded.
    failed: Option<Instant>,
    /// The connections that are on their way, by their cookies.
    under_way: HashMap<u64, BackendId>,
    /// What has become of connections.
    history: History,
    /// What is being moved.
    batches: BTreeMap<BackendId, Batch>,
    /// What should be moved so that backends are even.
    rebalancing: Rebalancing,
    /// How connections are moved, where a backend's group says it and not its port.
    rules: HashMap<BackendId, MoveRule>,
    /// The backends that are to be emptied, and why.
    leaving: BTreeMap<BackendId, Cause>,
    /// What people call backends, where that says more than their addresses.
    names: HashMap<BackendId, String>,
    /// When moves were ordered of late.
    of_late: VecDeque<(Instant, BackendId)>,
}

/// How many connections of this node's backends are being moved.
#[derive(Clone, Debug, Default)]
pub struct Departures(BTreeMap<BackendId, Departing>);

/// How many connections of a backend are being moved.
#[derive(Clone, Copy, Debug, Default)]
pub struct Departing {
    /// Established ones that are about to go.
    pub moving: u32,
    /// Those whose move began within [`COMES_BACK`], gone or not.
    pub returning: u32,
}

impl Departures {
    /// Those of a backend.
    pub fn of(&self, backend: BackendId) -> Departing {
        self.0.get(&backend).copied().unwrap_or_default()
    }
}

impl Moves {
    /// Has some connections of a backend moved, whichever.
    ///
    /// # Errors
    /// When its service moves none.
    pub fn shed(
        &mut self,
        writer: &Writer,
        plan: Option<&Plan>,
        backend: &str,
        number: usize,
    ) -> Result<String> {
        let view = find(writer, backend)?;
        self.ensure_movable(writer, plan, &view)?;
        let batch = self.batch(writer, &view, Cause::ByHand(0), None);
        if let Cause::ByHand(wanted) = &mut batch.cause {
            *wanted += number;
        }
        Ok(format!(
            "moving {number} connections of {}; `balancer status` shows how far it is",
            batch.name
        ))
    }

    /// Takes the server of a backend out: no new connections, and the present ones are moved.
    ///
    /// # Errors
    /// When a map can't be read, or its service moves none.
    pub fn drain(&self, writer: &Writer, plan: Option<&Plan>, backend: &str) -> Result<String> {
        let view = find(writer, backend)?;
        self.ensure_movable(writer, plan, &view)?;
        let server = drain(writer, &view)?;
        let service = services::name(&writer.tables, view.member.backend.service);
        Ok(format!(
            "{service}: {server} takes no new connections, and the present ones are moved"
        ))
    }

    /// Ends that.
    ///
    /// # Errors
    /// When a map can't be read, or it is not drained.
    pub fn undrain(writer: &Writer, backend: &str) -> Result<String> {
        let view = find(writer, backend)?;
        let server = undrain(writer, &view)?;
        let service = services::name(&writer.tables, view.member.backend.service);
        Ok(format!("{service}: {server} takes new connections again"))
    }

    /// Orders the moves that are due, and takes in what has become of earlier ones. Where nothing
    /// `moves`, what would be moved to even out is only said.
    ///
    /// # Errors
    /// When a map or the socket table can't be read: the first such error. It keeps no other
    /// backend from its turn.
    pub fn follow(
        &mut self,
        guarded: &GuardedNetns,
        writer: &mut Writer,
        plan: Option<&Plan>,
        slots: &[SlotView],
        groups: &[BackendGroup],
        moves: bool,
    ) -> Result<()> {
        self.take_reports(writer);
        self.forget_old();
        let names = groups.iter().flat_map(BackendGroup::names);
        self.names = names.map(|(id, name)| (id, name.clone())).collect();
        // Where nothing moves, the plan says so.
        let ruling = groups.iter().filter(|_| moves);
        self.rules = ruling.flat_map(BackendGroup::rules).collect();
        self.leaving = self.leaving(writer, plan, slots, groups);
        for view in slots {
            if let Some(cause) = self.leaving.get(&view.id()) {
                self.batch(writer, view, *cause, None);
            }
        }
        let moves = moves && !self.has_failed();
        let (shedding, mut followed) = self.rebalancing.decide(guarded, writer, groups, moves);
        for shedding in shedding {
            followed = followed.and(self.rebalance(writer, plan, shedding));
        }
        for view in slots {
            if self.batches.contains_key(&view.id())
                && let Some(manner) = self.manner(writer, plan, view)
            {
                followed = followed.and(self.order(guarded, writer, view, manner));
            }
        }
        self.end_batches(slots);
        self.show(writer, slots);
        followed
    }

    /// Forgets what is too long ago to matter.
    fn forget_old(&mut self) {
        self.history.forget_old();
        let is_old = |(at, _): &(Instant, BackendId)| at.elapsed() >= COMES_BACK;
        while self.of_late.front().is_some_and(is_old) {
            self.of_late.pop_front();
        }
    }

    /// Whether what moves could not be loaded of late. What is missing was said when it failed.
    fn has_failed(&self) -> bool {
        self.failed.is_some_and(|at| at.elapsed() < RELOAD)
    }

    /// What was decided last, a sentence for each backend.
    pub fn sentences(&self) -> Vec<String> {
        self.rebalancing.sentences()
    }

    /// Notes that a client of a service was refused.
    pub fn note_refusal(&mut self, service: &str) {
        self.rebalancing.note_refusal(service);
    }

    /// How many connections are being moved.
    pub fn departures(&self) -> Departures {
        let mut all: BTreeMap<BackendId, Departing> = BTreeMap::new();
        for backend in self.under_way.values() {
            all.entry(*backend).or_default().moving += 1;
        }
        for (_, backend) in &self.of_late {
            all.entry(*backend).or_default().returning += 1;
        }
        Departures(all)
    }

    /// The moves of a backend's connections, which begin where there were none, or go on for
    /// another cause.
    fn batch(
        &mut self,
        writer: &Writer,
        view: &SlotView,
        cause: Cause,
        why: Option<&str>,
    ) -> &mut Batch {
        let had = view.counted() as usize;
        let name = self.name(writer, view);
        let batch = self.batches.entry(view.id());
        let mut begins = false;
        let batch = batch.or_insert_with(|| {
            begins = true;
            Batch::new(name, cause, had)
        });
        if begins || batch.cause < cause {
            (batch.cause, batch.had) = (cause, had);
            batch.tell_beginning(why.unwrap_or(cause.words()));
        }
        batch
    }

    /// What the log calls a backend.
    fn name(&self, writer: &Writer, view: &SlotView) -> String {
        let service = services::name(&writer.tables, view.member.backend.service);
        match self.names.get(&view.id()) {
            Some(shown) => format!("{service}: {shown} (slot {})", view.slot()),
            None => format!("{service}: {}", view.name()),
        }
    }

    fn rebalance(
        &mut self,
        writer: &mut Writer,
        plan: Option<&Plan>,
        shedding: Shedding,
    ) -> Result<()> {
        let Shedding { view, sockets, why } = shedding;
        let Some(manner) = self.manner(writer, plan, &view) else {
            return Ok(());
        };
        self.batch(writer, &view, Cause::Uneven, Some(&why));
        for socket in sockets {
            if !self.under_way.contains_key(&socket.cookie) {
                self.send(writer, &view, socket, manner)?;
            }
        }
        Ok(())
    }

    /// Orders as many moves of a backend's connections as are due in this second.
    fn order(
        &mut self,
        guarded: &GuardedNetns,
        writer: &mut Writer,
        view: &SlotView,
        manner: Manner,
    ) -> Result<()> {
        let Some(batch) = self.batches.get(&view.id()) else {
            return Ok(());
        };
        let (cause, had) = (batch.cause, batch.had);
        let wanted = match cause {
            Cause::ByHand(wanted) => wanted,
            Cause::Drained | Cause::Ends if self.leaving.contains_key(&view.id()) => usize::MAX,
            Cause::Drained | Cause::Ends | Cause::Uneven => 0,
        };
        if wanted == 0 || self.has_failed() {
            return Ok(());
        }
        let mut connections = guarded.connections(writer, &[*view])?;
        let mut connections = connections.remove(&view.id()).unwrap_or_default();
        let part = match cause {
            Cause::Ends => had.max(connections.len()) / EMPTY_AFTER,
            _ => connections.len() / PART_A_SECOND,
        };
        let rate = part.max(LEAST_A_SECOND);
        connections.retain(|socket| {
            !self.under_way.contains_key(&socket.cookie) && !self.history.has_stayed(socket.cookie)
        });
        // A client comes back with its next call: who has just called soon does so again.
        connections.sort_by_key(|socket| {
            let received = socket.received;
            (
                received.map_or(u32::MAX, |received| received.ms_ago),
                Reverse(socket.cookie),
            )
        });
        connections.truncate(rate.min(wanted));
        let number = connections.len();
        for socket in connections {
            self.rebalancing.note_told(view.id(), &socket);
            self.send(writer, view, socket, manner)?;
        }
        if let Some(batch) = self.batches.get_mut(&view.id())
            && let Cause::ByHand(wanted) = &mut batch.cause
        {
            // There are no more.
            *wanted = if number == 0 { 0 } else { *wanted - number };
        }
        Ok(())
    }

    fn send(
        &mut self,
        writer: &mut Writer,
        view: &SlotView,
        socket: Socket,
        manner: Manner,
    ) -> Result<()> {
        let (cookie, backend) = (socket.cookie, view.id());
        let order = Order {
            backend,
            pid: view.member.backend.pid,
            socket,
            manner,
        };
        self.mover(writer)?.order(order)?;
        self.under_way.insert(cookie, backend);
        let now = Instant::now();
        self.of_late.push_back((now, backend));
        if let Some(batch) = self.batches.get_mut(&backend) {
            batch.ordered = now;
        }
        Ok(())
    }

    fn mover(&mut self, writer: &mut Writer) -> Result<&Mover> {
        if self.mover.is_none() {
            self.failed = Some(Instant::now());
            let sockets = MovingSockets::load(&mut writer.loader)?;
            let mover = Mover::start(sockets).context("cannot start the thread that moves")?;
            self.mover = Some(mover);
            self.failed = None;
        }
        self.mover.as_ref().context("it was just started")
    }

    /// The backends that have connections and are to be emptied, and why.
    fn leaving(
        &self,
        writer: &Writer,
        plan: Option<&Plan>,
        slots: &[SlotView],
        groups: &[BackendGroup],
    ) -> BTreeMap<BackendId, Cause> {
        let drained = slots.iter().filter(|view| is_drained(view));
        let drained = drained.map(|view| (view, Cause::Drained));
        let ending = groups.iter().flat_map(BackendGroup::ending);
        let ending = ending.map(|view| (view, Cause::Ends));
        let moves = |view: &SlotView| self.manner(writer, plan, view).is_some();
        let all = drained.chain(ending);
        let all = all.filter(|(view, _)| view.counted() > 0 && moves(view));
        all.map(|(view, cause)| (view.id(), cause)).collect()
    }

    /// How connections of a backend are moved; `None`: they are not. Groups of one port may have
    /// different rules, and the port has that of the first.
    fn manner(&self, writer: &Writer, plan: Option<&Plan>, view: &SlotView) -> Option<Manner> {
        let name = services::name(&writer.tables, view.member.backend.service);
        let service = plan?.services.iter().find(|service| service.name == name)?;
        let of_group = self.rules.get(&view.id()).copied();
        match of_group.unwrap_or(service.moving) {
            MoveRule::Off => None,
            MoveRule::Graceful => Some(Manner::Graceful),
            MoveRule::Close => Some(Manner::Close),
        }
    }

    fn ensure_movable(&self, writer: &Writer, plan: Option<&Plan>, view: &SlotView) -> Result<()> {
        ensure!(
            self.manner(writer, plan, view).is_some(),
            "{} moves no connections: its configuration says `move: off`, or `mode` is not `on`",
            services::name(&writer.tables, view.member.backend.service)
        );
        Ok(())
    }

    fn take_reports(&mut self, writer: &Writer) {
        let reports = self.mover.as_ref().map(Mover::reports).unwrap_or_default();
        for Report { order, outcome, .. } in reports {
            self.under_way.remove(&order.socket.cookie);
            let batch = self.batches.get(&order.backend);
            self.history.add(&order, &outcome, batch);
            add(writer, order.backend, &outcome);
            if let Some(batch) = self.batches.get_mut(&order.backend) {
                batch.add(outcome);
            }
        }
    }

    /// Whether the connection of a client moves, and why or why not, in a sentence.
    ///
    /// # Errors
    /// When no backend of this node has it, or a map or the socket table can't be read.
    pub fn explain(
        &self,
        guarded: &GuardedNetns,
        writer: &Writer,
        plan: Option<&Plan>,
        slots: &[SlotView],
        client: SocketAddr,
    ) -> Result<String> {
        let connections = guarded.all_connections(writer, slots)?;
        let is_of = |found: &&Found| canonical(found.socket.remote) == canonical(client);
        let found = slots.iter().find_map(|view| {
            let of_backend = connections.get(&view.id())?;
            Some((view, of_backend.iter().find(is_of)?))
        });
        let Some((view, found)) = found else {
            return self.history.moved(client).with_context(|| {
                format!(
                    "no backend of this node has a connection of {client}: write the client's \
                     address and port, as `ss -tn` shows them"
                )
            });
        };
        let why = self.sentence_of(writer, plan, view, found);
        Ok(format!(
            "{}: the connection of {client} {why}",
            self.name(writer, view)
        ))
    }

    /// What becomes of a connection, as the rest of a sentence.
    fn sentence_of(
        &self,
        writer: &Writer,
        plan: Option<&Plan>,
        view: &SlotView,
        found: &Found,
    ) -> String {
        let cookie = found.socket.cookie;
        if let Some(why) = found.unmovable {
            return format!("is never moved: {why}");
        }
        if self.manner(writer, plan, view).is_none() {
            return "is not moved: its service says `move: off`, or `mode` is not `on`".to_owned();
        }
        if self.under_way.contains_key(&cookie) {
            return "is being moved".to_owned();
        }
        if let Some((since, why)) = self.history.why_stays(cookie) {
            let seconds = since.elapsed().as_secs();
            return format!("stayed {seconds} s ago when it was to move: {why}");
        }
        if let Some(cause) = self.leaving.get(&view.id()) {
            return format!("is about to be moved: {}", cause.words());
        }
        match self.rebalancing.sentence_of(view.id(), cookie) {
            Some(sentence) => format!("can be moved. Evening out: {sentence}"),
            None => "can be moved, by `shed` and `drain`: nothing is evened out".to_owned(),
        }
    }

    /// Says what has become of those that are done, or whose backend is gone.
    fn end_batches(&mut self, slots: &[SlotView]) {
        let (under_way, leaving) = (&self.under_way, &self.leaving);
        self.batches.retain(|id, batch| {
            let view = slots.iter().find(|view| view.id() == *id);
            let more = match batch.cause {
                Cause::ByHand(wanted) => wanted > 0,
                Cause::Drained | Cause::Ends => leaving.contains_key(id),
                Cause::Uneven => batch.ordered.elapsed() < QUIET,
            };
            let busy = under_way.values().any(|backend| backend == id);
            let goes_on = view.is_some() && (more || busy);
            if !goes_on {
                batch.tell();
            }
            goes_on
        });
    }

    fn show(&self, writer: &Writer, slots: &[SlotView]) {
        let departures = self.departures();
        for view in slots {
            let id = view.id();
            let moves = writer.tables.moves(id);
            let others = SlotMoves::others(departures.of(id).moving, moves.stay());
            writer
                .tables
                .set_moves(id.slot, SlotMoves { others, ..moves });
        }
    }
}

/// Counts what has become of a connection.
fn add(writer: &Writer, backend: BackendId, outcome: &Outcome) {
    let moves = writer.tables.moves(backend);
    let stays = u32::from(matches!(outcome, Outcome::Stays(_)));
    let others = SlotMoves::others(moves.under_way(), moves.stay().saturating_add(stays));
    let left = moves.left + u64::from(outcome.has_left());
    writer.tables.set_moves(
        backend.slot,
        SlotMoves {
            left,
            others,
            ..moves
        },
    );
}

/// Whether a backend is taken out by hand.
pub fn is_drained(view: &SlotView) -> bool {
    let written = written(&view.member.policy, view.slot_state());
    written.is_some_and(|written| written.source == QuotaSource::Drained)
}

/// The backend that somebody means: a slot, or an address and a port.
fn find(writer: &Writer, text: &str) -> Result<SlotView> {
    let mut slots = writer.tables.slots()?;
    slots.retain(|view| view.slot_state().is(BackendState::Active));
    let wanted: (Option<u32>, Option<SocketAddr>) = (text.parse().ok(), text.parse().ok());
    let fits = |view: &SlotView| match wanted {
        (Some(slot), _) => view.slot() == slot,
        (_, Some(address)) => {
            let backend = &view.member.backend;
            SocketAddr::new(backend.address.into(), backend.port) == address
        }
        _ => false,
    };
    ensure!(
        wanted.0.is_some() || wanted.1.is_some(),
        "`{text}` is neither a slot, as `balancer status` shows it, nor an address and a port"
    );
    slots.retain(fits);
    match slots.len() {
        1 => Ok(slots.remove(0)),
        0 => bail!("no backend is at `{text}`; `balancer status` shows slots and addresses"),
        _ => bail!("several backends are at `{text}`: name one by its slot in `balancer status`"),
    }
}
