//! `balancer rebalance`

use anyhow::Result;
use clap::Args;

use super::{Place, output::print};
use crate::api::Request;

/// Show what should be moved so that backends are even, and why not more (changes nothing)
///
/// The daemon moves connections by itself where a service has `rebalance: on`, which is the default
/// of virtual ports. This shows its last decision for each backend. Needs the daemon.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Example:
  balancer rebalance")]
pub(super) struct Rebalance {
    /// Says that nothing is to be done, which is so without it, too
    #[arg(long)]
    dry_run: bool,
}

impl Rebalance {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let Self { dry_run: _ } = self;
        let message = place.must_ask(&Request::Rebalancing, "decides what moves")?;
        print(&format!("{message}\n"))
    }
}
