//! The cgroup whose sockets are counted, and the links to it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use tracing::{info, warn};

use super::lock::Lock;
use super::paths::Link;
use super::pins;
use crate::discover::is_cgroup2;

/// The cgroup whose sockets are counted.
pub struct CountedCgroup {
    path: PathBuf,
    /// This build's links to it, each with its program.
    pub links: Vec<(Link, OwnedFd, OwnedFd)>,
    /// What was said last of a cgroup that is gone; `None`: it is there.
    gone: Option<String>,
}

impl CountedCgroup {
    /// The one at this path, to which nothing is attached yet.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            links: Vec::new(),
            gone: None,
        }
    }

    /// How messages call it.
    pub fn place(&self) -> String {
        format!("the cgroup {}", self.path.display())
    }

    /// Opens it; also its id, the inode of its directory.
    ///
    /// # Errors
    /// When it is not there.
    pub fn open(&self) -> Result<(File, u64)> {
        let file = File::open(&self.path);
        let file = file.with_context(|| format!("cannot open {}", self.place()))?;
        let metadata = file.metadata();
        let metadata = metadata.with_context(|| format!("cannot query {}", self.place()))?;
        Ok((file, metadata.ino()))
    }

    /// The directory of the pins has another name now.
    pub fn moved_to(&mut self, directory: &Path) {
        for (link, ..) in &mut self.links {
            *link = Link::new(directory, link.program, link.target);
        }
    }

    /// Attaches its programs anew when the cgroup was removed and is there again: whoever runs the
    /// servers in it may make it anew with them. That it is gone is said once.
    pub fn follow(&mut self, lock: &Lock, directory: &Path) {
        let said = self.attach_anew(lock, directory).err();
        let said = said.map(|error| format!("{error:#}"));
        if said != self.gone {
            if let Some(problem) = &said {
                warn!("{problem}");
            } else {
                info!("counting in {} again", self.place());
            }
            self.gone = said;
        }
    }

    fn attach_anew(&mut self, lock: &Lock, directory: &Path) -> Result<()> {
        for index in 0..self.links.len() {
            let (link, file, program) = &self.links[index];
            if !pins::is_dead(file)? {
                continue;
            }
            let there = is_cgroup2(&self.path);
            ensure!(
                there.with_context(|| format!("cannot look at {}", self.place()))?,
                "{} is gone: nothing that listens or connects is counted any more, and quotas are \
                 judged by the last counts. Make it again, and start the servers in it: the daemon \
                 attaches itself there; or start the daemon with another --cgroup",
                self.place()
            );
            let (target, id) = self.open()?;
            let fresh = Link::new(directory, link.program, id);
            let attached = pins::attach(lock, &fresh, program, &target, &self.place())?;
            pins::remove_pin(&link.pin)?;
            let slot = &mut self.links[index];
            (slot.0, slot.1) = (fresh, attached);
        }
        Ok(())
    }
}
