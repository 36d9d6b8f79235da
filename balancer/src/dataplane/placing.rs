//! The programs that place clients' connections: attached while there is a frontend. No other
//! node, and no client without one, pays for them.

use std::io::{ErrorKind, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use balancer_common::abi::PlacedRecord;
use bytes::Buf as _;
use tracing::{info, warn};

use super::loader::Loader;
use super::object::{self, PLACED_SOCKETS_MAP};
use super::paths::Link;
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
    /// The kernel takes no other program at the cgroup: why, and what to do.
    Refused(String),
}

impl Loader {
    /// Attaches the programs that place clients' connections, or puts this build's under the links
    /// that are there; or detaches them. Costs nothing where that is done already. What is
    /// established stays counted either way.
    ///
    /// # Errors
    /// When the kernel refuses a program, or a pin can't be made or removed. Another program that
    /// allows none beside it is no error, but [`Placing::Refused`].
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
        match self.start_placing() {
            Ok(()) => {
                info!(
                    "placing the connections of clients in {}",
                    self.cgroup.place()
                );
                self.refused = None;
                Ok(Placing::On)
            }
            Err(error) if is_refused(&error) => {
                self.stop_placing()?;
                Ok(Placing::Refused(self.say_refused()))
            }
            Err(error) => pins::cleaned_up(Err(error), self.stop_placing()),
        }
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
        for link in super::loader::links(&self.paths.current())? {
            if placing(&link) {
                pins::remove_link(lock, &link)?;
            }
        }
        Ok(())
    }

    /// Says once why clients' connections aren't placed.
    fn say_refused(&mut self) -> String {
        let reason = format!(
            "another program at connect() sits at {0} or above it, and was attached in a way that \
             allows no second one (EPERM): older versions of Cilium do that. Clients connect as \
             without the balancer, and everything else works. `balancer doctor` names the program \
             and the cgroup: have its owner attach it with BPF_F_ALLOW_MULTI or a link, or give \
             the balancer a cgroup that isn't at or below it with --cgroup",
            self.cgroup.place()
        );
        if self.refused.as_ref() != Some(&reason) {
            warn!("connections of clients are not placed on this node: {reason}");
            self.refused = Some(reason.clone());
        }
        reason
    }
}

/// Whether the kernel refused to attach something. The same privilege has attached what counts
/// before, so it isn't missing.
fn is_refused(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(|error: &std::io::Error| error.kind() == ErrorKind::PermissionDenied)
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
