//! Servers that fail when they are told to: the program `failing-server`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::kill;
use nix::unistd::Pid;
use testkit::fixtures::{Signal, binary, process};

/// What is done to a server.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// It gets a signal.
    Signal(Signal),
    /// It is told so.
    Tell(&'static str),
    /// It is taken out of its Service, where it is in one: a kubelet does so for what has ended.
    Leave,
}

/// A server in a process of its own; killed when dropped.
pub struct Server<'a> {
    child: Child,
    leave: Box<dyn Fn() + Send + 'a>,
}

impl<'a> Server<'a> {
    /// Starts one in the netns and the cgroup of the calling thread, and waits until it listens.
    #[track_caller]
    pub fn start(address: SocketAddr) -> Self {
        let mut command = Command::new(binary().with_file_name("failing-server"));
        command.arg(address.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process::spawn(&mut command).expect("a server can be started");
        let mut line = String::new();
        let output = child.stdout.take().expect("it is piped");
        let read = BufReader::new(output).read_line(&mut line);
        read.expect("its output can be read");
        assert_eq!(line, "listening\n", "no server on {address}: see above");
        Self {
            child,
            leave: Box::new(|| {}),
        }
    }

    /// With what takes it out of its Service.
    pub fn that_leaves_by(mut self, leave: impl Fn() + Send + 'a) -> Self {
        self.leave = Box::new(leave);
        self
    }

    /// Does this to it.
    pub fn suffer(&mut self, act: Act) {
        match act {
            Act::Signal(signal) => {
                let id = i32::try_from(self.child.id()).expect("a process id");
                kill(Pid::from_raw(id), signal).expect("the server can be signalled");
            }
            Act::Tell(line) => {
                let input = self.child.stdin.as_mut().expect("it is piped");
                writeln!(input, "{line}").expect("the server reads its input");
            }
            Act::Leave => (self.leave)(),
        }
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
