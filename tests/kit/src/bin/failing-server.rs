#![forbid(unsafe_code)]
//! A server that fails as servers do: `failing-server ADDRESS`. It sends back what comes, until a
//! line of its standard input tells it otherwise:
//!
//! - `close MILLISECONDS`: it closes each connection so long after it was accepted, or after this
//!   line where that was later. `close MILLISECONDS silently`: without an answer before.
//! - `ignore`: it accepts, and reads nothing.
//! - `serve`: it sends back what comes.
//!
//! It says `listening`, and ends with its standard input.

use std::io::{self, BufRead as _, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use socket2::{Domain, Socket, Type};

/// How soon a line reaches a connection that waits for something to read.
const LOOKS_EVERY: Duration = Duration::from_millis(50);
/// A thread for each connection, and there may be thousands.
const STACK: usize = 64 << 10;

#[derive(Clone, Copy)]
enum Conduct {
    Serve,
    Close {
        since: Instant,
        after: Duration,
        silently: bool,
    },
    Ignore,
}

static CONDUCT: Mutex<Conduct> = Mutex::new(Conduct::Serve);
static CHANGED: Condvar = Condvar::new();

fn main() -> Result<()> {
    let address = std::env::args().nth(1);
    let address = address.context("usage: failing-server ADDRESS")?;
    let listener = listen(&address).with_context(|| format!("cannot listen on {address}"))?;
    thread::spawn(move || accept(&listener));
    println!("listening");
    for line in io::stdin().lock().lines() {
        *conduct() = read(&line?)?;
        CHANGED.notify_all();
    }
    Ok(())
}

fn read(line: &str) -> Result<Conduct> {
    Ok(match line.split(' ').collect::<Vec<_>>()[..] {
        ["serve"] => Conduct::Serve,
        ["ignore"] => Conduct::Ignore,
        ["close", after] => close(after, false)?,
        ["close", after, "silently"] => close(after, true)?,
        _ => bail!("{line}: serve, ignore or close MILLISECONDS [silently]"),
    })
}

fn close(after: &str, silently: bool) -> Result<Conduct> {
    Ok(Conduct::Close {
        since: Instant::now(),
        after: Duration::from_millis(after.parse().context("no milliseconds")?),
        silently,
    })
}

fn listen(address: &str) -> Result<TcpListener> {
    let address: SocketAddr = address.parse().context("no address with a port")?;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn accept(listener: &TcpListener) {
    // An error is that of one connection, which is gone.
    for connection in listener.incoming().flatten() {
        let attend = move || attend(connection, Instant::now());
        let thread = thread::Builder::new().stack_size(STACK).spawn(attend);
        thread.expect("a thread can be started");
    }
}

/// Serves or fails one connection until it ends.
fn attend(mut connection: TcpStream, accepted: Instant) {
    let mut buffer = [0; 64];
    loop {
        let ignores = |conduct: &mut Conduct| matches!(conduct, Conduct::Ignore);
        let now = *CHANGED
            .wait_while(conduct(), ignores)
            .unwrap_or_else(PoisonError::into_inner);
        let mut patience = LOOKS_EVERY;
        if let Conduct::Close {
            since,
            after,
            silently,
        } = now
        {
            let end = accepted.max(since) + after;
            patience = patience.min(end.saturating_duration_since(Instant::now()));
            if patience.is_zero() {
                return;
            }
            if silently {
                thread::sleep(patience);
                continue;
            }
        }
        let read = connection
            .set_read_timeout(Some(patience))
            .and_then(|()| connection.read(&mut buffer));
        match read {
            Ok(length) if length > 0 && connection.write_all(&buffer[..length]).is_ok() => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

fn conduct() -> MutexGuard<'static, Conduct> {
    CONDUCT.lock().unwrap_or_else(PoisonError::into_inner)
}
