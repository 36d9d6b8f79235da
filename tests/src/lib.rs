//! Fixtures of the integration tests: guards over kernel objects, the daemon under test, and TCP tools.
#![forbid(unsafe_code)]

pub mod fixtures;
pub mod kubernetes;
pub mod oap;
pub mod standin;
pub mod story;

#[cfg(test)]
mod readme;
