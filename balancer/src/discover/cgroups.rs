//! The cgroups of a hierarchy.

use std::{
    collections::{HashSet, VecDeque},
    fs,
    path::{Path, PathBuf},
};

use crate::sys::file_id::FileId;

/// A cgroup and all below it, the nearest first. A cgroup may be removed at any time, so one that
/// can't be listed has none below it.
pub fn cgroups(root: &Path) -> impl Iterator<Item = PathBuf> {
    let mut waiting = VecDeque::from([root.to_owned()]);
    std::iter::from_fn(move || {
        let next = waiting.pop_front()?;
        let entries = fs::read_dir(&next).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        waiting.extend(directories.map(|directory| directory.path()));
        Some(next)
    })
}

/// The ids of a cgroup and of all below it, as the socket table names them: the inodes of their
/// directories.
pub fn cgroup_ids(root: &Path) -> HashSet<u64> {
    let ids = cgroups(root).filter_map(|cgroup| FileId::at(&cgroup).ok());
    ids.map(|id| id.inode).collect()
}
