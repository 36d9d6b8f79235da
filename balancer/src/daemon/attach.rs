//! Which network namespaces are guarded, and keeping `steer` attached to them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use balancer_common::abi::Backend;
use tracing::{info, warn};

use crate::config::NetnsScope;
use crate::dataplane::{SlotView, Writer};
use crate::discover::{
    Netns, NetnsHint, OpenNetns, Thread, UnreachableNetns, find_netns, live_netns,
};
use crate::sys::file_id::FileId;
use crate::sys::{memory, netns};

/// A netns that can't be found is looked for again only after so long: that takes a look at every
/// thread.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Which network namespaces an audit looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every network namespace where any may be guarded; else the own and the named ones.
    Everywhere,
    /// The own and the named network namespaces, and those where backends are known.
    Known,
}

/// The guarded network namespaces.
#[derive(Debug)]
pub struct GuardedNetns {
    /// The network namespace of this process, where it is guarded.
    own: Option<OpenNetns>,
    /// The network namespaces that the configuration names, with their cookies; `None`: there is
    /// none at that path now.
    named: BTreeMap<PathBuf, Option<u64>>,
    /// Every other network namespace is guarded as soon as a backend listens there.
    any: bool,
    /// With `any`: the cookies of the network namespaces that may be guarded; `None`: all may.
    only: Option<HashSet<u64>>,
    /// With `any`: the cookies of network namespaces that were found, guarded or about to be, with
    /// a thread that lives there; `None`: none is known.
    found: HashMap<u64, Option<Thread>>,
    /// The cookies of network namespaces that were not found, and when they were looked for last.
    missing: HashMap<u64, Instant>,
    /// Network namespaces that could not be entered at the last look at all.
    unreachable: HashSet<FileId>,
}

impl GuardedNetns {
    /// Finds the network namespaces of the configuration. One that is named and not there is waited
    /// for.
    ///
    /// # Errors
    /// When this process's own can't be opened.
    pub fn resolve(scope: &NetnsScope) -> Result<Self> {
        let mut guarded = Self {
            own: None,
            named: BTreeMap::new(),
            any: matches!(scope, NetnsScope::All | NetnsScope::Pods),
            only: (*scope == NetnsScope::Pods).then(HashSet::new),
            found: HashMap::new(),
            missing: HashMap::new(),
            unreachable: HashSet::new(),
        };
        match scope {
            NetnsScope::Own | NetnsScope::All => guarded.own = Some(own()?),
            NetnsScope::Pods => {}
            NetnsScope::Paths(paths) => {
                guarded.named = paths.iter().map(|path| (path.clone(), None)).collect();
                guarded.refresh();
                for (path, _) in guarded.named.iter().filter(|(_, cookie)| cookie.is_none()) {
                    warn!(
                        "the network namespace {} is not there (`ip netns` lists named ones): \
                         waiting for it",
                        path.display()
                    );
                }
            }
        }
        Ok(guarded)
    }

    /// Looks whether the network namespaces that the configuration names have come, gone or become
    /// others.
    pub fn refresh(&mut self) {
        for (path, known) in &mut self.named {
            let now = netns::open(path).and_then(netns::cookie_of).ok();
            if *known != now {
                let what = if now.is_some() { "there" } else { "gone" };
                info!("the network namespace {} is {what}", path.display());
                *known = now;
            }
        }
    }

    /// Cookies of the network namespaces that are guarded whether a backend listens there or not.
    pub fn named_cookies(&self) -> Vec<u64> {
        let own = self.own.iter().map(|own| own.cookie);
        own.chain(self.named.values().flatten().copied()).collect()
    }

    /// Whether listeners of any network namespace are wanted.
    pub const fn any(&self) -> bool {
        self.any
    }

    /// Whether SYNs in that network namespace are steered, or are about to be.
    pub fn covers(&self, cookie: u64) -> bool {
        self.named_cookies().contains(&cookie)
            || (self.found.contains_key(&cookie) && self.may_guard(cookie))
    }

    /// Lets only these network namespaces be guarded, where any might be.
    pub fn restrict_to(&mut self, cookies: HashSet<u64>) {
        self.only = Some(cookies);
    }

    fn may_guard(&self, cookie: u64) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&cookie))
    }

    /// Attaches `steer` to the own and the named network namespaces.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn attach(&self, writer: &mut Writer) -> Result<()> {
        for netns in self.open_named()? {
            writer.loader.guard(netns.file.as_fd(), netns.cookie)?;
        }
        Ok(())
    }

    /// With `any`: opens the network namespaces where backends listen and `steer` is not attached,
    /// those that are `wanted`.
    ///
    /// # Errors
    /// When the slots or the network namespaces can't be read.
    pub fn find_unguarded(
        &mut self,
        writer: &mut Writer,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<Vec<OpenNetns>> {
        if !self.any {
            return Ok(Vec::new());
        }
        let now = Instant::now();
        self.missing
            .retain(|_, since| now.duration_since(*since) < RETRY_AFTER);
        let slots = writer.tables.slots()?;
        let mut wanted_hints = Vec::new();
        for hint in netns_of(&slots) {
            if writer.loader.guards(hint.cookie) {
                // An earlier daemon found it.
                self.found.entry(hint.cookie).or_insert(None);
            } else if !self.missing.contains_key(&hint.cookie) && wanted(hint.cookie) {
                wanted_hints.push(hint);
            }
        }
        if wanted_hints.is_empty() {
            return Ok(Vec::new());
        }
        let found = find_netns(&wanted_hints)?;
        for NetnsHint { cookie, .. } in wanted_hints {
            if !found.iter().any(|found| found.cookie == cookie) {
                self.missing.insert(cookie, now);
                drop_adopted(&slots, cookie, writer);
            }
        }
        Ok(found)
    }

    /// Attaches `steer` to network namespaces that were found.
    pub fn attach_to(&mut self, found: &[OpenNetns], writer: &mut Writer) {
        for OpenNetns { cookie, file } in found {
            match writer.loader.guard(file.as_fd(), *cookie) {
                Ok(()) => {
                    self.found.entry(*cookie).or_insert(None);
                    info!("guarding the network namespace with cookie {cookie}");
                }
                Err(error) => {
                    self.found.remove(cookie);
                    self.missing.insert(*cookie, Instant::now());
                    warn!("cannot guard the network namespace with cookie {cookie}: {error:#}");
                }
            }
        }
        if !found.is_empty() {
            memory::give_back();
        }
    }

    /// Takes `steer` off the network namespaces that are gone or not wanted any more.
    ///
    /// # Errors
    /// When the slots can't be read or a pin can't be removed.
    pub fn detach_unwanted(&mut self, writer: &mut Writer) -> Result<()> {
        let mut wanted: HashSet<u64> = self.named_cookies().into_iter().collect();
        for (cookie, inode) in writer.loader.guarded()? {
            if inode.is_none() {
                writer.audit.drop_netns(&writer.tables, cookie)?;
                self.found.remove(&cookie);
                wanted.remove(&cookie);
            }
        }
        if self.any {
            let slots = writer.tables.slots()?;
            let listened_in: HashSet<u64> =
                slots.iter().map(|slot| slot.member.backend.netns).collect();
            self.found.retain(|cookie, _| listened_in.contains(cookie));
            let found = self.found.keys().copied();
            wanted.extend(found.filter(|cookie| self.may_guard(*cookie)));
        }
        writer.loader.unguard_others(&wanted)
    }

    /// Compares the counts of the guarded network namespaces with the socket table, and registers
    /// what listens there unregistered.
    ///
    /// # Errors
    /// When the network namespaces or their sockets can't be read.
    pub fn audit(&mut self, writer: &mut Writer, scope: Scope) -> Result<()> {
        writer.audit.begin(&writer.tables)?;
        for OpenNetns { cookie, file } in self.open_all(writer, scope)? {
            netns::inside(&file, || writer.check(cookie, scope == Scope::Everywhere))
                .context("cannot enter a network namespace")??;
        }
        Ok(())
    }

    fn open_all(&mut self, writer: &Writer, scope: Scope) -> Result<Vec<OpenNetns>> {
        let mut open = self.open_named()?;
        if !self.any {
            return Ok(open);
        }
        let others = if scope == Scope::Everywhere {
            let live = live_netns()?;
            self.warn_of(&live.unreachable);
            let all = live.reachable;
            let thread = |found: &Netns| {
                let Netns { pid, tid, .. } = *found;
                (found.cookie, Some(Thread { pid, tid }))
            };
            self.found = all.iter().map(thread).collect();
            all.into_iter().map(OpenNetns::from).collect()
        } else {
            let mut hints = netns_of(&writer.tables.slots()?);
            hints.retain_mut(|hint| {
                let found = self.found.get(&hint.cookie);
                hint.listened.splice(0..0, found.copied().flatten());
                found.is_some()
            });
            find_netns(&hints)?
        };
        let named: HashSet<u64> = open.iter().map(|netns| netns.cookie).collect();
        open.extend(
            others
                .into_iter()
                .filter(|other| !named.contains(&other.cookie)),
        );
        Ok(open)
    }

    /// Warns of the network namespaces that can't be entered, of each once.
    fn warn_of(&mut self, unreachable: &[UnreachableNetns]) {
        for UnreachableNetns { id, pid, error } in unreachable {
            if !self.unreachable.contains(id) {
                warn!(
                    "cannot enter the network namespace of process {pid}: {error}. What listens \
                     there is not counted and takes no connections of a service, the others are \
                     guarded: see what forbids it (a security module, a sandbox), or name the \
                     wanted ones in `namespaces:`"
                );
            }
        }
        self.unreachable = unreachable.iter().map(|netns| netns.id).collect();
    }

    /// Opens the own and the named network namespaces. A path that leads to another one than at
    /// the last [`Self::refresh`] is passed over: the next one will see that.
    fn open_named(&self) -> Result<Vec<OpenNetns>> {
        let mut open = Vec::new();
        if let Some(own) = &self.own {
            let file = own.file.try_clone().context("cannot copy a descriptor")?;
            open.push(OpenNetns { file, ..*own });
        }
        let named = self.named.iter().filter_map(|(path, known)| {
            let cookie = (*known)?;
            let file = netns::open(path).ok()?;
            (netns::cookie_of(&file).ok()? == cookie).then_some(OpenNetns { cookie, file })
        });
        open.extend(named);
        Ok(open)
    }
}

fn own() -> Result<OpenNetns> {
    let file = netns::current().context("cannot open this process's network namespace")?;
    let cookie = netns::cookie().context("cannot read the cookie of a network namespace")?;
    Ok(OpenNetns { cookie, file })
}

/// The network namespaces of slots, with the threads that listened there.
fn netns_of(slots: &[SlotView]) -> Vec<NetnsHint> {
    let mut threads: BTreeMap<u64, Vec<Thread>> = BTreeMap::new();
    for slot in slots {
        let Backend {
            netns, pid, tid, ..
        } = slot.member.backend;
        threads.entry(netns).or_default().push(Thread { pid, tid });
    }
    threads
        .into_iter()
        .map(|(cookie, listened)| NetnsHint { cookie, listened })
        .collect()
}

/// Nobody tells when an adopted listener closes, and nothing is left to look at.
fn drop_adopted(slots: &[SlotView], cookie: u64, writer: &mut Writer) {
    let adopted = slots
        .iter()
        .map(|slot| &slot.member.backend)
        .any(|backend| backend.netns == cookie && backend.flags & Backend::ADOPTED != 0);
    if adopted && let Err(error) = writer.audit.drop_netns(&writer.tables, cookie) {
        warn!("cannot close the backends of a network namespace that is gone: {error:#}");
    }
}
