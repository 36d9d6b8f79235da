//! A stand-in for a SkyWalking OAP, and clients that behave like its agents: gRPC over one
//! long-lived connection each.
//!
//! Of the protocol (`skywalking.v3`) it speaks one unary call, with which an agent says that it
//! lives, and one client-streaming call, with which it hands over trace segments. Paths and field
//! numbers are those of the real protocol. It is small enough to be written by hand, which saves a
//! compiler for `.proto` files.

mod client;
mod load_generator;
mod protocol;
mod server;

pub use client::{Attempt, Client, Ending};
pub use load_generator::{Behaviour, Cause, LoadGenerator, Outage, Tally, ask, now};
pub use server::{listen, serve, serve_counting};

/// Waits until standard input ends: until the process is gone that has the other end.
pub async fn stdin_ends() {
    let (ended, wait) = tokio::sync::oneshot::channel();
    // A thread, because a read of standard input can't be given up: it ends with the process.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = ended.send(());
    });
    let _ = wait.await;
}
