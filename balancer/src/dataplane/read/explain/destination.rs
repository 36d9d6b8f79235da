//! Which service a SYN is for.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail};
use balancer_common::abi::{Address, Backend, ListenRule, ServiceInfo, ServicePort};
use balancer_common::decision::member::{Member, fits_family};

use super::answer::{Explanation, ListeningBackend, Syn};
use super::netns::Chosen;
use crate::dataplane::plain::Plain;
use crate::dataplane::tables::{Tables, lookup, text};

/// The services that are configured.
pub struct Services(Vec<(u16, ServiceInfo)>);

impl Services {
    pub fn read(tables: &Tables) -> Result<Self> {
        tables.named_services().map(Self)
    }

    fn get(&self, id: u16) -> Option<&ServiceInfo> {
        let mut services = self.0.iter();
        services
            .find(|(named, _)| *named == id)
            .map(|(_, info)| info)
    }

    pub fn name(&self, id: u16) -> String {
        self.get(id)
            .map_or_else(|| format!("service {id}"), |info| text(&info.name))
    }

    /// Where its clients connect to.
    fn place(&self, id: u16) -> String {
        self.get(id).map_or_else(String::new, place)
    }

    fn on_port(&self, port: u16) -> impl Iterator<Item = &ServiceInfo> {
        let services = self.0.iter().map(|(_, info)| info);
        services.filter(move |info| info.port == port)
    }
}

fn place(info: &ServiceInfo) -> String {
    if info.address.is_any() {
        return format!("port {}", info.port);
    }
    std::net::SocketAddr::new(info.address.into(), info.port).to_string()
}

/// Whose a SYN's destination is.
pub enum Destination {
    Service(ServicePort),
    NoService,
}

impl Destination {
    /// # Errors
    /// Where a map can't be read, and where it takes an address to tell.
    pub fn of(tables: &Tables, services: &Services, syn: &Syn) -> Result<Self> {
        if syn.to_address.is_none() {
            needs_no_address(services, syn.to_port)?;
        }
        let port = ServicePort::of_destination(
            || syn.destination().into(),
            syn.to_port,
            |key| lookup(tables.services.get(&Plain(*key), 0).map(|Plain(port)| port)),
        )?;
        Ok(port.map_or(Self::NoService, Self::Service))
    }

    /// Whether this backend would have to do with a SYN to it: it serves the service, or a SYN to
    /// no service's port ends at its listener.
    pub fn concerns(&self, backend: &Backend, syn: &Syn) -> bool {
        match self {
            Self::Service(port) => backend.service == port.service,
            Self::NoService => {
                let address = syn.to_address.is_none_or(|to| backend.address == to.into());
                backend.port == syn.to_port
                    && (address || backend.address.is_any())
                    && fits_family(backend.flags, syn.from.is_ipv4())
            }
        }
    }
}

/// A service with an address is found by nothing but that address.
fn needs_no_address(services: &Services, port: u16) -> Result<()> {
    let on_port: Vec<_> = services.on_port(port).collect();
    if on_port.iter().all(|info| info.address.is_any()) {
        return Ok(());
    }
    let write = |info: &&ServiceInfo| {
        let name = text(&info.name);
        if info.address.is_any() {
            return format!("another address with port {port} for {name}");
        }
        format!("`--to {}` for {name}", place(info))
    };
    let ways: Vec<_> = on_port.iter().map(write).collect();
    bail!(
        "on port {port} it takes an address to tell which service is meant; write {}",
        ways.join(", or ")
    )
}

/// What becomes of a SYN to a port or address of no service; `here` are the backends that listen
/// there all the same.
pub fn not_judged(
    tables: &Tables,
    services: &Services,
    syn: &Syn,
    chosen: &Chosen,
    here: &[&Member],
) -> Result<Explanation> {
    let backends: Vec<_> = here
        .iter()
        .map(|member| ListeningBackend::of(member))
        .collect();
    let (what, from) = (no_service(services, syn), syn.from.ip());
    let sentence = match (here.first(), configured(tables, syn)?) {
        (Some(first), _) => {
            let service = first.backend.service;
            let prefix = chosen.prefix(&services.name(service));
            format!(
                "{prefix}{what}, but {}",
                counted(services, service, syn, &backends)
            )
        }
        (None, Some(service)) => format!(
            "{what}, but a backend of {} may listen there, and none does now: a SYN from {from} \
             is left to the kernel. {}",
            services.name(service),
            clients(services, service),
        ),
        (None, None) => {
            format!("{what}: a SYN from {from} is none of the balancer's business")
        }
    };
    let only = backends.first().filter(|_| backends.len() == 1);
    Ok(Explanation {
        backend: only.copied(),
        ..Explanation::not_judged(chosen.netns.cookie, None, sentence)
    })
}

/// The service whose backends may listen where the SYN goes.
fn configured(tables: &Tables, syn: &Syn) -> Result<Option<u16>> {
    for rule in &tables.rules {
        let (Plain(key), Plain(rule)) = rule.context("cannot read the listen rules")?;
        let any = key.address.is_any() && rule.flags & ListenRule::WILDCARD_ONLY == 0;
        let fits = any
            || syn
                .to_address
                .is_none_or(|to| key.address == Address::from(to));
        if fits && key.port == u32::from(syn.to_port) {
            return Ok(Some(rule.service));
        }
    }
    Ok(None)
}

/// What is said of a destination that belongs to no service, with the services that are near.
fn no_service(services: &Services, syn: &Syn) -> String {
    let port = syn.to_port;
    let mut sentence = match syn.to_address {
        None => format!("port {port} belongs to no service"),
        Some(to) => format!(
            "{} belongs to no service",
            std::net::SocketAddr::new(to, port)
        ),
    };
    let near: Vec<_> = services
        .on_port(port)
        .map(|info| format!("{} at {}", text(&info.name), place(info)))
        .collect();
    if !near.is_empty() {
        let _ = write!(sentence, " (on port {port} there is {})", near.join(", "));
    }
    sentence
}

/// Of a SYN that goes to a listener past its service.
fn counted(services: &Services, service: u16, syn: &Syn, backends: &[ListeningBackend]) -> String {
    let listens: Vec<_> = backends
        .iter()
        .map(|backend| format!("{} (slot {})", backend.address, backend.slot))
        .collect();
    format!(
        "{} of {} listens there: a connection from {} is counted on it and takes a place of its \
         quota, and it is not judged, so neither steered nor refused. {}",
        listens.join(" or "),
        services.name(service),
        syn.from.ip(),
        clients(services, service),
    )
}

/// Where the clients of a service go instead.
fn clients(services: &Services, service: u16) -> String {
    let (name, place) = (services.name(service), services.place(service));
    format!("Clients of {name} connect to {place}")
}
