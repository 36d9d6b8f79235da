//! The programs, one file each.

pub mod account;
pub mod steer;
