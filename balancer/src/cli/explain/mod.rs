//! `balancer explain`

mod ends;
mod netns;
mod show;

use std::{
    env,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Args, error::ErrorKind};

pub(super) use self::{
    ends::{From, To},
    netns::{Netns, Pods, pods, slot_of},
    show::{Json, Several, text},
};
use super::{Place, output::Output};
use crate::{
    dataplane::{Answer, NetnsChoice, Reader, SeveralNetns, Syn},
    kubernetes::ObjectName,
};

/// Say where a new connection would go now, and why (changes nothing)
///
/// Decides as the kernel would, by the same rules, on the state of this moment.
///
/// A SYN is looked at in the network namespace that it arrives in. Without --netns and --pod that
/// is the one of this command where backends of the service listen there, else the only one where
/// they do. Where they listen in several others, these are listed and the exit code is 1.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer explain --from 10.0.0.7 --to 11800
  balancer explain --from 10.0.0.7:40001 --to 10.0.0.9:11800 -o json
  balancer explain --from 10.0.0.7 --to 11800 --netns blue
  balancer explain --from 10.244.1.7 --to 11800 --pod skywalking/oap-0")]
pub(super) struct Explain {
    /// The client. Its port matters only while a backend uses SYN cookies
    #[arg(long, value_name = "ADDR[:PORT]")]
    from: From,
    /// What it connects to. The address matters where services or backends have addresses of their
    /// own
    #[arg(long, value_name = "[ADDR:]PORT")]
    to: To,
    /// The network namespace that the SYN arrives in: a name as `ip netns` has it, a file such as
    /// /run/netns/NAME or /proc/PID/ns/net, or the number that `status` shows
    #[arg(long, value_name = "NETNS", conflicts_with = "pod")]
    netns: Option<Netns>,
    /// The pod of this node that the SYN arrives at, in a Kubernetes cluster (asks the daemon)
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = netns::pod)]
    pod: Option<ObjectName>,
    #[command(flatten)]
    output: Output,
}

impl Explain {
    pub(super) fn perform(&self, place: &Place) -> Result<ExitCode> {
        let (from, to) = (self.from, self.to);
        let syn = self.syn()?;
        let reader = place.reader()?;
        let answer = self
            .choice(place, &reader)
            .and_then(|choice| reader.explain(&syn, choice))
            .with_context(|| {
                format!("can't tell where a connection from {from} to {to} would go")
            })?;
        match answer {
            Answer::One(explanation) => {
                self.output.show(&Json::new(from, to, &explanation), || {
                    text(from, to, &explanation)
                })?;
                Ok(ExitCode::SUCCESS)
            }
            Answer::Several(several) => {
                let several = named(&several, place, &reader);
                self.output
                    .show(&Json::of_several(from, to, &several), || {
                        several.text(from, to)
                    })?;
                Ok(ExitCode::FAILURE)
            }
        }
    }

    fn syn(&self) -> Result<Syn> {
        let (from, to) = (self.from, self.to);
        let fits = |to: IpAddr| to.is_ipv4() == from.address.is_ipv4();
        if !to.address.is_none_or(fits) {
            let message = format!(
                "{from} and {to} are of two address families, and no connection has both: write two IPv4 or two IPv6 addresses, or the port alone after --to\n"
            );
            return Err(clap::Error::raw(ErrorKind::ArgumentConflict, message).into());
        }
        Ok(Syn {
            from: SocketAddr::new(from.address, from.port.unwrap_or(0)),
            to_address: to.address,
            to_port: to.port,
        })
    }

    /// The netns that is asked for.
    fn choice(&self, place: &Place, reader: &Reader) -> Result<NetnsChoice> {
        if let Some(pod) = &self.pod {
            let cluster = place.ask_for_cluster().with_context(|| {
                format!("only a daemon knows the pod {pod}, and --netns does without")
            })?;
            let slot = slot_of(&cluster, pod, self.to.port)?;
            let cookie = netns::netns_of(&reader.snapshot()?, slot);
            let cookie =
                cookie.with_context(|| format!("the listener of {pod} has just closed"))?;
            return Ok(NetnsChoice::Cookie(cookie));
        }
        Ok(match &self.netns {
            None => NetnsChoice::Unnamed,
            Some(Netns::Cookie(cookie)) => NetnsChoice::Cookie(*cookie),
            Some(Netns::File(path)) => NetnsChoice::Open(netns::open(path)?),
        })
    }
}

/// The netns to choose from, with the names of their pods where a daemon knows them.
fn named(several: &SeveralNetns, place: &Place, reader: &Reader) -> Several {
    let pods = match (place.ask_for_cluster(), reader.snapshot()) {
        (Ok(cluster), Ok(snapshot)) => pods(&cluster, &snapshot),
        _ => Pods::new(),
    };
    let asked: Vec<_> = env::args_os()
        .map(|argument| shell_word(&argument.to_string_lossy()))
        .collect();
    Several::new(several, &pods, &asked.join(" "))
}

/// An argument as a shell reads it.
pub(super) fn shell_word(argument: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=@%+".contains(c);
    if !argument.is_empty() && argument.chars().all(is_plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}
