//! An Envoy that reports each request it serves to the OAPs.

use anyhow::Result;
use e2e::oap::cache::{Cache, asset};
use e2e::oap::http;
use testkit::scenario::process::{Process, command};

use crate::layout::ENVOY;

/// Envoy's worker threads; each has its own connection to an OAP once it has served a request.
const WORKERS: &str = "2";

/// The running Envoy.
pub struct Envoy {
    process: Process,
    sent: u32,
}

impl Envoy {
    /// Starts it.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(cache: &Cache) -> Result<Self> {
        let mut envoy = command(cache.python_program("envoy"));
        envoy.arg("--config-path").arg(asset("envoy.yaml"));
        envoy.args(["--concurrency", WORKERS, "--disable-hot-restart"]);
        Ok(Self {
            process: Process::start("envoy", &cache.logs(), envoy)?,
            sent: 0,
        })
    }

    /// Makes one numbered request on a connection of its own, so that the kernel chooses the
    /// worker.
    ///
    /// # Errors
    /// When Envoy does not answer.
    pub fn request(&mut self) -> Result<()> {
        http::get(ENVOY, &format!("/log-{}", self.sent))?;
        self.sent += 1;
        Ok(())
    }

    /// How many requests were made; their numbers begin at 0.
    pub fn sent(&self) -> u32 {
        self.sent
    }

    /// Envoy's process id.
    pub fn process(&self) -> u32 {
        self.process.id()
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// Then.
    pub fn check(&mut self) -> Result<()> {
        self.process.check()
    }
}
