//! The rules that concern several services at once.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
};

use kube::core::Expression;

use super::{
    Backend, ClusterService, MAX_BACKENDS, Service, ServiceChoice, error::at_line, fields::Result,
    selector::selector,
};

/// A service with the lines that errors about several services together name.
pub(super) struct Located {
    pub(super) service: Service,
    pub(super) name_line: usize,
    pub(super) port_line: usize,
    pub(super) backend_lines: Vec<usize>,
}

/// A service of a cluster with the lines that errors about several services together name.
pub(super) struct LocatedChoice {
    pub(super) service: ClusterService,
    pub(super) name_line: usize,
    /// Where it begins.
    pub(super) line: usize,
}

/// Checks what no service can know of itself: names, ports and backends that collide.
pub(super) fn check_conflicts(services: &[Located]) -> Result<()> {
    check_names(
        services
            .iter()
            .map(|located| (&*located.service.name, located.name_line)),
    )?;
    check_ports(services)?;
    check_backends(services)
}

/// The same for services of a cluster: names, and Services that two of them select.
pub(super) fn check_choices(services: &[LocatedChoice]) -> Result<()> {
    check_names(
        services
            .iter()
            .map(|located| (&*located.service.name, located.name_line)),
    )?;
    for (index, second) in services.iter().enumerate() {
        let same = |first: &&LocatedChoice| overlap(&first.service, &second.service);
        if let Some(first) = services[..index].iter().find(same) {
            return Err(at_line(
                second.line,
                format!(
                    "`{}` selects the same Services and port as `{}` on line {}",
                    second.service.name, first.service.name, first.line
                ),
                "a port is guarded for one of them: keep one, or give them another `service`, `selector`, `namespace` or `port`",
            ));
        }
    }
    Ok(())
}

/// Whether it is certain, without a look at the cluster, that what one selects the other selects too.
fn overlap(one: &ClusterService, other: &ClusterService) -> bool {
    one.port == other.port
        && match (&one.of, &other.of) {
            (
                ServiceChoice::Selected {
                    namespace: one_namespace,
                    selectors: one,
                },
                ServiceChoice::Selected {
                    namespace: other_namespace,
                    selectors: other,
                },
            ) => {
                let everywhere = one_namespace.is_none() || other_namespace.is_none();
                (everywhere || one_namespace == other_namespace)
                    && requirements(one) == requirements(other)
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

fn check_names<'a>(services: impl Iterator<Item = (&'a str, usize)>) -> Result<()> {
    let mut seen = HashMap::new();
    for (name, line) in services {
        if let Some(first) = seen.insert(name, line) {
            return Err(at_line(
                line,
                format!("a second service is named `{name}`, the first on line {first}"),
                "give each service a name of its own",
            ));
        }
    }
    Ok(())
}

fn check_ports(services: &[Located]) -> Result<()> {
    let mut seen = HashMap::new();
    for Located {
        service, port_line, ..
    } in services
    {
        if let Some((first, line)) =
            seen.insert((service.port, service.address), (&service.name, port_line))
        {
            return Err(at_line(
                *port_line,
                format!(
                    "`{}` is on the same port and address as `{first}` on line {line}: {}",
                    service.name,
                    place(service)
                ),
                "change a port, or give each service an `address` of its own",
            ));
        }
    }
    Ok(())
}

fn check_backends(services: &[Located]) -> Result<()> {
    let mut seen: HashMap<SocketAddr, (&str, usize)> = HashMap::new();
    for Located {
        service,
        backend_lines,
        ..
    } in services
    {
        for (backend, line) in service.backends.iter().flatten().zip(backend_lines) {
            if let Some((owner, first)) = seen.insert(backend.address, (&service.name, *line)) {
                let problem = if owner == service.name {
                    format!(
                        "the backend {} is listed twice, first on line {first}",
                        backend.address
                    )
                } else {
                    format!(
                        "the backend {} is already one of `{owner}`, on line {first}",
                        backend.address
                    )
                };
                return Err(at_line(
                    *line,
                    problem,
                    "a listener serves one service: keep one of the two",
                ));
            }
            if seen.len() > MAX_BACKENDS {
                return Err(at_line(
                    *line,
                    format!("more than {MAX_BACKENDS} backends in all"),
                    "remove some, or run several daemons with a --state-dir each",
                ));
            }
            if let Some(shadow) = services
                .iter()
                .map(|located| &located.service)
                .find(|other| hides(other, backend))
            {
                return Err(at_line(
                    *line,
                    format!(
                        "the backend {} is where clients of `{}` connect to ({}), so it could not be told from the service",
                        backend.address,
                        shadow.name,
                        place(shadow)
                    ),
                    "let it listen on another port, or give the service an `address` that no backend has",
                ));
            }
        }
    }
    Ok(())
}

/// Whether a connection to `backend` itself would be one to `service`.
fn hides(service: &Service, backend: &Backend) -> bool {
    service.port == backend.address.port()
        && service
            .address
            .is_none_or(|address| address == backend.address.ip())
}

fn place(service: &Service) -> String {
    match service.address {
        Some(address) => SocketAddr::new(address, service.port).to_string(),
        None => format!("port {} on any address", service.port),
    }
}
