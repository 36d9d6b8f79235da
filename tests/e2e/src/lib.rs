//! What the runs with real `SkyWalking` have in common.
#![forbid(unsafe_code)]

pub mod oap;
