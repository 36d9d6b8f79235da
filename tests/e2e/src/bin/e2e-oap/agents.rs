//! `SkyWalking` agents that make numbered segments.

use anyhow::Result;
use e2e::oap::cache::{Cache, asset};
use testkit::scenario::process::{Process, command};

use crate::cluster::java;

const HEAP_MEGABYTES: u32 = 64;

/// In which language an agent is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `SkyWalking` Java agent, with the settings of `agent.config`: it looks every second whether
    /// it has to connect anew.
    Java,
    /// The same with other ones.
    JavaWith(Settings),
    /// `SkyWalking` Python agent, with its own defaults.
    Python,
}

/// Settings of the Java agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `collector.grpc_channel_check_interval`: seconds between two looks.
    pub check_interval: u32,
    /// `agent.force_reconnection_period`: looks that it leaves to gRPC.
    pub force_reconnection_period: u32,
}

impl Settings {
    /// The agent's own.
    pub const DEFAULT: Self = Self {
        check_interval: 30,
        force_reconnection_period: 1,
    };
}

/// A running application with its agent.
pub struct Agent {
    name: String,
    process: Process,
}

impl Agent {
    /// Starts one that reports to `collector`, an address or several. Its service is called
    /// `java-NUMBER` or `python-NUMBER`.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(cache: &Cache, kind: Kind, collector: &str, number: usize) -> Result<Self> {
        let (name, command) = match kind {
            Kind::Java | Kind::JavaWith(_) => {
                let name = format!("java-{number}");
                let mut java = java(HEAP_MEGABYTES, &cache.java_application().to_string_lossy());
                java.arg(format!("-javaagent:{}", cache.java_agent().display()));
                java.arg(format!("-Dskywalking.agent.service_name={name}"));
                java.arg(format!("-Dskywalking.agent.instance_name={name}"));
                java.arg(format!(
                    "-Dskywalking.collector.backend_service={collector}"
                ));
                if let Kind::JavaWith(settings) = kind {
                    java.args(properties(settings));
                }
                java.arg("balancer.e2e.IdleApp");
                (name, java)
            }
            Kind::Python => {
                let name = format!("python-{number}");
                let mut python = command(cache.python_program("python3"));
                python.arg(asset("python_agent.py"));
                python.args([&name, collector]);
                (name, python)
            }
        };
        let process = Process::start(&name, &cache.logs(), command)?;
        Ok(Self { name, process })
    }

    /// The name of its service; its segments are called `NAME-N`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The agent's process id.
    pub fn process(&self) -> u32 {
        self.process.id()
    }

    /// The number of the last segment that it has made.
    pub fn made(&self) -> Option<u32> {
        let log = self.process.log();
        log.lines()
            .rev()
            .find_map(|line| line.strip_prefix("made ")?.parse().ok())
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// Then.
    pub fn check(&mut self) -> Result<()> {
        self.process.check()
    }
}

/// What puts settings in the place of those of `agent.config`.
fn properties(settings: Settings) -> [String; 3] {
    [
        format!(
            "-Dskywalking.collector.grpc_channel_check_interval={}",
            settings.check_interval
        ),
        format!(
            "-Dskywalking.agent.force_reconnection_period={}",
            settings.force_reconnection_period
        ),
        // Its default.
        "-Dskywalking.collector.grpc_upstream_timeout=30".to_owned(),
    ]
}
