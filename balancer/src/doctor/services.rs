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
pub(super) struct CheckedService {
    name: String,
    port: u16,
    address: Option<IpAddr>,
    /// Where the listeners behind a virtual port are; `None`: on the port itself.
    backends: Option<Vec<SocketAddr>>,
    /// The quota of each backend, where it is known.
    quota: Option<u32>,
    /// Sources that are exempt; `None`: not known.
    exempt: Option<Vec<IpNet>>,
    /// Addresses and ports that its listeners in the loaded data plane are bound to; `None`: not
    /// known.
    loaded: Option<Vec<SocketAddr>>,
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
            exempt: Some(service.exempt.clone()),
            loaded: None,
        }
    }
}

impl From<&ServiceSnapshot> for CheckedService {
    fn from(service: &ServiceSnapshot) -> Self {
        let backends = service.backends.iter();
        let ours = backends.filter(|backend| backend.state != BackendState::Candidate);
        let seen: Vec<_> = ours.map(|backend| backend.address).collect();
        let quotas = service.backends.iter().filter_map(|backend| backend.quota);
        Self {
            name: service.name.clone(),
            port: service.port,
            address: service.address,
            backends: service.virtual_port.then(|| seen.clone()),
            quota: quotas.max(),
            exempt: None,
            loaded: Some(seen),
        }
    }
}

/// A listening socket on a port that a service has to do with.
struct ServiceListener<'a> {
    socket: Socket,
    /// The label of the netns that it is in, for findings.
    netns: &'a str,
    owners: Vec<SocketOwner>,
}

/// The services' listeners; `cgroup` is where sockets are counted.
pub(super) fn checks(
    services: &[CheckedService],
    netns: &[GuardedNetns],
    cgroup: Option<&Path>,
) -> Vec<Check> {
    const NAME: &str = "services";
    if services.is_empty() {
        return vec![Check::warn(
            NAME,
            "none: no configuration is given and nothing is loaded",
            "no service's listeners were looked at",
            "give the file with --config",
        )];
    }
    let listeners = match listeners(services, netns) {
        Ok(listeners) => listeners,
        Err(error) => {
            let found = format!("listening sockets can't be listed: {error}");
            let means = "the services' listeners aren't known";
            return vec![Check::fail(NAME, found, means, "run as root")];
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

fn listeners<'a>(
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
            netns: &netns.label,
            owners: Vec::new(),
        }));
    }
    let mut owners = discover::owners(found.iter().map(|listener| listener.socket.inode))?;
    for listener in &mut found {
        listener.owners = owners.remove(&listener.socket.inode).unwrap_or_default();
    }
    Ok(found)
}

impl ServiceListener<'_> {
    fn describe(&self) -> String {
        let owner = self.owners.first();
        let owner = owner.map_or_else(|| "owner unknown".to_owned(), |owner| owner.name());
        format!("{} of {owner} in {}", self.socket.local, self.netns)
    }

    /// Whether connections to an address reach it, were there no balancer.
    fn covers(&self, address: IpAddr) -> bool {
        match self.socket.local.ip().to_canonical() {
            IpAddr::V4(own) if own.is_unspecified() => address.is_ipv4(),
            IpAddr::V6(own) if own.is_unspecified() => {
                address.is_ipv6() || self.socket.v6only != Some(true)
            }
            own => own == address.to_canonical(),
        }
    }

    fn covers_backend(&self, backend: &SocketAddr) -> bool {
        self.socket.local.port() == backend.port() && self.covers(backend.ip())
    }

    /// Whether it listens on the service's own port and address.
    fn is_on_port(&self, service: &CheckedService) -> bool {
        self.socket.local.port() == service.port
            && service.address.is_none_or(|address| self.covers(address))
    }

    /// Whether it listens where a backend of the service is expected.
    fn serves(&self, service: &CheckedService) -> bool {
        match &service.backends {
            None => self.is_on_port(service),
            Some(backends) => backends.iter().any(|backend| self.covers_backend(backend)),
        }
    }
}

/// `service: listener` for every pair that fits.
fn pairs(
    services: &[CheckedService],
    listeners: &[ServiceListener<'_>],
    fits: impl Fn(&CheckedService, &ServiceListener<'_>) -> bool,
) -> Vec<String> {
    let of = |service: &CheckedService| {
        let fitting = listeners.iter().filter(|listener| fits(service, listener));
        let named = fitting.map(|listener| format!("{}: {}", service.name, listener.describe()));
        named.collect::<Vec<_>>()
    };
    services.iter().flat_map(of).collect()
}

fn mptcp(services: &[CheckedService], listeners: &[ServiceListener<'_>]) -> Check {
    let found = pairs(services, listeners, |service, listener| {
        listener.socket.mptcp && listener.serves(service)
    });
    Check::warn_of(
        "MPTCP listeners",
        &found,
        ("none", "every listener can be steered to"),
        "the kernel can't steer to an MPTCP listener: it is counted, and on the service's own port \
         admitted and refused, but gets only the connections that come to it by themselves; behind a \
         virtual port it gets none",
        "make an ordinary TCP listener of it: GODEBUG=multipathtcp=0 for a Go server, no \
         IPPROTO_MPTCP, no mptcpize",
    )
}

/// Listeners that wait on a port whose connections all go elsewhere.
fn hidden(services: &[CheckedService], listeners: &[ServiceListener<'_>]) -> Check {
    let found = pairs(services, listeners, |service, listener| {
        service.backends.is_some() && listener.is_on_port(service) && !listener.serves(service)
    });
    Check::warn_of(
        "hidden listeners",
        &found,
        (
            "none",
            "no listener waits on a port whose connections go elsewhere",
        ),
        "the service's port is virtual (it has `backends:`): its connections all go to the backends, \
         and this listener gets none",
        "stop it, add it to `backends:`, or drop `backends:` to balance the listeners on the port itself",
    )
}

fn missing(services: &[CheckedService], listeners: &[ServiceListener<'_>]) -> Check {
    let found: Vec<_> = services
        .iter()
        .flat_map(|service| absent(service, listeners))
        .collect();
    let well = format!("{} services have their listeners", services.len());
    Check::warn_of(
        "backends",
        &found,
        (&well, "every backend can take connections"),
        "connections go to the other backends; where there is none, the kernel refuses them",
        "start it: it joins by itself when it listens; or correct the address, or `namespaces:` where \
         it listens in another one",
    )
}

fn absent(service: &CheckedService, listeners: &[ServiceListener<'_>]) -> Vec<String> {
    let name = &service.name;
    match &service.backends {
        None if listeners.iter().any(|listener| listener.serves(service)) => Vec::new(),
        None => vec![format!("{name}: nobody listens on port {}", service.port)],
        Some(backends) if backends.is_empty() => {
            vec![format!(
                "{name}: no backend has listened since it was loaded"
            )]
        }
        Some(backends) => {
            let listens = |backend: &&SocketAddr| {
                listeners
                    .iter()
                    .any(|listener| listener.covers_backend(backend))
            };
            let absent = backends.iter().filter(|backend| !listens(backend));
            absent
                .map(|backend| format!("{name}: nobody listens on {backend}"))
                .collect()
        }
    }
}

/// Listeners that the loaded data plane doesn't have; nothing where none is loaded.
fn unclaimed(services: &[CheckedService], listeners: &[ServiceListener<'_>]) -> Option<Check> {
    if services.iter().all(|service| service.loaded.is_none()) {
        return None;
    }
    let found = pairs(services, listeners, |service, listener| {
        let has = |backend: &SocketAddr| is_same(*backend, listener.socket.local);
        let known = service.loaded.as_ref();
        listener.serves(service) && known.is_some_and(|known| !known.iter().any(has))
    });
    Some(Check::warn_of(
        "unclaimed listeners",
        &found,
        ("none", "the data plane has every listener of its services"),
        "the data plane doesn't know it: its connections aren't counted, and nothing is steered to it",
        "start it again while the daemon runs; where that doesn't help, see the daemon's log for what \
         kept it from joining",
    ))
}

/// Whether two listeners are bound to one address; "any address" is one, however it is written.
fn is_same(left: SocketAddr, right: SocketAddr) -> bool {
    let bare =
        |address: SocketAddr| Some(address.ip().to_canonical()).filter(|ip| !ip.is_unspecified());
    left.port() == right.port() && bare(left) == bare(right)
}

fn outside(services: &[CheckedService], listeners: &[ServiceListener<'_>], cgroup: &Path) -> Check {
    let inside = cgroup_ids(cgroup);
    let found = pairs(services, listeners, |service, listener| {
        let is_outside = |id: u64| !inside.contains(&id);
        listener.serves(service) && listener.socket.cgroup.is_some_and(is_outside)
    });
    let cgroup = cgroup.display();
    let well = format!("all below {cgroup}");
    Check::warn_of(
        "listeners' cgroups",
        &found,
        (&well, "every listener's connections are counted"),
        format!(
            "made outside {cgroup} (a socket keeps the cgroup in which it was made): its connections \
             aren't counted and it isn't steered to"
        ),
        "start it again inside the cgroup, or leave out --cgroup",
    )
}

/// A process that may open fewer files than the quota lets connections in can't accept them.
fn file_limits(services: &[CheckedService], listeners: &[ServiceListener<'_>]) -> Check {
    let mut limits = HashMap::new();
    let mut limit = |pid: u32| *limits.entry(pid).or_insert_with(|| open_files(pid));
    let mut found = Vec::new();
    for (service, quota) in services
        .iter()
        .filter_map(|service| Some((service, service.quota?)))
    {
        for listener in listeners.iter().filter(|listener| listener.serves(service)) {
            let limits = listener.owners.iter().filter_map(|owner| limit(owner.pid));
            if let Some(files) = limits.min().filter(|files| *files <= u64::from(quota)) {
                let (name, listener) = (&service.name, listener.describe());
                found.push(format!(
                    "{name}: {listener} may open {files} files, the quota is {quota}"
                ));
            }
        }
    }
    Check::warn_of(
        "backends' open files",
        &found,
        (
            "no quota is above what a backend may open",
            "a backend can accept all that its quota lets in",
        ),
        "it can't accept as many connections as its quota lets in: the rest wait in its accept queue",
        "raise its limit (ulimit -n, LimitNOFILE= in systemd), or lower the quota",
    )
}

fn open_files(pid: u32) -> Option<u64> {
    soft_limit(&fs::read_to_string(format!("/proc/{pid}/limits")).ok()?)
}

/// `Max open files            20000                20000                files`: the soft limit is
/// the first number; `unlimited` is none.
fn soft_limit(limits: &str) -> Option<u64> {
    let mut lines = limits.lines();
    let line = lines.find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The remark on exempt sources; nothing where it isn't known which they are.
fn exempt(services: &[CheckedService]) -> Option<Check> {
    const NAME: &str = "exempt sources";
    let mut found = Vec::new();
    for service in services {
        let mut networks = service.exempt.as_ref()?.iter();
        if networks.any(|network| !network.addr().is_loopback()) {
            found.push(&service.name);
        }
    }
    Some(if found.is_empty() {
        Check::ok(NAME, "none but loopback", "quotas are for everybody")
    } else {
        Check::ok(
            NAME,
            format!("services {}", listing(&found)),
            "a source is known by the address that arrives here: after SNAT (masquerading, a \
             Kubernetes Service with externalTrafficPolicy: Cluster) that is a node's, and rules by \
             pod address don't match it",
        )
    })
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

    fn listen(netns: &GuardedNetns, addresses: &[&str]) -> Vec<TcpListener> {
        let bind = |address: &&str| TcpListener::bind(address).expect("bind");
        netns::inside(netns, || addresses.iter().map(bind).collect()).expect("inside")
    }

    fn config(services: &str) -> Vec<CheckedService> {
        let config = Config::parse(&format!("services:\n{services}")).expect("a configuration");
        config.services.iter().map(CheckedService::from).collect()
    }

    fn check(services: &[CheckedService], netns: &GuardedNetns, name: &str) -> Check {
        let all = checks(services, std::slice::from_ref(netns), None);
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
    fn loaded(virtual_port: bool, backends: &[(&str, BackendState)]) -> CheckedService {
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
        CheckedService::from(&ServiceSnapshot {
            id: 0,
            name: "agents".to_owned(),
            port: 11800,
            address: None,
            policy: Policy::RoundRobin,
            virtual_port,
            rule: String::new(),
            sentence: String::new(),
            quota_override: None,
            unattributed: 0,
            backends: backends.iter().map(backend).collect(),
            verdicts: Vec::new(),
        })
    }

    #[test]
    fn the_loaded_data_plane_stands_for_the_configuration() {
        let netns = guarded();
        let _listeners = listen(&netns, &["0.0.0.0:11800", "[::]:21801"]);
        let seen = [
            ("[::]:21801", BackendState::Active),
            ("127.0.0.1:21802", BackendState::Closed),
            ("127.0.0.1:21803", BackendState::Candidate),
        ];
        let hidden = check(&[loaded(true, &seen)], &netns, "hidden listeners");
        assert!(
            hidden.found.starts_with("agents: 0.0.0.0:11800"),
            "{hidden:?}"
        );
        let missing = check(&[loaded(true, &seen)], &netns, "backends");
        assert_eq!(missing.found, "agents: nobody listens on 127.0.0.1:21802");
        assert_eq!(
            check(&[loaded(false, &seen)], &netns, "hidden listeners").status,
            Status::Ok
        );
        assert_eq!(
            check(&[loaded(false, &[])], &netns, "backends").status,
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
        let netns = guarded();
        let _listeners = listen(&netns, &["0.0.0.0:11800"]);
        let state = BackendState::Active;
        let known = check(
            &[loaded(false, &[("[::]:11800", state)])],
            &netns,
            "unclaimed listeners",
        );
        assert_eq!(known.status, Status::Ok);
        for seen in [
            &[][..],
            &[("127.0.0.1:11800", state)],
            &[("0.0.0.0:11801", state)],
        ] {
            let check = check(&[loaded(false, seen)], &netns, "unclaimed listeners");
            assert_eq!(check.status, Status::Warn);
            assert!(
                check.found.starts_with("agents: 0.0.0.0:11800 of"),
                "{check:?}"
            );
        }
        let names = |services: &[CheckedService]| {
            checks(services, std::slice::from_ref(&netns), None)
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
        let netns = guarded();
        let listener = netns::inside(&netns, mptcp_listener).expect("inside");
        let address = listener.local_addr().expect("address");
        let own = config(&format!(
            "  - {{name: als, port: {}, policy: least-connections}}\n",
            address.port()
        ));
        let found = check(&own, &netns, "MPTCP listeners");
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
            check(&config(OWN), &netns, "MPTCP listeners").status,
            Status::Ok,
            "it is of no service"
        );
    }

    #[test]
    fn an_ordinary_listener_is_no_mptcp_one() {
        let netns = guarded();
        let _listeners = listen(&netns, &["0.0.0.0:11802"]);
        assert_eq!(
            check(&config(OWN), &netns, "MPTCP listeners").status,
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
            let netns = guarded();
            let _listeners = listen(&netns, &[address]);
            let found = check(&config(VIRTUAL), &netns, "hidden listeners");
            assert_eq!(found.status == Status::Warn, hidden, "{address}: {found:?}");
            assert_eq!(found.found.contains(address), hidden, "{found:?}");
        }
    }

    #[test]
    fn a_backend_on_the_services_port_is_not_hidden() {
        let netns = guarded();
        let _listeners = listen(&netns, &["127.0.0.7:11800"]);
        let config = config(
            "  - {name: agents, port: 11800, address: 127.0.0.9, policy: least-connections, backends: [\"127.0.0.7:11800\"]}\n",
        );
        assert_eq!(
            check(&config, &netns, "hidden listeners").status,
            Status::Ok
        );
        assert_eq!(check(&config, &netns, "backends").status, Status::Ok);
    }

    #[test]
    fn a_service_with_an_address_hides_only_what_covers_it() {
        let netns = guarded();
        let _listeners = listen(&netns, &["127.0.0.8:11800"]);
        let at = |address: &str| {
            config(&format!(
                "  - {{name: agents, port: 11800, address: {address}, policy: least-connections, backends: [\"127.0.0.1:21801\"]}}\n"
            ))
        };
        assert_eq!(
            check(&at("127.0.0.9"), &netns, "hidden listeners").status,
            Status::Ok
        );
        assert_eq!(
            check(&at("127.0.0.8"), &netns, "hidden listeners").status,
            Status::Warn
        );
    }

    #[test]
    fn missing_listeners_are_named() {
        let netns = guarded();
        let both = config(&format!("{VIRTUAL}{OWN}"));
        let _listeners = listen(&netns, &["0.0.0.0:21801"]);
        let found = check(&both, &netns, "backends");
        assert_eq!(found.status, Status::Warn);
        assert_eq!(
            found.found,
            "agents: nobody listens on 127.0.0.1:21802, als: nobody listens on port 11802"
        );
        let _more = listen(&netns, &["[::]:21802", "[::]:11802"]);
        assert_eq!(
            check(&both, &netns, "backends").status,
            Status::Ok,
            "dual-stack listeners take IPv4"
        );
    }

    #[test]
    fn a_listener_outside_the_cgroup_is_named() {
        let netns = guarded();
        let _listeners = listen(&netns, &["0.0.0.0:11802"]);
        let root = discover::cgroup2_mount().expect("cgroup2");
        let elsewhere = root.join(format!("balancer-doctor-services-{}", std::process::id()));
        fs::create_dir(&elsewhere).expect("a cgroup");
        let at = |cgroup: &Path| {
            let checks = checks(&config(OWN), std::slice::from_ref(&netns), Some(cgroup));
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
        let netns = guarded();
        let _listeners = listen(&netns, &["0.0.0.0:11802"]);
        let files = open_files(std::process::id()).expect("our own limit");
        for (quota, status) in [(files - 1, Status::Ok), (files, Status::Warn)] {
            let config = config(&format!(
                "  - {{name: als, port: 11802, policy: least-connections, quota: {{per_backend: {quota}}}}}\n"
            ));
            assert_eq!(
                check(&config, &netns, "backends' open files").status,
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
        let netns = guarded();
        let with = |networks: &str| {
            let config = config(&format!(
                "  - {{name: als, port: 11802, policy: least-connections, exempt: [{networks}]}}\n"
            ));
            check(&config, &netns, "exempt sources").means
        };
        assert!(with("10.0.0.0/24").contains("SNAT"));
        assert!(!with("127.0.0.0/8").contains("SNAT"));
    }
}
