//! The role of a server: sends back what comes, on as many listeners as there are backends.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};
use testkit::fixtures::Machine;

use crate::children::{self, Helper, Place};
use crate::settings::{Processor, keep_to, processors};

/// The port of the first backend; the others follow.
pub const FIRST_PORT: u16 = 21801;
/// What begins with this byte is swallowed instead of sent back.
pub const SWALLOW: u8 = b'S';
const BACKLOG: i32 = 4096;
const BUFFER: usize = 256 << 10;
/// Marks the events of listeners.
const LISTENER: u64 = 1 << 32;

static OPEN: AtomicU64 = AtomicU64::new(0);

/// What the role is told.
#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long)]
    first_port: u16,
    #[arg(long)]
    listeners: u16,
    /// One thread, on the last processor, instead of one for each.
    #[arg(long)]
    one_thread: bool,
}

/// Serves until standard input ends; a line asks for the number of open connections.
///
/// # Errors
/// When it can't listen.
pub fn run(arguments: &Arguments) -> Result<()> {
    children::raise_open_files()?;
    let last = arguments.first_port + arguments.listeners;
    let listeners = (arguments.first_port..last).map(listen);
    // Leaked: threads have them until the process ends.
    let listeners: &'static [TcpListener] = listeners.collect::<Result<Vec<_>>>()?.leak();
    let threads = if arguments.one_thread {
        keep_to(Processor::Last)?;
        1
    } else {
        processors()
    };
    for _ in 0..threads {
        let epoll = waiting_for(listeners)?;
        thread::spawn(move || serve(&epoll, listeners));
    }
    println!("listening");
    children::answer_questions(|_| OPEN.load(Ordering::Relaxed))
}

fn listen(port: u16) -> Result<TcpListener> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listen = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        std::io::Result::Ok(socket.into())
    };
    listen().with_context(|| format!("cannot listen on {address}"))
}

/// Every thread waits for every listener; a connection wakes one of them.
fn waiting_for(listeners: &[TcpListener]) -> Result<Epoll> {
    let epoll =
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll instance")?;
    for (number, listener) in (LISTENER..).zip(listeners) {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        let added = epoll.add(listener, EpollEvent::new(flags, number));
        added.context("cannot wait for a listener")?;
    }
    Ok(epoll)
}

fn serve(epoll: &Epoll, listeners: &[TcpListener]) {
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    let mut buffer = vec![0; BUFFER];
    loop {
        let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => continue,
            Err(errno) => panic!("epoll_wait: {errno}"),
        };
        for event in &events[..ready] {
            let about = event.data();
            match about.checked_sub(LISTENER) {
                Some(number) => {
                    let number = usize::try_from(number).expect("it is the index of a listener");
                    accept(epoll, &listeners[number], &mut streams);
                }
                None if streams
                    .get(&about)
                    .is_some_and(|stream| answer(stream, &mut buffer)) => {}
                None => {
                    streams.remove(&about);
                    OPEN.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
    }
}

fn accept(epoll: &Epoll, listener: &TcpListener, streams: &mut HashMap<u64, TcpStream>) {
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        // Another thread was faster, or the client has reset it meanwhile.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::ConnectionAborted
            ) =>
        {
            return;
        }
        Err(error) => panic!("accept: {error}"),
    };
    let file = u64::try_from(stream.as_raw_fd()).expect("descriptors are positive");
    let event = EpollEvent::new(EpollFlags::EPOLLIN, file);
    epoll
        .add(&stream, event)
        .expect("a connection can be waited for");
    streams.insert(file, stream);
    OPEN.fetch_add(1, Ordering::Relaxed);
}

/// False: it has closed.
fn answer(mut stream: &TcpStream, buffer: &mut [u8]) -> bool {
    match stream.read(buffer) {
        Ok(0) | Err(_) => false,
        Ok(_) if buffer[0] == SWALLOW => true,
        Ok(length) => stream.write_all(&buffer[..length]).is_ok(),
    }
}

/// Servers on a machine.
pub struct Servers {
    helpers: Vec<Helper>,
    addresses: Vec<SocketAddr>,
}

impl Servers {
    /// One process with so many listeners.
    ///
    /// # Errors
    /// When it can't listen.
    pub fn together(machine: &Machine, number: u16) -> Result<Self> {
        let mut servers = Self::none();
        servers.start(machine, number)?;
        Ok(servers)
    }

    /// One process with so many listeners and one thread, which has a processor to itself where
    /// there are several: all subjects' messages wake a thread on another processor then, and not
    /// some of them one on the same.
    ///
    /// # Errors
    /// When it can't listen.
    pub fn in_one_thread(machine: &Machine, number: u16) -> Result<Self> {
        let mut servers = Self::none();
        servers.start_with(machine, number, &["--one-thread"])?;
        Ok(servers)
    }

    /// A process for each listener.
    ///
    /// # Errors
    /// When they can't listen.
    pub fn apart(machine: &Machine, number: u16) -> Result<Self> {
        let mut servers = Self::none();
        for _ in 0..number {
            servers.start(machine, 1)?;
        }
        Ok(servers)
    }

    const fn none() -> Self {
        Self {
            helpers: Vec::new(),
            addresses: Vec::new(),
        }
    }

    /// Starts one more process, with so many listeners on the ports that follow.
    ///
    /// # Errors
    /// When it can't listen.
    pub fn start(&mut self, machine: &Machine, listeners: u16) -> Result<()> {
        self.start_with(machine, listeners, &[])
    }

    fn start_with(&mut self, machine: &Machine, listeners: u16, more: &[&str]) -> Result<()> {
        let all = backends(u16::try_from(self.addresses.len())? + listeners);
        let new = &all[self.addresses.len()..];
        let (first, number) = (new[0].port().to_string(), listeners.to_string());
        let arguments = ["serve", "--first-port", &first, "--listeners", &number];
        let arguments = arguments.iter().chain(more);
        let (helper, _) = Helper::start(Place::Inside(machine), arguments)?;
        self.helpers.push(helper);
        self.addresses = all;
        Ok(())
    }

    /// Where they listen.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// How many connections each process has open.
    ///
    /// # Errors
    /// When one has ended.
    pub fn loads(&mut self) -> Result<Vec<u64>> {
        self.helpers
            .iter_mut()
            .map(|helper| helper.ask("open"))
            .collect()
    }

    /// Kills the first process.
    pub fn kill_first(&mut self) {
        drop(self.helpers.remove(0));
    }
}

/// The addresses of so many backends.
pub fn backends(number: u16) -> Vec<SocketAddr> {
    (0..number)
        .map(|index| SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT + index)))
        .collect()
}
