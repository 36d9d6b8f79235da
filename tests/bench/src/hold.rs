//! The role of many clients: opens connections and keeps them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};
use testkit::fixtures::Machine;

use crate::children::{self, Helper, Place};
use crate::interrupt;

/// Fewer than the files that a process may have.
pub const MOST: usize = 16_000;
/// Longer than several lost SYNs.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the role is told.
#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long)]
    number: usize,
    #[arg(long)]
    from: Ipv4Addr,
    #[arg(long, value_delimiter = ',')]
    to: Vec<SocketAddr>,
}

/// Opens the connections, says how many there are, and keeps them until standard input ends.
///
/// # Errors
/// When one of them can't be opened.
pub fn run(arguments: &Arguments) -> Result<()> {
    children::raise_open_files()?;
    let mut held = Vec::with_capacity(arguments.number);
    for to in arguments.to.iter().cycle().take(arguments.number) {
        let connected = connect(arguments.from, *to);
        held.push(connected.with_context(|| {
            format!("connection {} from {} to {to}", held.len(), arguments.from)
        })?);
    }
    println!("{}", held.len());
    children::answer_questions(|_| u64::try_from(held.len()).unwrap_or(u64::MAX))
}

/// A source of its own, because one address has only so many ports.
fn connect(from: Ipv4Addr, to: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    // Closed with a RST, so that no TIME_WAIT is left for the next round.
    socket.set_linger(Some(Duration::ZERO))?;
    Ok(socket)
}

/// Processes that hold connections.
pub struct HeldConnections(Vec<Helper>);

impl HeldConnections {
    /// Opens so many to these addresses in turn, and returns when all are there.
    ///
    /// # Errors
    /// When one of them can't be opened.
    pub fn gather(machine: &Machine, number: usize, to: &[SocketAddr]) -> Result<Self> {
        let to: Vec<_> = to.iter().map(ToString::to_string).collect();
        let to = to.join(",");
        let mut helpers = Vec::new();
        let mut left = number;
        while left > 0 {
            let part = left.min(MOST);
            left -= part;
            let from = Ipv4Addr::new(127, 7, 7, u8::try_from(helpers.len() + 1)?).to_string();
            let part = part.to_string();
            let arguments = ["hold", "--number", &part, "--from", &from, "--to", &to];
            helpers.push(Helper::spawn(Place::Beside(machine), arguments)?);
        }
        for helper in &mut helpers {
            interrupt::check()?;
            helper.read()?;
        }
        let mut connections = Self(helpers);
        let held = connections.len()?;
        ensure!(
            held == number,
            "{held} connections are held instead of {number}"
        );
        Ok(connections)
    }

    fn len(&mut self) -> Result<usize> {
        let mut sum = 0;
        for helper in &mut self.0 {
            sum += usize::try_from(helper.ask("held")?)?;
        }
        Ok(sum)
    }
}
