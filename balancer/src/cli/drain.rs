//! `balancer drain`, `balancer undrain`

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::{Place, output::print};
use crate::api::Request;
use crate::config::parse_time;

/// Between two looks at how far it is.
const PAUSE: Duration = Duration::from_millis(500);

/// Take a backend out: no new connections, and the present ones are moved (changes the kernel)
///
/// Waits until its server has no connection left, and shows how far it is. Stays in force until
/// `balancer undrain`, also when the daemon starts anew. Connections of exempt sources stay. Needs
/// the daemon.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer drain 3                    the server of the backend in slot 3
  balancer drain 127.0.0.1:21801 --timeout 5m

Exit codes: 0 empty, 1 not empty in time (it stays drained), 2 wrong usage.")]
pub(super) struct Drain {
    /// The backend: its slot, or its address and port, see `balancer status`
    backend: String,
    /// How long to wait until it is empty; 0s: not at all
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = parse_time)]
    timeout: Duration,
}

/// Put a drained backend back (changes the kernel)
///
/// It takes new connections again. Needs the daemon.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Example:
  balancer undrain 3")]
pub(super) struct Undrain {
    /// The backend: its slot, or its address and port, see `balancer status`
    backend: String,
}

impl Drain {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let backend = self.backend.clone();
        let message = place.must_ask(&Request::Drain { backend }, "drains backends")?;
        print(&format!("{message}\n"))?;
        let until = Instant::now() + self.timeout;
        let mut shown = None;
        while !self.timeout.is_zero() {
            let left = self.left(place)?;
            if shown != Some(left) {
                print(&format!("{left} connections are left\n"))?;
                shown = Some(left);
            }
            if left == 0 {
                return Ok(());
            }
            if Instant::now() >= until {
                bail!(
                    "{left} connections are left: it stays drained, and they are moved on as far \
                     as that can be done. The log of the daemon says why some stay; `move: close` \
                     ends calls that go on. `balancer undrain {}` takes new ones again",
                    self.backend
                );
            }
            sleep(PAUSE);
        }
        Ok(())
    }

    /// How many connections the drained server still has.
    fn left(&self, place: &Place) -> Result<u32> {
        let snapshot = place.reader()?.snapshot();
        let snapshot = snapshot.context("can't read the balancer's maps")?;
        let backends = snapshot
            .services
            .iter()
            .flat_map(|service| &service.backends);
        let named = backends.clone().find(|backend| {
            backend.slot.to_string() == self.backend || backend.address.to_string() == self.backend
        });
        let Some(named) = named else {
            // It has ended.
            return Ok(0);
        };
        let server = named.server.map(|server| server.first_slot);
        let of_server = backends.filter(|backend| {
            backend.slot == named.slot
                || server.is_some() && backend.server.map(|one| one.first_slot) == server
        });
        Ok(of_server
            .map(|backend| backend.established.saturating_sub(backend.exempt))
            .sum())
    }
}

impl Undrain {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let backend = self.backend.clone();
        let message = place.must_ask(&Request::Undrain { backend }, "drains backends")?;
        print(&format!("{message}\n"))
    }
}
