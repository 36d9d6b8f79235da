//! The kernel half of balancer.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
