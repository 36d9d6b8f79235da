//! What programs have in common that run a scenario and hold what they see against what they
//! expect.

pub mod interrupt;
pub mod process;
mod report;

pub use report::{Check, Report};
