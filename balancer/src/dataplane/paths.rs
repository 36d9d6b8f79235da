//! The one owner of every path on the BPF file system.

use std::path::{Path, PathBuf};

use balancer_common::abi::VERSION;

const ACCOUNT: &str = "link_account_";
const STEER: &str = "link_steer_";

/// Where the pins of one data plane are. Names hold no dots: the BPF file system refuses them (`bpf_lookup`,
/// kernel/bpf/inode.c).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    state_dir: PathBuf,
}

impl Paths {
    /// The data plane under that state directory.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
        }
    }

    /// The state directory itself.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The pins of this build's map layout.
    pub fn current(&self) -> PathBuf {
        self.state_dir.join(format!("v{VERSION}"))
    }

    /// Where a new data plane is built before it is renamed to [`Paths::current`].
    pub fn staging(&self) -> PathBuf {
        self.state_dir.join(format!("v{VERSION}-new"))
    }

    /// Where the programs are loaded on trial: beside the state directory, which a trial must not make.
    pub fn trial(&self) -> PathBuf {
        let name = self.state_dir.file_name().unwrap_or_default();
        let name = format!("{}-trial-{}", name.to_string_lossy(), std::process::id());
        self.state_dir.with_file_name(name)
    }

    /// A pinned map.
    pub fn map(&self, name: &str) -> PathBuf {
        self.current().join(name)
    }

    /// The link of `account` to the cgroup with that id.
    pub fn account(directory: &Path, cgroup: u64) -> PathBuf {
        directory.join(format!("{ACCOUNT}{cgroup}"))
    }

    /// The link of `steer` to the network namespace with that cookie.
    pub fn steer(directory: &Path, netns: u64) -> PathBuf {
        directory.join(format!("{STEER}{netns}"))
    }

    /// The cgroup of a link's pin, if it is one of `account`.
    pub fn cgroup_of(pin: &Path) -> Option<u64> {
        pin.file_name()?
            .to_str()?
            .strip_prefix(ACCOUNT)?
            .parse()
            .ok()
    }

    /// The namespace of a link's pin, if it is one of `steer`.
    pub fn netns_of(pin: &Path) -> Option<u64> {
        pin.file_name()?.to_str()?.strip_prefix(STEER)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_no_dots_and_round_trip() {
        let paths = Paths::new(Path::new("/sys/fs/bpf/balancer"));
        for path in [paths.current(), paths.staging(), paths.map("COUNTS")] {
            assert!(!path.to_str().unwrap().contains('.'));
        }
        assert_eq!(Paths::netns_of(&Paths::steer(&paths.current(), 7)), Some(7));
        assert_eq!(
            Paths::cgroup_of(&Paths::account(&paths.current(), 9)),
            Some(9)
        );
        assert_eq!(Paths::cgroup_of(&paths.map("COUNTS")), None);
    }
}
