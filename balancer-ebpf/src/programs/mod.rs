//! The programs, one file each.

pub mod account;
mod claim;
pub mod goaway;
mod keepalive;
pub mod place;
mod placed;
pub mod placed_sockets;
pub mod steer;
