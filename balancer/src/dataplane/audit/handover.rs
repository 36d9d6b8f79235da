//! What another build's data plane knows that the socket table does not tell: whose a connection is. All connections of a virtual port have the
//! same local address, whichever backend accepted them.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use balancer_common::abi::Connection;
use tracing::{info, warn};

use super::super::Paths;
use super::super::tables::connection_of;
use super::super::writer::Writer;
use super::adopt::ONLY_NEW;
use super::socket_table::{SocketTable, sockets};
use crate::discover::{SocketOwner, owners};
use crate::sys::bpf::{self, Object};
use crate::sys::sock_diag::Socket;
use crate::sys::socket;

/// The maps of other layouts that name the slots of connections, and the connections that could not be given a slot of their own because no
/// process has them yet (they wait to be accepted), by their cookie.
#[derive(Debug, Default)]
pub struct Handover {
    maps: Vec<OwnedFd>,
    unaccepted: HashMap<u64, Connection>,
}

/// A backend, in either data plane.
type Tenant = (u16, u32);

impl Handover {
    /// Opens what other builds have left. Without it connections are shared out by their addresses and processes.
    ///
    /// # Errors
    /// When the state directory can't be read.
    pub fn of(paths: &Paths) -> Result<Self> {
        let mut maps = Vec::new();
        for directory in paths.others().context("cannot list the state directory")? {
            info!(
                "{} is the data plane of another build: taking over its listeners and connections",
                directory.display()
            );
            match open(&directory.join("CONNECTION")) {
                Ok(map) => maps.push(map),
                Err(error) => warn!(
                    "whose connections are is not known from {}: {error:#}",
                    directory.display()
                ),
            }
        }
        Ok(Self {
            maps,
            ..Self::default()
        })
    }

    /// The others are gone, and their maps with them.
    pub fn close(&mut self) {
        self.maps.clear();
    }
}

fn open(pin: &std::path::Path) -> Result<OwnedFd> {
    let map = bpf::obj_get(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    anyhow::ensure!(
        Object::of(&map)? == Some(Object::Map)
            && bpf::map_info(&map)?.value_size as usize == size_of::<Connection>(),
        "{} is another map",
        pin.display()
    );
    Ok(map)
}

impl Writer {
    /// Gives each connection of another data plane to the slot that its listener has in this one; says whether there was any. Must run
    /// inside the namespace, after its listeners were adopted.
    pub(in crate::dataplane) fn inherit(&mut self, socket_table: &SocketTable) -> Result<bool> {
        let mut inherited = false;
        for map in std::mem::take(&mut self.handover.maps) {
            let theirs = sockets(map.as_fd())?;
            inherited |= self.inherit_from(socket_table, &theirs)?;
            self.handover.maps.push(map);
        }
        Ok(inherited)
    }

    fn inherit_from(&mut self, socket_table: &SocketTable, theirs: &[Socket]) -> Result<bool> {
        let ours = tenants_of(&socket_table.listeners);
        let theirs_by_tenant = listeners_of(theirs);
        let known: HashMap<u64, bool> = socket_table
            .connections
            .iter()
            .map(|socket| (socket.cookie, socket.storage.is_some()))
            .collect();
        let heirs: Vec<(&Socket, Connection)> = theirs
            .iter()
            .filter(|socket| known.get(&socket.cookie) == Some(&false))
            .filter_map(|socket| {
                let listener = theirs_by_tenant.get(&tenant_of(socket)?)?;
                let (slot, generation) = *ours.get(listener)?;
                let class = Connection::INHERITED;
                Some((
                    socket,
                    Connection {
                        slot,
                        class,
                        generation,
                    },
                ))
            })
            .collect();
        if heirs.is_empty() {
            return Ok(false);
        }
        let processes = owners(heirs.iter().map(|(socket, _)| socket.inode))?;
        for (socket, connection) in heirs {
            let owners = processes.get(&socket.inode).map(Vec::as_slice);
            if !self.give(socket, connection, owners.unwrap_or_default()) {
                self.handover.unaccepted.insert(socket.cookie, connection);
            }
        }
        Ok(true)
    }

    fn give(&self, connection: &Socket, value: Connection, owners: &[SocketOwner]) -> bool {
        Self::file_of(connection, owners)
            .is_some_and(|file| self.set_storage(value, &file, ONLY_NEW).is_ok())
    }

    /// A descriptor of that very connection.
    pub(in crate::dataplane) fn file_of(
        connection: &Socket,
        owners: &[SocketOwner],
    ) -> Option<OwnedFd> {
        owners.iter().find_map(|owner| {
            let file = owner.file().ok()?;
            (socket::cookie(&file).ok()? == connection.cookie).then_some(file)
        })
    }

    /// What a connection without a slot was given because it could not be given it for good.
    pub(in crate::dataplane) fn inherited(
        &self,
        socket: &Socket,
        generations: &HashMap<u32, u32>,
    ) -> Option<Connection> {
        let connection = self.handover.unaccepted.get(&socket.cookie)?;
        let generation = generations.get(&u32::from(connection.slot));
        (generation == Some(&connection.generation)).then_some(*connection)
    }
}

fn tenant_of(socket: &Socket) -> Option<Tenant> {
    connection_of(socket).map(|connection| (connection.slot, connection.generation))
}

/// The slots of listeners, by the listeners' cookies.
fn tenants_of(listeners: &[Socket]) -> HashMap<u64, Tenant> {
    listeners
        .iter()
        .filter_map(|socket| Some((socket.cookie, tenant_of(socket)?)))
        .collect()
}

/// The cookies of listeners, by their slots.
fn listeners_of(sockets: &[Socket]) -> BTreeMap<Tenant, u64> {
    sockets
        .iter()
        .filter(|socket| socket.state == crate::sys::sock_diag::State::Listen)
        .filter_map(|socket| Some((tenant_of(socket)?, socket.cookie)))
        .collect()
}
