//! What both sides of the kernel boundary share: the layout of the maps ([`abi`]), the reasons of
//! every verdict ([`Reason`]), and the rules of admission and choice as pure functions
//! ([`decision`]).
//!
//! They run inside the kernel programs, in `balancer explain`, and under proptest on the host.
#![cfg_attr(not(test), no_std)]
#![expect(
    clippy::inline_always,
    reason = "in the kernel a call costs stack, of which there are 512 bytes, and multiplies what the verifier follows"
)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_lossless,
    reason = "packed words are taken apart by casts, in const functions where `from` can't be called"
)]

pub mod abi;
pub mod decision;
pub mod hash;
pub mod http2;
mod opaque;
pub mod place;
pub mod pool;

pub use abi::{BackendState, Policy};
pub use decision::reason::{Reason, Verdict};
pub use opaque::opaque;
pub use place::PlaceReason;
