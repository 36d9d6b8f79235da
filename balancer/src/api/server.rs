//! What the daemon does: taking requests and answering them.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File},
    io::{ErrorKind, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt},
            net,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::{
        socket::{
            AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, recv,
            socket,
        },
        stat::{Mode, fchmod},
    },
    unistd::{Uid, geteuid},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::protocol::{Envelope, MAX_REQUEST_BYTES, Request, Response, comparable};
use crate::{
    sanitize,
    sys::{file_id::FileId, privileges::user},
};

/// How long a client may take to say what it wants.
const ASKS_WITHIN: Duration = Duration::from_secs(5);
/// How long it may take to read a long answer.
const READS_WITHIN: Duration = Duration::from_secs(5);
/// How many clients are read from at once; more wait in the backlog.
const MAX_CLIENTS: usize = 256;
/// How many clients may wait in the backlog.
const BACKLOG: i32 = 128;
/// How many requests may wait for the daemon; a client that asks while so many do waits longer.
const MAX_WAITING: usize = 16;

/// The socket that the daemon listens on. Removed when this is dropped, if it is still the one that
/// was bound.
pub struct Server {
    requests: mpsc::Receiver<(Request, Reply)>,
    accepting: JoinHandle<()>,
    path: PathBuf,
    file: FileId,
}

impl Server {
    /// Listens on `path` (made with its directory, mode 0600) for requests to the daemon that keeps
    /// its state in `state_dir`. A socket that nobody listens on any more is replaced. Must be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    /// When another daemon listens there, something else than a socket is there, or the socket
    /// can't be made.
    pub fn bind(path: &Path, state_dir: &Path) -> Result<Self> {
        let (listener, file) = bind_socket(path)
            .with_context(|| format!("can't listen for requests on {}", path.display()))?;
        let listener = UnixListener::from_std(listener).context("can't watch the admin socket")?;
        let (sender, requests) = mpsc::channel(MAX_WAITING);
        let queue = RequestQueue {
            state_dir: comparable(state_dir),
            sender,
        };
        Ok(Self {
            requests,
            accepting: tokio::spawn(accept(listener, queue)),
            path: path.to_owned(),
            file,
        })
    }

    /// The next request of a client that waits for its answer. Cancel safe: nothing is lost when
    /// the future is dropped.
    pub async fn next(&mut self) -> (Request, Reply) {
        loop {
            let Some((request, reply)) = self.requests.recv().await else {
                // Nobody accepts any more (the runtime is ending): there is no next one.
                std::future::pending().await
            };
            if reply.is_awaited() {
                return (request, reply);
            }
            tracing::warn!(?request, "not done: who asked for it has gone meanwhile");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        if FileId::named(&self.path).is_ok_and(|file| file == self.file)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(socket = %self.path.display(), %error, "can't remove the admin socket");
        }
    }
}

/// Whom to answer. Dropped without an answer, it closes the connection.
pub struct Reply(UnixStream);

impl Reply {
    /// Whether the client still waits. One that has given up must not find its request done later.
    fn is_awaited(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.0.as_raw_fd(), &mut [0], flags) {
            // The end is read where it has closed its side.
            Ok(read) => read > 0,
            Err(errno) => errno == Errno::EAGAIN,
        }
    }

    /// Answers and closes. Returns at once: an answer fits into the socket's buffer, and reaches
    /// the client even if this process ends now. A client that has gone away misses it.
    pub fn send(self, response: &Response) {
        let sent = serde_json::to_vec(response)
            .map_err(Into::into)
            .and_then(|mut line| {
                line.push(b'\n');
                self.0.into_std()?.write_all(&line)
            });
        if let Err(error) = sent {
            tracing::debug!(%error, ?response, "an admin client missed its answer");
        }
    }

    /// Answers with more than may fit into the socket's buffer: returns at once too, and a client
    /// that does not read it in time misses it.
    pub fn send_long(mut self, response: &Response) {
        let line = match serde_json::to_vec(response) {
            Ok(mut line) => {
                line.push(b'\n');
                line
            }
            Err(error) => {
                tracing::debug!(%error, "an answer can't be written as JSON");
                return;
            }
        };
        tokio::spawn(async move {
            if !matches!(
                timeout(READS_WITHIN, self.0.write_all(&line)).await,
                Ok(Ok(()))
            ) {
                tracing::debug!("an admin client did not read its answer");
            }
        });
    }
}

fn bind_socket(path: &Path) -> Result<(net::UnixListener, FileId)> {
    let path = std::path::absolute(path)?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("that is not the path of a file: give one with --admin-socket");
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .with_context(|| format!("can't make the directory {}", directory.display()))?;
    // Two daemons that start together must not both find a dead socket and replace each other's.
    let _one_at_a_time = File::open(directory)
        .and_then(|directory| {
            Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
        })
        .with_context(|| format!("can't lock the directory {}", directory.display()))?;
    for why in open_to_others(directory) {
        tracing::warn!(
            "others can take the place of the admin socket, and so keep requests from the daemon: {why}. Close the directory to them (chmod \
             go-w), or give --admin-socket in one of root's"
        );
    }
    check_free(&path)?;

    let mut aside = OsString::from(".");
    aside.push(name);
    aside.push(format!(".{}", std::process::id()));
    let aside = directory.join(aside);
    let listener = listen_aside(&aside).and_then(|listener| {
        let file = FileId::named(&aside).context("the socket that was just made is gone")?;
        fs::rename(&aside, &path).context("can't put the socket in its place")?;
        Ok((listener, file))
    });
    if listener.is_err() {
        // Best effort: the error that matters is the one above.
        let _ = fs::remove_file(&aside);
    }
    listener
}

fn check_free(path: &Path) -> Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context("can't see what is there"),
    };
    if !kind.is_socket() {
        bail!(
            "there is something else than a socket: move it away, or give another --admin-socket"
        );
    }
    match net::UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).context("can't tell whether a daemon lives there"),
        Ok(_) => bail!(
            "another daemon lives there: end it first, or give this one its own --admin-socket and --state-dir"
        ),
    }
}

/// A listener whose file has its mode from the beginning.
pub(super) fn listen_aside(path: &Path) -> Result<net::UnixListener> {
    let address = UnixAddr::new(path).context(
        "the path is too long for a socket: give one of at most 96 bytes with --admin-socket",
    )?;
    if let Err(error) = fs::remove_file(path)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(error).context("can't remove what an earlier start left");
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The file gets the mode of the socket itself (`unix_bind_bsd`, net/unix/af_unix.c).
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).context("can't set the socket's mode")?;
    bind(socket.as_raw_fd(), &address).context("can't make the socket's file")?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket.into())
}

/// Why others could put a socket of theirs in the place of one in this directory. In a sticky
/// directory they can't: there they can only remove what they own.
pub(super) fn open_to_others(directory: &Path) -> Vec<String> {
    let mut reasons = Vec::new();
    let directory = directory.canonicalize().unwrap_or_default();
    for directory in directory.ancestors() {
        let Ok(found) = directory.metadata() else {
            continue;
        };
        let owner = Uid::from_raw(found.uid());
        let why = if !owner.is_root() && owner != geteuid() {
            format!("belongs to {}", user(owner))
        } else if found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0 {
            format!("can be written by others, mode {:o}", found.mode() & 0o7777)
        } else {
            continue;
        };
        reasons.push(format!("{} {why}", directory.display()));
    }
    reasons
}

/// Where the requests of all clients go.
#[derive(Clone)]
struct RequestQueue {
    state_dir: PathBuf,
    sender: mpsc::Sender<(Request, Reply)>,
}

async fn accept(listener: UnixListener, queue: RequestQueue) {
    let permits = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve(stream, queue.clone(), permit));
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept an admin client");
                // Out of descriptors, most likely, which passes; without a pause this would spin.
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(mut stream: UnixStream, queue: RequestQueue, _permit: OwnedSemaphorePermit) {
    match read_request(&mut stream, &queue.state_dir).await {
        Ok(request) => {
            // Nobody to take it: the daemon is ending, and dropping the stream says so.
            let _ = queue.sender.send((request, Reply(stream))).await;
        }
        Err(refusal) => {
            tracing::debug!(refusal, "refused an admin client");
            Reply(stream).send(&Response::failed(refusal));
        }
    }
}

/// The request of a client that may make it, or why it is refused.
async fn read_request(stream: &mut UnixStream, state_dir: &Path) -> Result<Request, String> {
    let peer = stream
        .peer_cred()
        .map_err(|error| format!("can't tell who is asking: {error}"))?;
    if peer.uid() != 0 && peer.uid() != geteuid().as_raw() {
        return Err(format!(
            "user {} may not change the balancer: ask as root",
            peer.uid()
        ));
    }
    let line = timeout(ASKS_WITHIN, read_line(stream))
        .await
        .map_err(|_| format!("no request within {} seconds", ASKS_WITHIN.as_secs()))??;
    parse_request(&line, state_dir)
}

/// The request that `line` makes of the daemon that keeps its state in `state_dir`.
///
/// # Errors
/// Why it is refused: it is no request, or one for another daemon.
pub fn parse_request(line: &[u8], state_dir: &Path) -> Result<Request, String> {
    let envelope: Envelope<Request> = serde_json::from_slice(line).map_err(|error| {
        format!(
            "the request is not understood ({}): is the asking program of another version?",
            shown(&error.to_string())
        )
    })?;
    if envelope.state_dir != state_dir {
        return Err(format!(
            "the request is meant for the balancer with its state in {}, this one has it in {}: give the --state-dir and --admin-socket that belong together",
            shown(&envelope.state_dir.to_string_lossy()),
            state_dir.display()
        ));
    }
    Ok(envelope.request)
}

/// `text`, which the client may have chosen, as it may stand in an answer: no longer than fits into
/// the socket's buffer.
fn shown(text: &str) -> String {
    sanitize::for_message(text, 300)
}

/// The line that a client sends, with its end, and no more bytes than a request may have.
///
/// # Errors
/// When the client ends before its line does, or its line does not end in time.
pub async fn read_line(stream: impl AsyncRead + Unpin) -> Result<Vec<u8>, String> {
    let mut line = Vec::new();
    let limit = MAX_REQUEST_BYTES as u64;
    BufReader::new(stream.take(limit))
        .read_until(b'\n', &mut line)
        .await
        .map_err(|error| format!("the request can't be read: {error}"))?;
    match line.last() {
        Some(b'\n') => Ok(line),
        _ if line.len() >= MAX_REQUEST_BYTES => Err(format!(
            "the request is longer than {MAX_REQUEST_BYTES} bytes"
        )),
        _ => Err("the request ends before its line does".to_owned()),
    }
}
