//! Which network namespaces are guarded, and keeping `steer` attached to them.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result};
use tracing::{info, warn};

use crate::config::Namespaces;
use crate::dataplane::{SlotView, Writer};
use crate::discover::{Namespace, namespaces};
use crate::sys::netns;

/// The guarded namespaces.
#[derive(Debug)]
pub struct Guarded {
    /// Those that the configuration names, by cookie.
    named: BTreeMap<u64, OwnedFd>,
    /// Every other one is guarded as soon as a backend listens there.
    any: bool,
}

impl Guarded {
    /// Opens the namespaces of the configuration.
    ///
    /// # Errors
    /// When one can't be opened or entered.
    pub fn resolve(wanted: &Namespaces) -> Result<Self> {
        let own = || netns::current().context("cannot open this process's network namespace");
        let files = match wanted {
            Namespaces::Own | Namespaces::All => vec![own()?],
            Namespaces::Paths(paths) => paths
                .iter()
                .map(|path| {
                    netns::open(path).with_context(|| {
                        format!("cannot open the network namespace {} (is it there? `ip netns` lists named ones)", path.display())
                    })
                })
                .collect::<Result<_>>()?,
        };
        let mut named = BTreeMap::new();
        for file in files {
            let cookie =
                netns::cookie_of(&file).context("cannot read the cookie of a network namespace")?;
            named.insert(cookie, file);
        }
        Ok(Self {
            named,
            any: *wanted == Namespaces::All,
        })
    }

    /// Cookies of the namespaces that are guarded whether a backend listens there or not.
    pub fn named_cookies(&self) -> Vec<u64> {
        self.named.keys().copied().collect()
    }

    /// Whether listeners of any namespace are wanted.
    pub const fn any(&self) -> bool {
        self.any
    }

    /// Whether SYNs in that namespace are steered.
    pub fn covers(&self, cookie: u64, writer: &Writer) -> bool {
        self.named.contains_key(&cookie) || (self.any && writer.guards(cookie))
    }

    /// Attaches `steer` to the named namespaces, replacing what is there, and takes it off those that are not wanted.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn attach(&self, writer: &mut Writer) -> Result<()> {
        for (cookie, file) in &self.named {
            writer.guard(file.as_fd(), *cookie)?;
        }
        self.release(writer)
    }

    /// With `all`: attaches `steer` where backends listen, and takes it off where none is left.
    ///
    /// # Errors
    /// When the slots or the namespaces can't be read.
    pub fn follow(&self, writer: &mut Writer) -> Result<()> {
        if !self.any {
            return Ok(());
        }
        let unguarded: HashSet<u64> = Self::inhabited(&writer.slots()?)
            .into_iter()
            .filter(|cookie| !writer.guards(*cookie))
            .collect();
        if !unguarded.is_empty() {
            for namespace in namespaces()?
                .iter()
                .filter(|namespace| unguarded.contains(&namespace.cookie))
            {
                match writer.guard(namespace.as_fd(), namespace.cookie) {
                    Ok(()) => info!(
                        "guarding the network namespace of process {}",
                        namespace.pid
                    ),
                    Err(error) => warn!(
                        "cannot guard the network namespace of process {}: {error:#}",
                        namespace.pid
                    ),
                }
            }
        }
        self.release(writer)
    }

    /// Registers what listens already in the guarded namespaces, or in all that there are.
    ///
    /// # Errors
    /// When the namespaces or their sockets can't be read.
    pub fn adopt(&self, writer: &mut Writer) -> Result<()> {
        self.visit(writer, |_| true, Writer::adopt)
    }

    /// Counts again what was adopted and the kernel half can't follow.
    ///
    /// # Errors
    /// When the namespaces or their sockets can't be read.
    pub fn recount(&self, writer: &mut Writer) -> Result<()> {
        let adopted = writer.adopted_namespaces()?;
        if adopted.is_empty() {
            return Ok(());
        }
        self.visit(writer, |cookie| adopted.contains(&cookie), Writer::recount)
    }

    fn visit(
        &self,
        writer: &mut Writer,
        wanted: impl Fn(u64) -> bool,
        work: fn(&mut Writer, u64) -> Result<()>,
    ) -> Result<()> {
        let inside = |file: BorrowedFd<'_>, cookie: u64, writer: &mut Writer| {
            netns::inside(file, || work(writer, cookie))
                .context("cannot enter a network namespace")?
        };
        for (cookie, file) in self.named.iter().filter(|(cookie, _)| wanted(**cookie)) {
            inside(file.as_fd(), *cookie, writer)?;
        }
        if !self.any {
            return Ok(());
        }
        let unnamed = |namespace: &Namespace| !self.named.contains_key(&namespace.cookie);
        for namespace in namespaces()?
            .iter()
            .filter(|namespace| unnamed(namespace) && wanted(namespace.cookie))
        {
            inside(namespace.as_fd(), namespace.cookie, writer)?;
        }
        Ok(())
    }

    fn release(&self, writer: &Writer) -> Result<()> {
        let mut wanted: HashSet<u64> = self.named.keys().copied().collect();
        if self.any {
            wanted.extend(Self::inhabited(&writer.slots()?));
        }
        writer.unguard_others(&wanted)
    }

    fn inhabited(slots: &[SlotView]) -> HashSet<u64> {
        slots.iter().map(|view| view.member.backend.netns).collect()
    }
}
