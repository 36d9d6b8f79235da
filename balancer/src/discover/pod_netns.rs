//! The netns of pods, by the processes in their cgroups.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::cgroups::below;
use super::pods::pod_of_directory;
use crate::sys::limits::present;
use crate::sys::netns;

/// The cookies of the netns that processes of these pods live in, by the pods' uids. A pod without
/// a process is not among them. The cgroups of pods are those of [`super::pod_cgroups`].
///
/// # Errors
/// Where cgroups can't be read, or descriptors are short.
pub fn pod_netns(root: &Path, uids: &BTreeSet<String>) -> io::Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    look(root, None, uids, &mut found)?;
    Ok(found)
}

fn look(
    cgroup: &Path,
    pod: Option<&str>,
    uids: &BTreeSet<String>,
    found: &mut BTreeMap<String, u64>,
) -> io::Result<()> {
    if let Some(uid) = pod
        && !found.contains_key(uid)
        && let Some(cookie) = netns_of(cgroup)?
    {
        found.insert(uid.to_owned(), cookie);
    }
    for directory in below(cgroup)? {
        let name = directory.file_name().and_then(|name| name.to_str());
        let named = name.and_then(pod_of_directory);
        match pod.map(str::to_owned).or(named) {
            // Another pod's, or one that is known by now.
            Some(uid) if !uids.contains(&uid) || found.contains_key(&uid) => {}
            pod => look(&directory, pod.as_deref(), uids, found)?,
        }
    }
    Ok(())
}

/// The netns of the first process of a cgroup that can be looked at.
fn netns_of(cgroup: &Path) -> io::Result<Option<u64>> {
    let list = |file: &str| present(fs::read_to_string(cgroup.join(file)));
    let tasks = match list("cgroup.procs") {
        // A threaded cgroup has only threads (`cgroup_procs_start`, kernel/cgroup/cgroup.c).
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
            list("cgroup.threads")?
        }
        tasks => tasks?,
    };
    // 0: a process of another process namespace than the daemon's.
    for pid in tasks.iter().flat_map(|list| list.lines()) {
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        if let Some(file) = present(netns::open(&path))? {
            return netns::cookie_of(&file).map(Some);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_netns_is_that_of_a_process_in_its_cgroup() {
        let uid = |digit: &str| format!("{digit}b6e1f6c-52f2-4e65-9c0a-7a3f0a8d9d01");
        let root = tempfile::tempdir().expect("a directory");
        let write = |path: &str, list: &str| {
            let cgroup = root.path().join(path);
            fs::create_dir_all(&cgroup).expect("made");
            fs::write(cgroup.join("cgroup.procs"), list).expect("written");
        };
        let own = std::process::id();
        write(&format!("kubepods/burstable/pod{}", uid("0")), "");
        let gone_and_own = format!("0\n4294967\n{own}\n");
        write(
            &format!("kubepods/burstable/pod{}/main", uid("0")),
            &gone_and_own,
        );
        write(&format!("kubepods/pod{}/main", uid("1")), &gone_and_own);
        write(&format!("kubepods/pod{}/main", uid("2")), "");
        let asked = BTreeSet::from([uid("0"), uid("2"), uid("3")]);
        let found = pod_netns(root.path(), &asked).expect("it can be read");
        let cookie = netns::cookie().expect("known");
        assert_eq!(found, BTreeMap::from([(uid("0"), cookie)]));
    }
}
