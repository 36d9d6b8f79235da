//! Other balancers on this machine that would decide about the same connections.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use tracing::warn;

use crate::config::Service;
use crate::dataplane::{self, DaemonNotes, Link, Paths, ServiceSnapshot, Snapshot};
use crate::sys::file_id::FileId;

/// Where state directories are by default.
const USUAL: &str = "/sys/fs/bpf";

/// Makes sure that no other data plane has a port of these services in one of these network
/// namespaces. Those in other places than ours and the usual one are not found.
///
/// # Errors
/// When one has: names it, and its daemon.
pub fn ensure_sole(services: &[Service], netns: &[u64], own: &Paths) -> Result<()> {
    for other in beside(own).iter().filter(|other| guards_any(other, netns)) {
        let place = other.state_dir().display();
        let theirs = match read(other) {
            Ok(snapshot) => snapshot.map_or_else(Vec::new, |snapshot| snapshot.services),
            Err(error) => {
                warn!(
                    "the balancer with its state in {place} guards the same network namespace; \
                     whether it has the same ports is not known: {error:#}"
                );
                continue;
            }
        };
        let Some((service, theirs)) = same_port(services, &theirs) else {
            continue;
        };
        let daemon = DaemonNotes::read(other).running;
        let daemon = daemon.map_or_else(
            || "no daemon runs there".to_owned(),
            |pid| format!("process {pid}"),
        );
        bail!(
            "the balancer with its state in {place} ({daemon}) has port {} in this network \
             namespace already, as service `{}`: it and `{}` would decide about the same \
             connections. Take it out first (`balancer unload --state-dir {place}`, with its own \
             --admin-socket), or choose another port",
            service.port,
            theirs.name,
            service.name
        );
    }
    Ok(())
}

/// The data planes in the same directory as this one and in the usual one.
fn beside(own: &Paths) -> Vec<Paths> {
    let file = FileId::at(own.state_dir()).ok();
    let parents = [own.state_dir().parent(), Some(Path::new(USUAL))];
    let entries = parents
        .into_iter()
        .flatten()
        .filter_map(|parent| fs::read_dir(parent).ok());
    let mut directories: Vec<PathBuf> = entries
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .filter(|path| FileId::at(path).ok() != file)
        .collect();
    directories.sort();
    directories.dedup();
    directories.iter().map(|path| Paths::new(path)).collect()
}

/// Whether `steer` of a data plane, whatever its layout, is attached to one of them.
fn guards_any(paths: &Paths, netns: &[u64]) -> bool {
    let mut layouts = paths.others().unwrap_or_default();
    layouts.push(paths.current());
    let links = layouts
        .iter()
        .filter_map(|layout| Paths::links(layout).ok());
    let mut guarded = links.flatten().filter_map(|link: Link| link.netns());
    guarded.any(|cookie| netns.contains(&cookie))
}

fn read(paths: &Paths) -> Result<Option<Snapshot>> {
    let reader = dataplane::open(paths)?;
    reader.map(|reader| reader.snapshot()).transpose()
}

/// The first of ours that a client could mean when it connects to one of theirs.
fn same_port<'a, 'b>(
    ours: &'a [Service],
    theirs: &'b [ServiceSnapshot],
) -> Option<(&'a Service, &'b ServiceSnapshot)> {
    ours.iter().find_map(|service| {
        let same = |other: &&ServiceSnapshot| {
            let addresses = service.address.zip(other.address);
            service.port == other.port && addresses.is_none_or(|(one, other)| one == other)
        };
        Some((service, theirs.iter().find(same)?))
    })
}
