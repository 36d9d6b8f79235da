//! Making, replacing and removing what is pinned.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use nix::unistd::geteuid;
use tracing::info;

use super::Paths;
use super::lock::{Held, Lock};
use crate::discover::ensure_bpffs;
use crate::sys::bpf;

/// Takes the data plane of a state directory out of the kernel; false: there was none.
///
/// # Errors
/// When a daemon holds it, or a pin can't be removed.
pub fn unload(paths: &Paths) -> Result<bool> {
    if !paths.state_dir().exists() {
        return Ok(false);
    }
    let there = paths.current().exists() || paths.staging().exists();
    match Lock::take(paths)? {
        Held::Mine(lock) => {
            remove_data_plane(paths)?;
            drop(lock);
            Ok(there)
        }
        Held::ByOther(pid) => bail!(
            "the data plane in {} is held by {}, which does not answer on its admin socket: end that process first",
            paths.state_dir().display(),
            holder(pid)
        ),
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(
        || "another process".to_owned(),
        |pid| format!("process {pid}"),
    )
}

pub(super) fn lock(paths: &Paths) -> Result<Lock> {
    if ensure_bpffs(paths.state_dir())? {
        info!("mounted the BPF file system");
    }
    make_directory(paths.state_dir())?;
    close_to_others(paths.state_dir()).with_context(|| {
        format!(
            "cannot use the state directory {}",
            paths.state_dir().display()
        )
    })?;
    match Lock::take(paths)? {
        Held::Mine(lock) => Ok(lock),
        Held::ByOther(pid) => bail!(
            "the data plane in {} already has a daemon: {} (a second one needs a --state-dir of its own)",
            paths.state_dir().display(),
            holder(pid)
        ),
    }
}

/// Replaces the program of a pinned link, without a moment in which there is none.
pub(super) fn replace(pin: &Path, program: BorrowedFd<'_>) -> Result<()> {
    let link = bpf::obj_get(pin)
        .with_context(|| format!("cannot open the pinned link {}", pin.display()))?;
    bpf::link_update(&link, program).with_context(|| {
        format!("cannot replace the program of {} (the namespace or cgroup may be gone: `balancer unload` clears it)", pin.display())
    })
}

pub(super) fn make_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| {
            format!(
                "cannot make the directory {} (are we root?)",
                path.display()
            )
        })
}

/// A directory that was there already may be open to others. The sticky bit means that it is meant to be, as the root of a BPF file
/// system is.
fn close_to_others(state_dir: &Path) -> Result<()> {
    let directory = fs::File::open(state_dir)?;
    let found = directory.metadata()?;
    ensure!(
        [0, geteuid().as_raw()].contains(&found.uid()),
        "it belongs to user {}, who could replace what is pinned there",
        found.uid()
    );
    if found.mode() & 0o077 != 0 {
        ensure!(
            found.mode() & 0o1000 == 0,
            "it is shared with others (mode {:o}): give one of its own below it",
            found.mode() & 0o7777
        );
        directory.set_permissions(fs::Permissions::from_mode(0o700))?;
        info!("closed {} to other users", state_dir.display());
    }
    Ok(())
}

/// The pins first that attach something, so that nothing runs on half of its maps.
pub(super) fn remove_directory(directory: &Path) -> Result<()> {
    let mut pins: Vec<PathBuf> = match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
    }
    .with_context(|| format!("cannot list {}", directory.display()))?;
    pins.sort_by_key(|path| {
        (
            Paths::netns_of(path).is_none(),
            Paths::cgroup_of(path).is_none(),
        )
    });
    for pin in pins {
        if Paths::netns_of(&pin).is_some() || Paths::cgroup_of(&pin).is_some() {
            detach(&pin)?;
        }
        remove_pin(&pin)?;
    }
    fs::remove_dir(directory)
        .with_context(|| format!("cannot remove the directory {}", directory.display()))
}

pub(super) fn remove_data_plane(paths: &Paths) -> Result<()> {
    remove_directory(&paths.current())?;
    remove_directory(&paths.staging())?;
    match fs::remove_dir(paths.state_dir()) {
        Ok(()) => Ok(()),
        // Another layout's pins, or somebody's own files, are not ours to remove.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::DirectoryNotEmpty | ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Err(error) => {
            Err(error).with_context(|| format!("cannot remove {}", paths.state_dir().display()))
        }
    }
}

pub(super) fn remove_other_pins(directory: &Path, unwanted: impl Fn(&Path) -> bool) -> Result<()> {
    for entry in
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let path = entry?.path();
        if unwanted(&path) {
            info!("detaching {}", path.display());
            detach(&path)?;
            remove_pin(&path)?;
        }
    }
    Ok(())
}

/// Ends what a pinned link does before its pin goes: without it, it would go on for a moment after.
fn detach(pin: &Path) -> Result<()> {
    bpf::obj_get(pin)
        .and_then(bpf::link_detach)
        .with_context(|| format!("cannot detach the link {}", pin.display()))
}

fn remove_pin(pin: &Path) -> Result<()> {
    fs::remove_file(pin).with_context(|| format!("cannot remove the pin {}", pin.display()))
}
