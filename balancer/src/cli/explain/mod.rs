//! `balancer explain`

mod connect;
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
use serde::Serialize;

pub(super) use self::{
    ends::{Client as FromClient, From, To},
    netns::{Netns, Pods, pod, pods, slot_of, slots_of},
    show::{Json, Several, text},
};
use super::{Place, output::Output};
use crate::{
    api::Request,
    dataplane::{Answer, Client, NetnsChoice, Reader, SeveralNetns, Syn},
    kubernetes::ObjectName,
};

/// Say where a new connection would go now, and why (changes nothing)
///
/// Decides as the kernel would, by the same rules, on the state of this moment.
///
/// Where --to is a frontend, an address whose connects this node places, the answer is about a
/// connect on this node: which endpoint it goes to. So it is where --from is the number of a
/// process, or a pod, NAMESPACE/NAME. Nothing is drawn for it. With --netns or --pod, and else, the
/// answer is about a SYN that arrives here.
///
/// A SYN is looked at in the network namespace that it arrives in. Without --netns and --pod that
/// is the one of this command where backends of the service listen there, else the only one where
/// they do. Where they listen in several others, these are listed and the exit code is 1.
///
/// With --connection the answer is about an established connection: whether it moves, and why or
/// why not.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer explain --from 10.0.0.7 --to 11800
  balancer explain --from 10.0.0.7:40001 --to 10.0.0.9:11800 -o json
  balancer explain --from 10.0.0.7 --to 11800 --netns blue
  balancer explain --from 4711 --to 10.96.0.9:11800
  balancer explain --from 10.244.1.7 --to 10.96.0.9:11800
  balancer explain --from 10.244.1.7 --to 11800 --pod skywalking/oap-0
  balancer explain --connection 10.244.1.7:40001")]
pub(super) struct Explain {
    /// The client: its address, whose port matters only while a backend uses SYN cookies; or a
    /// process or a pod of this node, for a connect that it makes
    #[arg(
        long,
        value_name = "ADDR[:PORT]|PID|POD",
        required_unless_present = "connection"
    )]
    from: Option<FromClient>,
    /// What it connects to. The address matters where services or backends have addresses of their
    /// own
    #[arg(
        long,
        value_name = "[ADDR:]PORT",
        required_unless_present = "connection"
    )]
    to: Option<To>,
    /// The client's end of a connection that a backend of this node has, or had until it was moved
    /// of late (asks the daemon)
    #[arg(long, value_name = "ADDR:PORT", conflicts_with_all = ["from", "to", "netns", "pod"])]
    connection: Option<SocketAddr>,
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
        if let Some(client) = self.connection {
            return self.explain_connection(place, client);
        }
        let (Some(from), Some(to)) = (&self.from, self.to) else {
            return Err(conflict("--from and --to go together\n"));
        };
        let question = Question {
            from,
            to,
            netns: self.netns.as_ref(),
            pod: self.pod.as_ref(),
            output: &self.output,
        };
        question.perform(place)
    }

    fn explain_connection(&self, place: &Place, client: SocketAddr) -> Result<ExitCode> {
        let sentence = place.must_ask(&Request::Connection { client }, "moves connections")?;
        let json = ConnectionJson {
            schema: 1,
            connection: client,
            sentence: &sentence,
        };
        self.output.show(&json, || format!("{sentence}\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Serialize)]
struct ConnectionJson<'a> {
    schema: u32,
    connection: SocketAddr,
    sentence: &'a str,
}

/// Where a new connection would go.
struct Question<'a> {
    from: &'a FromClient,
    to: To,
    netns: Option<&'a Netns>,
    pod: Option<&'a ObjectName>,
    output: &'a Output,
}

impl Question<'_> {
    fn perform(&self, place: &Place) -> Result<ExitCode> {
        if let FromClient::Address(from) = self.from {
            same_family(*from, self.to)?;
        }
        let reader = place.reader()?;
        if let Some(to) = self.connect(&reader)? {
            return self.explain_connect(place, &reader, to);
        }
        let (from, to) = (self.from()?, self.to);
        let syn = self.syn()?;
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

    /// What a connect that is asked about goes to; `None`: a SYN is asked about.
    fn connect(&self, reader: &Reader) -> Result<Option<SocketAddr>> {
        let names_place = self.netns.is_some() || self.pod.is_some();
        match (self.from, self.to.both()) {
            (FromClient::Address(_), Some(to)) if !names_place && reader.is_frontend(to)? => {
                Ok(Some(to))
            }
            (FromClient::Address(_), _) => Ok(None),
            (client, Some(_)) if names_place => Err(conflict(&format!(
                "a connect() of {client} is made where it is, and --netns and --pod say where a SYN arrives: leave them out, or write an address after --from\n"
            ))),
            (_, Some(to)) => Ok(Some(to)),
            (client, None) => Err(conflict(&format!(
                "a connect() of {client} goes to an address and a port: write both after --to, such as 10.96.0.9:11800\n"
            ))),
        }
    }

    fn explain_connect(&self, place: &Place, reader: &Reader, to: SocketAddr) -> Result<ExitCode> {
        let from = self.from;
        let explanation = client(from, place, reader)
            .and_then(|client| reader.explain_connect(&client, to))
            .with_context(|| format!("can't tell where a connect of {from} to {to} would go"))?;
        self.output
            .show(&connect::Json::new(from, to, &explanation), || {
                connect::text(from, to, &explanation)
            })?;
        Ok(ExitCode::SUCCESS)
    }

    /// The address of the client.
    fn from(&self) -> Result<From> {
        match self.from {
            FromClient::Address(from) => Ok(*from),
            other => Err(conflict(&format!("{other} has no address here\n"))),
        }
    }

    fn syn(&self) -> Result<Syn> {
        let (from, to) = (self.from()?, self.to);
        same_family(from, to)?;
        Ok(Syn {
            from: SocketAddr::new(from.address, from.port.unwrap_or(0)),
            to_address: to.address,
            to_port: to.port,
        })
    }

    /// The netns that is asked for.
    fn choice(&self, place: &Place, reader: &Reader) -> Result<NetnsChoice> {
        if let Some(pod) = self.pod {
            let cluster = place.ask_for_cluster().with_context(|| {
                format!("only a daemon knows the pod {pod}, and --netns does without")
            })?;
            let slot = slot_of(&cluster, pod, self.to.port)?;
            let cookie = netns::netns_of(&reader.snapshot()?, slot);
            let cookie =
                cookie.with_context(|| format!("the listener of {pod} has just closed"))?;
            return Ok(NetnsChoice::Cookie(cookie));
        }
        Ok(match self.netns {
            None => NetnsChoice::Unnamed,
            Some(Netns::Cookie(cookie)) => NetnsChoice::Cookie(*cookie),
            Some(Netns::File(path)) => NetnsChoice::Open(netns::open(path)?),
        })
    }
}

/// Refuses ends of which no connection can be.
fn same_family(from: From, to: To) -> Result<()> {
    let fits = |to: IpAddr| to.is_ipv4() == from.address.is_ipv4();
    if to.address.is_none_or(fits) {
        return Ok(());
    }
    Err(conflict(&format!(
        "{from} and {to} are of two address families, and no connection has both: write two IPv4 or two IPv6 addresses, or the port alone after --to\n"
    )))
}

fn conflict(message: &str) -> anyhow::Error {
    clap::Error::raw(ErrorKind::ArgumentConflict, message).into()
}

/// Who connects.
fn client(from: &FromClient, place: &Place, reader: &Reader) -> Result<Client> {
    match from {
        FromClient::Address(from) => Client::with_address(from.address),
        FromClient::Process(pid) => Client::of_process(*pid),
        FromClient::Pod(pod) => {
            let cluster = place.ask_for_cluster().with_context(|| {
                format!("only a daemon knows the pod {pod}; write its address or one of its processes after --from")
            })?;
            let cookie = netns::netns_of_pod(&cluster, &reader.snapshot()?, pod)?;
            let netns = reader.open_netns(cookie)?;
            Ok(Client::in_netns(netns))
        }
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
