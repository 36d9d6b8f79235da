//! The cgroups of pods.

use std::collections::HashMap;
use std::fs::read_dir;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::pods::pod_of_directory;
use crate::sys::limits::present;

/// The uids of the pods whose cgroups are below a cgroup, by the id of each cgroup that a pod has.
///
/// The outermost directory that names a pod counts, and only where it is root's: whoever was given
/// a part of the hierarchy may give any name to a directory of their own.
///
/// # Errors
/// Where a cgroup that is there can't be read: a pod may be missing then.
pub fn pod_cgroups(root: &Path) -> io::Result<HashMap<u64, String>> {
    owned_by(root, 0)
}

fn owned_by(root: &Path, owner: u32) -> io::Result<HashMap<u64, String>> {
    let mut found = HashMap::new();
    collect(root, owner, None, &mut found)?;
    Ok(found)
}

/// A cgroup may be removed at any time: one that is gone is passed over.
fn collect(
    cgroup: &Path,
    owner: u32,
    pod: Option<&str>,
    found: &mut HashMap<u64, String>,
) -> io::Result<()> {
    for entry in present(read_dir(cgroup))?.into_iter().flatten() {
        let Some(entry) = present(entry)? else {
            continue;
        };
        let Some(metadata) = present(entry.metadata())? else {
            continue;
        };
        if !metadata.is_dir() || (pod.is_none() && metadata.uid() != owner) {
            continue;
        }
        let named = || entry.file_name().to_str().and_then(pod_of_directory);
        let pod = pod.map(str::to_owned).or_else(named);
        if let Some(uid) = &pod {
            found.insert(metadata.ino(), uid.clone());
        }
        collect(&entry.path(), owner, pod.as_deref(), found)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::unistd::getuid;

    use super::*;

    const UID: &str = "0b6e1f6c-52f2-4e65-9c0a-7a3f0a8d9d01";

    #[test]
    fn what_is_below_a_pods_cgroup_is_the_pods() {
        let root = tempfile::tempdir().expect("a directory");
        let pod = root.path().join(format!("kubepods/burstable/pod{UID}"));
        let container = pod.join("container");
        let inner = container.join("pod1b6e1f6c-52f2-4e65-9c0a-7a3f0a8d9d01");
        fs::create_dir_all(&inner).expect("made");
        fs::create_dir_all(root.path().join("system.slice/sshd.service")).expect("made");
        let id = |path: &Path| fs::metadata(path).expect("there").ino();
        let expected = [&pod, &container, &inner].map(|path| (id(path), UID.to_owned()));
        let owner = getuid().as_raw();
        let of = |owner| owned_by(root.path(), owner).expect("it can be read");
        assert_eq!(of(owner), HashMap::from(expected));
        // Systemd gives a user's session a part of the hierarchy, with any names in it.
        assert_eq!(of(owner + 1), HashMap::new());
        // Longer than a path may be: nobody can tell what is there.
        assert!(owned_by(&root.path().join("x".repeat(5_000)), owner).is_err());
        let gone = owned_by(&root.path().join("gone"), owner);
        assert_eq!(gone.expect("nothing is there"), HashMap::new());
    }
}
