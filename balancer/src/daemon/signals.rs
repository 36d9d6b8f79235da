//! The signals that mean something to the daemon.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{self, SignalKind};

/// What a signal asks of the daemon.
#[derive(Clone, Copy, Debug)]
pub enum Signal {
    /// SIGHUP: reload the configuration.
    Hangup,
    /// SIGINT: end, and unload the data plane.
    Interrupt,
    /// SIGTERM: end, and keep the data plane.
    Terminate,
}

/// The signals that come in.
pub struct Signals {
    hangup: unix::Signal,
    interrupt: unix::Signal,
    terminate: unix::Signal,
}

impl Signals {
    /// From now on these signals don't end the process.
    ///
    /// # Errors
    /// When the process can't listen for them.
    pub fn new() -> Result<Self> {
        let listen = |kind| unix::signal(kind).context("cannot listen for signals");
        Ok(Self {
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// The next signal. Cancel safe.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.hangup.recv() => Signal::Hangup,
            _ = self.interrupt.recv() => Signal::Interrupt,
            _ = self.terminate.recv() => Signal::Terminate,
        }
    }
}
