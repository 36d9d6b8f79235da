#![forbid(unsafe_code)]
//! A stand-in for a SkyWalking OAP: it answers the two gRPC calls that its clients make, on every
//! connection, until it is ended.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// A stand-in for an OAP.
#[derive(Parser)]
struct Arguments {
    /// Where to listen. An IPv6 wildcard takes IPv4 connections too.
    #[arg(long, default_value = "[::]:11800")]
    listen: SocketAddr,
    /// How many connections may wait to be accepted.
    #[arg(long, default_value_t = 4096)]
    backlog: u32,
    /// End when standard input ends, so that it does not outlive the program that started it.
    #[arg(long)]
    until_stdin_ends: bool,
}

/// One thread: there may be many of these on one machine.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let listener = standin::listen(arguments.listen, arguments.backlog)
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    println!("listening on {}", listener.local_addr()?);
    // The first process of a container gets no default action for a signal.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        ended = standin::serve(listener) => {
            ended?;
            bail!("the server ended by itself");
        }
        // As an OAP does, without a GOAWAY.
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = standin::stdin_ends(), if arguments.until_stdin_ends => Ok(()),
    }
}
