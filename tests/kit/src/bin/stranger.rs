#![forbid(unsafe_code)]
//! Anybody at all: a process of user 65534 that makes itself a user namespace and network
//! namespaces. `stranger ADDRESS NETNS churn|hold|connect NUMBER` gives the address (with a port)
//! to `lo` of so many network namespaces, and in each of them, so many times, listens there and
//! closes, or keeps the listener, or connects to it, closes it and keeps the connection. It says
//! `ready` when that is done, and ends with its standard input.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_dumpable;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use socket2::{Domain, Socket, Type};

const NOBODY: u32 = 65534;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, netns, what, number] = &arguments[..] else {
        bail!("usage: stranger ADDRESS NETNS churn|hold|connect NUMBER");
    };
    let address: SocketAddr = address.parse().context("an address with a port")?;
    let (netns, number): (u32, u32) = (netns.parse()?, number.parse()?);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    become_nobody()?;
    let mut kept = Vec::new();
    for _ in 0..netns {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        ip(&["link", "set", "lo", "up"])?;
        if !address.ip().is_loopback() {
            ip(&[
                "address",
                "add",
                &format!("{}/32", address.ip()),
                "dev",
                "lo",
            ])?;
        }
        for _ in 0..number {
            let listener = listen(address)?;
            match what.as_str() {
                "hold" => kept.push(listener),
                "connect" => {
                    kept.push(TcpStream::connect(address)?.into());
                    kept.push(listener.accept()?.0);
                }
                _ => {}
            }
        }
    }
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn become_nobody() -> Result<()> {
    setgroups(&[])?;
    setgid(Gid::from_raw(NOBODY))?;
    setuid(Uid::from_raw(NOBODY))?;
    // Or its own files in /proc stay root's.
    set_dumpable(true)?;
    unshare(CloneFlags::CLONE_NEWUSER).context("cannot make a user namespace")?;
    fs::write("/proc/self/setgroups", "deny").context("setgroups")?;
    fs::write("/proc/self/gid_map", format!("0 {NOBODY} 1")).context("gid_map")?;
    fs::write("/proc/self/uid_map", format!("0 {NOBODY} 1")).context("uid_map")
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status()?;
    ensure!(status.success(), "ip {arguments:?}: {status}");
    Ok(())
}

fn listen(address: SocketAddr) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    // The last one may still be on its way out.
    for _ in 0..100 {
        if socket.bind(&address.into()).is_ok() {
            break;
        }
        sleep(Duration::from_millis(10));
    }
    socket.listen(8).context("cannot listen")?;
    Ok(socket)
}
