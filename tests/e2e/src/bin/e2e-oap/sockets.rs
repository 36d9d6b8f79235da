//! The kernel's socket table with the processes that own the sockets, as `ss` shows it. All
//! connections to a virtual port have the same local address, so only the owner tells which OAP one
//! belongs to.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// One end of an established connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The own end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// Who owns it; not known until it is accepted.
    pub process: Option<u32>,
}

/// Both ends of all established connections of the calling thread's netns.
///
/// # Errors
/// When `ss` fails, or prints what is not understood.
pub fn established() -> Result<Vec<Connection>> {
    let table = ss(&["--processes", "state", "established"])?;
    table
        .lines()
        .map(|line| {
            connection(line).with_context(|| format!("cannot read this line of ss: {line}"))
        })
        .collect()
}

/// How many sockets listen on a port.
///
/// # Errors
/// When `ss` fails.
pub fn listeners(port: u16) -> Result<usize> {
    let table = ss(&["--listening", &format!("sport = {port}")])?;
    Ok(table.lines().count())
}

fn ss(arguments: &[&str]) -> Result<String> {
    let output = Command::new("ss")
        .args(["--no-header", "--tcp", "--numeric"])
        .args(arguments)
        .output()
        .context("cannot start ss: is iproute2 there?")?;
    ensure!(
        output.status.success(),
        "ss failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).context("ss prints what is not UTF-8")
}

/// `Recv-Q Send-Q LOCAL PEER [users:(("java",pid=1,fd=2))]`
fn connection(line: &str) -> Option<Connection> {
    let mut fields = line.split_whitespace().skip(2);
    Some(Connection {
        local: address(fields.next()?)?,
        peer: address(fields.next()?)?,
        process: fields.next().and_then(owner),
    })
}

/// An IPv4 address also where the socket is an IPv6 one.
fn address(text: &str) -> Option<SocketAddr> {
    let address: SocketAddr = text.parse().ok()?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

fn owner(users: &str) -> Option<u32> {
    let (_, rest) = users.split_once("pid=")?;
    rest.split(',').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_lines_of_ss() {
        let line =
            r#"0 0 [::ffff:10.11.1.1]:11800 [::ffff:10.11.1.1]:45678 users:(("java",pid=42,fd=7))"#;
        assert_eq!(
            connection(line),
            Some(Connection {
                local: "10.11.1.1:11800".parse().unwrap(),
                peer: "10.11.1.1:45678".parse().unwrap(),
                process: Some(42),
            })
        );
        let unowned = connection("0 0 10.11.1.1:11800 10.11.1.1:45678").unwrap();
        assert_eq!(unowned.process, None);
    }
}
