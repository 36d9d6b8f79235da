//! What the command line does: asking a daemon.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};

use super::protocol::{Envelope, Request, Response, comparable};

/// How long a daemon may take to accept: one that lives does at once.
const ACCEPTS_WITHIN: Duration = Duration::from_secs(5);
/// How long it may take, as a rule, to do what was asked: unloading waits for the kernel.
pub const ANSWERS_WITHIN: Duration = Duration::from_secs(30);
/// The longest answer, in bytes.
const MAX_ANSWER_BYTES: u64 = 16 << 20;

/// Asks the daemon behind `socket`, which must be the one that keeps its state in `state_dir`, and
/// waits for its answer. `None` when no daemon lives there: no such socket, or a dead one.
///
/// # Errors
/// When the socket can't be used (most often: not root), or the daemon doesn't answer `within` that
/// time, or not as agreed.
pub fn ask(
    socket: &Path,
    state_dir: &Path,
    request: &Request,
    within: Duration,
) -> Result<Option<Response>> {
    let Some(stream) = open(socket, within)? else {
        return Ok(None);
    };
    match (&stream).write_all(&encode_request(state_dir, request)?) {
        // The daemon may refuse before it has read everything: what it says is what counts.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            return Err(error)
                .with_context(|| format!("the daemon behind {} doesn't listen", socket.display()));
        }
        _ => {}
    }
    read_response(&stream).map(Some).with_context(|| {
        format!(
            "no proper answer from the daemon behind {}; see its log for what it did",
            socket.display()
        )
    })
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
    setsockopt(&file, sockopt::ReceiveTimeout, &time_val(within))
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
            "the daemon behind {} lives but takes no requests: look at its log, restart it if it hangs",
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
    BufReader::new(stream.take(MAX_ANSWER_BYTES))
        .read_until(b'\n', &mut line)
        .map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => {
                anyhow::anyhow!("it said nothing in time")
            }
            _ => error.into(),
        })?;
    if line.is_empty() {
        bail!("it closed the connection without a word");
    }
    serde_json::from_slice(&line)
        .context("what it said is not understood: is it of another version?")
}

fn time_val(duration: Duration) -> TimeVal {
    TimeVal::new(duration.as_secs().try_into().unwrap_or(i64::MAX), 0)
}
