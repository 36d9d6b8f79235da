//! What readers see without the daemon: snapshots of the maps, and explanations of decisions.

pub mod connect;
pub mod explain;
pub mod placing;
pub mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail};

use self::connect::{Client, ConnectExplanation};
use self::explain::{Answer, NetnsChoice, Syn};
use self::snapshot::Snapshot;
use super::down;
use super::paths::Paths;
use super::place_tables::frontend_key;
use super::services;
use super::tables::{Tables, check_maps};
use crate::discover::OpenNetns;

/// The pinned maps, for reading.
pub struct Reader {
    tables: Tables,
    paths: Paths,
}

/// Opens the data plane of a state directory; `None`: there is none.
///
/// # Errors
/// When the pins are of another build, or can't be opened.
pub fn open(paths: &Paths) -> Result<Option<Reader>> {
    let directory = paths.current();
    match std::fs::metadata(&directory) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return match paths.others() {
                Ok(others) if !others.is_empty() => bail!(
                    "the data plane there is of another build ({}; this one reads {}): ask the program that made it, or take it over with \
                     `balancer run`",
                    others[0].display(),
                    directory.display()
                ),
                _ => Ok(None),
            };
        }
        Err(error) => {
            return Err(error).with_context(|| {
                format!("cannot look into {} (are we root?)", directory.display())
            });
        }
    }
    check_maps(&directory)?;
    Ok(Some(Reader {
        tables: Tables::open(&directory)?,
        paths: paths.clone(),
    }))
}

impl Reader {
    /// The data plane now.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn snapshot(&self) -> Result<Snapshot> {
        snapshot::take(&self.tables, &down::read_notes(&self.paths))
    }

    /// The addresses and ports that the services list for their backends, by the service's id.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn listed(&self) -> Result<BTreeMap<u16, BTreeSet<SocketAddr>>> {
        Ok(services::rules(&self.tables)?.listed())
    }

    /// Where a SYN would go now, and why: the decision of the kernel program on a snapshot of the
    /// maps.
    ///
    /// # Errors
    /// When a map or the socket table can't be read, the netns can't be entered, or it takes an
    /// address to tell which service is meant.
    pub fn explain(&self, syn: &Syn, netns: NetnsChoice) -> Result<Answer> {
        explain::explain(&self.tables, &self.paths.current(), syn, netns)
    }

    /// Where a connect of a client of this node would go now, and why.
    ///
    /// # Errors
    /// When a map or the socket table can't be read.
    pub fn explain_connect(&self, client: &Client, to: SocketAddr) -> Result<ConnectExplanation> {
        let snapshot = self.snapshot()?;
        connect::explain(&self.tables.place, &self.paths, &snapshot, client, to)
    }

    /// Opens the netns with that cookie, in which a backend listens.
    ///
    /// # Errors
    /// When it can't be found or entered, or the slots can't be read.
    pub fn open_netns(&self, cookie: u64) -> Result<OpenNetns> {
        let slots = self.tables.slots()?;
        let members: Vec<_> = slots.iter().map(|view| &view.member).collect();
        explain::open_netns(cookie, &members)
    }

    /// Whether an address is a frontend.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn is_frontend(&self, to: SocketAddr) -> Result<bool> {
        let frontends = self.tables.place.frontends()?;
        Ok(frontends.contains_key(&frontend_key(to)))
    }
}
