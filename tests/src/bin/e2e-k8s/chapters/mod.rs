//! The story: what happens, and what must be seen.

mod agents;
mod api;
mod change;
mod install;
mod node;
mod pods;
mod uninstall;
mod without;

use anyhow::Result;
use balancer_tests::story::Report;

use crate::world::World;

/// Plays it from the first to the last chapter.
///
/// # Errors
/// When it can't go on. Differences are in the report.
pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    without::play(world, report)?;
    install::play(world, report)?;
    change::play(world, report)?;
    agents::play(world, report)?;
    pods::play(world, report)?;
    api::play(world, report)?;
    node::play(world, report)?;
    uninstall::play(world, report)
}
