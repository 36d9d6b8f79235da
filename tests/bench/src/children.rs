//! This program as a child process: servers and holders of connections. They end with their
//! standard input, so also when this one is killed.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use testkit::fixtures::{Machine, process};

/// Where a child runs.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// In the machine's netns and cgroup: its sockets are those of a guarded server.
    Inside(&'a Machine),
    /// In its netns only: its sockets are somebody else's.
    Beside(&'a Machine),
}

/// A child that answers lines with lines.
pub struct Helper {
    name: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Helper {
    /// Starts it, and returns with its first line.
    ///
    /// # Errors
    /// When it can't be started or ends without a word.
    pub fn start(
        place: Place<'_>,
        arguments: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Result<(Self, String)> {
        let mut helper = Self::spawn(place, arguments)?;
        let line = helper.read()?;
        Ok((helper, line))
    }

    /// Starts it; its first line comes with [`Self::read`].
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(
        place: Place<'_>,
        arguments: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Result<Self> {
        Self::spawn_with(place, arguments, &[])
    }

    /// The same with these variables in its environment.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn_with(
        place: Place<'_>,
        arguments: impl IntoIterator<Item = impl Into<OsString>>,
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let arguments: Vec<OsString> = arguments.into_iter().map(Into::into).collect();
        let name = format!("bench {:?}", arguments.first());
        let own = std::env::current_exe().context("cannot tell where this program is")?;
        let mut command = Command::new(own);
        command.args(arguments).envs(environment.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A Ctrl-C at the terminal is for the parent, which then ends its children in order.
        command.process_group(0);
        let child = match place {
            Place::Inside(machine) => machine.run(|| process::spawn(&mut command)),
            Place::Beside(machine) => machine.netns.run(|| process::spawn(&mut command)),
        };
        let mut child = child.with_context(|| format!("cannot start {name}"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("the pipes of {name} are not there");
        };
        Ok(Self {
            name,
            child,
            input,
            output: BufReader::new(output),
        })
    }

    /// Its next line.
    ///
    /// # Errors
    /// When it has ended.
    pub fn read(&mut self) -> Result<String> {
        let mut line = String::new();
        let length = self.output.read_line(&mut line);
        if length.with_context(|| format!("cannot read from {}", self.name))? == 0 {
            bail!("{} has ended: see above", self.name);
        }
        Ok(line.trim().to_owned())
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// A number that it answers with.
    ///
    /// # Errors
    /// When it has ended, or answers something else.
    pub fn ask(&mut self, question: &str) -> Result<u64> {
        writeln!(self.input, "{question}").with_context(|| format!("{} has ended", self.name))?;
        let answer = self.read()?;
        answer
            .parse()
            .with_context(|| format!("{} answered {question} with {answer}", self.name))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the child: answers each line of standard input, until that ends.
///
/// # Errors
/// When nobody reads the answers.
pub fn answer_questions(answer: impl Fn(&str) -> u64) -> Result<()> {
    for line in std::io::stdin().lines() {
        let line = line.context("cannot read standard input")?;
        println!("{}", answer(&line));
    }
    Ok(())
}

/// In the child: as many files as allowed.
///
/// # Errors
/// When the limit can't be raised.
pub fn raise_open_files() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")
}
