//! The rules that concern several services at once.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
};

use kube::core::Expression;

use super::{
    Backend, ClusterService, MAX_BACKENDS, Service, ServiceChoice,
    error::Result,
    selector::selector,
    yaml::{Node, Value},
};

/// Checks ports and backends that collide. `nodes` are the services in the file.
pub(super) fn check_services(services: &[Service], nodes: &[Node]) -> Result<()> {
    check_ports(services, nodes)?;
    check_backends(services, nodes)
}

/// Checks names, and services of a cluster that select the same. `nodes` are they in the file.
pub(super) fn check_choices(services: &[ClusterService], nodes: &[Node]) -> Result<()> {
    check_names(services.iter().map(|service| &*service.name), nodes)?;
    for (index, (second, node)) in services.iter().zip(nodes).enumerate() {
        let mut before = services[..index].iter().zip(nodes);
        if let Some((first, first_node)) = before.find(|(first, _)| overlap(first, second)) {
            return node.fail(format!(
                "`{}` selects the same Services and port as `{}` on line {}; a port is guarded for one of them: keep one, or give them another `service`, `selector`, `namespace` or `port`",
                second.name, first.name, first_node.place.line
            ));
        }
    }
    Ok(())
}

/// Whether it is certain, without a look at the cluster, that one selects what the other selects.
fn overlap(one: &ClusterService, other: &ClusterService) -> bool {
    use ServiceChoice::Selected;
    one.port == other.port
        && match (&one.of, &other.of) {
            (
                Selected {
                    namespace: here,
                    selectors: one,
                },
                Selected {
                    namespace: there,
                    selectors: other,
                },
            ) => {
                let everywhere = here.is_none() || there.is_none();
                (everywhere || here == there) && requirements(one) == requirements(other)
            }
            (one, other) => one == other,
        }
}

/// What selectors require, however they are spelled.
fn requirements(selectors: &[String]) -> BTreeSet<Option<BTreeSet<Expression>>> {
    selectors
        .iter()
        .map(|text| Some(selector(text).ok()?.into_iter().collect()))
        .collect()
}

/// Checks names that are given twice. `nodes` are the entries that have them.
pub(super) fn check_names<'a>(names: impl Iterator<Item = &'a str>, nodes: &[Node]) -> Result<()> {
    let mut seen = HashMap::new();
    for (name, node) in names.zip(nodes) {
        let place = node.at("name").place;
        if let Some(first) = seen.insert(name, place.line) {
            return place.fail(format!(
                "a second service is named `{name}`, the first on line {first}; give each service a name of its own"
            ));
        }
    }
    Ok(())
}

fn check_ports(services: &[Service], nodes: &[Node]) -> Result<()> {
    let mut seen = HashMap::new();
    for (service, node) in services.iter().zip(nodes) {
        let place = node.at("port").place;
        let before = seen.insert((service.port, service.address), (&service.name, place.line));
        if let Some((first, line)) = before {
            return place.fail(format!(
                "`{}` is on the same port and address as `{first}` on line {line}: {}; change a port, or give each service an `address` of its own",
                service.name,
                destination(service)
            ));
        }
    }
    Ok(())
}

fn check_backends(services: &[Service], nodes: &[Node]) -> Result<()> {
    let mut seen: HashMap<SocketAddr, (&str, usize)> = HashMap::new();
    for (service, backend, node) in backends(services, nodes) {
        let Backend { address, .. } = backend;
        if let Some((owner, first)) = seen.insert(*address, (&service.name, node.place.line)) {
            let other = if owner == service.name {
                format!("listed twice, first on line {first}")
            } else {
                format!("already one of `{owner}`, on line {first}")
            };
            return node.fail(format!(
                "the backend {address} is {other}; a listener serves one service: keep one of the two"
            ));
        }
        if seen.len() > MAX_BACKENDS {
            return node.fail(format!(
                "more than {MAX_BACKENDS} backends in all; remove some, or run several daemons with a --state-dir each"
            ));
        }
        if let Some(shadow) = services.iter().find(|other| hides(other, backend)) {
            return node.fail(format!(
                "the backend {address} is where clients of `{}` connect to ({}), so it could not be told from the service; let it listen on another port, or give the service an `address` that no backend has",
                shadow.name,
                destination(shadow)
            ));
        }
    }
    Ok(())
}

/// Every backend with its service and the value in the file that lists it.
fn backends<'a>(
    services: &'a [Service],
    nodes: &'a [Node],
) -> impl Iterator<Item = (&'a Service, &'a Backend, &'a Node)> {
    services.iter().zip(nodes).flat_map(|(service, node)| {
        let listed: &[Node] = match &*node.at("backends").value {
            Value::List(listed) => listed,
            _ => &[],
        };
        let backends = service.backends.iter().flatten();
        backends
            .zip(listed)
            .map(move |(backend, node)| (service, backend, node))
    })
}

/// Whether a connection to `backend` itself would be one to `service`.
fn hides(service: &Service, backend: &Backend) -> bool {
    service.port == backend.address.port()
        && service
            .address
            .is_none_or(|address| address == backend.address.ip())
}

/// What clients of a service connect to, in words.
fn destination(service: &Service) -> String {
    match service.address {
        Some(address) => SocketAddr::new(address, service.port).to_string(),
        None => format!("port {} on any address", service.port),
    }
}
