//! Which network namespaces are guarded, and keeping `steer` attached to them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use balancer_common::abi::Backend;
use tracing::{info, warn};

use crate::config::NetnsScope;
use crate::dataplane::{SlotView, Writer};
use crate::discover::{NetnsHint, find_netns, live_netns};
use crate::sys::{memory, netns};

/// A namespace that can't be found is looked for again only after so long: that takes a look at every thread.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// A namespace with its cookie. It can't end while this is held, so nothing of this kind is kept.
pub type Open = (u64, OwnedFd);

/// The guarded namespaces.
#[derive(Debug)]
pub struct GuardedNetns {
    /// This process's own, where it is guarded.
    own: Option<Open>,
    /// Those that the configuration names, with the cookies of those that are there.
    named: BTreeMap<PathBuf, Option<u64>>,
    /// Every other one is guarded as soon as a backend listens there.
    any: bool,
    /// With `any`: only these of them.
    only: Option<HashSet<u64>>,
    /// With `any`: those that were found, guarded or about to be, with the process and thread they were found by.
    found: HashMap<u64, Option<(u32, u32)>>,
    /// When those that were not found were looked for last.
    lost: HashMap<u64, Instant>,
}

impl GuardedNetns {
    /// Finds the namespaces of the configuration. One that is named and not there is waited for.
    ///
    /// # Errors
    /// When this process's own can't be opened.
    pub fn resolve(wanted: &NetnsScope) -> Result<Self> {
        let mut guarded = Self {
            own: None,
            named: BTreeMap::new(),
            any: matches!(wanted, NetnsScope::All | NetnsScope::Pods),
            only: (*wanted == NetnsScope::Pods).then(HashSet::new),
            found: HashMap::new(),
            lost: HashMap::new(),
        };
        match wanted {
            NetnsScope::Own | NetnsScope::All => guarded.own = Some(own()?),
            NetnsScope::Pods => {}
            NetnsScope::Paths(paths) => {
                guarded.named = paths.iter().map(|path| (path.clone(), None)).collect();
                guarded.refresh();
                for (path, _) in guarded.named.iter().filter(|(_, cookie)| cookie.is_none()) {
                    warn!(
                        "the network namespace {} is not there (`ip netns` lists named ones): waiting for it",
                        path.display()
                    );
                }
            }
        }
        Ok(guarded)
    }

    /// Looks whether the namespaces that the configuration names have come, gone or become others; says whether any has.
    pub fn refresh(&mut self) -> bool {
        let mut changed = false;
        for (path, known) in &mut self.named {
            let now = netns::open(path).and_then(netns::cookie_of).ok();
            if *known == now {
                continue;
            }
            changed = true;
            let what = if now.is_some() { "there" } else { "gone" };
            info!("the network namespace {} is {what}", path.display());
            *known = now;
        }
        changed
    }

    /// Cookies of the namespaces that are guarded whether a backend listens there or not.
    pub fn named_cookies(&self) -> Vec<u64> {
        let own = self.own.iter().map(|(cookie, _)| *cookie);
        own.chain(self.named.values().flatten().copied()).collect()
    }

    /// Whether listeners of any namespace are wanted.
    pub const fn any(&self) -> bool {
        self.any
    }

    /// Whether SYNs in that namespace are steered, or are about to be.
    pub fn covers(&self, cookie: u64) -> bool {
        self.named_cookies().contains(&cookie)
            || (self.found.contains_key(&cookie) && self.may_guard(cookie))
    }

    /// Guards these alone of all namespaces, where any is guarded.
    pub fn restrict_to(&mut self, cookies: HashSet<u64>) {
        self.only = Some(cookies);
    }

    fn may_guard(&self, cookie: u64) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&cookie))
    }

    /// Attaches `steer` to the namespaces that are guarded in any case.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn attach(&self, writer: &mut Writer) -> Result<()> {
        for (cookie, file) in self.open_named()? {
            writer.loader.guard(file.as_fd(), cookie)?;
        }
        Ok(())
    }

    /// With `any`: opens the namespaces where backends listen and `steer` is not attached, those that are `wanted`.
    ///
    /// # Errors
    /// When the slots or the namespaces can't be read.
    pub fn strangers(
        &mut self,
        writer: &mut Writer,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<Vec<Open>> {
        if !self.any {
            return Ok(Vec::new());
        }
        let now = Instant::now();
        self.lost
            .retain(|_, since| now.duration_since(*since) < LOOK_AGAIN_AFTER);
        let slots = writer.tables.slots()?;
        let inhabited = inhabited(&slots);
        for cookie in inhabited
            .keys()
            .filter(|cookie| writer.loader.guards(**cookie))
        {
            // An earlier daemon found it.
            self.found.entry(*cookie).or_insert(None);
        }
        let wanted: Vec<NetnsHint> = inhabited
            .into_iter()
            .filter(|(cookie, _)| !writer.loader.guards(*cookie) && !self.lost.contains_key(cookie))
            .filter(|(cookie, _)| wanted(*cookie))
            .map(|(cookie, listened)| NetnsHint { cookie, listened })
            .collect();
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let found = find_netns(&wanted)?;
        for NetnsHint { cookie, .. } in wanted {
            if !found.iter().any(|(found, _)| *found == cookie) {
                self.lost.insert(cookie, now);
                drop_adopted(&slots, cookie, writer);
            }
        }
        Ok(found)
    }

    /// Attaches `steer` to newcomers.
    pub fn guard(&mut self, newcomers: &[Open], writer: &mut Writer) {
        if newcomers.is_empty() {
            return;
        }
        for (cookie, file) in newcomers {
            match writer.loader.guard(file.as_fd(), *cookie) {
                Ok(()) => {
                    self.found.entry(*cookie).or_insert(None);
                    info!("guarding the network namespace with cookie {cookie}");
                }
                Err(error) => {
                    self.found.remove(cookie);
                    self.lost.insert(*cookie, Instant::now());
                    warn!("cannot guard the network namespace with cookie {cookie}: {error:#}");
                }
            }
        }
        memory::give_back();
    }

    /// Takes `steer` off the namespaces that are gone or not wanted any more.
    ///
    /// # Errors
    /// When the slots can't be read or a pin can't be removed.
    pub fn release(&mut self, writer: &mut Writer) -> Result<()> {
        let named = self.named_cookies();
        let mut wanted: HashSet<u64> = named.iter().copied().collect();
        for (cookie, inode) in writer.loader.guarded()? {
            if inode.is_none() {
                writer.audit.drop_netns(&writer.tables, cookie)?;
                self.found.remove(&cookie);
                wanted.remove(&cookie);
            }
        }
        if self.any {
            let inhabited = inhabited(&writer.tables.slots()?);
            self.found
                .retain(|cookie, _| inhabited.contains_key(cookie));
            let found = self.found.keys().copied();
            wanted.extend(found.filter(|cookie| self.may_guard(*cookie)));
        }
        writer.loader.unguard_others(&wanted)
    }

    /// Compares the guarded namespaces with the socket table, and registers what listens there unregistered; the `first` time in all
    /// namespaces that there are, later where backends are known.
    ///
    /// # Errors
    /// When the namespaces or their sockets can't be read.
    pub fn check(&mut self, writer: &mut Writer, first: bool) -> Result<()> {
        writer.audit.begin(&writer.tables)?;
        let open = self.open_all(writer, first)?;
        for (cookie, file) in open {
            netns::inside(&file, || writer.check(cookie, first))
                .context("cannot enter a network namespace")??;
        }
        Ok(())
    }

    fn open_all(&mut self, writer: &Writer, first: bool) -> Result<Vec<Open>> {
        let mut open = self.open_named()?;
        if !self.any {
            return Ok(open);
        }
        let named: HashSet<u64> = open.iter().map(|(cookie, _)| *cookie).collect();
        let others: Vec<Open> = if first {
            let all = live_netns()?;
            self.found = all
                .iter()
                .map(|found| (found.cookie, Some((found.pid, found.tid))))
                .collect();
            all.into_iter()
                .map(|namespace| (namespace.cookie, namespace.into()))
                .collect()
        } else {
            let wanted: Vec<NetnsHint> = inhabited(&writer.tables.slots()?)
                .into_iter()
                .filter_map(|(cookie, listened)| {
                    let seen = self.found.get(&cookie)?;
                    let listened = seen.iter().copied().chain(listened).collect();
                    Some(NetnsHint { cookie, listened })
                })
                .collect();
            find_netns(&wanted)?
        };
        open.extend(
            others
                .into_iter()
                .filter(|(cookie, _)| !named.contains(cookie)),
        );
        Ok(open)
    }

    /// A namespace that has changed since it was looked at last is passed over: the next look will see that.
    fn open_named(&self) -> Result<Vec<Open>> {
        let mut open = Vec::new();
        if let Some((cookie, file)) = &self.own {
            let file = file.try_clone().context("cannot copy a descriptor")?;
            open.push((*cookie, file));
        }
        for (path, known) in &self.named {
            let Ok(file) = netns::open(path) else {
                continue;
            };
            if known.is_some() && netns::cookie_of(&file).ok() == *known {
                open.extend(known.map(|cookie| (cookie, file)));
            }
        }
        Ok(open)
    }
}

fn own() -> Result<Open> {
    let file = netns::current().context("cannot open this process's network namespace")?;
    let cookie = netns::cookie().context("cannot read the cookie of a network namespace")?;
    Ok((cookie, file))
}

/// The namespaces of slots, with the threads that listened there.
fn inhabited(slots: &[SlotView]) -> BTreeMap<u64, Vec<(u32, u32)>> {
    let mut inhabited: BTreeMap<u64, Vec<(u32, u32)>> = BTreeMap::new();
    for view in slots {
        let backend = &view.member.backend;
        let listened = inhabited.entry(backend.netns).or_default();
        listened.push((backend.pid, backend.tid));
    }
    inhabited
}

/// Nobody tells when an adopted listener closes, and nothing is left to look at.
fn drop_adopted(slots: &[SlotView], cookie: u64, writer: &mut Writer) {
    let adopted = |view: &&SlotView| {
        let backend = &view.member.backend;
        backend.netns == cookie && backend.flags & Backend::ADOPTED != 0
    };
    if slots.iter().any(|view| adopted(&view))
        && let Err(error) = writer.audit.drop_netns(&writer.tables, cookie)
    {
        warn!("cannot close the backends of a network namespace that is gone: {error:#}");
    }
}
