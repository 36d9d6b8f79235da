//! Where connects of this node go: the plan of the mode, what is known of loads, and the maps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{EndpointGroup, Placed, Published};
use tracing::warn;

use super::mode::Mode;
use crate::config::Effect;
use crate::dataplane::endpoints::{Assigned, Known};
use crate::dataplane::{Paths, Placing, PlacingNotes, Writer};
use crate::place::{GroupKnowledge, GroupMemory, GroupPlan, PlacePlan};
use crate::sys::clock;

/// The daemon's part in placing.
#[derive(Debug)]
pub struct Places {
    /// The start of the times in `memories`.
    started: Instant,
    /// What is remembered of each group, by its name.
    memories: BTreeMap<String, GroupMemory>,
    /// What keeps connects from being placed, as it was noted last; `None`: nothing was yet.
    noted: Option<PlacingNotes>,
    /// When the programs were last refused, and why.
    refused: Option<(Instant, String)>,
}

/// How long after a refusal the programs are tried again: loading them takes a while.
const RETRY: Duration = Duration::from_secs(30);

impl Places {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            memories: BTreeMap::new(),
            noted: None,
            refused: None,
        }
    }

    /// Puts in force what this node should place by now, and what is known of loads. To be called
    /// once a second, and when the plan may have changed. Where the plan is not known yet, what an
    /// earlier daemon has put in force stays.
    ///
    /// # Errors
    /// When a map can't be read or changed, or the kernel refuses a program.
    pub fn follow(&mut self, mode: &mut Mode, effect: Effect, writer: &mut Writer) -> Result<()> {
        match mode.place_plan(writer)? {
            Some(plan) => self.put_in_force(&plan.within(effect), writer),
            None => Ok(()),
        }
    }

    fn put_in_force(&mut self, plan: &PlacePlan, writer: &mut Writer) -> Result<()> {
        let tables = &mut writer.tables.place;
        let assigned = writer.endpoints.assign(tables, plan)?;
        let now = self.started.elapsed();
        let known = plan.groups.iter().zip(&assigned).map(|(plan, assigned)| {
            let own = own(writer, assigned);
            let memory = self.memories.entry(plan.name.clone()).or_default();
            known(plan, memory.know(plan, &own, now))
        });
        let known: Vec<Known> = known.collect();
        self.memories
            .retain(|name, _| plan.groups.iter().any(|group| group.name == *name));
        let tables = &mut writer.tables.place;
        writer
            .endpoints
            .put_in_force(tables, plan, &assigned, &known)?;
        let any = plan.groups.iter().any(GroupPlan::has_frontends);
        let attached = self.attach(any, writer);
        let now = PlacingNotes {
            refused: self.refused.as_ref().map(|(_, why)| why.clone()),
            left_out: writer.endpoints.left_out().to_vec(),
        };
        self.note(now, writer.loader.paths());
        attached
    }

    /// What keeps connects of this node from being placed as they should be.
    pub fn notes(&self) -> PlacingNotes {
        self.noted.clone().unwrap_or_default()
    }

    /// Why no connect of this node is placed, for the report to the other daemons; `None`: the
    /// kernel has refused nothing.
    pub fn problem(&self) -> Option<String> {
        let why = self.notes().refused?;
        Some(format!("connects of its clients are not placed: {why}"))
    }

    /// Tries at once what was refused and waits.
    pub fn try_again(&mut self) {
        self.refused = None;
    }

    /// Attaches the programs that place while there is a frontend.
    fn attach(&mut self, any: bool, writer: &mut Writer) -> Result<()> {
        let held_back = self
            .refused
            .as_ref()
            .is_some_and(|(at, _)| at.elapsed() < RETRY);
        if any && held_back {
            return Ok(());
        }
        self.refused = match writer.set_placing(any)? {
            Placing::Refused(why) => Some((Instant::now(), why)),
            Placing::On | Placing::Off => None,
        };
        Ok(())
    }

    /// Notes what keeps connects from being placed where it has changed, and says once what there
    /// is no room for. (Why the programs were refused is said already.)
    fn note(&mut self, now: PlacingNotes, paths: &Paths) {
        if self.noted.as_ref() == Some(&now) {
            return;
        }
        let said = self.noted.take().unwrap_or_default();
        for problem in now
            .left_out
            .iter()
            .filter(|one| !said.left_out.contains(one))
        {
            warn!("{problem}");
        }
        if let Err(error) = now.write(paths) {
            warn!("`status` can't show what keeps connects from being placed: {error}");
        }
        self.noted = Some(now);
    }
}

/// The connections that this node has placed on each endpoint of a group.
fn own(writer: &Writer, assigned: &Assigned) -> Vec<u64> {
    let own = |index: &Option<u32>| {
        index.map_or(0, |index| {
            Placed::count(writer.tables.place.placed(index).established)
        })
    };
    assigned.endpoints.iter().map(own).collect()
}

fn known(plan: &GroupPlan, knowledge: GroupKnowledge) -> Known {
    let now = clock::monotonic_ns();
    let in_ns = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
    let group = EndpointGroup {
        level: knowledge.level,
        start: knowledge.start,
        lost_below: knowledge.lost_below,
        known_until_ns: knowledge
            .known_for
            .map_or(u64::MAX, |span| now.saturating_add(in_ns(span))),
    };
    let endpoints = plan.endpoints.iter().zip(knowledge.others);
    let published = endpoints.map(|(endpoint, others)| match endpoint.published {
        None => Published {
            others,
            ..Published::default()
        },
        Some(published) => Published {
            others,
            connections: published.connections,
            counted_ns: now.saturating_sub(in_ns(published.age)).max(1),
        },
    });
    let published = published.collect();
    Known { group, published }
}
