//! Connections whose entry into ESTABLISHED the kernel half has not seen, and whose backend is
//! known all the same: the storage of each says so, and the daemon counts them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use balancer_common::abi::Connection;

use super::super::tables::{ONLY_NEW, Tables};
use crate::discover::{Owners, SocketOwner};
use crate::sys::sock_diag::Socket;
use crate::sys::socket;

/// The connections that were given to a slot, as far as no storage says so.
#[derive(Debug, Default)]
pub struct Inherited {
    /// The connections whose storage could not be written, as a rule because no process has them
    /// yet (they wait to be accepted), by their cookie.
    unwritten: HashMap<u64, Connection>,
}

impl Inherited {
    /// Writes the storage of connections, through the descriptors of their owners.
    pub fn give(
        &mut self,
        tables: &Tables,
        connections: &[(&Socket, Connection)],
        processes: &Owners,
    ) {
        for (socket, connection) in connections {
            let owners = processes.get(&socket.inode).map(Vec::as_slice);
            let written = file_of(socket, owners.unwrap_or_default())
                .is_some_and(|file| tables.set_connection(&file, *connection, ONLY_NEW).is_ok());
            if !written {
                self.unwritten.insert(socket.cookie, *connection);
            }
        }
    }

    /// What a connection was given that could not be written to its storage.
    pub fn connection(&self, socket: &Socket) -> Option<Connection> {
        self.unwritten.get(&socket.cookie).copied()
    }
}

/// A descriptor of that very connection.
fn file_of(connection: &Socket, owners: &[SocketOwner]) -> Option<OwnedFd> {
    owners.iter().find_map(|owner| {
        let file = owner.file().ok()?;
        (socket::cookie(&file).ok()? == connection.cookie).then_some(file)
    })
}
