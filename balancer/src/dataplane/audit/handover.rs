//! What another build's data plane knows that the socket table does not tell: whose a connection
//! is. All connections of a virtual port have the same local address, whichever backend accepted
//! them.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use balancer_common::abi::{BackendId, Connection};
use tracing::{info, warn};

use super::super::paths::Paths;
use super::super::tables::{ONLY_NEW, Tables, backend_of, connection_of};
use super::socket_table::{SocketTable, sockets};
use crate::discover::{SocketOwner, owners};
use crate::sys::bpf::{self, Object};
use crate::sys::sock_diag::{Socket, State};
use crate::sys::socket;

/// What other builds' data planes know of connections.
#[derive(Debug, Default)]
pub struct Handover {
    /// The maps of other layouts that name the slots of connections.
    maps: Vec<OwnedFd>,
    /// The connections whose storage could not be written because no process has them yet (they
    /// wait to be accepted), by their cookie.
    unaccepted: HashMap<u64, Connection>,
}

impl Handover {
    /// Opens what other builds have left. Without it connections are shared out by their addresses
    /// and processes.
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

    /// Gives each connection of another data plane to the slot that its listener has in this one;
    /// says whether there was any. Must run inside the netns, after its listeners were adopted.
    ///
    /// # Errors
    /// When the socket table or the processes can't be read.
    pub fn inherit(&mut self, tables: &Tables, table: &SocketTable) -> Result<bool> {
        let mut any = false;
        for map in &self.maps {
            let theirs = sockets(map.as_fd())?;
            let inherited = inherited(table, &theirs);
            any |= !inherited.is_empty();
            let unaccepted = give(tables, inherited)?;
            self.unaccepted.extend(unaccepted);
        }
        Ok(any)
    }

    /// What a connection was given that could not be written to its storage.
    pub fn connection(&self, socket: &Socket) -> Option<Connection> {
        self.unaccepted.get(&socket.cookie).copied()
    }
}

fn open(pin: &Path) -> Result<OwnedFd> {
    let map = bpf::obj_get(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    ensure!(
        Object::of(&map)? == Some(Object::Map)
            && bpf::map_info(&map)?.value_size as usize == size_of::<Connection>(),
        "{} is another map",
        pin.display()
    );
    Ok(map)
}

/// The connections that another data plane has given to a listener which has a slot in this one.
fn inherited<'a>(table: &SocketTable, theirs: &'a [Socket]) -> Vec<(&'a Socket, Connection)> {
    let our_slots: HashMap<u64, Connection> = table
        .listeners
        .iter()
        .filter_map(|socket| Some((socket.cookie, connection_of(socket)?)))
        .collect();
    let their_listeners: HashMap<BackendId, u64> = theirs
        .iter()
        .filter(|socket| socket.state == State::Listen)
        .filter_map(|socket| Some((backend_of(socket)?, socket.cookie)))
        .collect();
    let without_storage: HashMap<u64, bool> = table
        .connections
        .iter()
        .map(|socket| (socket.cookie, socket.storage.is_none()))
        .collect();
    let given = |socket: &'a Socket| {
        let listener = their_listeners.get(&backend_of(socket)?)?;
        let connection = Connection {
            class: Connection::INHERITED,
            ..*our_slots.get(listener)?
        };
        Some((socket, connection))
    };
    theirs
        .iter()
        .filter(|socket| without_storage.get(&socket.cookie) == Some(&true))
        .filter_map(given)
        .collect()
}

/// Writes the storage of connections; returns what could not be written.
fn give(
    tables: &Tables,
    inherited: Vec<(&Socket, Connection)>,
) -> Result<HashMap<u64, Connection>> {
    if inherited.is_empty() {
        return Ok(HashMap::new());
    }
    let processes = owners(inherited.iter().map(|(socket, _)| socket.inode))?;
    let mut unwritten = HashMap::new();
    for (socket, connection) in inherited {
        let owners = processes.get(&socket.inode).map(Vec::as_slice);
        let written = file_of(socket, owners.unwrap_or_default())
            .is_some_and(|file| tables.set_connection(&file, connection, ONLY_NEW).is_ok());
        if !written {
            unwritten.insert(socket.cookie, connection);
        }
    }
    Ok(unwritten)
}

/// A descriptor of that very connection.
fn file_of(connection: &Socket, owners: &[SocketOwner]) -> Option<OwnedFd> {
    owners.iter().find_map(|owner| {
        let file = owner.file().ok()?;
        (socket::cookie(&file).ok()? == connection.cookie).then_some(file)
    })
}
