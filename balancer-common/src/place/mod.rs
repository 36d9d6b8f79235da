//! Placing: which endpoint a client's `connect()` should go to. Pure functions, which the kernel
//! half, `balancer explain`, the tests and the simulation run alike.

pub mod avoidance;
pub mod choice;
pub mod reason;

pub use reason::PlaceReason;

/// Where the sidecars of Istio and those of Linkerd listen for what a pod sends out.
pub const SIDECAR_PORTS: [u16; 2] = [15_001, 4_140];
