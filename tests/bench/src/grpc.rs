//! The role of a gRPC server that counts its calls.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result};

use crate::children;

const BACKLOG: u32 = 4096;

/// What the role is told.
#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long)]
    listen: SocketAddr,
}

/// Serves until standard input ends; a line asks for the number of calls.
///
/// # Errors
/// When it can't listen.
pub fn run(arguments: &Arguments) -> Result<()> {
    let calls = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&calls);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let entered = runtime.enter();
    let listener = standin::listen(arguments.listen, BACKLOG)
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    drop(entered);
    thread::spawn(move || runtime.block_on(standin::serve_counting(listener, counted)));
    println!("listening");
    children::answer_questions(|_| calls.load(Ordering::Relaxed))
}
