//! `balancer drain`, `balancer undrain`

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, bail};
use clap::Args;

use super::output::{print, say};
use super::{Place, explain};
use crate::api::Request;
use crate::config::parse_time;
use crate::dataplane::BackendSnapshot;

/// Between two looks at how far it is.
const PAUSE: Duration = Duration::from_millis(500);

/// Take a backend out: no new connections, and the present ones are moved (changes the kernel)
///
/// Waits until its server has no connection left, and shows how far it is. Stays in force until
/// `balancer undrain`, also when the daemon starts anew. Connections of exempt sources stay. In a
/// cluster no node places clients on its pod, and it is asked for on the pod's own node. Needs the
/// daemon.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer drain 3                    the server of the backend in slot 3
  balancer drain 127.0.0.1:21801 --timeout 5m
  balancer drain skywalking/oap-1     all ports of a pod of this node

Exit codes: 0 empty, 1 not empty in time (it stays drained), 2 wrong usage.")]
pub(super) struct Drain {
    /// The backend: its slot, its address and port, see `balancer status`, or a pod as
    /// NAMESPACE/NAME
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
Examples:
  balancer undrain 3
  balancer undrain skywalking/oap-1")]
pub(super) struct Undrain {
    /// The backend: its slot, its address and port, see `balancer status`, or a pod as
    /// NAMESPACE/NAME
    backend: String,
}

impl Drain {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let backends = ask_each(place, &self.backend, |backend| Request::Drain { backend })?;
        let until = Instant::now() + self.timeout;
        let mut shown = None;
        while !self.timeout.is_zero() {
            let left = left(place, &backends)?;
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
}

impl Undrain {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        ask_each(place, &self.backend, |backend| Request::Undrain { backend })?;
        Ok(())
    }
}

/// Asks the daemon about a backend, of a pod about each of its ports; returns those that it has
/// done something about. A port that is refused keeps the others from nothing, and is named.
fn ask_each(
    place: &Place,
    backend: &str,
    request: impl Fn(String) -> Request,
) -> Result<Vec<String>> {
    let (mut done, mut refused) = (Vec::new(), Vec::new());
    for backend in slots_or_address(place, backend)? {
        match place.must_ask(&request(backend.clone()), "drains backends") {
            Ok(message) => {
                print(&format!("{message}\n"))?;
                done.push(backend);
            }
            Err(error) => refused.push(error),
        }
    }
    let mut refused = refused.into_iter();
    if done.is_empty()
        && let Some(error) = refused.next()
    {
        return Err(error);
    }
    for error in refused {
        say(&format!("left as it was: {error:#}"));
    }
    Ok(done)
}

/// What the daemon knows a backend by: of a pod of this node the slot for each of its ports.
pub(super) fn slots_or_address(place: &Place, backend: &str) -> Result<Vec<String>> {
    if !backend.contains('/') {
        return Ok(vec![backend.to_owned()]);
    }
    let pod = explain::pod(backend).map_err(Error::msg)?;
    let slots = explain::slots_of(&place.ask_for_cluster()?, &pod)?;
    Ok(slots.iter().map(u32::to_string).collect())
}

/// How many connections the drained servers still have. Those that are not there have ended.
fn left(place: &Place, drained: &[String]) -> Result<u32> {
    let snapshot = place.reader()?.snapshot();
    let snapshot = snapshot.context("can't read the balancer's maps")?;
    let services = snapshot.services.iter();
    let backends: Vec<_> = services.flat_map(|service| &service.backends).collect();
    let left = drained.iter().map(|wanted| left_of(&backends, wanted));
    Ok(left.sum())
}

fn left_of(backends: &[&BackendSnapshot], wanted: &str) -> u32 {
    let mut named = backends.iter().filter(|backend| {
        backend.slot.to_string() == wanted || backend.address.to_string() == wanted
    });
    let Some(named) = named.next() else {
        return 0;
    };
    let server = named.server.map(|server| server.first_slot);
    let of_server = backends.iter().filter(|backend| {
        backend.slot == named.slot
            || server.is_some() && backend.server.map(|one| one.first_slot) == server
    });
    of_server
        .map(|backend| backend.established.saturating_sub(backend.exempt))
        .sum()
}
