//! The services' listeners: those that can't be steered to, that nobody reaches, that are missing.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use balancer_common::abi::BackendState;
use ipnet::IpNet;

use super::{Check, guarded::GuardedNetns, listing};
use crate::{
    config::{Backend, QuotaRule, Service},
    dataplane::ServiceSnapshot,
    discover::{self, SocketOwner, cgroup_ids},
    sys::sock_diag::Socket,
};

/// A service, as far as its listeners go.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    name: String,
    port: u16,
    address: Option<IpAddr>,
    /// Where the listeners behind a virtual port are; `None`: on the port itself.
    backends: Option<Vec<SocketAddr>>,
    /// The same for every backend.
    quota: Option<u32>,
    /// Sources that are exempt; `None`: not known.
    exempt: Option<Vec<IpNet>>,
    /// What its listeners in the loaded data plane are bound to; `None`: not known.
    loaded: Option<Vec<SocketAddr>>,
}

impl From<&Service> for Watched {
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
            exempt: Some(service.exempt.clone()),
            loaded: None,
        }
    }
}

impl From<&ServiceSnapshot> for Watched {
    fn from(service: &ServiceSnapshot) -> Self {
        let ours = service
            .backends
            .iter()
            .filter(|backend| backend.state != BackendState::Candidate);
        let seen: Vec<_> = ours.map(|backend| backend.address).collect();
        Self {
            name: service.name.clone(),
            port: service.port,
            address: service.address,
            backends: service.virtual_port.then(|| seen.clone()),
            quota: service
                .backends
                .iter()
                .filter_map(|backend| backend.quota)
                .max(),
            exempt: None,
            loaded: Some(seen),
        }
    }
}

/// A listening socket of a guarded namespace.
struct Listener<'a> {
    socket: Socket,
    namespace: &'a str,
    owners: Vec<SocketOwner>,
}

/// The services' listeners; `cgroup` is where sockets are counted.
pub(super) fn checks(
    services: &[Watched],
    namespaces: &[GuardedNetns],
    cgroup: Option<&Path>,
) -> Vec<Check> {
    if services.is_empty() {
        return vec![Check::warn(
            "services",
            "none: no configuration is given and nothing is loaded",
            "no service's listeners were looked at",
            "give the file with --config",
        )];
    }
    let listeners = match listeners(services, namespaces) {
        Ok(listeners) => listeners,
        Err(error) => {
            let found = format!("listening sockets can't be listed: {error}");
            return vec![Check::fail(
                "services",
                found,
                "the services' listeners aren't known",
                "run as root",
            )];
        }
    };
    let mut checks = vec![
        mptcp(services, &listeners),
        hidden(services, &listeners),
        missing(services, &listeners),
    ];
    checks.extend(unclaimed(services, &listeners));
    checks.extend(cgroup.map(|cgroup| outside(services, &listeners, cgroup)));
    checks.push(file_limits(services, &listeners));
    checks.extend(exempt(services));
    checks
}

/// All listeners on a port that a service has to do with.
fn listeners<'a>(
    services: &[Watched],
    namespaces: &'a [GuardedNetns],
) -> io::Result<Vec<Listener<'a>>> {
    let ports: HashSet<u16> = services
        .iter()
        .flat_map(|service| {
            let backends = service.backends.iter().flatten().map(SocketAddr::port);
            backends.chain([service.port])
        })
        .collect();
    let mut found = Vec::new();
    for namespace in namespaces {
        let sockets = discover::listening(namespace)?;
        let relevant = sockets
            .into_iter()
            .filter(|socket| ports.contains(&socket.local.port()));
        found.extend(relevant.map(|socket| Listener {
            socket,
            namespace: &namespace.label,
            owners: Vec::new(),
        }));
    }
    let mut owners = discover::owners(found.iter().map(|listener| listener.socket.inode))?;
    for listener in &mut found {
        listener.owners = owners.remove(&listener.socket.inode).unwrap_or_default();
    }
    Ok(found)
}

impl Listener<'_> {
    fn describe(&self) -> String {
        let owner = self
            .owners
            .first()
            .map_or_else(|| "owner unknown".to_owned(), |owner| owner.name());
        format!("{} of {owner} in {}", self.socket.local, self.namespace)
    }

    /// Whether connections to an address reach it, were there no balancer.
    fn covers(&self, address: IpAddr) -> bool {
        let own = self.socket.local.ip().to_canonical();
        match own {
            IpAddr::V4(own) if own.is_unspecified() => address.is_ipv4(),
            IpAddr::V6(own) if own.is_unspecified() => {
                address.is_ipv6() || self.socket.v6only != Some(true)
            }
            own => own == address.to_canonical(),
        }
    }

    /// Whether it is a backend of a service.
    fn serves(&self, service: &Watched) -> bool {
        let port = self.socket.local.port();
        match &service.backends {
            None => {
                port == service.port && service.address.is_none_or(|address| self.covers(address))
            }
            Some(backends) => backends
                .iter()
                .any(|backend| port == backend.port() && self.covers(backend.ip())),
        }
    }

    /// Whether it waits on a port whose connections all go elsewhere.
    fn hidden_by(&self, service: &Watched) -> bool {
        service.backends.is_some()
            && self.socket.local.port() == service.port
            && !self.serves(service)
            && service.address.is_none_or(|address| self.covers(address))
    }
}

/// `service: listener` for every pair that fits.
fn pairs(
    services: &[Watched],
    listeners: &[Listener<'_>],
    fits: impl Fn(&Watched, &Listener<'_>) -> bool,
) -> Vec<String> {
    let of = |service: &Watched| {
        let fitting = listeners.iter().filter(|listener| fits(service, listener));
        fitting
            .map(|listener| format!("{}: {}", service.name, listener.describe()))
            .collect::<Vec<_>>()
    };
    services.iter().flat_map(of).collect()
}

fn mptcp(services: &[Watched], listeners: &[Listener<'_>]) -> Check {
    const NAME: &str = "MPTCP listeners";
    let found = pairs(services, listeners, |service, listener| {
        listener.socket.mptcp && listener.serves(service)
    });
    if found.is_empty() {
        return Check::ok(NAME, "none", "every listener can be steered to");
    }
    Check::warn(
        NAME,
        listing(&found),
        "the kernel can't steer to an MPTCP listener: it is counted, and on the service's own port admitted and refused, but gets only the \
         connections that come to it by themselves; behind a virtual port it gets none",
        "make an ordinary TCP listener of it: GODEBUG=multipathtcp=0 for a Go server, no IPPROTO_MPTCP, no mptcpize",
    )
}

fn hidden(services: &[Watched], listeners: &[Listener<'_>]) -> Check {
    const NAME: &str = "hidden listeners";
    let found = pairs(services, listeners, |service, listener| {
        listener.hidden_by(service)
    });
    if found.is_empty() {
        return Check::ok(
            NAME,
            "none",
            "no listener waits on a port whose connections go elsewhere",
        );
    }
    Check::warn(
        NAME,
        listing(&found),
        "the service's port is virtual (it has `backends:`): its connections all go to the backends, and this listener gets none",
        "stop it, add it to `backends:`, or drop `backends:` to balance the listeners on the port itself",
    )
}

fn missing(services: &[Watched], listeners: &[Listener<'_>]) -> Check {
    const NAME: &str = "backends";
    let found: Vec<_> = services
        .iter()
        .flat_map(|service| absent(service, listeners))
        .collect();
    if found.is_empty() {
        return Check::ok(
            NAME,
            format!("{} services have their listeners", services.len()),
            "every backend can take connections",
        );
    }
    Check::warn(
        NAME,
        listing(&found),
        "connections go to the other backends; where there is none, the kernel refuses them",
        "start it: it joins by itself when it listens; or correct the address, or `namespaces:` where it listens in another one",
    )
}

fn absent(service: &Watched, listeners: &[Listener<'_>]) -> Vec<String> {
    let Some(backends) = &service.backends else {
        let any = listeners.iter().any(|listener| listener.serves(service));
        return if any {
            Vec::new()
        } else {
            vec![format!(
                "{}: nobody listens on port {}",
                service.name, service.port
            )]
        };
    };
    if backends.is_empty() {
        return vec![format!(
            "{}: no backend has listened since it was loaded",
            service.name
        )];
    }
    let listens = |address: &SocketAddr| {
        listeners.iter().any(|listener| {
            listener.socket.local.port() == address.port() && listener.covers(address.ip())
        })
    };
    let absent = backends.iter().filter(|address| !listens(address));
    absent
        .map(|address| format!("{}: nobody listens on {address}", service.name))
        .collect()
}

/// Listeners that the loaded data plane doesn't have; nothing where none is loaded.
fn unclaimed(services: &[Watched], listeners: &[Listener<'_>]) -> Option<Check> {
    const NAME: &str = "unclaimed listeners";
    if services.iter().all(|service| service.loaded.is_none()) {
        return None;
    }
    let found = pairs(services, listeners, |service, listener| {
        let has = |backends: &Vec<SocketAddr>| {
            backends
                .iter()
                .any(|backend| same(*backend, listener.socket.local))
        };
        listener.serves(service) && !service.loaded.as_ref().is_none_or(has)
    });
    if found.is_empty() {
        return Some(Check::ok(
            NAME,
            "none",
            "the data plane has every listener of its services",
        ));
    }
    Some(Check::warn(
        NAME,
        listing(&found),
        "the data plane doesn't know it: its connections aren't counted, and nothing is steered to it",
        "start it again while the daemon runs; where that doesn't help, see the daemon's log for what kept it from joining",
    ))
}

/// Whether two listeners are bound to the same; "any address" is one, however it is written.
fn same(left: SocketAddr, right: SocketAddr) -> bool {
    let bare =
        |address: SocketAddr| Some(address.ip().to_canonical()).filter(|ip| !ip.is_unspecified());
    left.port() == right.port() && bare(left) == bare(right)
}

fn outside(services: &[Watched], listeners: &[Listener<'_>], cgroup: &Path) -> Check {
    const NAME: &str = "listeners' cgroups";
    let inside = cgroup_ids(cgroup);
    let found = pairs(services, listeners, |service, listener| {
        listener.serves(service)
            && listener
                .socket
                .cgroup
                .is_some_and(|id| !inside.contains(&id))
    });
    if found.is_empty() {
        return Check::ok(
            NAME,
            format!("all below {}", cgroup.display()),
            "every listener's connections are counted",
        );
    }
    Check::warn(
        NAME,
        listing(&found),
        format!(
            "made outside {} (a socket keeps the cgroup in which it was made): its connections aren't counted and it isn't steered to",
            cgroup.display()
        ),
        "start it again inside the cgroup, or leave out --cgroup",
    )
}

/// A process that may open fewer files than the quota lets connections in can't accept them.
fn file_limits(services: &[Watched], listeners: &[Listener<'_>]) -> Check {
    const NAME: &str = "backends' open files";
    let mut limits = HashMap::new();
    let mut limit = |pid: u32| *limits.entry(pid).or_insert_with(|| open_files(pid));
    let mut found = Vec::new();
    for service in services {
        let Some(quota) = service.quota else {
            continue;
        };
        for listener in listeners.iter().filter(|listener| listener.serves(service)) {
            let Some(files) = listener
                .owners
                .iter()
                .filter_map(|owner| limit(owner.pid))
                .min()
            else {
                continue;
            };
            if files <= u64::from(quota) {
                found.push(format!(
                    "{}: {} may open {files} files, the quota is {quota}",
                    service.name,
                    listener.describe()
                ));
            }
        }
    }
    if found.is_empty() {
        return Check::ok(
            NAME,
            "no quota is above what a backend may open",
            "a backend can accept all that its quota lets in",
        );
    }
    Check::warn(
        NAME,
        listing(&found),
        "it can't accept as many connections as its quota lets in: the rest wait in its accept queue",
        "raise its limit (ulimit -n, LimitNOFILE= in systemd), or lower the quota",
    )
}

fn open_files(pid: u32) -> Option<u64> {
    soft_limit(&fs::read_to_string(format!("/proc/{pid}/limits")).ok()?)
}

/// `Max open files            20000                20000                files`: the soft limit is the first number; `unlimited` is none.
fn soft_limit(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The remark on exempt sources; nothing where it isn't known which they are.
fn exempt(services: &[Watched]) -> Option<Check> {
    const NAME: &str = "exempt sources";
    let mut found = Vec::new();
    for service in services {
        if service
            .exempt
            .as_ref()?
            .iter()
            .any(|network| !network.addr().is_loopback())
        {
            found.push(service.name.clone());
        }
    }
    if found.is_empty() {
        return Some(Check::ok(
            NAME,
            "none but loopback",
            "quotas are for everybody",
        ));
    }
    Some(Check::ok(
        NAME,
        format!("services {}", listing(&found)),
        "a source is known by the address that arrives here: after SNAT (masquerading, a Service with externalTrafficPolicy: Cluster) \
         that is a node's, and rules by pod address don't match it",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::BackendSnapshot;
    use crate::{
        config::Config,
        doctor::Status,
        sys::{netns, sock_diag::tests::mptcp_listener},
    };
    use balancer_common::Policy;
    use std::net::TcpListener;

    fn guarded() -> GuardedNetns {
        GuardedNetns {
            label: "the test's namespace".to_owned(),
            file: netns::tests::fresh(),
        }
    }

    fn listen(namespace: &GuardedNetns, addresses: &[&str]) -> Vec<TcpListener> {
        let bind = |address: &&str| TcpListener::bind(address).expect("bind");
        netns::inside(namespace, || addresses.iter().map(bind).collect()).expect("inside")
    }

    fn config(services: &str) -> Vec<Watched> {
        let config = Config::parse(&format!("services:\n{services}")).expect("a configuration");
        config.services.iter().map(Watched::from).collect()
    }

    fn check(services: &[Watched], namespace: &GuardedNetns, name: &str) -> Check {
        let all = checks(services, std::slice::from_ref(namespace), None);
        all.into_iter()
            .find(|check| check.name == name)
            .expect(name)
    }

    const VIRTUAL: &str = "  - {name: agents, port: 11800, policy: least-connections, backends: [\"127.0.0.1:21801\", \"127.0.0.1:21802\"]}\n";
    const OWN: &str = "  - {name: als, port: 11802, policy: least-connections}\n";

    #[test]
    fn without_a_configuration_nothing_is_claimed() {
        let checks = checks(&[], &[guarded()], None);
        assert_eq!(
            checks
                .iter()
                .map(|check| (check.name, check.status))
                .collect::<Vec<_>>(),
            [("services", Status::Warn)]
        );
    }

    /// A service of the loaded data plane as `status` sees it.
    fn loaded(virtual_port: bool, backends: &[(&str, BackendState)]) -> Watched {
        let backend = |(address, state): &(&str, BackendState)| BackendSnapshot {
            slot: 0,
            address: address.parse().expect("an address"),
            netns: 1,
            state: *state,
            weight: 1,
            quota: Some(100),
            overridden: false,
            established: 0,
            exempt: 0,
            pending: None,
            steerable: true,
            note: None,
        };
        Watched::from(&ServiceSnapshot {
            id: 0,
            name: "agents".to_owned(),
            port: 11800,
            address: None,
            policy: Policy::RoundRobin,
            virtual_port,
            rule: String::new(),
            sentence: String::new(),
            quota_override: None,
            backends: backends.iter().map(backend).collect(),
            verdicts: Vec::new(),
        })
    }

    #[test]
    fn the_loaded_data_plane_stands_for_the_configuration() {
        let namespace = guarded();
        let _listeners = listen(&namespace, &["0.0.0.0:11800", "[::]:21801"]);
        let seen = [
            ("[::]:21801", BackendState::Active),
            ("127.0.0.1:21802", BackendState::Closed),
            ("127.0.0.1:21803", BackendState::Candidate),
        ];
        let hidden = check(&[loaded(true, &seen)], &namespace, "hidden listeners");
        assert!(
            hidden.found.starts_with("agents: 0.0.0.0:11800"),
            "{hidden:?}"
        );
        let missing = check(&[loaded(true, &seen)], &namespace, "backends");
        assert_eq!(missing.found, "agents: nobody listens on 127.0.0.1:21802");
        assert_eq!(
            check(&[loaded(false, &seen)], &namespace, "hidden listeners").status,
            Status::Ok
        );
        assert_eq!(
            check(&[loaded(false, &[])], &namespace, "backends").status,
            Status::Ok
        );
    }

    #[test]
    fn a_virtual_service_without_any_backend_is_told() {
        let none = check(&[loaded(true, &[])], &guarded(), "backends");
        assert_eq!(
            none.found,
            "agents: no backend has listened since it was loaded"
        );
    }

    #[test]
    fn a_listener_that_the_data_plane_does_not_have_is_named() {
        let namespace = guarded();
        let _listeners = listen(&namespace, &["0.0.0.0:11800"]);
        let state = BackendState::Active;
        let known = check(
            &[loaded(false, &[("[::]:11800", state)])],
            &namespace,
            "unclaimed listeners",
        );
        assert_eq!(known.status, Status::Ok);
        for seen in [
            &[][..],
            &[("127.0.0.1:11800", state)],
            &[("0.0.0.0:11801", state)],
        ] {
            let check = check(&[loaded(false, seen)], &namespace, "unclaimed listeners");
            assert_eq!(check.status, Status::Warn);
            assert!(
                check.found.starts_with("agents: 0.0.0.0:11800 of"),
                "{check:?}"
            );
        }
        let names = |services: &[Watched]| {
            checks(services, std::slice::from_ref(&namespace), None)
                .iter()
                .map(|check| check.name)
                .collect::<Vec<_>>()
        };
        assert!(
            !names(&config(OWN)).contains(&"unclaimed listeners"),
            "nothing is known to be loaded"
        );
        assert!(
            !names(&[loaded(false, &[])]).contains(&"exempt sources"),
            "which are exempt isn't known"
        );
    }

    #[test]
    fn an_mptcp_listener_of_a_service_is_named_with_its_owner() {
        let namespace = guarded();
        let listener = netns::inside(&namespace, mptcp_listener).expect("inside");
        let address = listener.local_addr().expect("address");
        let own = config(&format!(
            "  - {{name: als, port: {}, policy: least-connections}}\n",
            address.port()
        ));
        let found = check(&own, &namespace, "MPTCP listeners");
        assert_eq!(found.status, Status::Warn);
        assert!(
            found.found.starts_with(&format!("als: {address} of ")),
            "{found:?}"
        );
        assert!(
            found
                .found
                .contains(&format!("(process {})", std::process::id())),
            "{found:?}"
        );
        assert_eq!(
            check(&config(OWN), &namespace, "MPTCP listeners").status,
            Status::Ok,
            "it is of no service"
        );
    }

    #[test]
    fn an_ordinary_listener_is_no_mptcp_one() {
        let namespace = guarded();
        let _listeners = listen(&namespace, &["0.0.0.0:11802"]);
        assert_eq!(
            check(&config(OWN), &namespace, "MPTCP listeners").status,
            Status::Ok
        );
    }

    #[test]
    fn a_listener_on_a_virtual_port_is_hidden() {
        for (address, hidden) in [
            ("0.0.0.0:11800", true),
            ("127.0.0.5:11800", true),
            ("[::]:11800", true),
            ("0.0.0.0:21801", false),
        ] {
            let namespace = guarded();
            let _listeners = listen(&namespace, &[address]);
            let found = check(&config(VIRTUAL), &namespace, "hidden listeners");
            assert_eq!(found.status == Status::Warn, hidden, "{address}: {found:?}");
            assert_eq!(found.found.contains(address), hidden, "{found:?}");
        }
    }

    #[test]
    fn a_backend_on_the_services_port_is_not_hidden() {
        let namespace = guarded();
        let _listeners = listen(&namespace, &["127.0.0.7:11800"]);
        let config = config(
            "  - {name: agents, port: 11800, address: 127.0.0.9, policy: least-connections, backends: [\"127.0.0.7:11800\"]}\n",
        );
        assert_eq!(
            check(&config, &namespace, "hidden listeners").status,
            Status::Ok
        );
        assert_eq!(check(&config, &namespace, "backends").status, Status::Ok);
    }

    #[test]
    fn a_service_with_an_address_hides_only_what_covers_it() {
        let namespace = guarded();
        let _listeners = listen(&namespace, &["127.0.0.8:11800"]);
        let at = |address: &str| {
            config(&format!(
                "  - {{name: agents, port: 11800, address: {address}, policy: least-connections, backends: [\"127.0.0.1:21801\"]}}\n"
            ))
        };
        assert_eq!(
            check(&at("127.0.0.9"), &namespace, "hidden listeners").status,
            Status::Ok
        );
        assert_eq!(
            check(&at("127.0.0.8"), &namespace, "hidden listeners").status,
            Status::Warn
        );
    }

    #[test]
    fn missing_listeners_are_named() {
        let namespace = guarded();
        let both = config(&format!("{VIRTUAL}{OWN}"));
        let _listeners = listen(&namespace, &["0.0.0.0:21801"]);
        let found = check(&both, &namespace, "backends");
        assert_eq!(found.status, Status::Warn);
        assert_eq!(
            found.found,
            "agents: nobody listens on 127.0.0.1:21802, als: nobody listens on port 11802"
        );
        let _more = listen(&namespace, &["[::]:21802", "[::]:11802"]);
        assert_eq!(
            check(&both, &namespace, "backends").status,
            Status::Ok,
            "dual-stack listeners take IPv4"
        );
    }

    #[test]
    fn a_listener_outside_the_cgroup_is_named() {
        let namespace = guarded();
        let _listeners = listen(&namespace, &["0.0.0.0:11802"]);
        let root = discover::cgroup2_mount().expect("cgroup2");
        let elsewhere = root.join(format!("balancer-doctor-services-{}", std::process::id()));
        fs::create_dir(&elsewhere).expect("a cgroup");
        let at = |cgroup: &Path| {
            let checks = checks(&config(OWN), std::slice::from_ref(&namespace), Some(cgroup));
            checks
                .into_iter()
                .find(|check| check.name == "listeners' cgroups")
                .expect("checked")
                .status
        };
        let found = [at(&root), at(&elsewhere)];
        fs::remove_dir(&elsewhere).expect("removed");
        assert_eq!(found, [Status::Ok, Status::Warn]);
    }

    #[test]
    fn a_quota_beyond_the_backends_files_is_named() {
        let namespace = guarded();
        let _listeners = listen(&namespace, &["0.0.0.0:11802"]);
        let files = open_files(std::process::id()).expect("our own limit");
        for (quota, status) in [(files - 1, Status::Ok), (files, Status::Warn)] {
            let config = config(&format!(
                "  - {{name: als, port: 11802, policy: least-connections, quota: {{per_backend: {quota}}}}}\n"
            ));
            assert_eq!(
                check(&config, &namespace, "backends' open files").status,
                status
            );
        }
        assert_eq!(
            soft_limit("Limit  Soft\nMax open files            1024       4096        files\n"),
            Some(1024)
        );
        assert_eq!(
            soft_limit("Max open files            unlimited       unlimited        files\n"),
            None
        );
    }

    #[test]
    fn exempt_rules_come_with_the_remark_about_nat() {
        let namespace = guarded();
        let with = |networks: &str| {
            let config = config(&format!(
                "  - {{name: als, port: 11802, policy: least-connections, exempt: [{networks}]}}\n"
            ));
            check(&config, &namespace, "exempt sources").means
        };
        assert!(with("10.0.0.0/24").contains("SNAT"));
        assert!(!with("127.0.0.0/8").contains("SNAT"));
    }
}
