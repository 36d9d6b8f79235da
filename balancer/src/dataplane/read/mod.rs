//! What readers see without the daemon: snapshots of the maps, and explanations of decisions.

pub mod explain;
pub mod snapshot;
