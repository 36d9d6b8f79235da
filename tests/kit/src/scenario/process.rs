//! Child processes that end with their guard, each with a log file.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::interrupt;

const TAIL_LINES: usize = 25;

/// A command that is killed also when this program is: the signal comes when the thread that starts
/// it ends. A terminal's Ctrl-C does not reach it, so that things end in the right order.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command.process_group(0);
    command
}

/// Runs a command to its end.
///
/// # Errors
/// With the tail of its log, when it fails, and when a signal comes meanwhile.
pub fn run(name: &str, logs: &Path, command: Command) -> Result<()> {
    let mut process = Process::start(name, logs, command)?;
    loop {
        match process.ended()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => bail!("{}", process.obituary(status)),
            None => interrupt::pause(Duration::from_millis(20))?,
        }
    }
}

/// A running process; killed when dropped.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it with its output in `LOGS/NAME.log`, behind what is there already.
    ///
    /// # Errors
    /// When the log cannot be written, or the program is not there.
    pub fn start(name: &str, logs: &Path, mut command: Command) -> Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let errors = file.try_clone().context("cannot share a log file")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {name} ({command:?}): is util-linux there?"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the process has printed so far.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// Then, with the tail of its log.
    pub fn check(&mut self) -> Result<()> {
        match self.ended()? {
            Some(status) => bail!("{}", self.obituary(status)),
            None => Ok(()),
        }
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let waited = self.child.try_wait();
        waited.with_context(|| format!("cannot wait for {}", self.name))
    }

    fn obituary(&self, status: ExitStatus) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
        format!(
            "{} ended ({status}); the end of {}:\n{tail}",
            self.name,
            self.log.display()
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
