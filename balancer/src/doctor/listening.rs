//! The services' listeners, as a socket table has them.

use std::{
    collections::{BTreeSet, HashSet},
    io,
    net::{IpAddr, SocketAddr},
};

use balancer_common::abi::BackendState;
use ipnet::IpNet;

use super::guarded::GuardedNetns;
use crate::{
    config::{Backend, QuotaRule, Service},
    dataplane::ServiceSnapshot,
    discover::{self, SocketOwner},
    sys::sock_diag::{Family, Socket},
};

/// A service, as far as its listeners go.
#[derive(Clone, Debug)]
pub(super) struct CheckedService {
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) address: Option<IpAddr>,
    /// Where the listeners behind a virtual port are; `None`: on the port itself.
    pub(super) backends: Option<Vec<SocketAddr>>,
    /// The quota of each backend, where it is known.
    pub(super) quota: Option<u32>,
    /// Its quota is to be computed from the number of clients, which nobody has said.
    pub(super) lacks_clients: bool,
    /// Sources that are exempt; `None`: not known.
    pub(super) exempt: Option<Vec<IpNet>>,
    /// Addresses and ports that its listeners in the loaded data plane are bound to; `None`: not
    /// known.
    pub(super) loaded: Option<Vec<SocketAddr>>,
}

impl From<&Service> for CheckedService {
    fn from(service: &Service) -> Self {
        let addresses =
            |backends: &Vec<Backend>| backends.iter().map(|backend| backend.address).collect();
        Self {
            name: service.name.clone(),
            port: service.port,
            address: service.address,
            backends: service.backends.as_ref().map(addresses),
            quota: match service.quota {
                QuotaRule::Fixed(quota) => Some(quota),
                QuotaRule::Unlimited | QuotaRule::Computed { .. } => None,
            },
            lacks_clients: matches!(service.quota, QuotaRule::Computed { clients: None, .. }),
            exempt: Some(service.exempt.clone()),
            loaded: None,
        }
    }
}

impl CheckedService {
    /// A service of the loaded data plane; `listed` is where its backends may be.
    pub(super) fn loaded(service: &ServiceSnapshot, listed: &BTreeSet<SocketAddr>) -> Self {
        let backends = service.backends.iter();
        let ours = backends.filter(|backend| backend.state != BackendState::Candidate);
        let quotas = service.backends.iter().filter_map(|backend| backend.quota);
        Self {
            name: service.name.clone(),
            port: service.port,
            address: service.address,
            backends: (service.virtual_port).then(|| listed.iter().copied().collect()),
            quota: quotas.max(),
            lacks_clients: false,
            exempt: None,
            loaded: Some(ours.map(|backend| backend.address).collect()),
        }
    }
}

/// A listening socket on a port that a service has to do with.
pub(super) struct ServiceListener<'a> {
    pub(super) socket: Socket,
    /// The netns that it is in.
    pub(super) netns: &'a GuardedNetns,
    /// Who has it, as far as anybody has looked.
    pub(super) owners: Vec<SocketOwner>,
}

/// The listeners on the services' ports and on those of their backends, without their owners.
///
/// # Errors
/// When a netns can't be entered, or its socket table can't be read.
pub(super) fn listeners<'a>(
    services: &[CheckedService],
    netns: &'a [GuardedNetns],
) -> io::Result<Vec<ServiceListener<'a>>> {
    let backends = services
        .iter()
        .flat_map(|service| service.backends.iter().flatten());
    let ports: HashSet<u16> = backends
        .map(SocketAddr::port)
        .chain(services.iter().map(|service| service.port))
        .collect();
    let mut found = Vec::new();
    for netns in netns {
        let sockets = discover::listening(netns)?.into_iter();
        let relevant = sockets.filter(|socket| ports.contains(&socket.local.port()));
        found.extend(relevant.map(|socket| ServiceListener {
            socket,
            netns,
            owners: Vec::new(),
        }));
    }
    Ok(found)
}

/// Finds out who has the listeners, which takes a look at every process.
///
/// # Errors
/// When `/proc` can't be read.
pub(super) fn find_owners(listeners: &mut [ServiceListener<'_>]) -> io::Result<()> {
    let mut owners = discover::owners(listeners.iter().map(|listener| listener.socket.inode))?;
    for listener in listeners {
        listener.owners = owners.remove(&listener.socket.inode).unwrap_or_default();
    }
    Ok(())
}

impl ServiceListener<'_> {
    pub(super) fn describe(&self) -> String {
        let (local, netns) = (self.socket.local, &self.netns.label);
        match self.owners.first() {
            Some(owner) => format!("{local} of {} in {netns}", owner.name()),
            None => format!("{local} in {netns}"),
        }
    }

    /// Whether connections to an address reach it, were there no balancer.
    pub(super) fn covers(&self, address: IpAddr) -> bool {
        match self.socket.local.ip().to_canonical() {
            IpAddr::V4(own) if own.is_unspecified() => address.is_ipv4(),
            IpAddr::V6(own) if own.is_unspecified() => address.is_ipv6() || self.is_dual_stack(),
            own => own == address.to_canonical(),
        }
    }

    /// Whether clients of both families reach it.
    fn is_dual_stack(&self) -> bool {
        self.socket.local.ip().is_unspecified()
            && self.socket.family == Family::V6
            && self.socket.v6only != Some(true)
    }

    /// The families of the clients that reach it.
    pub(super) fn families(&self) -> &'static [Family] {
        if self.is_dual_stack() {
            &[Family::V4, Family::V6]
        } else {
            family_of(self.socket.local.ip())
        }
    }

    pub(super) fn covers_backend(&self, backend: &SocketAddr) -> bool {
        self.socket.local.port() == backend.port() && self.covers(backend.ip())
    }

    /// Whether it listens on the service's own port and address.
    pub(super) fn is_on_port(&self, service: &CheckedService) -> bool {
        self.socket.local.port() == service.port
            && service.address.is_none_or(|address| self.covers(address))
    }

    /// Whether it listens where a backend of the service is expected.
    pub(super) fn serves(&self, service: &CheckedService) -> bool {
        match &service.backends {
            None => self.is_on_port(service),
            Some(backends) => backends.iter().any(|backend| self.covers_backend(backend)),
        }
    }
}

/// The family of the clients that reach a listener on one address.
pub(super) fn family_of(address: IpAddr) -> &'static [Family] {
    match address.to_canonical() {
        IpAddr::V4(_) => &[Family::V4],
        IpAddr::V6(_) => &[Family::V6],
    }
}
