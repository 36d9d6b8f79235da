use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;

/// Asks with the time limit of the verbs.
fn ask(socket: &Path, state_dir: &Path, request: &Request) -> anyhow::Result<Option<Response>> {
    super::ask(socket, state_dir, request, ANSWERS_WITHIN, |_| {})
}

const STATE: &str = "/sys/fs/bpf/one";

/// A directory with a server in it, which answers every request with what it was, until dropped.
struct Running {
    directory: TempDir,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Running {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let mut server = runtime.block_on(async {
            Server::bind(&directory.path().join("a.sock"), Path::new(STATE)).unwrap()
        });
        runtime.spawn(async move {
            loop {
                let (request, reply) = server.next().await;
                reply.send(&Response::Done {
                    message: format!("{request:?}"),
                });
            }
        });
        Self {
            directory,
            runtime: Some(runtime),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("a.sock")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// What the server says to these bytes, of which it may not read all.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        let _ = BufReader::new(stream).read_line(&mut answer);
        answer
    }

    fn still_serves(&self) {
        let response = ask(&self.socket(), Path::new(STATE), &Request::Unload).unwrap();
        assert_eq!(
            response,
            Some(Response::Done {
                message: "Unload".to_owned()
            })
        );
    }
}

impl Running {
    fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

#[test]
fn every_request_arrives_as_it_was_sent_and_is_answered() {
    let running = Running::start();
    for request in [
        Request::SetQuota {
            service: "agents".to_owned(),
            slot: None,
            quota: 0,
        },
        Request::SetQuota {
            service: "ü\n\"".to_owned(),
            slot: Some(7),
            quota: u32::MAX,
        },
        Request::ClearQuota {
            service: "als".to_owned(),
            slot: Some(0),
        },
        Request::Reload,
        Request::Unload,
    ] {
        let response = ask(&running.socket(), Path::new(STATE), &request).unwrap();
        assert_eq!(
            response,
            Some(Response::Done {
                message: format!("{request:?}")
            })
        );
    }
}

#[test]
fn nobody_there_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    assert_eq!(
        ask(&path, Path::new(STATE), &Request::Unload).unwrap(),
        None
    );
    drop(UnixListener::bind(&path).unwrap());
    assert_eq!(
        ask(&path, Path::new(STATE), &Request::Unload).unwrap(),
        None,
        "a dead socket"
    );
    assert_eq!(
        ask(&path.join("x"), Path::new(STATE), &Request::Unload).unwrap(),
        None,
        "below a file"
    );
}

#[test]
fn a_path_that_is_too_long_is_an_error() {
    let long = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
    let error = ask(&long, Path::new(STATE), &Request::Unload).unwrap_err();
    assert!(format!("{error:#}").contains("--admin-socket"), "{error:#}");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let error =
        runtime.block_on(async { Server::bind(&long, Path::new(STATE)).map(drop).unwrap_err() });
    assert!(format!("{error:#}").contains("too long"), "{error:#}");
}

#[test]
fn a_request_for_another_state_directory_is_refused() {
    let running = Running::start();
    let response = ask(
        &running.socket(),
        Path::new("/sys/fs/bpf/two"),
        &Request::Unload,
    )
    .unwrap();
    let Some(Response::Failed { message }) = response else {
        panic!("{response:?}")
    };
    assert!(
        message.contains("/sys/fs/bpf/two, this one has it in /sys/fs/bpf/one"),
        "{message}"
    );
    let same = ask(
        &running.socket(),
        Path::new("/sys/fs/bpf/one/"),
        &Request::Unload,
    )
    .unwrap();
    assert!(matches!(same, Some(Response::Done { .. })));
}

#[test]
fn garbage_gets_a_refusal_and_harms_nobody() {
    let running = Running::start();
    let known = format!("{{\"state_dir\":\"{STATE}\",\"request\":");
    for bytes in [
        &b"\n"[..],
        b"{}\n",
        b"null\n",
        b"\x00\xff\xfe\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "[".repeat(60_000).as_bytes(),
        format!("{known}{{\"verb\":\"unload\"}}\n").replace("unload", "explode").as_bytes(),
        format!("{known}{{\"verb\":\"set-quota\",\"service\":\"a\",\"slot\":-1,\"quota\":1}}}}\n").as_bytes(),
        format!("{known}{{\"verb\":\"set-quota\",\"service\":\"a\",\"slot\":1,\"quota\":4294967296}}}}\n").as_bytes(),
        format!("{known}{{\"verb\":\"set-quota\",\"service\":\"a\",\"slot\":1,\"quota\":1,\"more\":1}}}}\n").as_bytes(),
        &{
            let mut deep = known.clone().into_bytes();
            deep.extend("[".repeat(60_000).bytes());
            deep.push(b'\n');
            deep
        },
    ] {
        let mut stream = running.connect();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        let start: String = String::from_utf8_lossy(bytes).chars().take(80).collect();
        assert!(answer.starts_with("{\"result\":\"failed\""), "{start:?} got {answer:?}");
    }
    running.still_serves();
}

/// More than fits into the socket's buffer would be cut off, and an escape sequence would steer the
/// terminal of whoever asked.
#[test]
fn a_refusal_quotes_little_of_the_request_and_no_control_characters() {
    let long = "\u{200b}".repeat(20_000);
    for request in [
        format!("{{\"{long}\":1}}\n"),
        format!("{{\"state_dir\":\"{long}\",\"request\":{{\"verb\":\"unload\"}}}}\n"),
        format!("{{\"state_dir\":\"{STATE}\",\"request\":{{\"verb\":\"{long}\"}}}}\n"),
        format!("{{\"state_dir\":\"{STATE}\",\"request\":\"{long}\"}}\n"),
        "{\"\\u001b[2J\\u0007\u{7f}\":1}\n".to_owned(),
    ] {
        let refusal = server::parse_request(request.as_bytes(), Path::new(STATE)).unwrap_err();
        assert!(refusal.len() <= 4096, "{} bytes", refusal.len());
        assert!(!refusal.contains(char::is_control), "{refusal:?}");
    }
    let running = Running::start();
    let answer = running.raw(format!("{{\"{long}\":1}}\n").as_bytes());
    assert!(answer.ends_with("\"}\n"), "{answer:?}");
}

#[test]
fn a_line_of_ten_megabytes_is_cut_off() {
    let running = Running::start();
    let answer = running.raw(&vec![b'a'; 10 << 20]);
    assert!(answer.contains("longer than 65536 bytes"), "{answer:?}");
    running.still_serves();
}

#[test]
fn half_a_line_then_silence_or_the_end() {
    let running = Running::start();
    let mut silent = running.connect();
    silent.write_all(b"{\"state_dir\":").unwrap();
    let mut ended = running.connect();
    ended.write_all(b"{\"state_dir\":").unwrap();
    ended.shutdown(std::net::Shutdown::Write).unwrap();

    let mut answer = String::new();
    ended.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("ends before its line does"), "{answer:?}");
    running.still_serves();

    let started = Instant::now();
    let mut answer = String::new();
    silent.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("no request within 5 seconds"), "{answer:?}");
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn two_hundred_at_once_and_those_that_close_early() {
    let running = Running::start();
    let idle: Vec<UnixStream> = (0..200).map(|_| running.connect()).collect();
    running.still_serves();
    for mut stream in idle.into_iter().step_by(2) {
        let _ = stream
            .write_all(b"{\"state_dir\":\"/sys/fs/bpf/one\",\"request\":{\"verb\":\"unload\"}}\n");
        // Closed before the answer.
    }
    running.still_serves();

    let socket = running.socket();
    let clients: Vec<_> = (0..200)
        .map(|quota| {
            let socket = socket.clone();
            thread::spawn(move || {
                let request = Request::SetQuota {
                    service: "agents".to_owned(),
                    slot: None,
                    quota,
                };
                let response = ask(&socket, Path::new(STATE), &request).unwrap();
                assert_eq!(
                    response,
                    Some(Response::Done {
                        message: format!("{request:?}")
                    })
                );
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
}

/// A process of the user nobody connects, sends a line and prints the answer.
fn as_nobody(socket: &Path) -> Output {
    let script = r#"$SIG{PIPE} = 'IGNORE'; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "connect: $!"; print $s "x\n"; $s->flush; print <$s>"#;
    let mut command = Command::new("perl");
    command
        .args(["-MIO::Socket::UNIX", "-e", script])
        .arg(socket)
        .uid(65_534);
    command
        .output()
        .expect("perl, and root to become another user")
}

#[test]
fn other_users_are_kept_out_by_the_mode_and_then_by_their_credentials() {
    let running = Running::start();
    fs::set_permissions(running.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let kept_out = as_nobody(&running.socket());
    let error = String::from_utf8_lossy(&kept_out.stderr);
    assert!(error.contains("connect: Permission denied"), "{kept_out:?}");

    fs::set_permissions(running.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let refused = as_nobody(&running.socket());
    let answer = String::from_utf8_lossy(&refused.stdout);
    assert!(
        answer.contains("user 65534 may not change the balancer"),
        "{refused:?}"
    );
    running.still_serves();
}

/// What `Server::bind` says at this path, in a runtime of its own.
fn bind_error(path: &Path) -> String {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let error =
        runtime.block_on(async { Server::bind(path, Path::new(STATE)).map(drop).unwrap_err() });
    format!("{error:#}")
}

#[test]
fn a_socket_is_private_and_gone_with_its_server() {
    let mut running = Running::start();
    let mode = fs::metadata(running.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let left = |running: &Running| fs::read_dir(running.directory.path()).unwrap().count();
    assert_eq!(left(&running), 1, "nothing beside the socket");
    running.stop();
    assert_eq!(left(&running), 0);
}

#[test]
fn its_directory_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/balancer/a.sock");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(async { Server::bind(&path, Path::new(STATE)).unwrap() });
    assert!(path.exists());
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let live = UnixListener::bind(&path).unwrap();
    assert!(
        bind_error(&path).contains("another daemon lives there"),
        "{}",
        bind_error(&path)
    );
    assert!(path.exists());
    drop(live);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(async { Server::bind(&path, Path::new(STATE)).unwrap() });
    assert!(bind_error(&path).contains("another daemon lives there"));
    drop(server);
}

#[test]
fn something_that_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    fs::write(&path, "precious").unwrap();
    assert!(
        bind_error(&path).contains("something else than a socket"),
        "{}",
        bind_error(&path)
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn a_socket_that_has_been_replaced_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(async { Server::bind(&path, Path::new(STATE)).unwrap() });
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists(), "the other daemon's socket");
}

#[test]
fn of_daemons_that_start_together_one_wins() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    drop(UnixListener::bind(&path).unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let servers: Vec<_> = thread::scope(|scope| {
        let starters: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let _inside = runtime.enter();
                    Server::bind(&path, Path::new(STATE))
                })
            })
            .collect();
        starters
            .into_iter()
            .map(|starter| starter.join().unwrap())
            .collect()
    });
    assert_eq!(servers.iter().filter(|server| server.is_ok()).count(), 1);
}

#[test]
fn an_answer_outlives_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut server = runtime.block_on(async { Server::bind(&path, Path::new(STATE)).unwrap() });
    let asking = {
        let path = path.clone();
        thread::spawn(move || ask(&path, Path::new(STATE), &Request::Unload).unwrap())
    };
    let (_, reply) = runtime.block_on(server.next());
    reply.send(&Response::Done {
        message: "gone".to_owned(),
    });
    drop(server);
    drop(runtime);
    assert_eq!(
        asking.join().unwrap(),
        Some(Response::Done {
            message: "gone".to_owned()
        })
    );
}

/// A stopped daemon: its socket takes requests, and nobody looks at them.
#[test]
fn a_request_that_nobody_waits_for_any_more_is_not_done() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut server = runtime.block_on(async { Server::bind(&path, Path::new(STATE)).unwrap() });
    let mut told = Vec::new();
    let within = Duration::from_secs(3);
    let waiting = |line: &str| told.push(line.to_owned());
    let error = super::ask(&path, Path::new(STATE), &Request::Unload, within, waiting).unwrap_err();
    let process = format!("the daemon, process {},", std::process::id());
    assert_eq!(told, [format!("waiting for {process} …")]);
    let said = format!("{error:#}");
    let end = format!("`kill -9 {}`", std::process::id());
    for words in [&process, "within 3 s", "won't do", &end] {
        assert!(said.contains(words), "{said}");
    }

    // It goes on, and serves whoever waits now.
    let asking = {
        let path = path.clone();
        thread::spawn(move || ask(&path, Path::new(STATE), &Request::Reload).unwrap())
    };
    let (request, reply) = runtime.block_on(server.next());
    assert_eq!(request, Request::Reload);
    reply.send(&Response::Done {
        message: "done".to_owned(),
    });
    assert!(matches!(
        asking.join().unwrap(),
        Some(Response::Done { .. })
    ));
}

#[test]
fn another_users_process_is_no_daemon() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let path = directory.path().join("a.sock");
    let script = r#"my $s = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 1) or die "$!"; $s->accept; sleep 20"#;
    let mut command = Command::new("perl");
    command
        .args(["-MIO::Socket::UNIX", "-e", script])
        .arg(&path)
        .uid(65_534);
    let mut impostor = command
        .spawn()
        .expect("perl, and root to become another user");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !path.exists() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    // It may have made its file and not yet listen.
    let error = loop {
        match ask(&path, Path::new(STATE), &Request::Unload) {
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            outcome => break outcome.unwrap_err(),
        }
    };
    impostor.kill().unwrap();
    impostor.wait().unwrap();
    let said = format!("{error:#}");
    assert!(
        said.contains("user 65534 (nobody) listens behind"),
        "{said}"
    );
}

#[test]
fn a_directory_that_others_may_change_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let inner = inner.canonicalize().unwrap();
    let with = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        server::open_to_others(&inner)
    };
    assert!(
        with(&inner, 0o755).is_empty(),
        "also below a sticky one such as /tmp"
    );
    let outer = inner.parent().unwrap().to_owned();
    let told = with(&outer, 0o777);
    assert_eq!(
        told,
        [format!(
            "{} can be written by others, mode 777",
            outer.display()
        )]
    );
    assert!(with(&outer, 0o1777).is_empty());
    std::os::unix::fs::chown(&inner, Some(65_534), None).unwrap();
    let told = with(&outer, 0o700);
    assert_eq!(
        told,
        [format!(
            "{} belongs to user 65534 (nobody)",
            inner.display()
        )]
    );
}

/// Nobody can connect before the file has its mode, whatever the umask allows.
#[test]
fn the_mode_of_a_socket_is_set_before_it_has_a_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let listener = server::listen_aside(&path).unwrap();
    let mode = |metadata: fs::Metadata| metadata.permissions().mode() & 0o777;
    assert_eq!(mode(fs::metadata(&path).unwrap()), 0o600);
    let socket = std::os::fd::OwnedFd::from(listener);
    assert_eq!(mode(fs::File::from(socket).metadata().unwrap()), 0o600);
}

#[test]
fn a_daemon_that_drops_a_request_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut server = runtime.block_on(async { Server::bind(&path, Path::new(STATE)).unwrap() });
    let asking = thread::spawn(move || ask(&path, Path::new(STATE), &Request::Unload).unwrap_err());
    drop(runtime.block_on(server.next()));
    let error = format!("{:#}", asking.join().unwrap());
    assert!(
        error.contains("closed the connection without a word"),
        "{error}"
    );
}
