//! The programs, one file each.

pub mod account;
mod claim;
mod keepalive;
pub mod steer;
