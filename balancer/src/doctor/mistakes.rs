//! What a service's file says and this machine makes nothing of: `run`, `status` and `doctor` say
//! it in the same words.

use std::{fmt, io, net::SocketAddr};

use super::{
    Check,
    guarded::{Guarded, GuardedNetns},
    listening::{CheckedService, ServiceListener, find_owners, listeners},
};
use crate::{discover, sys::netns};

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The name of the service.
    pub service: String,
    /// Of which kind it is.
    pub kind: Kind,
    /// What was found.
    pub found: String,
}

/// A kind of mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A listener on a virtual port, which gets none of its connections.
    HiddenListener,
    /// A backend at an address that no guarded netns has.
    ForeignAddress,
    /// A quota that is computed from a number of clients which nobody has said.
    NoClients,
}

impl Kind {
    const ALL: [Self; 3] = [Self::HiddenListener, Self::ForeignAddress, Self::NoClients];

    /// What was looked at.
    const fn name(self) -> &'static str {
        match self {
            Self::HiddenListener => "hidden listeners",
            Self::ForeignAddress => "backends' addresses",
            Self::NoClients => "clients",
        }
    }

    /// What to say where there is no mistake, and what that means.
    const fn well(self) -> (&'static str, &'static str) {
        match self {
            Self::HiddenListener => (
                "none",
                "no listener waits on a port whose connections go elsewhere",
            ),
            Self::ForeignAddress => ("all of this host", "servers can bind to them"),
            Self::NoClients => (
                "no computed quota lacks their number",
                "every quota that is set can be computed",
            ),
        }
    }

    /// What it means for the balancer.
    const fn means(self) -> &'static str {
        match self {
            Self::HiddenListener => {
                "the port is virtual (the service has `backends:`), so connections to it all go to \
                 the backends, and this listener gets none of them"
            }
            Self::ForeignAddress => {
                "no guarded network namespace has this address now, so no server can bind to it; \
                 the backend stays away unless one listens on any address of its port. The \
                 balancer can't send connections to other hosts"
            }
            Self::NoClients => {
                "while the number of clients is not known a computed quota is unlimited: nobody \
                 is ever refused"
            }
        }
    }

    /// What to do about it. The file can be written so: a test follows each advice.
    const fn advice(self) -> &'static str {
        match self {
            Self::HiddenListener => {
                "let it listen on another port and name that in `backends:`; or remove \
                 `backends:`, and the listeners on the port itself are balanced; or stop it"
            }
            Self::ForeignAddress => {
                "write an address of this host (a typo, or another host's?); name the network \
                 namespace that has it in `namespaces:`; or do nothing where it is yet to come up"
            }
            Self::NoClients => {
                "add `clients: N` to `quota:`; or write `quota: {per_backend: N}`; or remove \
                 `quota:` where no limit is wanted"
            }
        }
    }

    /// The finding of `doctor` about this kind.
    pub(super) fn check(self, mistakes: &[Mistake]) -> Check {
        let ours = mistakes.iter().filter(|mistake| mistake.kind == self);
        let found: Vec<_> = ours
            .map(|mistake| format!("{}: {}", mistake.service, mistake.found))
            .collect();
        Check::warn_of(
            self.name(),
            &found,
            self.well(),
            self.means(),
            self.advice(),
        )
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, found) = (self.kind, &self.found);
        let what = match kind {
            Kind::HiddenListener => "the listener",
            Kind::ForeignAddress => "the backend",
            Kind::NoClients => "",
        };
        let space = if what.is_empty() { "" } else { " " };
        let (means, advice) = (kind.means(), kind.advice());
        write!(f, "{what}{space}{found}: {means}. What to do: {advice}")
    }
}

/// Every kind's finding.
pub(super) fn checks(mistakes: &[Mistake]) -> impl Iterator<Item = Check> {
    Kind::ALL.into_iter().map(|kind| kind.check(mistakes))
}

/// The services' mistakes, with the owners of listeners that are concerned.
///
/// # Errors
/// When listening sockets or their owners can't be listed.
pub(super) fn with_owners(
    services: &[CheckedService],
    guarded: &Guarded,
) -> io::Result<Vec<Mistake>> {
    let mut listeners = listeners(services, &guarded.netns)?;
    let mistakes = of(services, guarded, &listeners);
    if mistakes
        .iter()
        .all(|mistake| mistake.kind != Kind::HiddenListener)
    {
        return Ok(mistakes);
    }
    find_owners(&mut listeners)?;
    Ok(of(services, guarded, &listeners))
}

/// The services' mistakes; `listeners` are all of theirs in those netns.
pub(super) fn of(
    services: &[CheckedService],
    guarded: &Guarded,
    listeners: &[ServiceListener<'_>],
) -> Vec<Mistake> {
    let mistakes = |service: &CheckedService| {
        let mistake = |kind, found| Mistake {
            service: service.name.clone(),
            kind,
            found,
        };
        let hidden = hidden(service, services, listeners);
        let foreign = foreign(service, guarded, listeners);
        let no_clients = service
            .lacks_clients
            .then(|| "`quota:` without `clients`".to_owned());
        let all: Vec<_> = (hidden.map(|found| mistake(Kind::HiddenListener, found)))
            .chain(foreign.map(|backend| mistake(Kind::ForeignAddress, backend.to_string())))
            .chain(no_clients.map(|found| mistake(Kind::NoClients, found)))
            .collect();
        all
    };
    services.iter().flat_map(mistakes).collect()
}

/// Listeners that wait on a port whose connections all go elsewhere.
fn hidden<'a>(
    service: &'a CheckedService,
    services: &'a [CheckedService],
    listeners: &'a [ServiceListener<'_>],
) -> impl Iterator<Item = String> + 'a {
    let serves =
        |listener: &ServiceListener<'_>| services.iter().any(|service| listener.serves(service));
    // Where a netns is guarded for its backends alone, `steer` is only with them.
    let is_steered = move |netns: &GuardedNetns| {
        let mut there = (listeners.iter()).filter(|one| std::ptr::eq(one.netns, netns));
        !netns.for_backends_alone || there.any(serves)
    };
    let is_hidden = move |listener: &&ServiceListener<'_>| {
        listener.is_on_port(service) && !serves(listener) && is_steered(listener.netns)
    };
    let listeners = (service.backends.iter()).flat_map(move |_| listeners.iter());
    listeners.filter(is_hidden).map(ServiceListener::describe)
}

/// Backends at addresses where nobody listens and nobody can.
fn foreign<'a>(
    service: &'a CheckedService,
    guarded: &'a Guarded,
    listeners: &'a [ServiceListener<'_>],
) -> impl Iterator<Item = &'a SocketAddr> {
    let listened_on = move |backend: &SocketAddr| {
        let mut listeners = listeners.iter();
        listeners.any(|listener| listener.covers_backend(backend))
    };
    let has = |netns: &GuardedNetns, address| {
        // What can't be tried is not called a mistake.
        let tried = netns::inside(netns, || discover::has_address(address)).flatten();
        tried.unwrap_or(true)
    };
    let backends = service.backends.iter().flatten();
    backends.filter(move |backend| {
        guarded.unreachable.is_none()
            && !listened_on(backend)
            && !guarded.netns.iter().any(|netns| has(netns, backend.ip()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, doctor::Status};
    use std::net::TcpListener;

    const VIRTUAL: &str =
        "services: [{name: agents, port: 11800, backends: [\"127.0.0.1:21801\"]}]";

    fn guarded() -> Guarded {
        let guarded = Guarded::only(GuardedNetns {
            label: "the test's namespace".to_owned(),
            file: netns::tests::fresh(),
            for_backends_alone: false,
        });
        // Without an interface that is up every address counts as a broadcast one.
        netns::inside(&guarded.netns[0], || {
            let up = std::process::Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status();
            assert!(up.expect("ip of iproute2").success());
        })
        .expect("inside");
        guarded
    }

    fn listen(guarded: &Guarded, address: &str) -> TcpListener {
        let bind = || TcpListener::bind(address).expect("bind");
        netns::inside(&guarded.netns[0], bind).expect("inside")
    }

    /// What is found of that kind.
    fn found(file: &str, guarded: &Guarded, kind: Kind) -> Vec<String> {
        let config = Config::parse(file).expect("a configuration");
        let services: Vec<_> = config.services.iter().map(CheckedService::from).collect();
        let mistakes = with_owners(&services, guarded).expect("listed");
        let ours = mistakes.into_iter().filter(|mistake| mistake.kind == kind);
        ours.map(|mistake| mistake.found).collect()
    }

    #[test]
    fn the_advice_about_a_hidden_listener_can_be_followed() {
        let guarded = guarded();
        let hidden = |file: &str| found(file, &guarded, Kind::HiddenListener);
        let listener = listen(&guarded, "0.0.0.0:11800");
        let before = hidden(VIRTUAL);
        assert_eq!(before.len(), 1);
        assert!(before[0].starts_with("0.0.0.0:11800 of "), "{before:?}");
        let own_port = "services: [{name: agents, port: 11800}]";
        assert_eq!(hidden(own_port), [""; 0], "`backends:` removed");
        drop(listener);
        let _moved = listen(&guarded, "0.0.0.0:21802");
        let listed = VIRTUAL.replace("]}]", ", \"127.0.0.1:21802\"]}]");
        assert_eq!(hidden(&listed), [""; 0], "on another port, and named");
    }

    #[test]
    fn a_listener_of_another_service_on_the_port_is_not_hidden() {
        let guarded = guarded();
        let _listener = listen(&guarded, "127.0.0.9:11800");
        let file = "services: [{name: agents, port: 11800, backends: [\"127.0.0.1:21801\"]}, \
                    {name: own, port: 11800, address: 127.0.0.9}]";
        assert_eq!(found(file, &guarded, Kind::HiddenListener), [""; 0]);
    }

    /// A container's own server on the port is left alone where no backend listens beside it.
    #[test]
    fn nothing_is_hidden_where_nothing_is_steered() {
        let mut guarded = guarded();
        guarded.netns[0].for_backends_alone = true;
        let _listener = listen(&guarded, "0.0.0.0:11800");
        assert_eq!(found(VIRTUAL, &guarded, Kind::HiddenListener), [""; 0]);
        let _backend = listen(&guarded, "127.0.0.1:21801");
        assert_eq!(found(VIRTUAL, &guarded, Kind::HiddenListener).len(), 1);
    }

    #[test]
    fn the_address_of_another_host_is_told() {
        let guarded = guarded();
        let file = VIRTUAL.replace("127.0.0.1:21801", "10.99.0.3:21803");
        let foreign = |file: &str| found(file, &guarded, Kind::ForeignAddress);
        assert_eq!(foreign(&file), ["10.99.0.3:21803"]);
        assert_eq!(foreign(VIRTUAL), [""; 0]);
        let _listener = listen(&guarded, "0.0.0.0:21803");
        assert_eq!(foreign(&file), [""; 0], "one on any address is its backend");
    }

    #[test]
    fn an_address_that_servers_may_be_bound_to_is_none_of_another_host() {
        let guarded = guarded();
        netns::inside(&guarded.netns[0], || {
            std::fs::write("/proc/sys/net/ipv4/ip_nonlocal_bind", "1").expect("written");
        })
        .expect("inside");
        let file = VIRTUAL.replace("127.0.0.1:21801", "10.99.0.3:21803");
        assert_eq!(found(&file, &guarded, Kind::ForeignAddress), [""; 0]);
    }

    #[test]
    fn nothing_is_said_of_addresses_where_a_netns_was_not_looked_at() {
        let mut guarded = guarded();
        guarded.unreachable = Some(Check::ok("a", "b", "c"));
        let file = VIRTUAL.replace("127.0.0.1:21801", "10.99.0.3:21803");
        assert_eq!(found(&file, &guarded, Kind::ForeignAddress), [""; 0]);
    }

    #[test]
    fn a_quota_that_never_limits_is_told() {
        let guarded = guarded();
        let with = |quota: &str| {
            let file = format!("services: [{{name: agents, port: 11800{quota}}}]");
            found(&file, &guarded, Kind::NoClients).len()
        };
        assert_eq!(with(", quota: {headroom: 15%}"), 1);
        // Each advice, followed.
        assert_eq!(with(", quota: {headroom: 15%, clients: 40}"), 0);
        assert_eq!(with(", quota: {per_backend: 40}"), 0);
        assert_eq!(with(""), 0);
    }

    #[test]
    fn a_mistake_is_one_sentence_for_a_log_and_one_check() {
        let mistake = |kind| Mistake {
            service: "agents".to_owned(),
            kind,
            found: "10.99.0.3:21803".to_owned(),
        };
        let said = mistake(Kind::ForeignAddress).to_string();
        assert!(
            said.starts_with("the backend 10.99.0.3:21803: no guarded"),
            "{said}"
        );
        let mistakes = [mistake(Kind::ForeignAddress)];
        let statuses: Vec<_> = checks(&mistakes).map(|check| check.status).collect();
        assert_eq!(statuses, [Status::Ok, Status::Warn, Status::Ok]);
    }
}
