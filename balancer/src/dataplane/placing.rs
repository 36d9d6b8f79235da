//! The programs that place clients' connections: attached while there is a frontend. No other
//! node, and no client without one, pays for them.

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use balancer_common::abi::{FrontendKey, PlacedRecord};
use bytes::Buf as _;
use tracing::{info, warn};

use super::loader::{Loader, links};
use super::object::{self, PLACED_SOCKETS_MAP, is_not_permitted};
use super::paths::{Link, Paths};
use super::pins;
use super::programs::{Part, Program};
use crate::sys::bpf;

/// Whether clients' connections are placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placing {
    /// No: nobody asked for it.
    Off,
    /// Yes.
    On,
    /// The kernel does not take the programs, or no other one at the cgroup: why, and what to do.
    Refused(String),
}

impl Loader {
    /// Attaches the programs that place clients' connections, or puts this build's under the links
    /// that are there; or detaches them. Costs nothing where that is done already. What is
    /// established stays counted either way.
    ///
    /// # Errors
    /// When a pin can't be removed, or there are no descriptors or no memory left. What keeps the
    /// programs from being attached is no error, but [`Placing::Refused`]: everything else works.
    pub fn set_placing(&mut self, on: bool) -> Result<Placing> {
        if !on {
            self.stop_placing()?;
            return Ok(Placing::Off);
        }
        if self.places() {
            return Ok(Placing::On);
        }
        // Maps that are not there would be made anew beside those that are in use.
        self.put_back_pins()?;
        let Err(error) = self.start_placing() else {
            info!(
                "placing the connections of clients in {}",
                self.cgroup.place()
            );
            self.refused = None;
            return Ok(Placing::On);
        };
        pins::cleaned_up(Ok(()), self.stop_placing())?;
        if pins::is_of_shortage(&error) {
            return Err(error);
        }
        // The same privilege has attached what counts before, so it isn't missing.
        let reason = if is_not_permitted(&error) {
            self.exclusive()
        } else {
            format!("{error:#}")
        };
        Ok(Placing::Refused(self.say_refused(reason)))
    }

    /// Whether the programs that place clients' connections are attached.
    fn places(&self) -> bool {
        Part::Placing.programs().all(|program| self.has(program))
    }

    fn has(&self, program: &Program) -> bool {
        let mut links = self.cgroup.links.iter();
        links.any(|(link, ..)| link.program.name == program.name)
    }

    fn start_placing(&mut self) -> Result<()> {
        let directory = self.paths.current();
        let mut object = self.objects.open(&directory, 0)?;
        self.attach_part(Part::Placing, &mut object, &directory)
    }

    /// Detaches what is attached, and also what an earlier daemon has left attached.
    fn stop_placing(&mut self) -> Result<()> {
        let lock = &self.lock;
        let placing = |link: &Link| link.program.hook.part() == Part::Placing;
        for (link, file, _) in &self.cgroup.links {
            if placing(link) {
                info!("detaching {}", link.pin.display());
                pins::detach_now(lock, link, file)?;
                pins::remove_pin(&link.pin)?;
            }
        }
        self.cgroup.links.retain(|(link, ..)| !placing(link));
        if !self.placing_is_known {
            for link in links(&self.paths.current())? {
                if placing(&link) {
                    pins::remove_link(lock, &link)?;
                }
            }
            self.placing_is_known = true;
        }
        Ok(())
    }

    /// Why nothing can be attached where somebody else has forbidden it.
    fn exclusive(&self) -> String {
        format!(
            "another program at connect() sits at {} or above it, and was attached in a way that \
             allows no second one (EPERM): older versions of Cilium do that. `balancer doctor` \
             names the program and the cgroup: have its owner attach it with BPF_F_ALLOW_MULTI or \
             a link, or give the balancer a cgroup that isn't at or below it with --cgroup",
            self.cgroup.place()
        )
    }

    /// Says once why clients' connections aren't placed.
    fn say_refused(&mut self, reason: String) -> String {
        if self.refused.as_ref() != Some(&reason) {
            warn!(
                "connections of clients are not placed on this node: they go where they would \
                 without the balancer, and everything else works. {reason}"
            );
            self.refused = Some(reason.clone());
        }
        reason
    }
}

/// Whether a data plane has frontends: whether connections of clients should be placed.
pub fn has_frontends(paths: &Paths) -> bool {
    let map = MapData::from_pin(paths.map("FRONTENDS")).map(Map::HashMap);
    let frontends = map.and_then(HashMap::<_, [u8; size_of::<FrontendKey>()], u64>::try_from);
    frontends.is_ok_and(|frontends| frontends.keys().next().is_some())
}

/// The iterator over the sockets that were placed, in all network namespaces.
#[derive(Debug)]
pub struct PlacedSockets(OwnedFd);

impl PlacedSockets {
    /// Loads the iterator of a loader.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn load(loader: &mut Loader) -> Result<Self> {
        let directory = loader.paths.current();
        let mut object = loader.objects.open(&directory, 0)?;
        let program = object::load_placed_sockets(&mut object)?;
        Self::over(program, &directory)
    }

    fn over(program: impl std::os::fd::AsFd, directory: &Path) -> Result<Self> {
        let map = directory.join(PLACED_SOCKETS_MAP);
        let map = bpf::obj_get(&map).with_context(|| format!("cannot open {}", map.display()))?;
        let link = bpf::iter_link_create(program, map.as_fd());
        link.map(Self)
            .context("cannot make an iterator over the sockets that were placed")
    }

    /// Goes over all sockets that were placed. One that comes or goes meanwhile may be in it or
    /// not.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(&self) -> Result<Vec<PlacedRecord>> {
        let mut bytes = Vec::new();
        let file = bpf::iter_create(&self.0).and_then(|mut file| file.read_to_end(&mut bytes));
        file.context("cannot go over the sockets that were placed")?;
        let record = |mut bytes: &[u8]| PlacedRecord {
            endpoint: bytes.get_u16_ne(),
            phase: bytes.get_u8(),
            state: bytes.get_u8(),
            generation: bytes.get_u32_ne(),
        };
        let records = bytes.chunks_exact(size_of::<PlacedRecord>());
        Ok(records.map(record).collect())
    }
}
