//! Loads the programs, and keeps them attached to the cgroup and to the guarded netns.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use balancer_common::abi::maps;
use tracing::{error, info, warn};

use super::cgroup::CountedCgroup;
use super::events::{self, Events, LogFollower};
use super::lock::{Lock, make_directory};
use super::object::{self, ObjectLoader};
use super::paths::{Link, Paths};
use super::pins;
use super::programs::{Part, Target};
use super::tables::{Tables, check_maps};
use crate::discover::is_bpffs;
use crate::sys::bpf::{self, LinkTarget};

/// The programs of one data plane.
pub struct Loader {
    pub(super) paths: Paths,
    /// The kernel half, ready to be loaded any number of times.
    pub(super) objects: ObjectLoader,
    /// This build's links to guarded netns, by the netns' cookie and the program's name.
    links: BTreeMap<(u64, &'static str), (Link, OwnedFd)>,
    /// The cgroup, and this build's links to it.
    pub(super) cgroup: CountedCgroup,
    /// What was said last of why clients' connections can't be placed; `None`: they can.
    pub(super) refused: Option<String>,
    /// What an earlier daemon has left attached that places was looked for.
    pub(super) placing_is_known: bool,
    /// The pinned maps by their names.
    maps: Vec<(&'static str, OwnedFd)>,
    /// What was said last of pins that are gone; `None`: all are there.
    lost: Option<String>,
    /// The loaded objects whose logs nobody follows yet: they own the buffers.
    unfollowed: Vec<(NetnsCookie, Ebpf)>,
    /// The followers of the loaded objects' logs.
    logs: Vec<(NetnsCookie, LogFollower)>,
    /// The data plane was there before this daemon.
    adopted: bool,
    /// The right to change the pins.
    pub(super) lock: Lock,
}

/// The netns that an object was loaded for; `None`: for the cgroup.
type NetnsCookie = Option<u64>;

impl Loader {
    /// Makes a data plane, or adopts the one that is there, and attaches what counts to the cgroup.
    /// A data plane of another layout stays in force beside a new one until [`Loader::switch`].
    ///
    /// # Errors
    /// When the pins are not what they should be, or the kernel refuses something. Nothing is left
    /// behind then that was not there before.
    pub fn start(paths: Paths, lock: Lock, cgroup: &Path) -> Result<(Self, Tables)> {
        let objects = ObjectLoader::new()?;
        for remains in [paths.removed(), paths.staging()] {
            pins::remove_directory(&lock, &remains)?;
        }
        let directory = paths.current();
        let mut loader = Self {
            adopted: pins::is_there(&directory)?,
            paths,
            objects,
            links: BTreeMap::new(),
            cgroup: CountedCgroup::at(cgroup),
            refused: None,
            placing_is_known: false,
            maps: Vec::new(),
            lost: None,
            unfollowed: Vec::new(),
            logs: Vec::new(),
            lock,
        };
        let (tables, how) = if loader.adopted {
            check(&directory)?;
            (loader.attach_to_cgroup(&directory)?, "adopted")
        } else {
            (loader.make()?, "made")
        };
        loader.maps = open_maps(&directory)?;
        info!("{how} the data plane in {}", directory.display());
        Ok((loader, tables))
    }

    /// Builds a data plane aside and puts it in its place whole.
    fn make(&mut self) -> Result<Tables> {
        let staging = self.paths.staging();
        make_directory(&staging)?;
        let made = self.attach_to_cgroup(&staging).and_then(|tables| {
            pins::rename(&self.lock, &staging, &self.paths.current())?;
            self.cgroup.moved_to(&self.paths.current());
            Ok(tables)
        });
        if made.is_ok() {
            return made;
        }
        pins::cleaned_up(made, pins::remove_directory(&self.lock, &staging))
    }

    /// Attaches what counts to the cgroup, or puts it under the link that is there. Links to other
    /// cgroups are removed.
    fn attach_to_cgroup(&mut self, directory: &Path) -> Result<Tables> {
        let mut object = self.objects.open(directory, 0)?;
        let tables = Tables::open(directory)?;
        self.attach_part(Part::Counting, &mut object, directory)?;
        self.unfollowed.push((None, object));
        let (_, id) = self.cgroup.open()?;
        for link in links(directory)? {
            if link.program.hook.target() == Target::Cgroup && link.target != id {
                pins::remove_link(&self.lock, &link)?;
            }
        }
        Ok(tables)
    }

    /// Attaches a part of the programs to the cgroup, or puts them under the links that are there.
    pub(super) fn attach_part(
        &mut self,
        part: Part,
        object: &mut Ebpf,
        directory: &Path,
    ) -> Result<()> {
        let (target, id) = self.cgroup.open()?;
        for program in part.programs() {
            let link = Link::new(directory, program, id);
            let loaded = object::load(object, program)?.fd()?;
            let file = if pins::is_there(&link.pin)? {
                pins::replace(&self.lock, &link, loaded)?
            } else {
                pins::attach(&self.lock, &link, loaded, &target, &self.cgroup.place())?
            };
            let program = loaded.as_fd().try_clone_to_owned();
            let program = program.context("cannot copy a descriptor")?;
            self.cgroup.links.push((link, file, program));
        }
        Ok(())
    }

    /// Puts this build's programs under every link to a netns that is there. Links of another
    /// layout become this data plane's, those of netns that are gone are removed, then what is left
    /// of other layouts. From here on this data plane alone decides. `step` is called after each
    /// link.
    ///
    /// # Errors
    /// When the kernel refuses a program, or a pin can't be moved or removed.
    pub fn switch(&mut self, step: impl Fn()) -> Result<()> {
        let others = self.others()?;
        let current = self.paths.current();
        for directory in others.iter().chain([&current]) {
            for link in links(directory)? {
                if let Some(cookie) = link.netns() {
                    self.take_over(&link, cookie)?;
                    step();
                }
            }
        }
        for directory in others {
            info!(
                "removing the data plane of another build in {}: this one has its listeners and \
                 connections",
                directory.display()
            );
            pins::remove_directory(&self.lock, &directory)?;
        }
        Ok(())
    }

    /// Puts this build's program under a link to a netns, and moves it here from another layout.
    fn take_over(&mut self, from: &Link, cookie: u64) -> Result<()> {
        let file = pins::open_link(from)?;
        if pins::is_dead(&file)? {
            return pins::remove_link(&self.lock, from);
        }
        let directory = self.paths.current();
        let link = Link::new(&directory, from.program, cookie);
        let elsewhere = from.pin != link.pin;
        if elsewhere && pins::is_there(&link.pin)? {
            return pins::finish_move(&self.lock, from, &file, &link.pin);
        }
        if self.links.contains_key(&(cookie, link.program.name)) {
            return Ok(());
        }
        let mut object = self.objects.open(&directory, cookie)?;
        let loaded = object::load(&mut object, link.program)?.fd()?;
        let file = pins::replace(&self.lock, from, loaded)?;
        if elsewhere {
            pins::move_link(&self.lock, &file, &from.pin, &link.pin)?;
        }
        self.remember(cookie, link, file);
        self.unfollowed.push((Some(cookie), object));
        Ok(())
    }

    fn remember(&mut self, cookie: u64, link: Link, file: OwnedFd) {
        self.links.insert((cookie, link.program.name), (link, file));
    }

    /// Attaches to a netns the programs that aren't yet.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub fn guard(&mut self, netns: BorrowedFd<'_>, cookie: u64) -> Result<()> {
        if self.guards(cookie) {
            return Ok(());
        }
        // Maps that are not there would be made anew beside those that are in use.
        self.put_back_pins()?;
        let directory = self.paths.current();
        let place = format!("the network namespace with cookie {cookie}");
        let mut object = self.objects.open(&directory, cookie)?;
        for program in Part::Steering.programs() {
            if self.links.contains_key(&(cookie, program.name)) {
                continue;
            }
            let link = Link::new(&directory, program, cookie);
            let loaded = object::load(&mut object, program)?.fd()?;
            let file = pins::attach(&self.lock, &link, loaded, netns, &place)?;
            self.remember(cookie, link, file);
        }
        self.unfollowed.push((Some(cookie), object));
        Ok(())
    }

    /// Whether all of this build's programs for a netns are attached to it.
    pub fn guards(&self, cookie: u64) -> bool {
        Part::Steering
            .programs()
            .all(|program| self.links.contains_key(&(cookie, program.name)))
    }

    /// The guarded netns: cookie, and inode while they live.
    ///
    /// # Errors
    /// When a link can't be queried.
    pub fn guarded(&self) -> Result<Vec<(u64, Option<u32>)>> {
        let inode = |((cookie, _), (_, file)): (&(u64, &str), &(Link, OwnedFd))| {
            let info = bpf::link_info(file).context("cannot query a link")?;
            Ok(match info.target {
                LinkTarget::Netns { inode, .. } if inode != 0 => (*cookie, Some(inode)),
                _ => (*cookie, None),
            })
        };
        let mut found = self.links.iter().map(inode).collect::<Result<Vec<_>>>()?;
        found.dedup_by_key(|(cookie, _)| *cookie);
        Ok(found)
    }

    /// Detaches the programs from every netns that is not wanted.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn unguard_others(&mut self, wanted: &HashSet<u64>) -> Result<()> {
        let unwanted = |(cookie, _): &(u64, &str)| !wanted.contains(cookie);
        let keys: Vec<_> = self.links.keys().copied().filter(unwanted).collect();
        for key in keys {
            let (link, file) = &self.links[&key];
            info!("detaching {}", link.pin.display());
            pins::detach_now(&self.lock, link, file)?;
            pins::remove_pin(&link.pin)?;
            self.links.remove(&key);
        }
        self.logs
            .retain(|(netns, _)| netns.is_none_or(|cookie| wanted.contains(&cookie)));
        Ok(())
    }

    /// Passes on what the programs loaded since the last call log. Must be called inside a runtime.
    pub fn follow_logs(&mut self) {
        for (netns, object) in self.unfollowed.drain(..) {
            let follower = events::follow_log(object);
            self.logs.extend(follower.map(|follower| (netns, follower)));
        }
    }

    /// The events of the kernel half. Must be called inside a runtime.
    ///
    /// # Errors
    /// When the ring can't be opened.
    pub fn events(&self) -> Result<Events> {
        Events::open(&self.paths.current())
    }

    /// Where the pins are.
    pub const fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Notes for `status` how reading the configuration file again went: see [`Lock::note_reload`].
    pub fn note_reload(&self, error: Option<&str>) {
        self.lock.note_reload(error);
    }

    /// Takes out of the kernel what this daemon has put there, after a start that failed. One that
    /// was to take over another build's data plane takes nothing back: that one is in force as
    /// before, or this one is for the netns whose links it has moved, and the next start goes on.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn withdraw(&self) -> Result<()> {
        if self.adopted || !self.others()?.is_empty() {
            return Ok(());
        }
        self.remove()
    }

    /// Takes everything out of the kernel, also what lost its pin.
    ///
    /// # Errors
    /// When a link can't be detached or a pin can't be removed.
    pub fn remove(&self) -> Result<()> {
        // Links to a netns before those to a cgroup.
        for (link, file) in self.links.values() {
            pins::detach_now(&self.lock, link, file)?;
        }
        for (link, file, _) in &self.cgroup.links {
            pins::detach_now(&self.lock, link, file)?;
        }
        pins::remove_data_plane(&self.lock, &self.paths)
    }

    /// Puts back pins that are gone, and follows the cgroup when it is made anew. What keeps that
    /// from being done is said once.
    pub fn keep(&mut self) {
        let lost = self.put_back_pins().err();
        let lost = lost.map(|error| format!("{error:#}"));
        if let Some(problem) = lost.as_ref().filter(|_| lost != self.lost) {
            error!("{problem}");
        }
        self.lost = lost;
        self.cgroup.follow(&self.lock, &self.paths.current());
    }

    /// Pins again what has lost its pin: somebody removed it, or unmounted the BPF file system or
    /// mounted another one over it. Without pins the data plane ends with this process.
    pub(super) fn put_back_pins(&mut self) -> Result<()> {
        let lost = self.pinned().filter(|(pin, _)| !pin.exists()).count();
        if lost == 0 {
            return Ok(());
        }
        let directory = self.paths.current();
        ensure!(
            is_bpffs(self.paths.state_dir())?,
            "the pins in {} are gone: no BPF file system is mounted there any more. The data plane \
             works on, but ends with this process, and `balancer status` doesn't find it. Mount one \
             (`mount -t bpf bpf /sys/fs/bpf`), and the pins are put back at once. `balancer unload` \
             works meanwhile",
            directory.display()
        );
        make_directory(self.paths.state_dir())?;
        self.lock.follow(&self.paths)?;
        if directory.exists() {
            self.pin_into(&directory)?;
        } else {
            // Whole or not at all, as when it is made.
            let staging = self.paths.staging();
            pins::remove_directory(&self.lock, &staging)?;
            make_directory(&staging)?;
            self.pin_into(&staging)?;
            pins::rename(&self.lock, &staging, &directory)?;
        }
        warn!(
            "put back {lost} pins in {} that were gone: somebody had removed them, or mounted or \
             unmounted a file system there",
            directory.display()
        );
        Ok(())
    }

    /// Pins in a directory what has no pin there.
    fn pin_into(&self, directory: &Path) -> Result<()> {
        for (pin, object) in self.pinned() {
            let name = pin.file_name().context("a pin has no name")?;
            let pin = directory.join(name);
            if !pin.exists() {
                pins::pin_again(&self.lock, object, &pin)?;
            }
        }
        Ok(())
    }

    /// Where everything belongs that this data plane consists of: maps, then links.
    fn pinned(&self) -> impl Iterator<Item = (PathBuf, BorrowedFd<'_>)> {
        let maps = self.maps.iter();
        let maps = maps.map(|(name, file)| (self.paths.map(name), file.as_fd()));
        let netns = self.links.values();
        let netns = netns.map(|(link, file)| (link.pin.clone(), file.as_fd()));
        let cgroup = self.cgroup.links.iter();
        let cgroup = cgroup.map(|(link, file, _)| (link.pin.clone(), file.as_fd()));
        maps.chain(netns).chain(cgroup)
    }

    fn others(&self) -> Result<Vec<PathBuf>> {
        let others = self.paths.others();
        others.context("cannot list the state directory")
    }
}

/// Every pinned map of a directory.
fn open_maps(directory: &Path) -> Result<Vec<(&'static str, OwnedFd)>> {
    let open = |(name, _): &(&'static str, _)| {
        let pin = directory.join(name);
        let map = bpf::obj_get(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
        Ok((*name, map))
    };
    maps::PINNED.iter().map(open).collect()
}

/// The links that are pinned in a directory.
pub(super) fn links(directory: &Path) -> Result<Vec<Link>> {
    Paths::links(directory).with_context(|| format!("cannot list {}", directory.display()))
}

/// Compares what is pinned in a directory with what this build expects: the shape of every map, and
/// of every link what it attaches to what.
///
/// # Errors
/// Names the pin that is missing or different: nothing that this build does not know is ever used.
fn check(directory: &Path) -> Result<()> {
    check_maps(directory)?;
    for link in links(directory)? {
        pins::open_own_link(&link)?;
    }
    Ok(())
}
