//! The cgroups of a hierarchy.

use std::{
    collections::{HashSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
};

use crate::sys::file_id::FileId;
use crate::sys::limits::present;

/// A cgroup and all below it, the nearest first. A cgroup may be removed at any time: what is gone
/// has none below it. An error where one that is there can't be listed.
pub fn cgroups(root: &Path) -> impl Iterator<Item = io::Result<PathBuf>> {
    let mut waiting = VecDeque::from([root.to_owned()]);
    std::iter::from_fn(move || {
        let next = waiting.pop_front()?;
        let listed = below(&next).map(|directories| {
            waiting.extend(directories);
            next
        });
        Some(listed)
    })
}

/// The cgroups directly below one.
pub(super) fn below(cgroup: &Path) -> io::Result<Vec<PathBuf>> {
    let mut directories = Vec::new();
    for entry in present(fs::read_dir(cgroup))?.into_iter().flatten() {
        let Some(entry) = present(entry)? else {
            continue;
        };
        if present(entry.file_type())?.is_some_and(|kind| kind.is_dir()) {
            directories.push(entry.path());
        }
    }
    Ok(directories)
}

/// The ids of a cgroup and of all below it, as the socket table names them: the inodes of their
/// directories.
///
/// # Errors
/// Where one that is there can't be looked at.
pub fn cgroup_ids(root: &Path) -> io::Result<HashSet<u64>> {
    let mut ids = HashSet::new();
    for cgroup in cgroups(root) {
        ids.extend(present(FileId::at(&cgroup?))?.map(|id| id.inode));
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_absent_and_what_cannot_be_read_is_an_error() {
        let root = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(root.path().join("a/b")).expect("made");
        assert_eq!(cgroup_ids(root.path()).expect("read").len(), 3);
        let gone = root.path().join("gone");
        assert!(cgroup_ids(&gone).expect("nothing is there").is_empty());
        // Longer than a path may be: nobody can tell whether it is there.
        let unreadable = root.path().join("x".repeat(5_000));
        assert!(cgroup_ids(&unreadable).is_err());
    }
}
