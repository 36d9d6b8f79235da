//! `balancer explain`

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::{
    Place,
    output::{Output, wrapped},
};
use crate::dataplane::Explanation;

/// Say where a new connection would go now, and why (changes nothing)
///
/// Decides as the kernel would, by the same rules, on the state of this moment.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer explain --from 10.0.0.7 --to 11800
  balancer explain --from 10.0.0.7:40001 --to 10.0.0.9:11800 -o json")]
pub(super) struct Explain {
    /// The client. Its port matters only while a backend uses SYN cookies
    #[arg(long, value_name = "ADDR[:PORT]")]
    from: From,
    /// What it connects to. The address matters where services or backends have addresses of their
    /// own
    #[arg(long, value_name = "[ADDR:]PORT")]
    to: To,
    #[command(flatten)]
    output: Output,
}

impl Explain {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        let source = SocketAddr::new(self.from.address, self.from.port.unwrap_or(0));
        let explanation = place
            .reader()?
            .explain(source, self.to.address, self.to.port)
            .with_context(|| {
                format!(
                    "can't tell where a connection from {} to {} would go",
                    self.from, self.to
                )
            })?;
        self.output
            .show(&Json::new(self.from, self.to, &explanation), || {
                text(self.from, self.to, &explanation)
            })
    }
}

/// A client: an address, and a port where it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct From {
    pub(super) address: IpAddr,
    pub(super) port: Option<u16>,
}

impl FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self {
                address: address.to_canonical(),
                port: None,
            });
        }
        match text.parse::<SocketAddr>() {
            Ok(both) => Ok(Self {
                address: both.ip().to_canonical(),
                port: Some(both.port()),
            }),
            Err(_) => Err(
                "write an address such as 10.0.0.7, 10.0.0.7:40001, ::1 or [::1]:40001".to_owned(),
            ),
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

/// What a client connects to: a port, and an address where it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct To {
    pub(super) address: Option<IpAddr>,
    pub(super) port: u16,
}

impl FromStr for To {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let to = match text.parse::<SocketAddr>() {
            Ok(both) => Self {
                address: Some(both.ip().to_canonical()),
                port: both.port(),
            },
            Err(_) => Self {
                address: None,
                port: text.parse().unwrap_or(0),
            },
        };
        if to.port == 0 {
            return Err("write a port from 1 to 65535, or an address and a port such as 10.0.0.9:11800 or [::1]:11800".to_owned());
        }
        Ok(to)
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

#[derive(Serialize)]
pub(super) struct Json<'a> {
    schema: u32,
    from: String,
    to: String,
    service: Option<&'a str>,
    reason: &'static str,
    verdict: &'static str,
    backend: Option<JsonBackend>,
    sentence: &'a str,
}

#[derive(Serialize)]
struct JsonBackend {
    slot: u32,
    address: SocketAddr,
}

impl<'a> Json<'a> {
    pub(super) fn new(from: From, to: To, explanation: &'a Explanation) -> Self {
        Self {
            schema: 1,
            from: from.to_string(),
            to: to.to_string(),
            service: explanation.service.as_deref(),
            reason: explanation.reason.name(),
            verdict: explanation.verdict.name(),
            backend: explanation
                .backend
                .map(|(slot, address)| JsonBackend { slot, address }),
            sentence: &explanation.sentence,
        }
    }
}

pub(super) fn text(from: From, to: To, explanation: &Explanation) -> String {
    let Explanation {
        service,
        reason,
        verdict,
        backend,
        sentence,
    } = explanation;
    let mut text = wrapped(&format!("{from} -> {to}: "), sentence);
    let service = service
        .as_deref()
        .unwrap_or("none: the balancer leaves this port alone");
    text += &wrapped("  service  ", service);
    text += &wrapped("  verdict  ", verdict.name());
    if explanation.service.is_some() {
        text += &wrapped(
            "  reason   ",
            &format!("{}: {}", reason.name(), reason.meaning()),
        );
    }
    if let Some((slot, address)) = backend {
        text += &wrapped("  backend  ", &format!("{address} (slot {slot})"));
    }
    text
}
