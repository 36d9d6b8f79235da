//! The configuration file: whatever is in it, it is a valid configuration or an error with its
//! place.
#![no_main]

use std::net::{IpAddr, SocketAddr};

use balancer::config::{
    ClusterInput, ClusterQuota, ClusterService, Config, ConfigError, Connect, Kubernetes,
    NetnsScope, PodClass, PortChoice, QuotaRule, Service, ServiceChoice,
};
use balancer::config::{
    MAX_BACKENDS, MAX_CONNECT_ENDPOINTS, MAX_CONNECT_ENDPOINTS_IN_ALL, MAX_CONNECT_TO,
    MAX_CONNECT_TO_IN_ALL, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_CLIENT, MAX_EXEMPT,
    MAX_HEADROOM_PERCENT, MAX_KEEPALIVE_IDLE, MAX_KEEPALIVE_INTERVAL, MAX_KEEPALIVE_PROBES,
    MAX_NAME_BYTES, MAX_POD_CLASSES, MAX_SERVICE_BACKENDS, MAX_SERVICES, MAX_WEIGHT, selector,
};
use balancer_common::abi::Keepalive;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

/// The longest message, in bytes: it quotes at most a few words of the file.
const LONGEST_MESSAGE: usize = 1000;

fuzz_target!(|bytes: &[u8]| {
    match Config::from_bytes(bytes) {
        Ok(config) => {
            is_as_documented(&config);
            reads_the_same_when_written(&config);
        }
        Err(error) => says_where(&error, bytes),
    }
});

fn says_where(error: &ConfigError, bytes: &[u8]) {
    let message = error.to_string();
    match error.line() {
        Some(line) => assert!(
            (1..=lines(bytes)).contains(&line),
            "line {line} of {}: {message}",
            lines(bytes)
        ),
        None => assert!(message.contains("there are no settings"), "{message}"),
    }
    assert!(message.len() <= LONGEST_MESSAGE, "{message}");
    let steers_a_terminal = |c: char| c.is_control() && c != '\n';
    assert!(!message.contains(steers_a_terminal), "{message:?}");
}

/// How many lines YAML sees; a break at the end does not begin another one.
fn lines(bytes: &[u8]) -> usize {
    let text = String::from_utf8_lossy(bytes);
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    text.lines().count().max(1)
}

/// What the documentation of [`Config`] promises to whoever holds one.
fn is_as_documented(config: &Config) {
    if let Some(kubernetes) = &config.kubernetes {
        assert!(config.services.is_empty() && config.connects.is_empty());
        assert_eq!(config.namespaces, NetnsScope::Pods);
        kubernetes_is_as_documented(kubernetes);
    } else {
        let services = config.services.iter().map(|service| &service.name);
        let connects = config.connects.iter().map(|connect| &connect.name);
        let names: std::collections::BTreeSet<_> = services.chain(connects).collect();
        assert!((1..=MAX_SERVICES).contains(&names.len()));
    }
    assert!((1000..=3_600_000).contains(&config.fail_open_after.as_millis()));
    if let NetnsScope::Paths(paths) = &config.namespaces {
        assert!(!paths.is_empty() && paths.iter().all(|path| path.is_absolute()));
        assert_unique(paths);
    }
    let services = &config.services;
    assert_unique(services.iter().map(|service| &service.name));
    assert_unique(
        services
            .iter()
            .map(|service| (service.port, service.address)),
    );
    let backends = services
        .iter()
        .flat_map(|service| service.backends.iter().flatten());
    let addresses: Vec<_> = backends.map(|backend| backend.address).collect();
    assert!(addresses.len() <= MAX_BACKENDS);
    assert_unique(addresses);
    services.iter().for_each(service_is_as_documented);
    connects_are_as_documented(&config.connects);
}

fn connects_are_as_documented(connects: &[Connect]) {
    assert_unique(connects.iter().map(|connect| &connect.name));
    let frontends: Vec<_> = connects.iter().flat_map(|connect| &connect.to).collect();
    assert!(frontends.len() <= MAX_CONNECT_TO_IN_ALL);
    assert_unique(frontends);
    let mut weights = std::collections::BTreeMap::new();
    for connect in connects {
        is_a_label(&connect.name);
        assert!((1..=MAX_CONNECT_TO).contains(&connect.to.len()));
        assert!((1..=MAX_CONNECT_ENDPOINTS).contains(&connect.endpoints.len()));
        let endpoints = connect.endpoints.iter().map(|one| one.address);
        let endpoints: Vec<_> = endpoints.collect();
        for address in connect.to.iter().chain(&endpoints) {
            assert_ne!(address.port(), 0);
            is_plain(address.ip());
        }
        for frontend in &connect.to {
            assert!(
                endpoints
                    .iter()
                    .any(|one| one.is_ipv4() == frontend.is_ipv4())
            );
        }
        assert_unique(endpoints);
        for one in &connect.endpoints {
            assert!((1..=MAX_WEIGHT).contains(&one.weight));
            assert_eq!(
                *weights.entry(one.address).or_insert(one.weight),
                one.weight
            );
        }
    }
    assert!(weights.len() <= MAX_CONNECT_ENDPOINTS_IN_ALL);
}

fn is_a_label(name: &str) {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    assert!((1..=MAX_NAME_BYTES).contains(&name.len()) && name.chars().all(word));
}

fn kubernetes_is_as_documented(kubernetes: &Kubernetes) {
    assert!((1..=MAX_SERVICES).contains(&kubernetes.services.len()));
    assert!((500..=60_000).contains(&kubernetes.publish_every.as_millis()));
    assert!((10_000..=86_400_000).contains(&kubernetes.hold_for.as_millis()));
    let services = &kubernetes.services;
    assert_unique(services.iter().map(|service| &service.name));
    services.iter().for_each(cluster_service_is_as_documented);
}

fn cluster_service_is_as_documented(service: &ClusterService) {
    is_a_label(&service.name);
    match &service.of {
        ServiceChoice::Named { namespace, name } => {
            is_a_label(namespace);
            is_a_label(name);
        }
        ServiceChoice::Selected {
            namespace,
            selectors,
        } => {
            if let Some(name) = namespace {
                is_a_label(name);
            }
            assert!(!selectors.is_empty());
            for text in selectors {
                is_a_selector(text);
            }
        }
    }
    match &service.port {
        PortChoice::Number(port) => assert_ne!(*port, 0),
        PortChoice::Name(name) => is_a_label(name),
    }
    assert!(service.exempt.len() <= MAX_EXEMPT);
    keepalive_is_as_documented(service.keepalive);
    cluster_quota_is_as_documented(&service.quota);
}

fn is_a_selector(text: &str) {
    let read = selector(text).expect("a selector that is valid");
    assert!(!read.selects_all());
    assert_eq!(selector(&read.to_string()).expect("the same again"), read);
}

/// A rule as it is shown.
fn fits_a_line(rule: &impl std::fmt::Display) {
    let shown = rule.to_string();
    assert!(
        shown.len() < 128 && !shown.contains(char::is_control),
        "{shown}"
    );
}

fn cluster_quota_is_as_documented(quota: &ClusterQuota) {
    fits_a_line(quota);
    let connections = 1..=MAX_CONNECTIONS;
    match quota {
        ClusterQuota::Unlimited => {}
        ClusterQuota::Fixed(limit) => assert!(connections.contains(limit)),
        ClusterQuota::Shared {
            input,
            headroom_percent,
            min_quota,
        } => {
            assert!(*headroom_percent <= MAX_HEADROOM_PERCENT && connections.contains(min_quota));
            match input {
                ClusterInput::Clients {
                    clients,
                    connections_per_client,
                } => {
                    assert!(connections.contains(clients));
                    assert!((1..=MAX_CONNECTIONS_PER_CLIENT).contains(connections_per_client));
                }
                ClusterInput::Pods(classes) => {
                    assert!((1..=MAX_POD_CLASSES).contains(&classes.len()));
                    classes.iter().for_each(class_is_as_documented);
                }
                ClusterInput::Observed { window } => {
                    assert!((60_000..=86_400_000).contains(&window.as_millis()));
                }
            }
        }
    }
}

fn class_is_as_documented(class: &PodClass) {
    is_a_selector(&class.selector);
    if let Some(name) = &class.namespace {
        is_a_label(name);
    }
    assert!((1..=MAX_CONNECTIONS_PER_CLIENT).contains(&class.connections));
}

fn service_is_as_documented(service: &Service) {
    is_a_label(&service.name);
    assert_ne!(service.port, 0);
    service.address.into_iter().for_each(is_plain);
    if let Some(backends) = &service.backends {
        assert!((1..=MAX_SERVICE_BACKENDS).contains(&backends.len()));
        for backend in backends {
            assert!((1..=MAX_WEIGHT).contains(&backend.weight));
            assert_ne!(backend.address.port(), 0);
            is_plain(backend.address.ip());
        }
    }
    assert!(service.exempt.len() <= MAX_EXEMPT);
    assert_unique(&service.exempt);
    assert!(
        service
            .exempt
            .iter()
            .all(|network| network.addr() == network.network())
    );
    keepalive_is_as_documented(service.keepalive);
    quota_is_as_documented(&service.quota);
}

fn keepalive_is_as_documented(keepalive: Option<Keepalive>) {
    let Some(keepalive) = keepalive else { return };
    assert!((1..=MAX_KEEPALIVE_IDLE).contains(&keepalive.idle));
    assert!((1..=MAX_KEEPALIVE_INTERVAL).contains(&keepalive.interval));
    assert!((1..=MAX_KEEPALIVE_PROBES).contains(&keepalive.probes));
}

fn quota_is_as_documented(quota: &QuotaRule) {
    fits_a_line(quota);
    let connections = 1..=MAX_CONNECTIONS;
    match quota {
        QuotaRule::Unlimited => {}
        QuotaRule::Fixed(limit) => assert!(connections.contains(limit)),
        QuotaRule::Computed {
            clients,
            connections_per_client,
            headroom_percent,
            min_quota,
        } => {
            assert!(clients.is_none_or(|clients| connections.contains(&clients)));
            assert!((1..=MAX_CONNECTIONS_PER_CLIENT).contains(connections_per_client));
            assert!(*headroom_percent <= MAX_HEADROOM_PERCENT);
            assert!(connections.contains(min_quota));
        }
    }
}

fn is_plain(address: IpAddr) {
    assert!(!address.is_unspecified() && !address.is_multicast());
    assert_eq!(address, address.to_canonical(), "an IPv4-mapped address");
}

fn assert_unique<T: std::fmt::Debug + Eq + std::hash::Hash>(items: impl IntoIterator<Item = T>) {
    let mut seen = std::collections::HashSet::new();
    for item in items {
        let shown = format!("{item:?}");
        assert!(seen.insert(item), "{shown} comes twice");
    }
}

/// JSON is YAML, and so a way to write a configuration that shares nothing with the parser.
fn reads_the_same_when_written(config: &Config) {
    let namespaces = match &config.namespaces {
        NetnsScope::Own => json!("own"),
        NetnsScope::All => json!("all"),
        NetnsScope::Paths(paths) => json!(paths),
        // Not written: it follows from `kubernetes`.
        NetnsScope::Pods => json!(null),
    };
    let file = match &config.kubernetes {
        Some(kubernetes) => json!({
            "kubernetes": {
                "services": kubernetes.services.iter().map(written_of_cluster).collect::<Vec<_>>(),
                "publish_every": format!("{}ms", kubernetes.publish_every.as_millis()),
                "hold_for": format!("{}ms", kubernetes.hold_for.as_millis()),
                "place": if kubernetes.place { "on" } else { "off" },
            },
            "mode": config.effect.name(),
            "fail_open_after": format!("{}ms", config.fail_open_after.as_millis()),
        }),
        None => json!({
        "services": written_entries(config),
        "mode": config.effect.name(),
        "fail_open_after": format!("{}ms", config.fail_open_after.as_millis()),
        "namespaces": namespaces,
        }),
    };
    let file = file.to_string();
    // JSON leaves characters as they are that YAML wants escaped.
    if file.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        assert_eq!(Config::parse(&file).as_ref(), Ok(config), "{file}");
    }
}

fn written_keepalive(keepalive: Option<Keepalive>) -> Value {
    keepalive.map_or(json!("off"), |keepalive| {
        json!({
            "idle": format!("{}s", keepalive.idle),
            "interval": format!("{}s", keepalive.interval),
            "probes": keepalive.probes,
        })
    })
}

fn written_of_cluster(service: &ClusterService) -> Value {
    let mut written = json!({
        "name": service.name,
        "match": service.matching.name(),
        "policy": service.policy.name(),
        "exempt": service.exempt.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "health": if service.health { "on" } else { "off" },
        "port": match &service.port {
            PortChoice::Number(port) => json!(port),
            PortChoice::Name(name) => json!(name),
        },
        "keepalive": written_keepalive(service.keepalive),
    });
    match &service.of {
        ServiceChoice::Named { namespace, name } => {
            written["service"] = json!(format!("{namespace}/{name}"));
        }
        ServiceChoice::Selected {
            namespace,
            selectors,
        } => {
            // Several are the default, which has no spelling.
            if let [selector] = &selectors[..] {
                written["selector"] = json!(selector);
            }
            if let Some(namespace) = namespace {
                written["namespace"] = json!(namespace);
            }
        }
    }
    match &service.quota {
        ClusterQuota::Unlimited => {}
        ClusterQuota::Fixed(limit) => written["quota"] = json!({"per_backend": limit}),
        ClusterQuota::Shared {
            input,
            headroom_percent,
            min_quota,
        } => {
            written["quota"] = written_input(input);
            written["quota"]["headroom"] = json!(format!("{headroom_percent}%"));
            written["quota"]["min_quota"] = json!(min_quota);
        }
    }
    written
}

fn written_input(input: &ClusterInput) -> Value {
    match input {
        ClusterInput::Clients {
            clients,
            connections_per_client,
        } => json!({"clients": clients, "connections_per_client": connections_per_client}),
        ClusterInput::Pods(classes) => {
            json!({"pods": classes.iter().map(written_class).collect::<Vec<_>>()})
        }
        ClusterInput::Observed { window } => {
            json!({"observed": format!("{}ms", window.as_millis())})
        }
    }
}

fn written_class(class: &PodClass) -> Value {
    let mut written = json!({"selector": class.selector, "connections": class.connections});
    if let Some(namespace) = &class.namespace {
        written["namespace"] = json!(namespace);
    }
    written
}

/// The entries in an order that both lists have.
fn written_entries(config: &Config) -> Vec<Value> {
    let mut entries = Vec::new();
    let mut services = config.services.iter();
    for connect in &config.connects {
        let mut entry = json!({"name": connect.name});
        if config.services.iter().any(|one| one.name == connect.name) {
            for service in services.by_ref() {
                entry = written(service);
                if service.name == connect.name {
                    break;
                }
                entries.push(entry.take());
            }
        }
        entry["connect"] = written_connect(connect);
        entries.push(entry);
    }
    entries.extend(services.map(written));
    entries
}

fn written_connect(connect: &Connect) -> Value {
    let endpoint = |address: SocketAddr, weight| json!({"address": address, "weight": weight});
    let endpoints = connect.endpoints.iter();
    json!({
        "to": connect.to,
        "endpoints": endpoints.map(|one| endpoint(one.address, one.weight)).collect::<Vec<_>>(),
    })
}

fn written(service: &Service) -> Value {
    let mut written = json!({
        "name": service.name,
        "port": service.port,
        "policy": service.policy.name(),
        "exempt": service.exempt.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "keepalive": written_keepalive(service.keepalive),
    });
    if let Some(address) = service.address {
        written["address"] = json!(address);
    }
    if let Some(backends) = &service.backends {
        let backend = |address: SocketAddr, weight| json!({"address": address, "weight": weight});
        let backends = backends.iter().map(|one| backend(one.address, one.weight));
        written["backends"] = backends.collect();
    }
    match &service.quota {
        QuotaRule::Unlimited => {}
        QuotaRule::Fixed(limit) => written["quota"] = json!({"per_backend": limit}),
        QuotaRule::Computed {
            clients,
            connections_per_client,
            headroom_percent,
            min_quota,
        } => {
            written["quota"] = json!({
                "connections_per_client": connections_per_client,
                "headroom": format!("{headroom_percent}%"),
                "min_quota": min_quota,
            });
            if let Some(clients) = clients {
                written["quota"]["clients"] = json!(clients);
            }
        }
    }
    written
}
