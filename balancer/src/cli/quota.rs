//! `balancer quota`

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Place,
    output::{Column, Output, or, print, table, wrapped},
    status::{back_from_own, by_address, is_own_override, shared_quotas},
};
use crate::{
    api::Request,
    config::MAX_CONNECTIONS,
    dataplane::{BackendSnapshot, ServiceSnapshot},
};

/// Show the quotas and how they come about, or override them by hand
#[derive(Debug, Subcommand)]
#[command(after_long_help = "\
Examples:
  balancer quota show agents
  balancer quota set agents 150           150 for each backend, from the next connection on
  balancer quota set agents 0 --slot 2    no new connections for one backend
  balancer quota clear agents --slot 2    back to the rule")]
pub(super) enum Quota {
    Show(Show),
    Set(Set),
    Clear(Clear),
}

/// Show the quotas and how they come about (changes nothing)
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer quota show
  balancer quota show agents -o json")]
pub(super) struct Show {
    /// One service [default: all]
    service: Option<String>,
    #[command(flatten)]
    output: Output,
}

/// Override a quota by hand, until it is cleared (changes the kernel)
///
/// In force from the next connection on, and kept when the daemon starts anew. A quota below what
/// is established closes no connection: there are just no new ones. Needs the daemon.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer quota set agents 150           150 for each backend
  balancer quota set agents 0 --slot 2    no new connections for one backend")]
pub(super) struct Set {
    /// The service
    service: String,
    /// The most established connections of each backend; 0 closes it for new ones
    #[arg(value_parser = limit, allow_negative_numbers = true)]
    quota: u32,
    /// Only the backend in this slot, see `balancer status`
    #[arg(long, value_name = "N")]
    slot: Option<u32>,
}

/// Take an override back: the quota follows its rule again (changes the kernel)
///
/// Without --slot the service's own override goes, overrides of single backends stay. Needs the
/// daemon.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  balancer quota clear agents
  balancer quota clear agents --slot 2")]
pub(super) struct Clear {
    /// The service
    service: String,
    /// Only the override of the backend in this slot
    #[arg(long, value_name = "N")]
    slot: Option<u32>,
}

/// The most connections of a backend, as an argument.
fn limit(text: &str) -> Result<u32, String> {
    let limit = text.parse().ok();
    limit.filter(|limit| *limit <= MAX_CONNECTIONS).ok_or_else(|| {
        format!(
            "write a whole number of connections for each backend, up to {MAX_CONNECTIONS} (0 takes none), or follow the rule again with `balancer quota clear SERVICE`"
        )
    })
}

impl Quota {
    pub(super) fn perform(&self, place: &Place) -> Result<()> {
        match self {
            Self::Show(show) => show.perform(place),
            Self::Set(Set {
                service,
                quota,
                slot,
            }) => change(
                place,
                &Request::SetQuota {
                    service: service.clone(),
                    slot: *slot,
                    quota: *quota,
                },
            ),
            Self::Clear(Clear { service, slot }) => change(
                place,
                &Request::ClearQuota {
                    service: service.clone(),
                    slot: *slot,
                },
            ),
        }
    }
}

fn change(place: &Place, request: &Request) -> Result<()> {
    let message = place.must_ask(request, "changes quotas")?;
    print(&format!("{message}\n"))
}

impl Show {
    fn perform(&self, place: &Place) -> Result<()> {
        let snapshot = place
            .reader()?
            .snapshot()
            .context("can't read the balancer's maps")?;
        let services = selected(&snapshot.services, self.service.as_deref())?;
        self.output.show(&Json::new(&services), || text(&services))
    }
}

fn selected<'a>(
    services: &'a [ServiceSnapshot],
    name: Option<&str>,
) -> Result<Vec<&'a ServiceSnapshot>> {
    let Some(name) = name else {
        return Ok(services.iter().collect());
    };
    if let Some(service) = services.iter().find(|service| service.name == name) {
        return Ok(vec![service]);
    }
    let names: Vec<&str> = services
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    bail!(
        "there is no service `{name}`; there are: {}",
        names.join(", ")
    )
}

#[derive(Serialize)]
pub(super) struct Json<'a> {
    schema: u32,
    services: Vec<JsonService<'a>>,
}

#[derive(Serialize)]
struct JsonService<'a> {
    name: &'a str,
    rule: &'a str,
    sentence: &'a str,
    #[serde(rename = "override")]
    by_hand: Option<u32>,
    backends: Vec<JsonBackend>,
}

#[derive(Serialize)]
struct JsonBackend {
    slot: u32,
    address: SocketAddr,
    quota: Option<u32>,
    #[serde(rename = "override")]
    by_hand: bool,
}

impl<'a> Json<'a> {
    pub(super) fn new(services: &[&'a ServiceSnapshot]) -> Self {
        let backend = |backend: &BackendSnapshot| JsonBackend {
            slot: backend.slot,
            address: backend.address,
            quota: backend.quota,
            by_hand: backend.overridden,
        };
        let service = |service: &&'a ServiceSnapshot| JsonService {
            name: &service.name,
            rule: &service.rule,
            sentence: &service.sentence,
            by_hand: service.quota_override,
            backends: service.backends.iter().map(backend).collect(),
        };
        Self {
            schema: 1,
            services: services.iter().map(service).collect(),
        }
    }
}

pub(super) fn text(services: &[&ServiceSnapshot]) -> String {
    let texts: Vec<String> = services
        .iter()
        .map(|service| service_text(service))
        .collect();
    texts.join("\n")
}

fn service_text(service: &ServiceSnapshot) -> String {
    let mut text = format!("{}\n", service.name);
    text += &wrapped("  Rule: ", &service.rule);
    text += &wrapped("  Now:  ", &service.sentence);
    if service.quota_override.is_some() {
        let back = format!(
            "`balancer quota clear {}` goes back to the rule",
            service.name
        );
        text += &wrapped("        ", &back);
    }
    if service.backends.is_empty() {
        return text + "  No backend listens.\n";
    }
    text + &by_hand(service) + &backends(service)
}

/// The backends that don't follow the sentence above.
fn by_hand(service: &ServiceSnapshot) -> String {
    let by_hand = by_address(&service.backends)
        .into_iter()
        .filter(|backend| is_own_override(service, backend));
    let exceptions: Vec<String> = by_hand
        .map(|backend| {
            format!(
                "{} for slot {}",
                or(backend.server_quota(), "unlimited"),
                backend.slot
            )
        })
        .collect();
    if exceptions.is_empty() {
        return String::new();
    }
    let words = format!(
        "but by hand {}; {}",
        exceptions.join(", "),
        back_from_own(service)
    );
    wrapped("        ", &words)
}

fn backends(service: &ServiceSnapshot) -> String {
    let backends = by_address(&service.backends);
    let column = |heading: &'static str, cell: &dyn Fn(&BackendSnapshot) -> String| {
        let cells = backends.iter().map(|backend| cell(backend)).collect();
        Column { heading, cells }
    };
    let set = |backend: &BackendSnapshot| {
        let set = if backend.overridden {
            "by hand"
        } else {
            "by the rule"
        };
        set.to_owned()
    };
    let columns = vec![
        column(">SLOT", &|backend| backend.slot.to_string()),
        column("BACKEND", &|backend| backend.address.to_string()),
        column(">QUOTA", &|backend| or(backend.quota, "unlimited")),
        column(">ESTABLISHED", &|backend| backend.established.to_string()),
        column("SET", &set),
    ];
    let shared = shared_quotas(service).into_iter();
    let shared: String = shared.map(|words| wrapped("  - ", &words)).collect();
    table(columns, &["ESTABLISHED"]) + &shared
}
