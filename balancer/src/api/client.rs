//! What the command line does: asking a daemon.

use std::{
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket,
            sockopt,
        },
        time::TimeVal,
    },
    unistd::{Uid, geteuid},
};

use super::protocol::{Envelope, Request, Response, comparable};
use crate::sys::privileges::user;

/// How long a daemon may take to accept: one that lives does at once.
const ACCEPTS_WITHIN: Duration = Duration::from_secs(5);
/// How long it may take, as a rule, to do what was asked: unloading waits for the kernel.
pub const ANSWERS_WITHIN: Duration = Duration::from_secs(30);
/// A daemon that has no other work answers sooner; whoever waits longer is told for whom.
const USUALLY_WITHIN: Duration = Duration::from_secs(2);
/// The longest answer, in bytes.
const MAX_ANSWER_BYTES: u64 = 16 << 20;

/// Asks the daemon behind `socket`, which must be the one that keeps its state in `state_dir`, and
/// waits for its answer. `waiting` is called once, with what to tell whoever waits too, when that
/// takes longer than a daemon that lives needs. `None` when no daemon lives there: no such socket,
/// or a dead one.
///
/// # Errors
/// When the socket can't be used (most often: not root), or the daemon doesn't answer `within` that
/// time, or not as agreed. What it has not begun by then it does not do any more.
pub fn ask(
    socket: &Path,
    state_dir: &Path,
    request: &Request,
    within: Duration,
    waiting: impl FnOnce(&str),
) -> Result<Option<Response>> {
    let Some(stream) = open(socket, within)? else {
        return Ok(None);
    };
    let Peer { daemon, end } = Peer::of(&stream, socket)?;
    match (&stream).write_all(&encode_request(state_dir, request)?) {
        // The daemon may refuse before it has read everything: what it says is what counts.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            return Err(error).with_context(|| format!("{daemon} doesn't listen"));
        }
        _ => {}
    }
    let mut answer = Answer {
        stream: &stream,
        within,
        waiting: Some(|| waiting(&format!("waiting for {daemon} …"))),
        is_late: false,
    };
    let response = read_response(&mut answer);
    if answer.is_late {
        bail!(
            "{daemon} has not answered within {} s: it hangs, or has much to do. What it has not begun yet it won't do any more. See its log; \
             where it hangs, {end} and start it again: what is in the kernel stays meanwhile",
            within.as_secs()
        );
    }
    let response = response
        .with_context(|| format!("no proper answer from {daemon}; see its log for what it did"));
    response.map(Some)
}

/// Who is at the other end, for messages.
struct Peer {
    /// What it is called.
    daemon: String,
    /// How to end it.
    end: String,
}

impl Peer {
    /// Another user's process is no daemon: in a directory that others may write to, anybody could
    /// listen.
    fn of(stream: &UnixStream, socket: &Path) -> Result<Self> {
        // Of the process that called `listen` (unix(7), SO_PEERCRED).
        let peer =
            getsockopt(stream, sockopt::PeerCredentials).context("can't tell who listens")?;
        let (owner, socket) = (Uid::from_raw(peer.uid()), socket.display());
        if !owner.is_root() && owner != geteuid() {
            bail!(
                "{} listens behind {socket}, which is no daemon of yours: give its socket with --admin-socket",
                user(owner)
            );
        }
        Ok(match peer.pid() {
            // It is in a process namespace that we don't see.
            0 => Self {
                daemon: format!("the daemon behind {socket}"),
                end: "end it".to_owned(),
            },
            pid => Self {
                daemon: format!("the daemon, process {pid},"),
                end: format!("end it (`kill -9 {pid}`)"),
            },
        })
    }
}

/// An answer that may take a while.
struct Answer<'a, W> {
    stream: &'a UnixStream,
    /// How long it may take in all.
    within: Duration,
    /// What to do when it takes longer than usual.
    waiting: Option<W>,
    /// It has not come in time.
    is_late: bool,
}

impl<W: FnOnce()> Read for Answer<'_, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut limit = self.within;
        if self.within > USUALLY_WITHIN
            && let Some(waiting) = self.waiting.take()
        {
            match read_within(self.stream, buffer, USUALLY_WITHIN) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => waiting(),
                read => return read,
            }
            limit -= USUALLY_WITHIN;
        }
        let read = read_within(self.stream, buffer, limit);
        self.is_late = matches!(&read, Err(error) if error.kind() == ErrorKind::WouldBlock);
        read
    }
}

fn read_within(mut stream: &UnixStream, buffer: &mut [u8], limit: Duration) -> io::Result<usize> {
    stream.set_read_timeout(Some(limit))?;
    stream.read(buffer)
}

/// A request as it is sent: one JSON line.
///
/// # Errors
/// When the state directory is not UTF-8.
pub fn encode_request(state_dir: &Path, request: &Request) -> Result<Vec<u8>> {
    let envelope = Envelope {
        state_dir: comparable(state_dir),
        request,
    };
    let mut line = serde_json::to_vec(&envelope).context("the request can't be written as JSON")?;
    line.push(b'\n');
    Ok(line)
}

fn open(path: &Path, within: Duration) -> Result<Option<UnixStream>> {
    let address = UnixAddr::new(path).with_context(|| {
        format!(
            "{} can't be a socket: give a path of at most 107 bytes with --admin-socket",
            path.display()
        )
    })?;
    let file = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("can't make a Unix socket")?;
    // Without this, connecting to a daemon that hangs with a full backlog would hang too.
    setsockopt(
        &file,
        sockopt::SendTimeout,
        &time_val(ACCEPTS_WITHIN.min(within)),
    )
    .context("can't set a socket's time-out")?;
    match connect(std::os::fd::AsRawFd::as_raw_fd(&file), &address) {
        Ok(()) => Ok(Some(UnixStream::from(file))),
        Err(Errno::ENOENT | Errno::ECONNREFUSED | Errno::ENOTDIR) => Ok(None),
        Err(Errno::EACCES | Errno::EPERM) => {
            bail!(
                "not allowed to ask the daemon behind {}: run this as root",
                path.display()
            )
        }
        Err(Errno::EAGAIN) => bail!(
            "the daemon behind {} lives but takes no requests: it hangs, or has much to do. See its log; where it hangs, end it \
             (kill -9) and start it again: what is in the kernel stays meanwhile",
            path.display()
        ),
        Err(error) => Err(error).with_context(|| {
            format!(
                "can't connect to {}: is it the daemon's socket? give it with --admin-socket",
                path.display()
            )
        }),
    }
}

/// Reads the answer of a daemon.
///
/// # Errors
/// When it says nothing, not all of it, too much, or what no daemon of this version says.
pub fn read_response(stream: impl Read) -> Result<Response> {
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_ANSWER_BYTES)).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        bail!("it closed the connection without a word");
    }
    serde_json::from_slice(&line)
        .context("what it said is not understood: is it of another version?")
}

fn time_val(duration: Duration) -> TimeVal {
    TimeVal::new(duration.as_secs().try_into().unwrap_or(i64::MAX), 0)
}
