//! Making, replacing and removing what is pinned.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use aya_obj::generated::bpf_attach_type::{BPF_CGROUP_SOCK_OPS, BPF_SK_LOOKUP};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::unistd::geteuid;
use tracing::{info, warn};

use super::Paths;
use super::lock::{Held, Lock};
use super::paths::{Attachment, Link};
use crate::discover::ensure_bpffs;
use crate::sys::bpf::{self, LinkTarget, Object};

/// Takes the data plane of a state directory out of the kernel; false: there was none.
///
/// # Errors
/// When a daemon holds it, or a pin can't be removed.
pub fn unload(paths: &Paths) -> Result<bool> {
    if !paths.state_dir().exists() {
        return Ok(false);
    }
    match Lock::take(paths)? {
        Held::Mine(lock) => {
            let there = !all_directories(paths)?.is_empty();
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

/// Opens a pinned link of ours.
///
/// # Errors
/// When something else is pinned under its name: a link must never be changed that somebody else has made.
pub(super) fn open_link(link: &Link) -> Result<OwnedFd> {
    let file = bpf::obj_get(&link.pin).with_context(|| {
        format!(
            "cannot open the pinned link {} (is it a pin?)",
            link.pin.display()
        )
    })?;
    ensure!(
        Object::of(&file)? == Some(Object::Link),
        strange(link, "it is no link")
    );
    let info =
        bpf::link_info(&file).with_context(|| format!("cannot query {}", link.pin.display()))?;
    let fits = match (link.what, info.target) {
        (Attachment::Account(cgroup), LinkTarget::Cgroup { id, attach_type }) => {
            attach_type == BPF_CGROUP_SOCK_OPS as u32 && (id == cgroup || id == 0)
        }
        (Attachment::Steer(_), LinkTarget::Netns { attach_type, .. }) => {
            attach_type == BPF_SK_LOOKUP as u32
        }
        _ => false,
    };
    ensure!(fits, strange(link, "it is attached to something else"));
    Ok(file)
}

/// Opens a pinned link whose program is ours too, to put another one under it. Only `CAP_SYS_ADMIN` can find out about the
/// program; without it the link has to do.
///
/// # Errors
/// As [`open_link`].
pub(super) fn open_own_link(link: &Link) -> Result<OwnedFd> {
    let file = open_link(link)?;
    let program = bpf::link_program(&file)
        .and_then(bpf::prog_by_id)
        .and_then(bpf::prog_info);
    let name = match program {
        Ok(program) => program.name,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(file),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot query the program of {}", link.pin.display()));
        }
    };
    let expected = match link.what {
        Attachment::Account(_) => "account",
        Attachment::Steer(_) => "steer",
    };
    ensure!(
        name == expected,
        strange(link, &format!("its program is called {name}"))
    );
    Ok(file)
}

fn strange(link: &Link, what: &str) -> String {
    format!(
        "{} is not what the balancer has pinned there ({what}): look who made it; `balancer unload` removes the pin",
        link.pin.display()
    )
}

/// Whether what a link was attached to is gone.
pub(super) fn is_dead(link: impl std::os::fd::AsFd) -> Result<bool> {
    let info = bpf::link_info(link).context("cannot query a link")?;
    Ok(matches!(
        info.target,
        LinkTarget::Netns { inode: 0, .. } | LinkTarget::Cgroup { id: 0, .. }
    ))
}

/// Replaces the program of a pinned link, without a moment in which there is none.
pub(super) fn replace(link: &Link, program: BorrowedFd<'_>) -> Result<OwnedFd> {
    let file = open_own_link(link)?;
    bpf::link_update(&file, program).with_context(|| {
        format!(
            "cannot replace the program of {} (the namespace or cgroup may be gone: `balancer unload` clears it)",
            link.pin.display()
        )
    })?;
    Ok(file)
}

/// Gives a link that is pinned elsewhere its pin here, and takes the other one away.
pub(super) fn move_link(link: &OwnedFd, from: &Path, to: &Path) -> Result<()> {
    bpf::obj_pin(link, to).with_context(|| format!("cannot pin {}", to.display()))?;
    remove_pin(from)
}

/// Takes a link's other pin away that a daemon has left which died over [`move_link`]; a link of its own that has the same purpose as the one
/// at `to` goes with its pin.
pub(super) fn finish_move(link: &Link, file: &OwnedFd, to: &Path) -> Result<()> {
    let there = bpf::obj_get(to).with_context(|| format!("cannot open {}", to.display()))?;
    let id = |file: &OwnedFd| bpf::link_info(file).map(|info| info.id);
    if id(file)? == id(&there)? {
        remove_pin(&link.pin)
    } else {
        remove_link(link)
    }
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

/// Puts a directory in its place, where there must be none.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)
        .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
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

/// Removes a directory with everything in it: first what attaches something, so that nothing runs on half of its maps.
pub(super) fn remove_directory(directory: &Path) -> Result<()> {
    let mut entries: Vec<PathBuf> = match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
    }
    .with_context(|| format!("cannot list {}", directory.display()))?;
    entries.sort_by_key(|path| {
        (
            Paths::netns_of(path).is_none(),
            Paths::cgroup_of(path).is_none(),
        )
    });
    for entry in entries {
        if entry.is_dir() {
            remove_directory(&entry)?;
        } else {
            if let Some(link) = Link::at(entry.clone()) {
                detach(&link)?;
            }
            remove_pin(&entry)?;
        }
    }
    fs::remove_dir(directory)
        .with_context(|| format!("cannot remove the directory {}", directory.display()))
}

/// Every directory with pins of ours, whole or in part, in the order in which they are best removed.
fn all_directories(paths: &Paths) -> Result<Vec<PathBuf>> {
    let others = paths
        .others()
        .with_context(|| format!("cannot list {}", paths.state_dir().display()))?;
    let ours = [paths.removed(), paths.staging(), paths.current()];
    Ok(others
        .into_iter()
        .chain(ours)
        .filter(|directory| directory.exists())
        .collect())
}

pub(super) fn remove_data_plane(paths: &Paths) -> Result<()> {
    remove_directory(&paths.removed())?;
    if paths.current().exists() {
        // In one step: a daemon that is killed over this leaves nothing that looks whole and isn't.
        rename(&paths.current(), &paths.removed())?;
    }
    for directory in all_directories(paths)? {
        remove_directory(&directory)?;
    }
    match fs::remove_dir(paths.state_dir()) {
        Ok(()) => Ok(()),
        // Somebody's own files are not ours to remove.
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

pub(super) fn remove_link(link: &Link) -> Result<()> {
    info!("detaching {}", link.pin.display());
    detach(link)?;
    remove_pin(&link.pin)
}

/// Ends what a pinned link does before its pin goes: without it, it would go on for a moment after. What is no link of ours is left
/// alone.
fn detach(link: &Link) -> Result<()> {
    match open_link(link) {
        Ok(file) => bpf::link_detach(file.as_fd())
            .with_context(|| format!("cannot detach the link {}", link.pin.display())),
        Err(error) => {
            warn!("only its pin is removed: {error:#}");
            Ok(())
        }
    }
}

fn remove_pin(pin: &Path) -> Result<()> {
    fs::remove_file(pin).with_context(|| format!("cannot remove the pin {}", pin.display()))
}
