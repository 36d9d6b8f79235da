//! The scenario: what happens, and what must be seen.

mod agentless;
mod api;
mod change;
mod daemons;
mod every_node;
pub mod install;
mod node;
mod place;
mod pods;
mod six;
pub mod uninstall;
mod without;

use anyhow::Result;
use clap::ValueEnum;
use testkit::scenario::Report;

use crate::fixture::Fixture;

type Step = fn(&mut Fixture, &mut Report) -> Result<()>;

/// A part of the scenario that may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Chapter {
    /// OAPs are restarted, and their number changes.
    Change,
    /// Daemons end in every way.
    Daemons,
    /// The total follows from pods (after `daemons`).
    Pods,
    /// The API server is away, and a permission is missing (after `pods`).
    Api,
    /// A node dies, and comes back (after `daemons`).
    Node,
    /// Everybody is placed.
    Place,
    /// One node has no daemon.
    OneWithout,
    /// Nobody is placed.
    PlaceOff,
    /// The Service has an IPv6 address.
    Ipv6,
}

impl Chapter {
    /// All, in their order.
    const ALL: [(Self, Step); 9] = [
        (Self::Change, change::run),
        (Self::Daemons, daemons::run),
        (Self::Pods, pods::run),
        (Self::Api, api::run),
        (Self::Node, node::run),
        (Self::Place, place::run),
        (Self::OneWithout, agentless::run),
        (Self::PlaceOff, place::run_off),
        (Self::Ipv6, six::run),
    ];
}

/// The main steps.
pub fn main_ones() -> Vec<Step> {
    vec![
        without::run_short,
        install::run,
        daemons::replaced,
        place::run_short,
        uninstall::run,
    ]
}

/// All steps, or of the chapters only these, between installing and uninstalling.
pub fn all_or(only: &[Chapter]) -> Vec<Step> {
    let chosen = |chapter: &Chapter| only.is_empty() || only.contains(chapter);
    let chapters = Chapter::ALL.iter().filter(|(chapter, _)| chosen(chapter));
    let mut steps: Vec<Step> = vec![without::run, install::run];
    steps.extend(chapters.map(|(_, step)| *step));
    steps.push(uninstall::run);
    if only.is_empty() {
        steps.push(every_node::run);
    }
    steps
}

/// Runs steps.
///
/// # Errors
/// When it can't go on. Differences are in the report.
pub fn run(fixture: &mut Fixture, report: &mut Report, steps: &[Step]) -> Result<()> {
    for step in steps {
        let outcome = step(fixture, report);
        // Pods take their logs with them.
        fixture.keep_logs();
        outcome?;
    }
    Ok(())
}
