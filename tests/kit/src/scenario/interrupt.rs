//! SIGINT, SIGTERM and SIGHUP end the run at its next check, so that every guard cleans up on the
//! way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Catches the signals from now on.
///
/// # Errors
/// When no handler can be installed.
pub fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the thread that waits for signals")?;
    let guard = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut hang_up = signal(SignalKind::hangup()).context("cannot catch SIGHUP")?;
    drop(guard);
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hang_up.recv() => {}
            }
        });
        eprintln!("interrupted: cleaning up");
        REQUESTED.store(true, Ordering::Relaxed);
    });
    Ok(())
}

/// Fails once a signal has come.
///
/// # Errors
/// Then.
pub fn check() -> Result<()> {
    ensure!(!REQUESTED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// Waits a little, unless a signal has come.
///
/// # Errors
/// When one has.
pub fn pause(duration: Duration) -> Result<()> {
    check()?;
    thread::sleep(duration);
    check()
}
