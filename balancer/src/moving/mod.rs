//! Moving established connections: their clients are told to connect again, as gently as each
//! protocol allows. Who is to move is decided elsewhere.

mod rule;
mod worker;

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use balancer_common::abi::BackendId;

pub use self::rule::{Manner, Protocol, Step, View, next_step};
use crate::dataplane::MovingSockets;
use crate::sys::sock_diag::Socket;

/// A connection that is to move.
#[derive(Clone, Debug)]
pub struct Order {
    /// The backend that has it.
    pub backend: BackendId,
    /// The process that listens there, which most likely has the connection; 0: not known.
    pub pid: u32,
    /// The connection, as the socket table has it.
    pub socket: Socket,
    /// What to do where the client does not go.
    pub manner: Manner,
}

/// What became of an order.
#[derive(Clone, Debug)]
pub struct Report {
    /// The order.
    pub order: Order,
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
}

/// How a move ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The client was told to move, and one of both ends closed the connection.
    Left,
    /// The balancer closed it: the client was told and left it idle, or it was idle.
    Closed,
    /// It had ended before anything was done.
    Gone,
    /// It stays.
    Stays(Unmovable),
}

impl Outcome {
    /// Whether the connection has left its backend.
    pub const fn has_left(&self) -> bool {
        matches!(self, Self::Left | Self::Closed)
    }
}

/// Why a connection stays where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unmovable {
    /// The client was told, and goes on with calls that it had begun.
    KeepsCalls,
    /// It was never silent for long enough, and no message of its server began a frame.
    NeverSilent,
    /// No process that the balancer may look into has it.
    NoOwner,
    /// The kernel refused something.
    Refused(String),
}

impl fmt::Display for Unmovable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeepsCalls => formatter.write_str(
                "the client was told, and stays with a call that it had begun (`move: close` ends \
                 such calls)",
            ),
            Self::NeverSilent => formatter
                .write_str("it was never silent for long enough to end no call (`move: close`)"),
            Self::NoOwner => formatter
                .write_str("no process is known to have it (CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH)"),
            Self::Refused(error) => formatter.write_str(error),
        }
    }
}

/// The thread that moves connections. It ends when this is dropped.
pub struct Mover {
    orders: Sender<Order>,
    reports: Receiver<Report>,
}

impl Mover {
    /// Starts the thread, with the privileges of the calling one.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(sockets: MovingSockets) -> io::Result<Self> {
        let (orders, ordered) = channel();
        let (reporting, reports) = channel();
        thread::Builder::new()
            .name("mover".to_owned())
            .spawn(move || worker::run(sockets, &ordered, &reporting))?;
        Ok(Self { orders, reports })
    }

    /// Begins to move a connection.
    ///
    /// # Errors
    /// When the thread has ended, which is a defect.
    pub fn order(&self, order: Order) -> io::Result<()> {
        let sent = self.orders.send(order);
        sent.map_err(|_| io::Error::other("the thread that moves connections has ended"))
    }

    /// What has become of orders since the last call.
    pub fn reports(&self) -> Vec<Report> {
        let mut reports = Vec::new();
        loop {
            match self.reports.try_recv() {
                Ok(report) => reports.push(report),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return reports,
            }
        }
    }
}
