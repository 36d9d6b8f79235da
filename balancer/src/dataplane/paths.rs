//! The one owner of every path on the BPF file system.

use std::path::{Path, PathBuf};
use std::{fs, io};

use balancer_common::abi::VERSION;

use super::programs::{PROGRAMS, Program, Target};

/// Where the pins of one data plane are. Names hold no dots: the BPF file system refuses them
/// (`bpf_lookup`, kernel/bpf/inode.c).
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

    /// Where a data plane goes that is being removed, so that one that was removed in part is never
    /// taken for a whole one.
    pub fn removed(&self) -> PathBuf {
        self.state_dir.join(format!("v{VERSION}-old"))
    }

    /// Data planes with another layout: what another build has left here, by the number of their
    /// layout.
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

    /// The programs' links that are pinned in a directory.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn links(directory: &Path) -> io::Result<Vec<Link>> {
        let mut links = Vec::new();
        for entry in fs::read_dir(directory)? {
            links.extend(Link::at(&entry?.path()));
        }
        Ok(links)
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
#[derive(Clone, Debug)]
pub struct Link {
    /// Where it is pinned.
    pub pin: PathBuf,
    /// The program that it attaches.
    pub program: &'static Program,
    /// The number of the target, a cgroup's id or a netns cookie: see [`Target`].
    pub target: u64,
}

impl Link {
    /// The link of a program to that target, pinned in that directory.
    pub fn new(directory: &Path, program: &'static Program, target: u64) -> Self {
        Self {
            pin: directory.join(format!("{}{target}", program.pin_prefix())),
            program,
            target,
        }
    }

    /// What a pin must be by its name; nothing where that isn't a link's.
    pub fn at(pin: &Path) -> Option<Self> {
        let name = pin.file_name()?.to_str()?;
        PROGRAMS.iter().find_map(|program| {
            let target = name.strip_prefix(&program.pin_prefix())?.parse().ok()?;
            Some(Self {
                pin: pin.to_owned(),
                program,
                target,
            })
        })
    }

    /// The cookie of the netns that the link is attached to; `None`: its target is no netns.
    pub fn netns(&self) -> Option<u64> {
        (self.program.hook.target() == Target::Netns).then_some(self.target)
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
        for program in &PROGRAMS {
            let link = Link::new(&paths.current(), program, 7);
            let found = Link::at(&link.pin).expect("the pin of a link");
            assert_eq!((found.program.name, found.target), (program.name, 7));
        }
        assert!(Link::at(&paths.map("COUNTS")).is_none());
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
