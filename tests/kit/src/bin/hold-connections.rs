#![forbid(unsafe_code)]
//! A server that holds every connection until its client closes it: `hold-connections ADDRESS...`.
//! Once it listens on all of them it prints the numbers of its processes, and it ends with its
//! standard input. With `--shared` each listener has a second process, which accepts as well.

use std::io::{self, Read as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Context as _, Result};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

/// The listener is the standard input: what the second process is started with.
const INHERITED: &str = "--inherited";
const SHARED: &str = "--shared";

fn main() -> Result<ExitCode> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == [INHERITED] {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        let listener = io::stdin().as_fd().try_clone_to_owned()?;
        hold(&TcpListener::from(listener))?;
    }
    let shared = arguments.first().is_some_and(|first| first == SHARED);
    let addresses = arguments.split_off(usize::from(shared));
    let listeners = addresses.iter().map(|address| listen(address));
    let listeners = listeners.collect::<Result<Vec<_>>>()?;
    let mut processes = vec![std::process::id().to_string()];
    for listener in listeners {
        if shared {
            processes.push(share(listener.try_clone()?.into())?.to_string());
        }
        thread::spawn(move || hold(&listener));
    }
    println!("{}", processes.join(" "));
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(ExitCode::SUCCESS)
}

fn listen(address: &str) -> Result<TcpListener> {
    let parsed: SocketAddr = address.parse().context("no address with a port")?;
    let listen = || -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(parsed), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&parsed.into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    };
    listen().with_context(|| format!("cannot listen on {address}"))
}

/// Accepts for ever.
fn hold(listener: &TcpListener) -> Result<()> {
    loop {
        let (mut connection, _) = listener.accept().context("cannot accept")?;
        thread::spawn(move || io::copy(&mut connection, &mut io::sink()));
    }
}

/// Starts a second process, which ends with this one; returns its number.
fn share(listener: OwnedFd) -> Result<u32> {
    let mut second = Command::new(std::env::current_exe()?);
    second.arg(INHERITED).stdin(Stdio::from(listener));
    let second = second.spawn().context("cannot start the second process")?;
    Ok(second.id())
}
