//! The two ends of a connection, as arguments.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use super::netns::pod;
use crate::kubernetes::ObjectName;

/// A client: an address, and a port where it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) struct From {
    pub(in crate::cli) address: IpAddr,
    pub(in crate::cli) port: Option<u16>,
}

impl FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const WRITE: &str = "write an address such as 10.0.0.7, 10.0.0.7:40001, ::1 or [::1]:40001";
        match end(text) {
            Ok((Some(address), port)) => Ok(Self { address, port }),
            Ok((None, _)) => Err(format!("the address is missing; {WRITE}")),
            Err(why) => Err(format!("{why}; {WRITE}")),
        }
    }
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).fmt(f),
            None => self.address.fmt(f),
        }
    }
}

/// Who connects, as an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Client {
    /// Whoever has that address.
    Address(From),
    /// A process of this node.
    Process(u32),
    /// A pod of this node.
    Pod(ObjectName),
}

impl FromStr for Client {
    type Err = String;

    /// Only digits are a process, and a slash is in no address.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return pod(text).map(Self::Pod);
        }
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            return match text.parse() {
                Ok(pid @ 1..) => Ok(Self::Process(pid)),
                _ => Err(format!("`{text}` is no number of a process")),
            };
        }
        text.parse().map(Self::Address)
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(from) => from.fmt(f),
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Pod(pod) => write!(f, "pod {pod}"),
        }
    }
}

/// What a client connects to: a port, and an address where it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) struct To {
    pub(in crate::cli) address: Option<IpAddr>,
    pub(in crate::cli) port: u16,
}

impl FromStr for To {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const WRITE: &str =
            "write a port, or an address and a port such as 10.0.0.9:11800 or [::1]:11800";
        match end(text) {
            Ok((address, Some(port))) => Ok(Self { address, port }),
            Ok((_, None)) => Err(format!("the port is missing; {WRITE}")),
            Err(why) => Err(format!("{why}; {WRITE}")),
        }
    }
}

impl To {
    /// Address and port, where both are there.
    pub(in crate::cli) fn both(self) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.address?, self.port))
    }
}

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => SocketAddr::new(address, self.port).fmt(f),
            None => self.port.fmt(f),
        }
    }
}

/// An address, a port, or both.
fn end(text: &str) -> Result<(Option<IpAddr>, Option<u16>), String> {
    if text.contains('%') {
        return Err(format!("`{text}` has a zone, which is left out here"));
    }
    if let Some(address) = ip(text) {
        return Ok((Some(sender(address)?), None));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (Some(host), port),
        None if text.starts_with(|c: char| c.is_ascii_digit()) && !text.contains('.') => {
            (None, text)
        }
        None => (Some(text), ""),
    };
    let address = match host {
        Some(host) => Some(sender(ip(host).ok_or_else(|| no_address(host))?)?),
        None => None,
    };
    match port.parse() {
        Ok(port @ 1..) => Ok((address, Some(port))),
        _ => Err(format!("`{port}` is no port from 1 to 65535")),
    }
}

fn ip(text: &str) -> Option<IpAddr> {
    let inside = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    let address: IpAddr = inside.unwrap_or(text).parse().ok()?;
    Some(address.to_canonical())
}

/// Whether packets come from such an address, or go to it.
fn sender(address: IpAddr) -> Result<IpAddr, String> {
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!("no connection has the address {address} at an end"));
    }
    Ok(address)
}

fn no_address(host: &str) -> String {
    format!("`{host}` is no address, and names are not looked up")
}
