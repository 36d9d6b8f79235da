//! The scenario: what happens, and what must be seen.

mod api;
mod change;
mod daemons;
mod every_node;
pub mod install;
mod node;
mod place;
mod pods;
pub mod uninstall;
mod without;

use anyhow::Result;
use testkit::scenario::Report;

use crate::fixture::Fixture;

type Step = fn(&mut Fixture, &mut Report) -> Result<()>;

/// The steps in their order: all, or the main ones.
pub fn chosen(short: bool) -> &'static [Step] {
    if short {
        &[
            without::run_short,
            install::run,
            daemons::replaced,
            place::run_short,
            uninstall::run,
        ]
    } else {
        &[
            without::run,
            install::run,
            change::run,
            daemons::run,
            pods::run,
            api::run,
            node::run,
            place::run,
            uninstall::run,
            every_node::run,
        ]
    }
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
