//! What both sides of the kernel boundary share: the layout of the maps ([`abi`]), the reasons of every verdict
//! ([`Reason`]), and the rules of admission and choice as pure functions ([`admission`], [`choice`], [`decide`]).
//!
//! The same functions run inside the kernel programs, in `balancer explain`, and under proptest on the host.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod admission;
pub mod choice;
pub mod decide;
pub mod hash;
mod reason;

pub use abi::{BackendState, Policy};
pub use reason::{Reason, Verdict};
