//! The daemon's side: load, attach, adopt, replace, change.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::programs::CgroupAttachMode;
use aya::programs::links::FdLink;
use balancer_common::abi::{Heartbeat, ListenRule, PortKey};
use tracing::info;

use super::audit::Audit;
use super::audit::handover::Handover;
use super::audit::migrated::Migrated;
use super::events::{self, Events, LogFollower};
use super::lock::Lock;
use super::paths::{Attachment, Link};
use super::programs::{self, Kernel};
use super::tables::Tables;
use super::{Paths, pins};
use crate::sys::bpf::{self, LinkTarget};
use crate::sys::clock;

/// The one writer of a data plane.
pub struct Writer {
    paths: Paths,
    kernel: Kernel,
    pub(super) tables: Tables,
    /// The cgroup whose listeners are counted.
    pub(super) cgroup: PathBuf,
    pub(super) rules: BTreeMap<PortKey, ListenRule>,
    /// Since when a closed slot has been seen without connections.
    pub(super) empty_since: BTreeMap<u32, (u32, Instant)>,
    /// What the comparisons with the socket table have found so far.
    pub(super) audit: Audit,
    pub(super) handover: Handover,
    /// By the cookie of their namespace.
    pub(super) migrated: BTreeMap<u64, Migrated>,
    /// Links of this build's `steer`, by the cookie of their namespace.
    steers: BTreeMap<u64, OwnedFd>,
    /// The loaded objects whose logs nobody follows yet: they own the buffers. `account`'s has no namespace.
    objects: Vec<(Option<u64>, Ebpf)>,
    logs: BTreeMap<Option<u64>, LogFollower>,
    adopted: bool,
    _lock: Lock,
}

impl Writer {
    /// Takes the right to write, making the state directory where it is missing.
    ///
    /// # Errors
    /// When another process has it, or the directory can't be made.
    pub fn lock(paths: &Paths) -> Result<Lock> {
        pins::lock(paths)
    }

    /// Makes a data plane, or adopts the one that is there; attaches `account` to the cgroup. One of another layout stays in
    /// force beside a new one until [`Writer::switch`].
    ///
    /// # Errors
    /// When the pins are not what they should be, or the kernel refuses something. Nothing is
    /// left behind then that was not there before.
    pub fn start(paths: Paths, lock: Lock, cgroup: &Path) -> Result<Self> {
        let mut kernel = Kernel::read()?;
        for remains in [paths.removed(), paths.staging()] {
            pins::remove_directory(&remains)?;
        }
        let directory = paths.current();
        let adopted = directory.exists();
        let (object, tables) = if adopted {
            programs::check(&directory)?;
            attach_account(&mut kernel, &directory, cgroup)?
        } else {
            make(&mut kernel, &paths, cgroup)?
        };
        info!(
            "{} the data plane in {}",
            if adopted { "adopted" } else { "made" },
            directory.display()
        );
        let audit = Audit::of(tables.audit_totals());
        let handover = Handover::of(&paths)?;
        Ok(Self {
            paths,
            kernel,
            tables,
            cgroup: cgroup.to_owned(),
            rules: BTreeMap::new(),
            empty_since: BTreeMap::new(),
            audit,
            handover,
            migrated: BTreeMap::new(),
            steers: BTreeMap::new(),
            objects: vec![(None, object)],
            logs: BTreeMap::new(),
            adopted,
            _lock: lock,
        })
    }

    /// Puts this build's `steer` under every link that is there, also under those of another layout, which become this data plane's;
    /// removes the links of namespaces that are gone, then what is left of other layouts. From here on this data plane alone
    /// decides.
    ///
    /// # Errors
    /// When the kernel refuses a program, or a pin can't be moved or removed.
    pub fn switch(&mut self) -> Result<()> {
        let others = self
            .paths
            .others()
            .context("cannot list the state directory")?;
        let current = self.paths.current();
        for directory in others.iter().chain([&current]) {
            let links = Paths::links(directory)
                .with_context(|| format!("cannot list {}", directory.display()))?;
            for link in links {
                if let Attachment::Steer(cookie) = link.what {
                    self.take_over(&link, cookie)?;
                }
            }
        }
        for directory in others {
            info!(
                "removing the data plane of another build in {}: this one has its listeners and connections",
                directory.display()
            );
            pins::remove_directory(&directory)?;
        }
        self.handover.close();
        Ok(())
    }

    fn take_over(&mut self, link: &Link, cookie: u64) -> Result<()> {
        let file = pins::open_link(link)?;
        if pins::is_dead(&file)? {
            return pins::remove_link(link);
        }
        let pin = Paths::steer(&self.paths.current(), cookie);
        if link.pin != pin && pin.exists() {
            return pins::finish_move(link, &file, &pin);
        }
        if self.steers.contains_key(&cookie) {
            return Ok(());
        }
        let mut object = self.kernel.open_object(&self.paths.current(), cookie)?;
        let file = pins::replace(link, programs::steer(&mut object)?.fd()?.as_fd())?;
        if link.pin != pin {
            pins::move_link(&file, &link.pin, &pin)?;
        }
        self.remember(cookie, file, object);
        Ok(())
    }

    fn remember(&mut self, cookie: u64, link: OwnedFd, object: Ebpf) {
        self.steers.insert(cookie, link);
        self.objects.push((Some(cookie), object));
    }

    /// Attaches `steer` to a network namespace, where it isn't yet.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn guard(&mut self, netns: BorrowedFd<'_>, cookie: u64) -> Result<()> {
        if self.steers.contains_key(&cookie) {
            return Ok(());
        }
        let directory = self.paths.current();
        let mut object = self.kernel.open_object(&directory, cookie)?;
        let program = programs::steer(&mut object)?;
        let link = program.attach(netns).with_context(|| {
            format!("cannot attach `steer` to the network namespace with cookie {cookie} (at most 64 programs a namespace)")
        })?;
        let link: FdLink = program.take_link(link)?.into();
        let pin = Paths::steer(&directory, cookie);
        link.pin(&pin)
            .with_context(|| format!("cannot pin {}", pin.display()))?;
        let file = bpf::obj_get(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
        self.remember(cookie, file, object);
        Ok(())
    }

    /// Whether this build's `steer` is attached to a namespace.
    pub fn guards(&self, cookie: u64) -> bool {
        self.steers.contains_key(&cookie)
    }

    /// The guarded namespaces: cookie, and inode while they live.
    ///
    /// # Errors
    /// When a link can't be queried.
    pub fn guarded(&self) -> Result<Vec<(u64, Option<u32>)>> {
        let inode = |(cookie, link): (&u64, &OwnedFd)| {
            let info = bpf::link_info(link).context("cannot query a link")?;
            Ok(match info.target {
                LinkTarget::Netns { inode, .. } if inode != 0 => (*cookie, Some(inode)),
                _ => (*cookie, None),
            })
        };
        self.steers.iter().map(inode).collect()
    }

    /// Detaches `steer` from every namespace that is not wanted.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn unguard_others(&mut self, wanted: &HashSet<u64>) -> Result<()> {
        let unwanted: Vec<u64> = self
            .steers
            .keys()
            .filter(|cookie| !wanted.contains(cookie))
            .copied()
            .collect();
        for cookie in unwanted {
            pins::remove_link(&Link {
                pin: Paths::steer(&self.paths.current(), cookie),
                what: Attachment::Steer(cookie),
            })?;
            self.steers.remove(&cookie);
            self.logs.remove(&Some(cookie));
        }
        Ok(())
    }

    /// Passes on what the kernel half of the programs loaded since the last call logs. Must be called inside a runtime.
    pub fn follow_logs(&mut self) {
        for (cookie, object) in self.objects.drain(..) {
            if let Some(follower) = events::follow_log(object) {
                self.logs.insert(cookie, follower);
            }
        }
    }

    /// The events of the kernel half. Must be called inside a runtime.
    ///
    /// # Errors
    /// When the ring can't be opened.
    pub fn events(&self) -> Result<Events> {
        Events::open(&self.paths.current())
    }

    /// The daemon lives.
    pub fn beat(&self, limit: Duration) {
        self.tables.beat(beat(limit));
    }

    /// Takes out of the kernel what this daemon has put there, after a start that failed. One that was to take another build's data plane
    /// over takes nothing back: that one is in force as before, or for the namespaces whose links it has moved this one, and the
    /// next start goes on.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn withdraw(&self) -> Result<()> {
        let others = self
            .paths
            .others()
            .context("cannot list the state directory")?;
        if self.adopted || !others.is_empty() {
            return Ok(());
        }
        self.remove()
    }

    /// Takes everything out of the kernel.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn remove(&self) -> Result<()> {
        pins::remove_data_plane(&self.paths)
    }
}

/// Builds a data plane aside and puts it in its place whole.
fn make(kernel: &mut Kernel, paths: &Paths, cgroup: &Path) -> Result<(Ebpf, Tables)> {
    let staging = paths.staging();
    pins::make_directory(&staging)?;
    let made = attach_account(kernel, &staging, cgroup)
        .and_then(|made| pins::rename(&staging, &paths.current()).map(|()| made));
    if made.is_err() {
        pins::remove_directory(&staging)?;
    }
    made
}

fn attach_account(kernel: &mut Kernel, directory: &Path, cgroup: &Path) -> Result<(Ebpf, Tables)> {
    let mut object = kernel.open_object(directory, 0)?;
    let tables = Tables::open(directory)?;
    let target = fs::File::open(cgroup)
        .with_context(|| format!("cannot open the cgroup {}", cgroup.display()))?;
    let id = target
        .metadata()
        .with_context(|| format!("cannot query the cgroup {}", cgroup.display()))?
        .ino();
    let program = programs::account(&mut object)?;
    let link = Link {
        pin: Paths::account(directory, id),
        what: Attachment::Account(id),
    };
    if link.pin.exists() {
        pins::replace(&link, program.fd()?.as_fd())?;
    } else {
        let attached = program.attach(&target, CgroupAttachMode::Single).with_context(|| {
            format!(
                "cannot attach `account` to the cgroup {} (is it a cgroup2 directory? EPERM: an older program sits \
                 there that allows no other; `balancer doctor` names it)",
                cgroup.display()
            )
        })?;
        let attached: FdLink = program.take_link(attached)?.try_into()?;
        attached
            .pin(&link.pin)
            .with_context(|| format!("cannot pin {}", link.pin.display()))?;
    }
    let links =
        Paths::links(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for other in links {
        if matches!(other.what, Attachment::Account(other) if other != id) {
            pins::remove_link(&other)?;
        }
    }
    Ok((object, tables))
}

fn beat(limit: Duration) -> Heartbeat {
    Heartbeat {
        last_ns: clock::monotonic_ns(),
        limit_ns: u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX),
    }
}
