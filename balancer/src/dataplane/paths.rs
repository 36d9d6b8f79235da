//! The one owner of every path on the BPF file system.

use std::path::{Path, PathBuf};
use std::{fs, io};

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

    /// Where a data plane goes that is being removed, so that one that was removed in part is never taken for a whole one.
    pub fn removed(&self) -> PathBuf {
        self.state_dir.join(format!("v{VERSION}-old"))
    }

    /// Data planes with another layout: what another build has left here, by the number of their layout.
    ///
    /// # Errors
    /// When the state directory can't be read.
    pub fn others(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.state_dir)? {
            let path = entry?.path();
            if layout_of(&path).is_some_and(|layout| layout != VERSION) {
                found.push(path);
            }
        }
        found.sort_by_key(|path| layout_of(path));
        Ok(found)
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

    /// The programs' links that are pinned in a directory, of both kinds.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn links(directory: &Path) -> io::Result<Vec<Link>> {
        let mut links = Vec::new();
        for entry in fs::read_dir(directory)? {
            links.extend(Link::at(entry?.path()));
        }
        Ok(links)
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

/// The layout of a data plane's directory, `v` and a number.
fn layout_of(directory: &Path) -> Option<u32> {
    directory
        .file_name()?
        .to_str()?
        .strip_prefix('v')?
        .parse()
        .ok()
}

/// A pin that by its name is one of our links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The pin.
    pub pin: PathBuf,
    /// What it attaches, to what.
    pub what: Attachment,
}

/// What a link attaches, to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// `account`, to the cgroup with that id.
    Account(u64),
    /// `steer`, to the network namespace with that cookie.
    Steer(u64),
}

impl Link {
    /// What a pin must be by its name; nothing where that isn't a link's.
    pub fn at(pin: PathBuf) -> Option<Self> {
        let what = match (Paths::cgroup_of(&pin), Paths::netns_of(&pin)) {
            (Some(cgroup), _) => Attachment::Account(cgroup),
            (None, Some(netns)) => Attachment::Steer(netns),
            (None, None) => return None,
        };
        Some(Self { pin, what })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_no_dots_and_round_trip() {
        let paths = Paths::new(Path::new("/sys/fs/bpf/balancer"));
        for path in [
            paths.current(),
            paths.staging(),
            paths.removed(),
            paths.map("COUNTS"),
        ] {
            assert!(!path.to_str().unwrap().contains('.'));
        }
        assert_eq!(Paths::netns_of(&Paths::steer(&paths.current(), 7)), Some(7));
        assert_eq!(
            Paths::cgroup_of(&Paths::account(&paths.current(), 9)),
            Some(9)
        );
        assert_eq!(Paths::cgroup_of(&paths.map("COUNTS")), None);
    }

    #[test]
    fn only_whole_data_planes_of_other_layouts_are_others() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["v1", "v999", "v1-new", "v999-old", "vx", "junk"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        let paths = Paths::new(directory.path());
        fs::create_dir(paths.current()).unwrap();
        let others = paths.others().unwrap();
        assert_eq!(
            others,
            ["v1", "v999"].map(|name| directory.path().join(name))
        );
    }
}
