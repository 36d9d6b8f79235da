//! What programs have in common that play a story and hold what they see against what they expect.

pub mod interrupt;
pub mod process;
mod report;

pub use report::{Report, Sight};
