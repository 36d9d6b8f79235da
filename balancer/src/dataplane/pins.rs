//! Making, replacing and removing what is pinned: all of it with the lock in hand.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use tracing::{info, warn};

use super::lock::{Held, Lock, holder};
use super::notes::Note;
use super::paths::{Link, Paths};
use super::programs::{Part, Target};
use crate::sys::bpf::{self, LinkTarget, Object};
use crate::sys::limits::is_shortage;

/// Takes the data plane of a state directory out of the kernel; false: there was none.
///
/// # Errors
/// When a daemon holds it, or a pin can't be removed.
pub fn unload(paths: &Paths) -> Result<bool> {
    if !is_there(paths.state_dir())? {
        return Ok(false);
    }
    match Lock::take(paths)? {
        Held::Mine(lock) => {
            let there = !all_directories(paths)?.is_empty();
            remove_data_plane(&lock, paths)?;
            Ok(there)
        }
        Held::ByOther(pid) => bail!(
            "the data plane in {} is held by {}, which does not answer on its admin socket: end \
             that process first",
            paths.state_dir().display(),
            holder(pid)
        ),
    }
}

/// Whether there is anything at a path; what can't be looked at is not taken for absent.
pub(super) fn is_there(path: &Path) -> Result<bool> {
    let there = path.try_exists();
    there.with_context(|| format!("cannot look at {}", path.display()))
}

/// Opens a pinned link of ours.
///
/// # Errors
/// When something else is pinned under its name: a link must never be changed that somebody else
/// has made.
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
    let hook = link.program.hook;
    let fits = match (hook.target(), info.target) {
        (Target::Cgroup, LinkTarget::Cgroup { id, attach_type }) => {
            attach_type == hook.attach_type() as u32 && (id == link.target || id == 0)
        }
        (Target::Netns, LinkTarget::Netns { attach_type, .. }) => {
            attach_type == hook.attach_type() as u32
        }
        _ => false,
    };
    ensure!(fits, strange(link, "it is attached to something else"));
    Ok(file)
}

/// Opens a pinned link whose program is ours too, to put another one under it. Only
/// `CAP_SYS_ADMIN` can find out about the program; without it the link has to do.
///
/// # Errors
/// As [`open_link`].
pub(super) fn open_own_link(link: &Link) -> Result<OwnedFd> {
    let file = open_link(link)?;
    let program = bpf::link_program(&file)
        .and_then(bpf::prog_by_id)
        .and_then(bpf::prog_info);
    match program {
        Ok(program) => {
            let name = program.name;
            ensure!(
                name == link.program.name,
                strange(link, &format!("its program is called {name}"))
            );
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot query the program of {}", link.pin.display()));
        }
    }
    Ok(file)
}

fn strange(link: &Link, what: &str) -> String {
    format!(
        "{} is not what the balancer has pinned there ({what}): look who made it; `balancer \
         unload` removes the pin",
        link.pin.display()
    )
}

/// Whether what a link was attached to is gone.
pub(super) fn is_dead(link: impl AsFd) -> Result<bool> {
    let info = bpf::link_info(link).context("cannot query a link")?;
    Ok(matches!(
        info.target,
        LinkTarget::Netns { inode: 0, .. } | LinkTarget::Cgroup { id: 0, .. }
    ))
}

/// Attaches a program to a target, and pins the link. `place` names the target for an error.
pub(super) fn attach(
    _: &Lock,
    link: &Link,
    program: impl AsFd,
    target: impl AsFd,
    place: &str,
) -> Result<OwnedFd> {
    let hook = link.program.hook;
    let made = match hook.part() {
        // Whoever rewrites a destination first decides.
        Part::Placing => bpf::link_create_first(program, target, hook.attach_type()),
        Part::Counting | Part::Steering => bpf::link_create(program, target, hook.attach_type()),
    };
    let file = made.with_context(|| {
        let hint = match hook.target() {
            Target::Cgroup => {
                "EPERM: an older program sits there that allows no other; `balancer doctor` names it"
            }
            Target::Netns => "at most 64 programs in each",
        };
        format!("cannot attach `{}` to {place} ({hint})", link.program.name)
    })?;
    bpf::obj_pin(&file, &link.pin).with_context(|| format!("cannot pin {}", link.pin.display()))?;
    Ok(file)
}

/// Pins something again whose pin is gone.
pub(super) fn pin_again(_: &Lock, object: impl AsFd, pin: &Path) -> Result<()> {
    bpf::obj_pin(object, pin).with_context(|| format!("cannot pin {}", pin.display()))
}

/// Takes the program of a link off its target, wherever the link is pinned.
pub(super) fn detach_now(_: &Lock, link: &Link, file: impl AsFd) -> Result<()> {
    bpf::link_detach(file).with_context(|| format!("cannot detach the link {}", link.pin.display()))
}

/// Replaces the program of a pinned link, without a moment in which there is none.
pub(super) fn replace(_: &Lock, link: &Link, program: impl AsFd) -> Result<OwnedFd> {
    let file = open_own_link(link)?;
    bpf::link_update(&file, program).with_context(|| {
        format!(
            "cannot replace the program of {} (the netns or cgroup may be gone: `balancer \
             unload` clears it)",
            link.pin.display()
        )
    })?;
    Ok(file)
}

/// Gives a link that is pinned elsewhere its pin here, and takes the other one away.
pub(super) fn move_link(_: &Lock, link: &OwnedFd, from: &Path, to: &Path) -> Result<()> {
    bpf::obj_pin(link, to).with_context(|| format!("cannot pin {}", to.display()))?;
    remove_pin(from)
}

/// Takes away a link's other pin that a daemon has left which died over [`move_link`]. A link of
/// its own with the purpose of the one at `to` goes with its pin.
pub(super) fn finish_move(lock: &Lock, link: &Link, file: &OwnedFd, to: &Path) -> Result<()> {
    let there = bpf::obj_get(to).with_context(|| format!("cannot open {}", to.display()))?;
    let id = |file: &OwnedFd| bpf::link_info(file).map(|info| info.id);
    if id(file)? == id(&there)? {
        remove_pin(&link.pin)
    } else {
        remove_link(lock, link)
    }
}

/// Puts a directory in its place, where there must be none.
pub(super) fn rename(_: &Lock, from: &Path, to: &Path) -> Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)
        .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}

/// The outcome of a work and of the clean-up after it: its own error comes first.
pub(super) fn cleaned_up<T>(outcome: Result<T>, cleaning: Result<()>) -> Result<T> {
    match (outcome, cleaning) {
        (Ok(value), cleaning) => cleaning.map(|()| value),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(left)) => {
            warn!("what a failed step has made could not be removed: {left:#}");
            Err(error)
        }
    }
}

/// Removes a directory with everything in it: links first, so that nothing runs on half of its
/// maps.
pub(super) fn remove_directory(_: &Lock, directory: &Path) -> Result<()> {
    remove_tree(directory)
}

fn remove_tree(directory: &Path) -> Result<()> {
    // A symbolic link may lead to what is not ours: it goes itself.
    if directory.is_symlink() {
        return remove_pin(directory);
    }
    let mut entries: Vec<PathBuf> = match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
    }
    .with_context(|| format!("cannot list {}", directory.display()))?;
    // Links to a netns before those to a cgroup, then all else.
    entries.sort_by_key(|path| match Link::at(path) {
        Some(link) if link.netns().is_some() => 0,
        Some(_) => 1,
        None => 2,
    });
    for entry in entries {
        if entry.is_dir() || entry.is_symlink() {
            remove_tree(&entry)?;
        } else {
            if let Some(link) = Link::at(&entry) {
                detach(&link)?;
            }
            remove_pin(&entry)?;
        }
    }
    fs::remove_dir(directory)
        .with_context(|| format!("cannot remove the directory {}", directory.display()))
}

/// Every directory with pins of ours, whole or in part, in the order in which they are best
/// removed.
fn all_directories(paths: &Paths) -> Result<Vec<PathBuf>> {
    let others = paths
        .others()
        .with_context(|| format!("cannot list {}", paths.state_dir().display()))?;
    let ours = [paths.removed(), paths.staging(), paths.current()];
    let mut directories = Vec::new();
    for directory in others.into_iter().chain(ours) {
        if is_there(&directory)? {
            directories.push(directory);
        }
    }
    Ok(directories)
}

/// Takes everything out of the kernel that a state directory holds, and removes it.
pub(super) fn remove_data_plane(lock: &Lock, paths: &Paths) -> Result<()> {
    if !paths.state_dir().exists() {
        return Ok(());
    }
    Note::down(paths).remove();
    Note::placing(paths).remove();
    remove_directory(lock, &paths.removed())?;
    if is_there(&paths.current())? {
        // In one step: a daemon that is killed over this leaves nothing that looks whole and isn't.
        rename(lock, &paths.current(), &paths.removed())?;
    }
    for directory in all_directories(paths)? {
        remove_directory(lock, &directory)?;
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

/// Detaches a link and removes its pin.
pub(super) fn remove_link(_: &Lock, link: &Link) -> Result<()> {
    info!("detaching {}", link.pin.display());
    detach(link)?;
    remove_pin(&link.pin)
}

/// Ends what a pinned link does before its pin goes: without it, it would go on for a moment after,
/// or for as long as somebody has it open. What is no link of ours is left alone.
fn detach(link: &Link) -> Result<()> {
    match open_link(link) {
        Ok(file) => bpf::link_detach(file.as_fd())
            .with_context(|| format!("cannot detach the link {}", link.pin.display())),
        Err(error) if is_of_shortage(&error) => Err(error).context(
            "there are no descriptors or no memory left to take a program out of the kernel: its \
             pin stays. Raise the limit (`ulimit -n`, LimitNOFILE=) or end what uses them up, then \
             run `balancer unload` again",
        ),
        Err(error) => {
            warn!("only its pin is removed: {error:#}");
            Ok(())
        }
    }
}

/// Whether something failed for want of descriptors or memory, which says nothing of what it was
/// about.
pub(super) fn is_of_shortage(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(is_shortage)
}

/// Takes a pin away, where it is still there; what it stands for may live on.
pub(super) fn remove_pin(pin: &Path) -> Result<()> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove the pin {}", pin.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Whoever owns the state directory could lead us to the pins of others.
    #[test]
    fn unloading_follows_no_symbolic_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let others = directory.path().join("others");
        let paths = Paths::new(&directory.path().join("state"));
        fs::create_dir_all(&others).expect("made");
        fs::write(others.join("pin"), "").expect("written");
        fs::create_dir_all(paths.staging()).expect("made");
        for link in [paths.current(), paths.staging().join("inside")] {
            symlink(&others, link).expect("linked");
        }
        assert!(unload(&paths).expect("unloaded"));
        assert!(!paths.state_dir().exists());
        assert!(others.join("pin").exists());
    }
}
