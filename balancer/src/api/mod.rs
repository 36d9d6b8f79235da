//! The daemon's API: what the command line asks of a running daemon, over a Unix stream socket.

pub(crate) mod client;
mod protocol;
pub(crate) mod server;
#[cfg(test)]
mod tests;

pub use self::client::{ANSWERS_WITHIN, ask};
pub use self::protocol::{MAX_REQUEST_BYTES, Request, Response};
pub use self::server::{Reply, Server};
