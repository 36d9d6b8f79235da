//! The sockets of connections that are being moved: what is noted at them, and the program that
//! writes a GOAWAY between the messages of their servers.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{Map, MapData, MapError, SkStorage, SockHash};
use balancer_common::abi::{Connection, MovingSocket};

use super::loader::Loader;
use super::object::load_goaway;
use super::plain::Plain;
use super::tables::{Tables, connection_of};
use crate::sys::bpf;
use crate::sys::sock_diag::Socket;

/// Most connections whose messages are looked at at one time.
pub const MOST_WATCHED: u32 = 256;

/// What the kernel half does with the messages of connections that are being moved.
pub struct MovingSockets {
    /// The connections whose messages it looks at, by their cookies. It is pinned nowhere: when the
    /// daemon ends, however that is, they are sockets as any other.
    sockets: SockHash<MapData, u64>,
    /// What is noted at sockets.
    notes: SkStorage<MapData, Plain<MovingSocket>>,
    /// Has the program, which is detached when this is dropped.
    _object: Ebpf,
}

impl MovingSockets {
    /// Loads the program.
    ///
    /// # Errors
    /// When the kernel refuses it, or a map can't be opened.
    pub fn load(loader: &mut Loader) -> Result<Self> {
        let directory = loader.paths.current();
        let mut object = loader.objects.open(&directory, 0)?;
        let map = bpf::sock_hash_create(MOST_WATCHED);
        let map = map.context("cannot make a map of sockets (CAP_NET_ADMIN)")?;
        let sockets = SockHash::try_from(Map::SockHash(MapData::from_fd(map)?))?;
        load_goaway(&mut object)?
            .attach(sockets.fd())
            .context("cannot attach the program that tells clients to move")?;
        Ok(Self {
            notes: notes(&directory)?,
            sockets,
            _object: object,
        })
    }

    /// What is noted at a socket; `None`: it was never moved.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn note(&self, socket: &OwnedFd) -> Result<Option<MovingSocket>> {
        match self.notes.get(&socket.as_raw_fd(), 0) {
            Ok(Plain(note)) => Ok(Some(note)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("cannot read what is noted at a connection"),
        }
    }

    /// Notes something at a socket that is not watched.
    ///
    /// # Errors
    /// When memory is short.
    pub fn set_note(&mut self, socket: &OwnedFd, note: MovingSocket) -> Result<()> {
        let noted = self.notes.insert(&socket.as_raw_fd(), Plain(note), 0);
        noted.context("cannot note at a connection that it is moved (memory may be short)")
    }

    /// Has the kernel half look at the messages that are sent on a connection from now on, and tell
    /// its client to move if the note says so. Nothing else changes for the connection, but that a
    /// message costs a few percent more.
    ///
    /// # Errors
    /// When the kernel does not take it: it has encryption of its own (kTLS), or belongs to
    /// another socket map.
    pub fn watch(&mut self, cookie: u64, socket: &OwnedFd, note: MovingSocket) -> Result<()> {
        self.set_note(socket, note)?;
        let put = self.sockets.insert(cookie, socket.as_fd(), 0);
        put.context("the kernel does not let its messages be seen (it may do TLS itself)")
    }

    /// Ends that.
    ///
    /// # Errors
    /// When the map can't be changed. A connection that is gone is none.
    pub fn unwatch(&mut self, cookie: u64) -> Result<()> {
        match self.sockets.remove(&cookie) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            // A connection that has ended has left the map by itself.
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
            {
                Ok(())
            }
            Err(error) => Err(error).context("cannot take a connection out of a map of sockets"),
        }
    }
}

fn notes(directory: &Path) -> Result<SkStorage<MapData, Plain<MovingSocket>>> {
    let path = directory.join("MOVING_SOCKET");
    let map = MapData::from_pin(&path);
    let map = map.with_context(|| format!("cannot open the map {}", path.display()))?;
    Ok(SkStorage::try_from(Map::SkStorage(map))?)
}

/// Why a service's connection can't be moved, in words; `None`: it can.
///
/// # Errors
/// When it can't be read who is exempt.
pub fn why_unmovable(
    tables: &Tables,
    service: u16,
    socket: &Socket,
) -> Result<Option<&'static str>> {
    if socket.inode == 0 {
        return Ok(Some("no process has accepted it yet"));
    }
    if socket.mptcp {
        return Ok(Some(
            "it is Multipath TCP, of which the socket table shows one of several paths",
        ));
    }
    // One that is older than the data plane was not classified.
    let class = connection_of(socket).map(|connection| connection.class());
    let is_exempt = match class {
        Some(Connection::COUNTED) => false,
        Some(Connection::EXEMPT) => true,
        _ => tables.is_exempt(service, socket.remote.ip())?,
    };
    Ok(is_exempt.then_some("its source is exempt"))
}
