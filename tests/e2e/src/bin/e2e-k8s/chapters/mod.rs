//! The story: what happens, and what must be seen.

mod agents;
mod api;
mod change;
pub mod install;
mod node;
mod pods;
pub mod uninstall;
mod without;

use anyhow::Result;
use testkit::scenario::Report;

use crate::world::World;

/// Plays it from the first to the last chapter.
///
/// # Errors
/// When it can't go on. Differences are in the report.
pub fn play(world: &mut World, report: &mut Report) -> Result<()> {
    for chapter in [
        without::play,
        install::play,
        change::play,
        agents::play,
        pods::play,
        api::play,
        node::play,
        uninstall::play,
    ] {
        let played = chapter(world, report);
        // Pods take their logs with them.
        world.keep_logs();
        played?;
    }
    Ok(())
}
