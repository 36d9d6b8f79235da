//! Which backends are named and don't listen, and since when.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use balancer_common::abi::{Backend, ServicePort};
use tracing::{info, warn};

use crate::dataplane::down::{DownNote, not_listened_on, read_notes, write_notes};
use crate::dataplane::{Writer, services};
use crate::sys::clock;

/// A backend that is down for so long is logged: a server that is started again is away for less.
const LOGGED_AFTER: Duration = Duration::from_secs(10);

/// A backend, by the name of its service and its address.
pub type Named = (String, SocketAddr);

/// The backends that are down.
#[derive(Debug, Default)]
pub struct DownBackends {
    /// Since when each is down, ns of `CLOCK_MONOTONIC`, and whether the log says so. `None`: what
    /// an earlier daemon has noted was not read yet.
    since: Option<BTreeMap<Named, (u64, bool)>>,
}

impl DownBackends {
    /// Takes in which backends are down now, and notes it where it has changed.
    pub fn update(&mut self, writer: &Writer, down: BTreeSet<Named>) {
        let paths = writer.loader.paths();
        let noted = || {
            let noted = read_notes(paths).into_iter();
            noted
                .map(|note| ((note.service, note.address), (note.since_ns, true)))
                .collect()
        };
        let before = self.since.take();
        let is_first = before.is_none();
        let mut before = before.unwrap_or_else(noted);
        let now = clock::monotonic_ns();
        let mut changed = false;
        let since: BTreeMap<Named, (u64, bool)> = down
            .into_iter()
            .map(|named| {
                let known = before.remove(&named);
                changed |= known.is_none();
                (named, known.unwrap_or((now, false)))
            })
            .collect();
        changed |= !before.is_empty();
        for ((service, address), (_, logged)) in before {
            if logged && !is_first {
                info!("{service}: {address} is not down any more");
            }
        }
        let since = self.since.insert(since);
        for ((service, address), (since_ns, logged)) in since.iter_mut() {
            let age = Duration::from_nanos(now.saturating_sub(*since_ns));
            if !*logged && age >= LOGGED_AFTER {
                *logged = true;
                warn!(
                    "{service}: {address} is down: nobody has listened there for {} s. It joins by \
                     itself when it listens",
                    age.as_secs()
                );
            }
        }
        if changed {
            note(writer, since);
        }
    }
}

fn note(writer: &Writer, since: &BTreeMap<Named, (u64, bool)>) {
    let notes = since
        .iter()
        .map(|((service, address), (since_ns, _))| DownNote {
            service: service.clone(),
            address: *address,
            since_ns: *since_ns,
        });
    if let Err(error) = write_notes(writer.loader.paths(), &notes.collect::<Vec<_>>()) {
        warn!("`status` can't show since when backends are down: {error}");
    }
}

/// The backends of virtual ports that the file lists and nobody listens as.
///
/// # Errors
/// When a map can't be read.
pub fn of_file(writer: &Writer) -> Result<BTreeSet<Named>> {
    let slots = writer.tables.slots()?;
    let listed = writer.rules.listed();
    let mut down = BTreeSet::new();
    for (id, info) in writer.tables.named_services()? {
        if info.flags & ServicePort::VIRTUAL == 0 {
            continue;
        }
        let backends = slots.iter().map(|view| &view.member.backend);
        let listening: Vec<&Backend> = backends.filter(|backend| backend.service == id).collect();
        let named = listed.get(&id).into_iter().flatten();
        let name = services::name(&writer.tables, id);
        down.extend(
            not_listened_on(named, &listening)
                .into_iter()
                .map(|address| (name.clone(), address)),
        );
    }
    Ok(down)
}
