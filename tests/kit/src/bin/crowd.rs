#![forbid(unsafe_code)]
//! A process that is tiresome to look at: `crowd PORT NETNS DESCRIPTORS leave|stay` listens on a
//! port of so many network namespaces of its own and holds so many sockets beside. With `leave` no
//! thread of it stays in any of them. It says `ready` when everything is there, and ends with its
//! standard input.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::mpsc::channel;
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [port, netns, descriptors, stay] = &arguments[..] else {
        bail!("usage: crowd PORT NETNS DESCRIPTORS leave|stay");
    };
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let bind = |_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let sockets = (0..descriptors.parse::<usize>()?).map(bind);
    let _sockets: Vec<_> = sockets
        .collect::<Result<_, _>>()
        .context("cannot open that many sockets")?;
    let (number, port): (usize, u16) = (netns.parse()?, port.parse()?);
    let listeners = listen(number, port, stay == "stay")?;
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(listeners);
    // Threads that stay end with the process.
    std::process::exit(0)
}

/// A listener in each of so many netns, all of them at once.
fn listen(netns: usize, port: u16, stay: bool) -> Result<Vec<TcpListener>> {
    let (sender, listeners) = channel();
    let mut go = Vec::new();
    for _ in 0..netns {
        let (sender, (start, started)) = (sender.clone(), channel::<()>());
        let (made, is_made) = channel();
        thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || {
                let unshared = unshare(CloneFlags::CLONE_NEWNET);
                let _ = made.send(());
                let _ = started.recv();
                let listen = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
                let _ = sender.send(unshared.map_err(Into::into).and_then(|()| listen()));
                if stay {
                    loop {
                        thread::park();
                    }
                }
            })
            .context("cannot start a thread")?;
        is_made.recv().context("a thread has ended")?;
        go.push(start);
    }
    drop((sender, go));
    let all = listeners.iter().take(netns).collect::<Result<Vec<_>, _>>();
    all.context("cannot listen in a network namespace")
}
