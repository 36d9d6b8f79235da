//! `HAProxy`: a TCP proxy with leastconn.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use testkit::fixtures::Machine;

use super::{FRONT, command_in, wait_until_it_serves};
use crate::process::{self, Process, command};
use crate::settings::Settings;

/// Where Debian installs it.
const PROGRAM: &str = "/usr/sbin/haproxy";

/// A running one.
pub struct Haproxy(Process);

impl Haproxy {
    /// Starts it in front of these backends and waits until it serves. `name` is that of its files.
    ///
    /// # Errors
    /// When it is not installed, refuses its file, or does not serve.
    pub fn start(
        settings: &Settings,
        machine: &Machine,
        name: &str,
        backends: &[SocketAddr],
    ) -> Result<Self> {
        let program = Path::new(PROGRAM);
        ensure!(
            program.is_file(),
            "there is no {PROGRAM}: run `cargo xtask setup`"
        );
        let file = settings.logs().join(format!("{name}.cfg"));
        fs::write(&file, configuration(backends)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        let mut check = command(program);
        check.args(["-c", "-q", "-f"]).arg(&file);
        process::run(&format!("{name}-check"), &settings.logs(), check)?;
        // -db: in the foreground.
        let mut haproxy = command_in(machine, program);
        haproxy.args(["-db", "-f"]).arg(&file);
        let mut process = Process::start(name, &settings.logs(), haproxy)?;
        wait_until_it_serves(machine, &mut process)?;
        Ok(Self(process))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// Then, with the tail of its log.
    pub fn check(&mut self) -> Result<()> {
        self.0.check()
    }
}

/// Health checks, so that a dead backend gets nobody; a client whose backend refuses is sent to
/// another one.
fn configuration(backends: &[SocketAddr]) -> Result<String> {
    let mut text = format!(
        "global\n  maxconn 9000\n\
         defaults\n  mode tcp\n  timeout connect 1s\n  timeout client 600s\n  timeout server 600s\n  timeout check 1s\n  \
         retries 3\n  option redispatch 1\n\
         listen agents\n  bind {FRONT}\n  balance leastconn\n  default-server check inter 200ms rise 1 fall 1\n"
    );
    for (index, backend) in backends.iter().enumerate() {
        writeln!(text, "  server backend-{index} {backend}")?;
    }
    Ok(text)
}
