//! The programs, one file each.

pub mod account;
mod claim;
pub mod steer;
