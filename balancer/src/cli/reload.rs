//! `balancer reload`

use anyhow::Result;
use clap::Args;

use super::{Place, output::print};
use crate::api::Request;

/// Have the daemon read its configuration file again (changes the kernel)
///
/// As the signal HUP does, and with an answer: the new file is in force when this returns. A bad
/// file is reported, and the old one stays in force. Needs the daemon.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Example:
  balancer reload")]
pub(super) struct Reload {}

impl Reload {
    #[expect(clippy::unused_self, reason = "as every verb has it")]
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let message = place.must_ask(&Request::Reload, "reads its file again")?;
        print(&format!("{message}\n"))
    }
}
