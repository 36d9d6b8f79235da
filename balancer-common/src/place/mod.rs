//! Placing: which endpoint a client's `connect()` should go to. Pure functions, which the kernel
//! half, `balancer explain`, the tests and the simulation run alike.

pub mod avoidance;
pub mod choice;
pub mod reason;

pub use reason::PlaceReason;
