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

/// Runs the steps in their order.
///
/// # Errors
/// When it can't go on. Differences are in the report.
pub fn run(fixture: &mut Fixture, report: &mut Report) -> Result<()> {
    for step in [
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
    ] {
        let outcome = step(fixture, report);
        // Pods take their logs with them.
        fixture.keep_logs();
        outcome?;
    }
    Ok(())
}
