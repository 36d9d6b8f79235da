//! `balancer shed`

use anyhow::{Result, ensure};
use clap::Args;

use super::{Place, drain::slots_or_address, output::print};
use crate::api::Request;

/// Have some connections of a backend moved, whichever (changes the kernel)
///
/// Their clients are told to connect again, as gently as their protocol allows: no call is lost
/// where it is gRPC without TLS. They go where any new connection goes. Needs the daemon.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer shed 3 20                  20 connections of the backend in slot 3
  balancer shed 127.0.0.1:21801 1     one of the backend at this address
  balancer shed skywalking/oap-1 5    five of a pod of this node")]
pub(super) struct Shed {
    /// The backend: its slot, its address and port, see `balancer status`, or a pod as
    /// NAMESPACE/NAME
    backend: String,
    /// How many connections
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connections: u32,
}

impl Shed {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let backends = slots_or_address(place, &self.backend)?;
        ensure!(
            backends.len() == 1,
            "{} serves several ports: name one by its slot, one of {}",
            self.backend,
            backends.join(", ")
        );
        let request = Request::Shed {
            backend: backends.concat(),
            connections: self.connections,
        };
        let message = place.must_ask(&request, "moves connections")?;
        print(&format!("{message}\n"))
    }
}
