//! Bringing the data plane up to date with the configuration, the cluster and the kernel.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use balancer_common::abi::{Event, EventKind, MAX_SERVICES};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tracing::{debug, error, info, warn};

use super::attach::{GuardedNetns, Scope};
use super::event_log;
use super::mode::Mode;
use super::neighbours::ensure_sole;
use super::retry::FailedPlan;
use super::warn_of_mistakes;
use crate::config::{Config, NetnsScope};
use crate::dataplane::{Plan, Writer, services, slots};
use crate::sys::clock;
use crate::sys::privileges::{Kept, suffice_for};

/// The longest time between two ticks; shorter where `fail_open_after` is short.
const TICK: Duration = Duration::from_secs(1);
/// Heartbeats that may be missed before the kernel fails open.
const BEATS: u32 = 4;
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
    }
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
    /// How long after the daemon last lived the kernel stops refusing.
    fail_open_after: Duration,
    /// What the maps hold. `None`: the cluster has not told yet, and what an earlier daemon put in
    /// force stays; or a plan is in force only in part.
    plan: Option<Plan>,
    /// The plan that could not be put in force wholly, and waits to be tried again.
    failed: Option<FailedPlan>,
    /// The next audit is not due before.
    next_audit: Instant,
    /// The file that was read last is in force only in part.
    in_part: bool,
}

impl Daemon {
    /// A daemon that has put nothing in force yet. Must be called inside a tokio runtime.
    pub fn new(config: &Config, guarded: GuardedNetns, mode: Mode, writer: Writer) -> Self {
        Self {
            mode,
            writer,
            ticks: ticks(config.fail_open_after),
            guarded,
            fail_open_after: config.fail_open_after,
            plan: None,
            failed: None,
            next_audit: Instant::now(),
            in_part: false,
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
        self.plan = self.mode.plan(&self.guarded, &self.writer)?;
        let left_out = self.writer.apply(self.plan.as_ref())?;
        if !left_out.is_empty() {
            warn!("{}", no_room(&left_out));
            self.failed = (self.plan.take()).map(|plan| FailedPlan::after(None, plan));
        }
        self.audit(Scope::Everywhere)?;
        slots::give_back_held(&mut self.writer.tables)?;
        self.mode.find_pods(&mut self.guarded, &mut self.writer)?;
        self.apply_quotas()?;
        // Not before: the quotas that the last daemon left may have been refusing nobody for a
        // while. And not later: a data plane that has never had a sign of life refuses nobody.
        self.beat();
        self.writer.switch()?;
        self.guarded.attach(&mut self.writer)?;
        self.writer.loader.follow_logs();
        self.update()?;
        self.beat();
        Ok(())
    }

    /// Once a while: follows also what no event tells of. A step that fails is tried again at the
    /// next tick and keeps no other one from its turn; counting and steering go on meanwhile.
    pub fn tick(&mut self) {
        self.beat();
        self.writer.loader.keep();
        self.guarded.refresh();
        let followed = self.follow_plan();
        let audited = matches!(followed, Ok(true));
        let followed = log_failure(followed);
        if !audited && Instant::now() >= self.next_audit {
            log_failure(self.audit(Scope::Known));
        }
        let updated = log_failure(self.update());
        if self.in_part && self.failed.is_none() && followed && updated {
            self.in_part = false;
            self.writer.loader.note_reload(None);
        }
    }

    /// What the cluster has told is put in force at once.
    pub fn on_cluster_change(&mut self) {
        log_failure(self.follow_plan());
        log_failure(self.update());
    }

    /// What happens in the kernel is logged, and followed where it is about listeners.
    pub fn on_events(&mut self, events: &[Event]) {
        let mut listeners_changed = false;
        for event in events {
            event_log::log(event, &services::name(&self.writer.tables, event.service));
            match EventKind::from_number(event.kind) {
                Some(EventKind::Refused) => {
                    if let Some(port) = services::port_of(&self.writer.tables, event.service) {
                        let source = event.address.into();
                        self.mode.on_refusal(event.netns, port, source);
                    }
                }
                Some(_) => listeners_changed = true,
                None => {}
            }
        }
        if listeners_changed {
            log_failure(self.update());
        }
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
            None => info!("reloaded {}", path.display()),
            Some(error) => error!("{error}"),
        }
        reloaded
    }

    fn put_file_in_force(&mut self, path: &Path) -> Result<()> {
        self.reconfigure(path)
            .context("the configuration was not reloaded, the old one stays in force")?;
        self.beat();
        let followed = self.follow_plan();
        let updated = self.update();
        self.in_part = followed.is_err() || updated.is_err();
        followed
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
        self.fail_open_after = config.fail_open_after;
        self.ticks = ticks(config.fail_open_after);
        // Whatever the maps hold, it is written again.
        self.plan = None;
        self.failed = None;
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

    /// Puts in force what the maps should hold by now. Listeners on other ports or in other network
    /// namespaces than before are registered with their connections; true: that was done.
    fn follow_plan(&mut self) -> Result<bool> {
        self.mode.refresh();
        let Some(plan) = self.mode.plan(&self.guarded, &self.writer)? else {
            return Ok(false);
        };
        let is_held_back = |failed: &FailedPlan| failed.holds_back(&plan);
        if self.plan.as_ref() == Some(&plan) || self.failed.as_ref().is_some_and(is_held_back) {
            return Ok(false);
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

    /// True: listeners were registered.
    fn put_in_force(&mut self, before: Option<&Plan>, plan: &Plan) -> Result<bool> {
        let other_listeners = before.is_none_or(|before| {
            before.ports_listened_on() != plan.ports_listened_on() || before.netns != plan.netns
        });
        let left_out = self.writer.apply(Some(plan))?;
        if other_listeners {
            self.audit(Scope::Everywhere)?;
            self.guarded.attach(&mut self.writer)?;
        }
        ensure!(left_out.is_empty(), no_room(&left_out));
        Ok(other_listeners)
    }

    /// Follows the listeners that have come and gone.
    fn update(&mut self) -> Result<()> {
        for freed in self.writer.empty.free(&mut self.writer.tables)? {
            let slot = freed.slot();
            debug!("slot {slot} is free: its last connection has left");
        }
        // `steer` before quotas: the backends of a newly guarded network namespace are confirmed by
        // their quotas, and active from then on.
        self.mode.attach(&mut self.guarded, &mut self.writer)?;
        self.apply_quotas()?;
        self.guarded.detach_unwanted(&mut self.writer)?;
        self.writer.loader.follow_logs();
        Ok(())
    }

    fn apply_quotas(&mut self) -> Result<()> {
        self.mode.apply_quotas(&self.guarded, &mut self.writer)
    }

    fn beat(&self) {
        self.writer.tables.beat(self.fail_open_after);
    }

    /// Compares the counts with the socket table, so seldom that it takes only a small part of one
    /// processor.
    fn audit(&mut self, scope: Scope) -> Result<()> {
        let before = clock::processor_time();
        let audited = self.guarded.audit(&mut self.writer, scope);
        let cost = clock::processor_time().saturating_sub(before);
        self.next_audit = Instant::now() + SHORTEST_PAUSE;
        audited?;
        let totals = self.writer.audit.end(&mut self.writer.tables, cost)?;
        debug!(
            "audit {}: {:.1} ms of processor time, drift {}, {} repairs so far",
            totals.checks,
            cost.as_secs_f64() * 1e3,
            totals.drift,
            totals.repairs
        );
        let share = match scope {
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
    let mut ticks = interval(TICK.min(fail_open_after / BEATS));
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
