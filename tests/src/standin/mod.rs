//! A stand-in for a SkyWalking OAP, and clients that behave like its agents: gRPC over one long-lived connection each.
//!
//! Of the protocol (`skywalking.v3`) it speaks one unary call, with which an agent says that it lives, and one client-streaming
//! call, with which it hands over trace segments. Paths and field numbers are those of the real protocol. It is small enough to be
//! written by hand, which saves a compiler for `.proto` files.

mod client;
mod protocol;
mod server;

pub use client::{Attempt, Client, Ending};
pub use server::{listen, serve, serve_counting};
