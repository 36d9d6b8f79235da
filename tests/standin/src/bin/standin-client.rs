#![forbid(unsafe_code)]
//! A stand-in for the agents of a workload: connections to one address that stay, and are opened
//! again where they end. Who asks at `--answer` is told what they have seen.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use standin::{Behaviour, LoadGenerator};
use tokio::signal::unix::{SignalKind, signal};

/// Stand-ins for agents.
#[derive(Parser)]
struct Arguments {
    /// Where to connect to.
    #[arg(long)]
    to: SocketAddr,
    /// How many connections to keep.
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// The connections begin within so many seconds.
    #[arg(long, default_value_t = 2)]
    begin_within: u64,
    /// Where to answer with what they have seen, as JSON. `reconnect MILLISECONDS` makes all of
    /// them open a new connection.
    #[arg(long, default_value = "[::]:9000")]
    answer: SocketAddr,
    /// No pause between two connects is longer than so many seconds. gRPC's own bound is two
    /// minutes.
    #[arg(long, default_value_t = 3)]
    longest_pause: u64,
    /// End when standard input ends, so that it does not outlive the program that started it.
    #[arg(long)]
    until_stdin_ends: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let listener = standin::listen(arguments.answer, 64)
        .with_context(|| format!("cannot listen on {}", arguments.answer))?;
    println!("answering on {}", listener.local_addr()?);
    // The first process of a container gets no default action for a signal.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let load = LoadGenerator::start(Behaviour {
        to: arguments.to,
        clients: arguments.connections,
        begin_within: Duration::from_secs(arguments.begin_within),
        call_every: Duration::from_secs(2),
        longest_pause: Duration::from_secs(arguments.longest_pause),
    });
    tokio::select! {
        ended = load.answer(listener) => ended.context("cannot answer any more"),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = standin::stdin_ends(), if arguments.until_stdin_ends => Ok(()),
    }
}
