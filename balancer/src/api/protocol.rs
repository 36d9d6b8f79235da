//! The daemon's API for the verbs that change something: one JSON line asks, one JSON line answers,
//! over a Unix stream socket.
//!
//! Only root and the daemon's own user are listened to. Whatever a client sends or fails to send,
//! it spoils its own connection alone. A client keeps its side open until it has its answer: what
//! is asked for by one that has gone is not done.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::kubernetes::ClusterStatus;

/// The longest request, with its line end, in bytes.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// What a daemon can be asked to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Override the quota of a service, or of one of its backends, until it is cleared.
    SetQuota {
        /// The name of the service.
        service: String,
        /// The slot of the backend; `None`: every backend of the service.
        slot: Option<u32>,
        /// The most established connections of each; 0 closes.
        quota: u32,
    },
    /// Take such an override back.
    ClearQuota {
        /// The name of the service.
        service: String,
        /// The slot of the backend; `None`: the service's own override.
        slot: Option<u32>,
    },
    /// Say what should be moved so that backends are even, and why not more.
    Rebalancing,
    /// Say whether a connection moves, and why or why not.
    Connection {
        /// The client's end of it.
        client: SocketAddr,
    },
    /// Have some connections of a backend moved.
    Shed {
        /// Its slot, or its address and port.
        backend: String,
        /// How many.
        connections: u32,
    },
    /// Take the server of a backend out: no new connections, and the present ones are moved.
    Drain {
        /// The slot of the backend, or its address and port.
        backend: String,
    },
    /// Take that back.
    Undrain {
        /// The slot of the backend, or its address and port.
        backend: String,
    },
    /// Read the configuration file again.
    Reload,
    /// Take everything out of the kernel and end.
    Unload,
    /// Say that it lives.
    Ping,
    /// Tell what it knows of the Kubernetes cluster that it is in.
    Cluster,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Response {
    /// What was asked for is in force.
    Done {
        /// What changed, for an operator.
        message: String,
    },
    /// What was asked for.
    Cluster {
        /// What the daemon knows of its cluster.
        cluster: Box<ClusterStatus>,
    },
    /// What was asked for is not in force, or only in part.
    Failed {
        /// Why, and what to do about it.
        message: String,
    },
}

impl Response {
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::Failed {
            message: message.into(),
        }
    }
}

/// A request with the state directory that it is meant for: where several daemons stand side by
/// side, a request that reaches the wrong one must not change it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Envelope<R> {
    pub(super) state_dir: PathBuf,
    pub(super) request: R,
}

/// `path` in the form in which state directories are compared.
pub(super) fn comparable(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
