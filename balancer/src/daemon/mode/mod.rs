//! What the daemon does alone on a host, and what it does in a Kubernetes cluster.

pub mod kubernetes;
