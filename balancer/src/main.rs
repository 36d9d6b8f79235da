//! The balancer daemon and its command line.
fn main() {}
