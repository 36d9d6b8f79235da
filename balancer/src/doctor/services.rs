//! The services' listeners: those that can't be steered to, that nobody reaches, that are missing.

use std::{collections::HashMap, fs, io, net::SocketAddr, path::Path};

use super::{
    Check,
    guarded::Guarded,
    listening::{CheckedService, ServiceListener, family_of, find_owners, listeners},
    listing, mistakes,
};
use crate::{discover::cgroup_ids, sys::sock_diag::Family};

const NAME: &str = "services";

/// Why no services are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoServices {
    /// Nobody has named a file, and nothing is loaded.
    NothingNamed,
    /// The file is one for a cluster, and nothing is loaded.
    InCluster,
    /// It is only said where connects of this host go.
    ConnectsAlone,
}

/// The finding where no services are known.
pub(super) fn none(why: NoServices) -> Check {
    let (found, advice) = match why {
        NoServices::ConnectsAlone => {
            return Check::ok(
                NAME,
                "none: nothing is served here, and connects of this host are placed",
                "there are no listeners to look at",
            );
        }
        NoServices::InCluster => (
            "none: nothing is loaded, and the file names no addresses",
            "start the daemon (`balancer run`), which learns of them from the API server, and look \
             again",
        ),
        NoServices::NothingNamed => (
            "none: no configuration is given and nothing is loaded",
            "give the file with --config",
        ),
    };
    Check::warn(NAME, found, "no service's listeners were looked at", advice)
}

/// The services' listeners; `cgroup` is where sockets are counted.
pub(super) fn checks(
    services: &[CheckedService],
    guarded: &Guarded,
    cgroup: Option<&Path>,
) -> Vec<Check> {
    let found = listeners(services, &guarded.netns).and_then(|mut found| {
        find_owners(&mut found)?;
        Ok(found)
    });
    let listeners = match found {
        Ok(listeners) => listeners,
        Err(error) => {
            let found = format!("listening sockets can't be listed: {error}");
            let means = "the services' listeners aren't known";
            return vec![Check::fail(NAME, found, means, "run as root")];
        }
    };
    let mut checks = vec![mptcp(services, &listeners)];
    checks.extend(mistakes::checks(&mistakes::of(
        services, guarded, &listeners,
    )));
    checks.push(missing(services, &listeners));
    checks.push(families(services, &listeners));
    checks.extend(unclaimed(services, &listeners));
    checks.extend(cgroup.map(|cgroup| outside(services, &listeners, cgroup)));
    checks.push(file_limits(services, &listeners));
    checks.extend(exempt(services));
    checks
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

fn missing(services: &[CheckedService], listeners: &[ServiceListener<'_>]) -> Check {
    let found: Vec<_> = services
        .iter()
        .flat_map(|service| absent(service, listeners))
        .collect();
    let well = match services.len() {
        1 => "the service has its listeners".to_owned(),
        services => format!("{services} services have their listeners"),
    };
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
        Some(backends) => unattended(backends, listeners)
            .map(|backend| format!("{name}: nobody listens on {backend}"))
            .collect(),
    }
}

/// Those of the backends that nobody listens on.
fn unattended<'a>(
    backends: &'a [SocketAddr],
    listeners: &[ServiceListener<'_>],
) -> impl Iterator<Item = &'a SocketAddr> {
    backends.iter().filter(|backend| {
        let mut listeners = listeners.iter();
        !listeners.any(|listener| listener.covers_backend(backend))
    })
}

/// Backends of which no client can reach all: a listener takes clients of its own family alone.
fn families(services: &[CheckedService], listeners: &[ServiceListener<'_>]) -> Check {
    let found: Vec<_> = services
        .iter()
        .filter_map(|service| {
            let reached = reached(service, listeners);
            let whole = |family| {
                reached
                    .iter()
                    .all(|(_, families)| families.contains(family))
            };
            if reached.is_empty() || [Family::V4, Family::V6].iter().any(whole) {
                return None;
            }
            let only = |family| {
                let those = reached.iter().filter(|(_, families)| *families == [family]);
                listing(&those.map(|(place, _)| place).collect::<Vec<_>>())
            };
            let (v4, v6) = (only(Family::V4), only(Family::V6));
            Some(format!("{}: IPv4 only {v4}; IPv6 only {v6}", service.name))
        })
        .collect();
    Check::warn_of(
        "address families",
        &found,
        (
            "each service has one that all its backends take",
            "a client can be given to every backend",
        ),
        "a client is given to backends of its own family alone, but all count as ready, with their \
         share of a computed quota",
        "let all listen for the family that clients come by, or for both (on [::] without \
         IPV6_V6ONLY); or make a service of each family, with an `address` of its own",
    )
}

/// Where a service's backends are, and the families of the clients that reach them; by the address
/// where nobody listens.
fn reached(
    service: &CheckedService,
    listeners: &[ServiceListener<'_>],
) -> Vec<(SocketAddr, Vec<Family>)> {
    let Some(backends) = &service.backends else {
        let ours = listeners.iter().filter(|listener| listener.serves(service));
        return ours
            .map(|listener| (listener.socket.local, listener.families().to_vec()))
            .collect();
    };
    let families = |backend: &SocketAddr| {
        let ours = (listeners.iter()).filter(|listener| listener.covers_backend(backend));
        let mut families: Vec<_> = ours.flat_map(ServiceListener::families).copied().collect();
        families.dedup();
        if families.is_empty() {
            families.extend(family_of(backend.ip()));
        }
        (*backend, families)
    };
    backends.iter().map(families).collect()
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

fn unread_cgroups(cgroup: &Path, error: &io::Error) -> Check {
    Check::warn(
        "listeners' cgroups",
        format!(
            "cannot read the cgroups below {}: {error}",
            cgroup.display()
        ),
        "nobody can tell which listeners were made outside of it",
        "see the error; run `doctor` again once it is gone",
    )
}

fn outside(services: &[CheckedService], listeners: &[ServiceListener<'_>], cgroup: &Path) -> Check {
    let inside = match cgroup_ids(cgroup) {
        Ok(inside) => inside,
        Err(error) => return unread_cgroups(cgroup, &error),
    };
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
    let mut none = true;
    for service in services {
        let networks = service.exempt.as_ref()?;
        none &= networks.is_empty();
        let mut networks = networks.iter();
        if networks.any(|network| !network.addr().is_loopback()) {
            found.push(&service.name);
        }
    }
    Some(if none {
        Check::ok(NAME, "none", "quotas are for everybody")
    } else if found.is_empty() {
        Check::ok(NAME, "loopback alone", "quotas are for every other client")
    } else {
        Check::ok(
            NAME,
            format!("some of {}", listing(&found)),
            "a source is known by the address that arrives here: after SNAT (masquerading, a \
             Kubernetes Service with externalTrafficPolicy: Cluster) that is a node's, and rules by \
             pod address don't match it",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::{BackendHealth, BackendSnapshot, ServiceSnapshot};
    use crate::{
        config::{Config, Effect},
        discover,
        doctor::{Status, guarded::GuardedNetns},
        sys::{netns, sock_diag::tests::mptcp_listener},
    };
    use balancer_common::abi::{Silence, SlotMoves};
    use balancer_common::{BackendState, Policy};
    use std::net::TcpListener;

    fn guarded() -> Guarded {
        Guarded::only(GuardedNetns {
            label: "the test's namespace".to_owned(),
            file: netns::tests::fresh(),
            for_backends_alone: false,
        })
    }

    fn listen(netns: &Guarded, addresses: &[&str]) -> Vec<TcpListener> {
        let bind = |address: &&str| TcpListener::bind(address).expect("bind");
        netns::inside(&netns.netns[0], || addresses.iter().map(bind).collect()).expect("inside")
    }

    fn config(services: &str) -> Vec<CheckedService> {
        let config = Config::parse(&format!("services:\n{services}")).expect("a configuration");
        config.services.iter().map(CheckedService::from).collect()
    }

    fn check(services: &[CheckedService], guarded: &Guarded, name: &str) -> Check {
        let all = checks(services, guarded, None);
        all.into_iter()
            .find(|check| check.name == name)
            .expect(name)
    }

    const VIRTUAL: &str = "  - {name: agents, port: 11800, policy: least-connections, backends: [\"127.0.0.1:21801\", \"127.0.0.1:21802\"]}\n";
    const OWN: &str = "  - {name: als, port: 11802, policy: least-connections}\n";

    #[test]
    fn without_a_configuration_nothing_is_claimed() {
        let (outside, in_cluster) = (none(NoServices::NothingNamed), none(NoServices::InCluster));
        assert_eq!(none(NoServices::ConnectsAlone).status, Status::Ok);
        for check in [&outside, &in_cluster] {
            assert_eq!((check.name, check.status), ("services", Status::Warn));
        }
        let advises_the_file = |check: &Check| {
            check
                .advice
                .as_ref()
                .is_some_and(|advice| advice.contains("--config"))
        };
        assert!(advises_the_file(&outside) && !advises_the_file(&in_cluster));
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
            server: None,
            established: 0,
            exempt: 0,
            pending: None,
            silence: Silence::default(),
            drained: false,
            moves: SlotMoves::default(),
            steerable: true,
            health: Some(BackendHealth::SERVING),
            note: None,
        };
        let listed =
            ["127.0.0.1:21801", "127.0.0.1:21802"].map(|text| text.parse().expect("an address"));
        let service = ServiceSnapshot {
            id: 0,
            name: "agents".to_owned(),
            port: 11800,
            address: None,
            policy: Policy::RoundRobin,
            virtual_port,
            effect: Effect::On,
            rule: String::new(),
            sentence: String::new(),
            keepalive: None,
            quota_override: None,
            unattributed: 0,
            backends: backends.iter().map(backend).collect(),
            down: Vec::new(),
            verdicts: Vec::new(),
            warnings: Vec::new(),
        };
        CheckedService::loaded(&service, &listed.into())
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
    fn backends_that_have_never_listened_are_told() {
        let none = check(&[loaded(true, &[])], &guarded(), "backends");
        assert_eq!(
            none.found,
            "agents: nobody listens on 127.0.0.1:21801, agents: nobody listens on 127.0.0.1:21802"
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
            checks(services, &netns, None)
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
        let listener = netns::inside(&netns.netns[0], mptcp_listener).expect("inside");
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
    fn backends_that_no_client_can_all_reach_are_told() {
        let netns = guarded();
        let backends = |listed: &str| {
            config(&format!(
                "  - {{name: agents, port: 11800, backends: [{listed}]}}\n"
            ))
        };
        let both = "\"127.0.0.1:21801\", \"[::1]:21802\"";
        let found = check(&backends(both), &netns, "address families");
        assert_eq!(
            (found.status, found.found.as_str()),
            (
                Status::Warn,
                "agents: IPv4 only 127.0.0.1:21801; IPv6 only [::1]:21802"
            )
        );
        let status = |services: &str| check(&config(services), &netns, "address families").status;
        // Each advice, followed.
        let split = "  - {name: four, port: 11800, address: 127.0.0.1, backends: [\"127.0.0.1:21801\"]}\n  \
                     - {name: six, port: 11800, address: \"::1\", backends: [\"[::1]:21802\"]}\n";
        assert_eq!(status(split), Status::Ok);
        let _dual = listen(&netns, &["[::]:21802"]);
        let on_both = check(&backends(both), &netns, "address families");
        assert_eq!(on_both.status, Status::Ok, "{on_both:?}");
        let _v4 = listen(&netns, &["0.0.0.0:11802"]);
        assert_eq!(status(OWN), Status::Ok);
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
            let checks = checks(&config(OWN), &netns, Some(cgroup));
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
            check(&config, &netns, "exempt sources")
        };
        assert!(with("10.0.0.0/24").means.contains("SNAT"));
        assert_eq!(with("127.0.0.0/8").found, "loopback alone");
        assert_eq!(
            with("").found,
            "none",
            "loopback is exempt where it is listed"
        );
    }
}
