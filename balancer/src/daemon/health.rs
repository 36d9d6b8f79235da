//! Looking at the health of backends once a second.

use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{BackendState, HealthState, ticks};
use tracing::{debug, info, warn};

use super::attach::{GuardedNetns, LookPass};
use crate::dataplane::look::Depth;
use crate::dataplane::{SlotView, Writer, services};
use crate::health::{HealthChanges, Line, Seen};
use crate::sys::clock;

/// The time between two looks: a little less than a tick, so that each tick finds one due.
const PAUSE: Duration = Duration::from_millis(900);
/// The part of the time that looks at connections may take is one in this many.
const SHARE: u32 = 100;
/// The longest time between two looks at connections, however long they take.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The looks at backends.
pub struct HealthWatch {
    /// The look that is under way.
    pass: Option<LookPass>,
    /// The next look is not due before.
    next: Instant,
    /// The next one that is also at connections is not due before.
    next_connections: Instant,
    /// How long a look at connections took last, in processor time.
    cost: Duration,
    /// What the log has told.
    changes: HealthChanges,
    started: Instant,
    /// The last look failed, and the log says so.
    failed: bool,
}

impl HealthWatch {
    /// Looks that have not begun.
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            pass: None,
            next: now,
            next_connections: now,
            cost: Duration::ZERO,
            changes: HealthChanges::default(),
            started: now,
            failed: false,
        }
    }

    /// Whether a look is under way.
    pub const fn is_under_way(&self) -> bool {
        self.pass.is_some()
    }

    /// Begins a look where one is due.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn begin(&mut self, guarded: &GuardedNetns, writer: &mut Writer) -> Result<()> {
        let now = Instant::now();
        if self.pass.is_some() || now < self.next {
            return Ok(());
        }
        self.next = now + PAUSE;
        let depth = if now < self.next_connections {
            Depth::Queues
        } else {
            Depth::Connections(self.pause() + PAUSE)
        };
        self.pass = Some(guarded.begin_look(writer, depth)?);
        Ok(())
    }

    /// Looking at connections is done so seldom that it takes only a small part of one processor.
    fn pause(&self) -> Duration {
        (self.cost * SHARE).clamp(PAUSE, LONGEST_PAUSE)
    }

    /// Goes on with the look that is under way until the round is over.
    ///
    /// # Errors
    /// When the slots can't be read.
    pub fn go_on(&mut self, guarded: &GuardedNetns, writer: &mut Writer) -> Result<()> {
        let Some(mut pass) = self.pass.take() else {
            return Ok(());
        };
        let before = clock::processor_time();
        let done = guarded.look(writer, &mut pass);
        pass.cost += clock::processor_time().saturating_sub(before);
        if !done {
            self.pass = Some(pass);
            return Ok(());
        }
        if matches!(pass.depth, Depth::Connections(_)) {
            self.cost = pass.cost;
            self.next_connections = Instant::now() + self.pause();
            debug!(
                "looked at the connections of backends: {:.1} ms of processor time",
                pass.cost.as_secs_f64() * 1e3
            );
        }
        self.tell_of(pass.failed.as_ref());
        self.log_changes(writer)
    }

    /// A look that fails is tried again at the next tick, and said once.
    fn tell_of(&mut self, failed: Option<&anyhow::Error>) {
        let before = std::mem::replace(&mut self.failed, failed.is_some());
        match failed {
            Some(error) if !before => warn!(
                "cannot look at the health of backends, which is tried again each second: {error:#}"
            ),
            None if before => info!("the health of backends can be looked at again"),
            _ => {}
        }
    }

    fn log_changes(&mut self, writer: &Writer) -> Result<()> {
        let now = ticks(clock::monotonic_ns());
        let slots = writer.tables.slots()?;
        let listening = slots
            .iter()
            .filter(|view| view.slot_state().is(BackendState::Active));
        let seen: Vec<Seen> = listening.map(|view| seen(writer, view, now)).collect();
        for line in self.changes.update(self.started.elapsed(), &seen) {
            match line {
                Line::Bad(line) => warn!("{line}"),
                Line::Good(line) => info!("{line}"),
            }
        }
        Ok(())
    }
}

fn seen(writer: &Writer, view: &SlotView, now: u64) -> Seen {
    let backend = &view.member.backend;
    let (state, age) = (view.unhealthy(now)).unwrap_or((HealthState::Serving, Duration::ZERO));
    Seen {
        id: view.id(),
        name: format!(
            "{}: {}",
            services::name(&writer.tables, backend.service),
            view.name()
        ),
        state,
        age,
    }
}
