//! Quotas: from a rule and what is known of the backends to a number for each, and the sentence
//! that explains it. Pure.

mod compute;
pub mod in_force;
mod model;
pub mod plausible;
mod sentence;
pub mod server;
mod share;
pub mod starved;
pub mod window;

pub use compute::{Known, Total, compute, compute_cluster};
pub use in_force::{InForce, QuotaSource};
pub use model::{Outcome, Quota, ReadyBackend, SHARE_GONE_AFTER, are_too_many};

#[cfg(test)]
mod tests;
