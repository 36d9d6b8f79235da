//! Which backends don't serve, as their sockets tell it: pure rules. The kernel half judges accept
//! queues and the ends of connections by itself (`balancer_common::abi::Health`).

mod changes;
mod reads;
mod words;

pub use changes::{HealthChanges, Line, Seen};
pub use reads::{ReadWatch, Reading};
pub use words::{in_words, reason};
