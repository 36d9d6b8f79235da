//! Which backends don't serve, as their sockets tell it: pure rules. The kernel half judges accept
//! queues and the ends of connections by itself (`balancer_common::abi::Health`).

mod reads;

pub use reads::{ReadWatch, Reading};
