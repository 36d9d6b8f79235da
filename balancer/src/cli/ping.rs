//! `balancer ping`

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use super::{Place, output::print};
use crate::api::Request;

/// Ask the daemon whether it lives (changes nothing)
///
/// It answers once it has started, and between any two pieces of its work. Exit code 1 when there
/// is none, or none answers in time: made for probes of Kubernetes.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Example:
  balancer ping && echo it lives")]
pub(super) struct Ping {
    /// How long it may take to answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    within: u8,
}

impl Ping {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let within = Duration::from_secs(self.within.into());
        match place.ask_within(&Request::Ping, within)? {
            Some(message) => print(&format!("{message}\n")),
            None => bail!(
                "no daemon answers at {}: start it with `balancer run --config FILE`, or give its socket with --admin-socket",
                place.admin_socket.display()
            ),
        }
    }
}
