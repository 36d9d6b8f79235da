//! Where connects of this node go: the plan of the mode, what is known of loads, and the maps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{EndpointGroup, Placed, Published};
use tracing::warn;

use super::mode::Mode;
use crate::config::Effect;
use crate::dataplane::endpoints::{Assigned, Known};
use crate::dataplane::{Placing, Writer};
use crate::place::{GroupKnowledge, GroupMemory, GroupPlan, PlacePlan};
use crate::sys::clock;

/// The daemon's part in placing.
#[derive(Debug)]
pub struct Places {
    /// The start of the times in `memories`.
    started: Instant,
    /// What is remembered of each group, by its name.
    memories: BTreeMap<String, GroupMemory>,
    /// What was said last of what there is no room for.
    said: Vec<String>,
    /// When the kernel last refused the programs, for those of somebody else.
    refused: Option<Instant>,
}

/// How long after a refusal the programs are tried again: loading them takes a while.
const RETRY: Duration = Duration::from_secs(30);

impl Places {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            memories: BTreeMap::new(),
            said: Vec::new(),
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
        self.say_left_out(writer.endpoints.left_out());
        let any = plan.groups.iter().any(|group| !group.frontends.is_empty());
        self.attach(any, writer)
    }

    /// Attaches the programs that place while there is a frontend.
    fn attach(&mut self, any: bool, writer: &mut Writer) -> Result<()> {
        let held_back = self.refused.is_some_and(|at| at.elapsed() < RETRY);
        if any && held_back {
            return Ok(());
        }
        let placing = writer.set_placing(any)?;
        self.refused = matches!(placing, Placing::Refused(_)).then(Instant::now);
        Ok(())
    }

    /// Says once what there is no room for.
    fn say_left_out(&mut self, left_out: &[String]) {
        for problem in left_out.iter().filter(|one| !self.said.contains(one)) {
            warn!("{problem}");
        }
        self.said = left_out.to_vec();
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
