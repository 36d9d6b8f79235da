//! Clients that connect as fast as they can: connect, a byte each way, reset.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use socket2::{Domain, Socket, Type};
use testkit::fixtures::{Machine, Netns};

use crate::interrupt;
use crate::settings::processors;
use crate::statistics::as_f64;

/// So many threads for each processor: enough to saturate it, as one waits while the other works.
const THREADS: usize = 4;
/// Longer than several lost SYNs.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a round of clients saw.
#[derive(Clone, Copy, Default)]
pub struct Visits {
    /// Got their byte back.
    pub served: u64,
    /// A RST in answer to the SYN.
    pub refused: u64,
    seconds: f64,
}

impl Visits {
    /// Connects a second, whatever their end.
    pub fn per_second(&self) -> f64 {
        as_f64(self.served + self.refused) / self.seconds
    }

    /// The share that was refused.
    pub fn refused_share(&self) -> f64 {
        as_f64(self.refused) / as_f64((self.served + self.refused).max(1))
    }
}

/// Visits these addresses in turn, from all threads, for so long.
///
/// # Errors
/// When a client sees something else than service or a refusal, and when a signal comes.
pub fn drive(netns: &Netns, to: &[SocketAddr], during: Duration) -> Result<Visits> {
    drive_with(|| netns.enter(), to, during)
}

/// The same with sockets that belong to a machine's cgroup, so that the programs which are attached
/// to it run when they connect.
///
/// # Errors
/// As [`drive`].
pub fn drive_from(machine: &Machine, to: &[SocketAddr], during: Duration) -> Result<Visits> {
    let enter = || {
        machine.cgroup.enter();
        machine.netns.enter();
    };
    drive_with(enter, to, during)
}

fn drive_with(enter: impl Fn() + Sync, to: &[SocketAddr], during: Duration) -> Result<Visits> {
    interrupt::check()?;
    let threads = processors() * THREADS;
    let start = Barrier::new(threads);
    let results: Vec<io::Result<Visits>> = thread::scope(|scope| {
        let client = |number: usize| {
            let (start, enter) = (&start, &enter);
            scope.spawn(move || {
                enter();
                start.wait();
                // Not all at the same backend.
                let offset = number * to.len() / threads;
                visit_all(to.iter().cycle().skip(offset), during)
            })
        };
        let clients: Vec<_> = (0..threads).map(client).collect();
        let join = |client: thread::ScopedJoinHandle<'_, _>| {
            client
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        clients.into_iter().map(join).collect()
    });
    let mut sum = Visits::default();
    for result in results {
        let visits = result?;
        sum.served += visits.served;
        sum.refused += visits.refused;
        sum.seconds = sum.seconds.max(visits.seconds);
    }
    ensure!(
        sum.served + sum.refused > 0,
        "no client connected to {to:?} in {during:?}"
    );
    Ok(sum)
}

fn visit_all<'a>(
    mut to: impl Iterator<Item = &'a SocketAddr>,
    during: Duration,
) -> io::Result<Visits> {
    let mut visits = Visits::default();
    let began = Instant::now();
    while began.elapsed() < during {
        let Some(to) = to.next() else { break };
        match visit(*to) {
            Ok(()) => visits.served += 1,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => visits.refused += 1,
            Err(error) => {
                return Err(io::Error::new(error.kind(), format!("{to}: {error}")));
            }
        }
    }
    visits.seconds = began.elapsed().as_secs_f64();
    Ok(visits)
}

/// Connects, sends a byte, gets it back, and resets.
///
/// # Errors
/// Those of the system: a refusal too.
pub fn visit(to: SocketAddr) -> io::Result<()> {
    let mut stream = connect(to)?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}

/// Connects; the connection will be reset when dropped.
///
/// # Errors
/// Those of the system: a refusal too.
pub fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_linger(Some(Duration::ZERO))?;
    // Nothing hangs for ever. The write time-out is that of the connect too.
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}
