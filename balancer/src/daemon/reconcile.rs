//! Bringing the data plane up to date with the configuration, the cluster and the kernel.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use balancer_common::abi::{Event, EventKind, MAX_SERVICES};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use super::attach::{AuditPass, GuardedNetns, Scope};
use super::down::DownBackends;
use super::event_log;
use super::health::HealthWatch;
use super::heartbeat::Heartbeat;
use super::log_limit::{BY_HAND, report_left_out};
use super::mode::Mode;
use super::moves::Moves;
use super::neighbours::ensure_sole;
use super::place::Places;
use super::refusal_log::RefusalLog;
use super::retry::FailedPlan;
use super::strangers::Strangers;
use super::turned_away::TurnedAway;
use super::warn_of_mistakes;
use crate::config::{Config, Effect, MoveRule, NetnsScope};
use crate::dataplane::{Plan, Writer, services, slots, take_refusals};
use crate::kubernetes::ClusterStatus;
use crate::sys::clock;
use crate::sys::privileges::{Kept, suffice_for};

/// The longest time between two ticks; shorter where `fail_open_after` is short.
const TICK: Duration = Duration::from_secs(1);
/// Ticks in the time after which the kernel fails open.
const TICKS: u32 = 4;
/// How long one round of the daemon's work may take before it looks up: for requests, events,
/// signals. What is left then is done in the next one.
const ROUND: Duration = Duration::from_millis(250);
/// The shortest time between two audits: a little less than a tick, so that not every other tick
/// finds the audit not yet due.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// The longest time between two audits, however long they take.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The part of the time that audits may take is one in this many.
const AUDIT_SHARE: u32 = 200;
/// The part is one in this many where there are backends or connections that the kernel half does
/// not see go.
const ADOPTED_SHARE: u32 = 30;
/// The part is one in this many where a deviation is to be confirmed by the next pass.
const DOUBTFUL_SHARE: u32 = 20;

/// The privileges that a configuration needs for as long as the daemon runs.
pub fn kept(config: &Config) -> Kept {
    Kept {
        other_netns: config.namespaces != NetnsScope::Own,
        placing: config.kubernetes.is_some() || !config.connects.is_empty(),
        moving: moves_any(config),
    }
}

fn moves_any(config: &Config) -> bool {
    let of_host = config.services.iter().map(|service| service.moving);
    let in_cluster = config
        .kubernetes
        .iter()
        .flat_map(|cluster| &cluster.services);
    let mut rules = of_host.chain(in_cluster.map(|service| service.moving));
    rules.any(|rule| rule != MoveRule::Off)
}

/// The daemon's state.
pub struct Daemon {
    /// The part that differs between a single host and a cluster.
    pub mode: Mode,
    /// The data plane, which only this process may change.
    pub writer: Writer,
    /// The times at which the next ticks are due.
    pub ticks: Interval,
    /// The network namespaces that `steer` is or will be attached to.
    guarded: GuardedNetns,
    /// How much of the configuration is done.
    effect: Effect,
    /// How long after the daemon last lived the kernel stops refusing.
    fail_open_after: Duration,
    heartbeat: Heartbeat,
    /// The audit that is under way.
    audit: Option<AuditPass>,
    /// What the maps hold. `None`: the cluster has not told yet, and what an earlier daemon put in
    /// force stays; or a plan is in force only in part.
    plan: Option<Plan>,
    /// The plan that could not be put in force wholly, and waits to be tried again.
    failed: Option<FailedPlan>,
    /// The next audit is not due before.
    next_audit: Instant,
    /// The listeners that were turned away, which may be pods'.
    turned_away: TurnedAway,
    /// The looks at the health of backends.
    health: HealthWatch,
    /// The candidates that may belong to nobody.
    strangers: Strangers,
    /// The backends that are named and don't listen.
    down: DownBackends,
    /// The file that was read last is in force only in part.
    in_part: bool,
    /// The start of the times in `refusal_log`.
    started: Instant,
    /// The refusals that the log has yet to tell of.
    refusal_log: RefusalLog,
    /// Where connects of this node go.
    places: Places,
    /// The connections that are moved.
    moves: Moves,
}

impl Daemon {
    /// A daemon that has put nothing in force yet. Must be called inside a tokio runtime.
    pub fn new(config: &Config, guarded: GuardedNetns, mode: Mode, writer: Writer) -> Self {
        Self {
            heartbeat: Heartbeat::new(writer.tables.pulse(), config.fail_open_after),
            audit: None,
            mode,
            writer,
            ticks: ticks(config.fail_open_after),
            guarded,
            effect: config.effect,
            fail_open_after: config.fail_open_after,
            plan: None,
            failed: None,
            next_audit: Instant::now(),
            turned_away: TurnedAway::default(),
            health: HealthWatch::new(),
            strangers: Strangers::default(),
            down: DownBackends::default(),
            in_part: false,
            started: Instant::now(),
            refusal_log: RefusalLog::default(),
            places: Places::new(),
            moves: Moves::default(),
        }
    }

    /// How long after the daemon last lived the kernel stops refusing.
    pub const fn fail_open_after(&self) -> Duration {
        self.fail_open_after
    }

    /// Puts everything in force for the first time. Rules come first: a listener that comes up
    /// from then on registers itself. Then the listeners that are there are registered with their
    /// connections, and get their quotas. Only then does this build decide.
    ///
    /// # Errors
    /// When the kernel refuses something.
    pub fn start(&mut self) -> Result<()> {
        self.mode.resume(&self.writer)?;
        self.plan = self.wanted_plan()?;
        let left_out = self.writer.apply(self.plan.as_ref())?;
        if !left_out.is_empty() {
            warn!("{}", no_room(&left_out));
            self.failed = (self.plan.take()).map(|plan| FailedPlan::after(None, plan));
        }
        self.audit_now(Scope::Everywhere)?;
        slots::give_back_held(&mut self.writer.tables)?;
        self.begin_round();
        self.mode.find_pods(&mut self.guarded, &mut self.writer)?;
        self.apply_quotas()?;
        // Not before: the quotas that the last daemon left may have been refusing nobody for a
        // while. And not later: a data plane that has never had a sign of life refuses nobody.
        self.heartbeat.begin();
        // Before another build's programs that place go with its data plane.
        self.follow_places()?;
        self.writer.switch(|| self.heartbeat.turn())?;
        self.update_all()
    }

    /// Gives a heartbeat also while the loop is busy. To be called once privileges are given up:
    /// the thread that is started has what is left.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn follow_heartbeat(&self) -> Result<()> {
        self.heartbeat.start_thread()
    }

    /// The loop has turned.
    pub fn turn(&self) {
        self.heartbeat.turn();
    }

    /// Whether there is work that goes on at once.
    pub const fn is_busy(&self) -> bool {
        self.audit.is_some() || self.health.is_under_way() || self.guarded.is_unfinished()
    }

    /// Once a while: follows also what no event tells of. A step that fails is tried again at the
    /// next tick and keeps no other one from its turn; counting and steering go on meanwhile.
    pub fn tick(&mut self) {
        report_left_out();
        self.writer.loader.keep();
        self.guarded.refresh();
        let followed = log_failure(self.follow_plan());
        log_failure(self.follow_refusals());
        log_failure(self.follow_places());
        if self.audit.is_none() && self.turned_away.is_due(&self.writer) {
            log_failure(self.begin_audit(Scope::Everywhere));
        }
        if self.audit.is_none() && Instant::now() >= self.next_audit {
            log_failure(self.begin_audit(Scope::Known));
        }
        log_failure(self.health.begin(&self.guarded, &mut self.writer));
        let done = self.go_on() && !self.is_auditing_everywhere();
        log_failure(self.note_down());
        log_failure(self.follow_moves());
        log_failure(self.strangers.give_up(&self.writer));
        if self.in_part && self.failed.is_none() && followed && done {
            self.in_part = false;
            self.writer.loader.note_reload(None);
        }
    }

    /// Does a round of the work that is there; true: nothing failed.
    pub fn go_on(&mut self) -> bool {
        self.begin_round();
        // Before the audit, which may take the whole of the round.
        log_failure(self.health.go_on(&self.guarded, &mut self.writer));
        let audited = log_failure(self.go_on_auditing());
        log_failure(self.update()) && audited
    }

    fn begin_round(&mut self) {
        self.guarded.begin_round(Instant::now() + ROUND);
    }

    /// What the cluster has told is put in force at once.
    pub fn on_cluster_change(&mut self) {
        log_failure(self.follow_plan());
        log_failure(self.follow_places());
        self.go_on();
    }

    /// What happens in the kernel is logged, and followed where it is about listeners.
    pub fn on_events(&mut self, events: &[Event]) {
        let mut listeners_changed = false;
        let mut names = BTreeMap::new();
        for event in events {
            let tables = &self.writer.tables;
            let name = names.entry(event.service);
            let name = name.or_insert_with_key(|service| services::name(tables, *service));
            event_log::log(event, name);
            listeners_changed |= EventKind::from_number(event.kind).is_some();
        }
        if listeners_changed {
            self.begin_round();
            log_failure(self.update());
        }
    }

    /// Takes the sources that were refused since the last tick: for the quotas of a cluster, and
    /// for the log, which gets a line about them now and then.
    fn follow_refusals(&mut self) -> Result<()> {
        let tables = &self.writer.tables;
        let now = self.started.elapsed();
        for refused in take_refusals(tables)? {
            self.refusal_log.add(&refused, now);
            self.moves
                .note_refusal(&services::name(tables, refused.service));
            if let Some(port) = services::port_of(tables, refused.service) {
                self.mode.on_refusals(port, &refused);
            }
        }
        for (service, line) in self.refusal_log.lines(now) {
            warn!("{}: {line}", services::name(tables, service));
        }
        Ok(())
    }

    /// Puts the file in force again; a bad one changes nothing. The log tells how it went, and
    /// `status` where it failed.
    ///
    /// # Errors
    /// When the file is bad, or the kernel refuses a part of what it says.
    pub fn reload(&mut self, path: &Path) -> Result<()> {
        self.in_part = false;
        let reloaded = self.put_file_in_force(path);
        let failed = reloaded.as_ref().err().map(|error| format!("{error:#}"));
        self.writer.loader.note_reload(failed.as_deref());
        match &failed {
            None => info!(target: BY_HAND, "reloaded {}", path.display()),
            Some(error) => error!(target: BY_HAND, "{error}"),
        }
        reloaded
    }

    fn put_file_in_force(&mut self, path: &Path) -> Result<()> {
        self.reconfigure(path)
            .context("the configuration was not reloaded, the old one stays in force")?;
        self.turn();
        let followed = self.follow_plan();
        let placed = self.follow_places();
        let audited = self.finish_audit();
        let updated = self.update_all();
        self.in_part = [&followed, &placed, &audited, &updated]
            .into_iter()
            .any(Result::is_err);
        followed
            .and(placed)
            .and(audited)
            .and(updated)
            .context("the new configuration is in force only in part; the rest is tried again")
    }

    fn reconfigure(&mut self, path: &Path) -> Result<()> {
        let config = Config::load(path)?;
        suffice_for(kept(&config))?;
        let guarded = GuardedNetns::resolve(&config.namespaces)?;
        let own = self.writer.loader.paths();
        ensure_sole(&config.services, &guarded.named_cookies(), own)?;
        self.mode.reconfigure(&config)?;
        self.guarded = guarded;
        self.effect = config.effect;
        self.fail_open_after = config.fail_open_after;
        self.heartbeat.set_limit(config.fail_open_after);
        self.ticks = ticks(config.fail_open_after);
        // Whatever the maps hold, it is written again.
        self.plan = None;
        self.failed = None;
        self.audit = None;
        self.places.try_again();
        warn_of_mistakes(&config);
        Ok(())
    }

    /// Puts quotas in force after one was set by hand.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn apply_quotas_by_hand(&mut self) -> Result<()> {
        if let Some(plan) = &self.plan {
            services::refresh_ports(&mut self.writer.tables, plan)?;
        }
        self.apply_quotas()
    }

    /// Has connections of a backend moved.
    ///
    /// # Errors
    /// When it is not known, or its service moves none.
    pub fn shed(&mut self, backend: &str, number: usize) -> Result<String> {
        (self.moves).shed(&self.writer, self.plan.as_ref(), backend, number)
    }

    /// What was decided last of evening out, a sentence for each backend.
    pub fn rebalancing(&self) -> String {
        let mut sentences = self.moves.sentences();
        if sentences.is_empty() {
            return "nothing is moved so that backends are even: services say `rebalance: off` or \
                    `move: off`, `mode` is `count`, or this node has none of their backends"
                .to_owned();
        }
        if self.effect == Effect::DryRun {
            sentences.insert(
                0,
                "`mode` is `dry-run`: nothing moves. It would be:".to_owned(),
            );
        }
        sentences.join("\n")
    }

    /// Whether the connection of a client moves, and why or why not, in a sentence.
    ///
    /// # Errors
    /// When no backend has it, or a map or the socket table can't be read.
    pub fn connection(&self, client: SocketAddr) -> Result<String> {
        let slots = self.writer.tables.slots()?;
        (self.moves).explain(
            &self.guarded,
            &self.writer,
            self.plan.as_ref(),
            &slots,
            client,
        )
    }

    /// Takes the server of a backend out, or puts it back.
    ///
    /// # Errors
    /// When it is not known, or its service moves no connections.
    pub fn set_drained(&mut self, backend: &str, drained: bool) -> Result<String> {
        let message = if drained {
            (self.moves).drain(&self.writer, self.plan.as_ref(), backend)?
        } else {
            Moves::undrain(&self.writer, backend)?
        };
        // What it had is shared among the others at once.
        self.apply_quotas()?;
        Ok(message)
    }

    /// Puts in force what the maps should hold by now. An audit is begun that registers the
    /// listeners on other ports or in other network namespaces than before, with their connections.
    fn follow_plan(&mut self) -> Result<()> {
        self.mode.refresh();
        let Some(plan) = self.wanted_plan()? else {
            return Ok(());
        };
        let is_held_back = |failed: &FailedPlan| failed.holds_back(&plan);
        if self.plan.as_ref() == Some(&plan) || self.failed.as_ref().is_some_and(is_held_back) {
            return Ok(());
        }
        // Known again once all of this is done: what fails is begun anew after a while.
        let before = self.plan.take();
        let followed = self.put_in_force(before.as_ref(), &plan);
        if followed.is_ok() {
            self.failed = None;
            self.plan = Some(plan);
        } else {
            self.failed = Some(FailedPlan::after(self.failed.take(), plan));
        }
        followed
    }

    /// What `status --cluster` shows.
    ///
    /// # Errors
    /// When this is no cluster, or the slots can't be read.
    pub fn cluster_status(&self) -> Result<ClusterStatus> {
        let notes = self.places.notes();
        self.mode.cluster_status(&self.writer, self.effect, notes)
    }

    /// What the maps should hold by now; `None`: that is not known yet.
    fn wanted_plan(&mut self) -> Result<Option<Plan>> {
        let plan = self.mode.plan(&self.guarded, &self.writer)?;
        Ok(plan.map(|plan| plan.within(self.effect)))
    }

    fn put_in_force(&mut self, before: Option<&Plan>, plan: &Plan) -> Result<()> {
        let other_listeners = before.is_none_or(|before| {
            before.ports_listened_on() != plan.ports_listened_on() || before.netns != plan.netns
        });
        let left_out = self.writer.apply(Some(plan))?;
        if other_listeners {
            self.begin_audit(Scope::Everywhere)?;
        }
        ensure!(left_out.is_empty(), no_room(&left_out));
        Ok(())
    }

    /// Moves connections that should be elsewhere.
    fn follow_moves(&mut self) -> Result<()> {
        let slots = self.writer.tables.slots()?;
        let groups = match self.effect {
            Effect::Count => Vec::new(),
            Effect::DryRun | Effect::On => self.mode.backend_groups(&self.writer, &slots)?,
        };
        let moves = self.effect == Effect::On;
        let (writer, plan) = (&mut self.writer, self.plan.as_ref());
        let followed = (self.moves).follow(&self.guarded, writer, plan, &slots, &groups, moves);
        self.mode.note_departures(self.moves.departures());
        followed
    }

    /// Puts in force where connects of this node should go, and what is known of loads.
    fn follow_places(&mut self) -> Result<()> {
        (self.places).follow(&mut self.mode, self.effect, &mut self.writer)
    }

    /// Follows the listeners that have come and gone, to the end.
    fn update_all(&mut self) -> Result<()> {
        loop {
            self.begin_round();
            self.update()?;
            self.turn();
            if !self.guarded.is_unfinished() {
                return Ok(());
            }
        }
    }

    /// Follows the listeners that have come and gone, until the round is over.
    fn update(&mut self) -> Result<()> {
        for freed in self.writer.empty.free(&mut self.writer.tables)? {
            let slot = freed.slot();
            debug!("slot {slot} is free: its last connection has left");
        }
        // Not before the listeners that are there are registered.
        let attached = if self.is_auditing_everywhere() {
            Ok(())
        } else {
            self.guarded.attach_named(&mut self.writer)
        };
        // `steer` before quotas: the backends of a newly guarded network namespace are confirmed by
        // their quotas, and active from then on.
        self.mode.attach(&mut self.guarded, &mut self.writer)?;
        let problems = [self.guarded.problem(), self.places.problem()];
        self.mode
            .note_unfit(&problems.into_iter().flatten().collect::<Vec<_>>());
        self.apply_quotas()?;
        self.guarded.detach_unwanted(&mut self.writer)?;
        self.writer.loader.follow_logs();
        attached
    }

    /// Follows which backends are named and don't listen, once those that do are registered.
    fn note_down(&mut self) -> Result<()> {
        if !self.is_auditing_everywhere() {
            let down = self.mode.down(&self.writer)?;
            self.down.update(&self.writer, down);
        }
        Ok(())
    }

    fn apply_quotas(&mut self) -> Result<()> {
        self.mode.apply_quotas(&self.guarded, &mut self.writer)
    }

    fn is_auditing_everywhere(&self) -> bool {
        let audit = self.audit.as_ref();
        audit.is_some_and(|audit| audit.scope() == Scope::Everywhere)
    }

    /// Begins to compare the counts with the socket table; one that is under way is given up.
    fn begin_audit(&mut self, scope: Scope) -> Result<()> {
        if scope == Scope::Everywhere {
            self.turned_away.look(&self.writer);
            self.mode.look_at_cgroups(&mut self.writer);
        }
        self.next_audit = Instant::now() + SHORTEST_PAUSE;
        self.audit = Some(self.guarded.begin_audit(&mut self.writer, scope)?);
        Ok(())
    }

    fn audit_now(&mut self, scope: Scope) -> Result<()> {
        self.begin_audit(scope)?;
        self.finish_audit()
    }

    fn finish_audit(&mut self) -> Result<()> {
        while self.audit.is_some() {
            self.begin_round();
            self.go_on_auditing()?;
            self.turn();
        }
        Ok(())
    }

    /// Goes on with the audit that is under way until the round is over.
    fn go_on_auditing(&mut self) -> Result<()> {
        let Some(mut pass) = self.audit.take() else {
            return Ok(());
        };
        let before = clock::processor_time();
        let audited = self.guarded.audit(&mut self.writer, &mut pass);
        pass.cost += clock::processor_time().saturating_sub(before);
        match audited {
            Ok(true) => self.end_audit(&pass),
            Ok(false) => {
                self.audit = Some(pass);
                Ok(())
            }
            Err(error) => {
                self.next_audit = Instant::now() + SHORTEST_PAUSE;
                if pass.scope() == Scope::Everywhere {
                    // What it was to register is not: the plan is put in force anew.
                    self.plan = None;
                }
                Err(error)
            }
        }
    }

    /// Comparing is done so seldom that it takes only a small part of one processor.
    fn end_audit(&mut self, pass: &AuditPass) -> Result<()> {
        self.next_audit = Instant::now() + SHORTEST_PAUSE;
        let cost = pass.cost;
        let totals = self.writer.audit.end(&mut self.writer.tables, cost)?;
        debug!(
            "audit {}: {:.1} ms of processor time, drift {}, {} repairs so far",
            totals.checks,
            cost.as_secs_f64() * 1e3,
            totals.drift,
            totals.repairs
        );
        let share = match pass.scope() {
            // It also looks for owners and network namespaces, which later ones don't.
            Scope::Everywhere => 0,
            Scope::Known if self.writer.audit.is_in_doubt() => DOUBTFUL_SHARE,
            Scope::Known if self.writer.audit.has_adopted() => ADOPTED_SHARE,
            Scope::Known => AUDIT_SHARE,
        };
        self.next_audit = Instant::now() + (cost * share).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        Ok(())
    }
}

fn ticks(fail_open_after: Duration) -> Interval {
    let mut ticks = interval(TICK.min(fail_open_after / TICKS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Why services are not in force.
fn no_room(left_out: &[String]) -> String {
    format!(
        "there is no room for {}: all {MAX_SERVICES} service ids are in use, and services that were \
         removed keep theirs until their last connection is gone. The others are in force, and \
         these are tried again",
        left_out.join(", ")
    )
}

/// Logs a failure; true: there was none.
fn log_failure<T>(result: Result<T>) -> bool {
    match result {
        Ok(_) => true,
        Err(error) => {
            error!("the data plane could not be brought up to date: {error:#}");
            false
        }
    }
}
