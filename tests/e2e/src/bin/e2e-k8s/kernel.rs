//! What the balancer has in the kernel, on each node.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;

use crate::cluster::TestCluster;
use crate::timestamp;

const PINS: &str = "/sys/fs/bpf/balancer";

/// When `steer` was attached to the netns with that cookie; `None`: it is not.
pub fn guarded_since(cluster: &TestCluster, node: &str, cookie: u64) -> Option<u64> {
    let name = format!("link_steer_{cookie}");
    let pin = pins(cluster, node)
        .into_iter()
        .find(|pin| pin.file_name().is_some_and(|own| *own == *name))?;
    timestamp::of_file(&pin).ok()
}

/// Everything that is pinned on a node.
pub fn pins(cluster: &TestCluster, node: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(&cluster.file_on(node, PINS), &mut found);
    found
}

/// Whether the directory of the pins is there.
pub fn is_there(cluster: &TestCluster, node: &str) -> bool {
    cluster.file_on(node, PINS).exists()
}

/// The programs that are attached by links that are pinned on a node.
pub fn programs(cluster: &TestCluster, node: &str) -> BTreeSet<u32> {
    let pins = pins(cluster, node);
    // The kernel would answer for a map, too, and with another number.
    let links = pins.iter().filter(|pin| {
        pin.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("link_"))
    });
    links
        .filter_map(|pin| {
            let link = FdLink::from(PinnedLink::from_pin(pin).ok()?);
            Some(link.info().ok()?.program_id())
        })
        .collect()
}

/// Those of the programs that the kernel still has.
///
/// # Errors
/// When the kernel does not list its programs.
pub fn still_loaded(programs: &BTreeSet<u32>) -> Result<usize> {
    let loaded: BTreeSet<u32> = loaded_programs()
        .map(|program| program.map(|program| program.id()))
        .collect::<Result<_, _>>()
        .context("cannot list the programs in the kernel")?;
    Ok(programs.intersection(&loaded).count())
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), found);
        } else {
            found.push(entry.path());
        }
    }
}
