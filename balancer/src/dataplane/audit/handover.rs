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
use super::super::tables::{Tables, backend_of, connection_of};
use super::inherited::Inherited;
use super::socket_table::{SocketTable, sockets};
use crate::discover::owners;
use crate::sys::bpf::{self, Object};
use crate::sys::sock_diag::{Socket, State};

/// What other builds' data planes know of connections.
#[derive(Debug, Default)]
pub struct Handover {
    /// The maps of other layouts that name the slots of connections.
    maps: Vec<OwnedFd>,
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
        Ok(Self { maps })
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
    pub fn inherit(
        &self,
        tables: &Tables,
        table: &SocketTable,
        inherited: &mut Inherited,
    ) -> Result<bool> {
        let mut any = false;
        for map in &self.maps {
            let theirs = sockets(map.as_fd())?;
            let given = given(table, &theirs);
            let processes = owners(given.iter().map(|(socket, _)| socket.inode))?;
            inherited.give(tables, &given, &processes);
            any |= !given.is_empty();
        }
        Ok(any)
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
fn given<'a>(table: &SocketTable, theirs: &'a [Socket]) -> Vec<(&'a Socket, Connection)> {
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
