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
}

/// A server in a process of its own; killed when dropped.
pub struct Server(Child);

impl Server {
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
        Self(child)
    }

    /// Does this to it.
    pub fn suffer(&mut self, act: Act) {
        match act {
            Act::Signal(signal) => {
                let id = i32::try_from(self.0.id()).expect("a process id");
                kill(Pid::from_raw(id), signal).expect("the server can be signalled");
            }
            Act::Tell(line) => {
                let input = self.0.stdin.as_mut().expect("it is piped");
                writeln!(input, "{line}").expect("the server reads its input");
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
