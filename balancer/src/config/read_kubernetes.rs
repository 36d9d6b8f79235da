//! From located YAML to a valid section `kubernetes`.

use balancer_common::Policy;
use kube::core::Selector;

use super::{
    ClusterInput, ClusterQuota, ClusterService, DEFAULT_HOLD_FOR, DEFAULT_MIN_QUOTA, DEFAULT_PORT,
    DEFAULT_PUBLISH_EVERY, DEFAULT_SELECTORS, Kubernetes, MAX_POD_CLASSES, PodClass, PortChoice,
    ServiceChoice,
    conflicts::{LocatedChoice, check_choices},
    error::at_line,
    fields::{Fields, Result, list, scalar},
    selector::selector,
    values::{
        Time, clients, connections_each, entries, exempt, headroom, label, min_quota,
        nothing_computed, per_backend, per_client, policy, port, service_name,
    },
    yaml::{Entry, Node, Value, shown},
};

const SMALLEST: &str = "start with\n  kubernetes:\n    services:\n      - name: agents";
const SELECTOR_ADVICE: &str = "write it as for `kubectl get -l`, for example app=oap,tier!=test or \"app in (oap,collector)\"";

const PUBLISH_EVERY: Time = Time {
    key: "publish_every",
    bounds: 500..=60_000,
    from: "500ms",
    to: "1m",
    less: "the API server would have much to write",
    more: "quotas would lag behind",
    example: "2s",
};

const HOLD_FOR: Time = Time {
    key: "hold_for",
    bounds: 10_000..=86_400_000,
    from: "10s",
    to: "24h",
    less: "a restart of the API server alone would lift every quota",
    more: "quotas of a cluster long changed would refuse clients",
    example: "5m",
};

const OBSERVED: Time = Time {
    key: "observed",
    bounds: 60_000..=86_400_000,
    from: "1m",
    to: "24h",
    less: "clients that are just reconnecting would be forgotten",
    more: "clients long gone would count for days",
    example: "10m",
};

pub(super) fn kubernetes(node: &Node) -> Result<Kubernetes> {
    let fields = Fields::of(
        node,
        "`kubernetes`",
        &["services", "publish_every", "hold_for"],
    )?;
    let services = entries(fields.required("services")?, SMALLEST)?
        .iter()
        .map(service)
        .collect::<Result<Vec<_>>>()?;
    check_choices(&services)?;
    Ok(Kubernetes {
        services: services
            .into_iter()
            .map(|located| located.service)
            .collect(),
        publish_every: fields
            .optional("publish_every", |node| PUBLISH_EVERY.read(node))?
            .unwrap_or(DEFAULT_PUBLISH_EVERY),
        hold_for: fields
            .optional("hold_for", |node| HOLD_FOR.read(node))?
            .unwrap_or(DEFAULT_HOLD_FOR),
    })
}

fn service(node: &Node) -> Result<LocatedChoice> {
    let fields = Fields::of(
        node,
        "a service",
        &[
            "name",
            "service",
            "selector",
            "namespace",
            "port",
            "policy",
            "quota",
            "exempt",
        ],
    )?;
    let name = fields.required("name")?;
    Ok(LocatedChoice {
        name_line: name.line,
        line: node.line,
        service: ClusterService {
            name: service_name(name)?,
            of: choice(&fields)?,
            port: fields
                .optional("port", port_choice)?
                .unwrap_or(PortChoice::Number(DEFAULT_PORT)),
            policy: fields
                .optional("policy", policy)?
                .unwrap_or(Policy::LeastConnections),
            quota: fields
                .optional("quota", quota)?
                .unwrap_or(ClusterQuota::Unlimited),
            exempt: fields.optional("exempt", exempt)?.unwrap_or_default(),
        },
    })
}

fn choice(fields: &Fields) -> Result<ServiceChoice> {
    if let Some(named) = fields.get("service") {
        let other = fields
            .entries
            .iter()
            .find(|entry| ["selector", "namespace"].contains(&entry.key.as_str()));
        if let Some(Entry { key, line, .. }) = other {
            return Err(at_line(
                *line,
                format!("`{key}` beside `service`, which names one Service"),
                "keep `service: namespace/name` for this one, or `selector` and `namespace` for all with these labels",
            ));
        }
        return service_of(named);
    }
    let selectors = match fields.get("selector") {
        Some(node) => vec![selector_text(node)?],
        None => DEFAULT_SELECTORS.map(str::to_owned).into(),
    };
    Ok(ServiceChoice::Selected {
        namespace: fields.optional("namespace", namespace)?,
        selectors,
    })
}

fn service_of(node: &Node) -> Result<ServiceChoice> {
    let text = scalar(node, "a Service", "skywalking/skywalking-oap")?;
    let Some((namespace, name)) = text.split_once('/') else {
        return Err(at_line(
            node.line,
            format!("the Service `{}` has no namespace", shown(text)),
            "write NAMESPACE/NAME, for example skywalking/skywalking-oap",
        ));
    };
    Ok(ServiceChoice::Named {
        namespace: label(node, "namespace", namespace)?,
        name: label(node, "Service's name", name)?,
    })
}

fn namespace(node: &Node) -> Result<String> {
    label(
        node,
        "namespace",
        scalar(node, "a namespace", "skywalking")?,
    )
}

fn selector_text(node: &Node) -> Result<String> {
    parsed_selector(node).map(|(text, _)| text)
}

fn parsed_selector(node: &Node) -> Result<(String, Selector)> {
    let text = scalar(node, "a selector", "app=oap")?.trim();
    match selector(text) {
        Ok(parsed) => Ok((text.to_owned(), parsed)),
        Err(error) => Err(at_line(
            node.line,
            format!("the selector `{}` is not possible: {error}", shown(text)),
            SELECTOR_ADVICE,
        )),
    }
}

fn port_choice(node: &Node) -> Result<PortChoice> {
    let text = scalar(node, "a port", "11800")?;
    if text.bytes().any(|byte| byte.is_ascii_alphabetic()) {
        return label(node, "port's name", text).map(PortChoice::Name);
    }
    port(node).map(PortChoice::Number)
}

/// The keys of a quota that say where its number comes from.
const SOURCES: [&str; 4] = ["per_backend", "clients", "pods", "observed"];

fn quota(node: &Node) -> Result<ClusterQuota> {
    const COMPUTED: [&str; 3] = ["connections_per_client", "headroom", "min_quota"];
    let fields = Fields::of(
        node,
        "`quota`",
        &[
            "per_backend",
            "clients",
            "connections_per_client",
            "pods",
            "observed",
            "headroom",
            "min_quota",
        ],
    )?;
    let source = source(node, &fields)?;
    if source.key == "per_backend" {
        nothing_computed(&fields, &COMPUTED)?;
        return Ok(ClusterQuota::Fixed(per_backend(&source.node)?));
    }
    if source.key != "clients"
        && let Some(each) = fields.get("connections_per_client")
    {
        return Err(at_line(
            each.line,
            format!("`connections_per_client` beside `{}`", source.key),
            "it goes with `clients`: remove it (a class of `pods` has `connections`)",
        ));
    }
    Ok(ClusterQuota::Shared {
        input: input(source, &fields)?,
        headroom_percent: fields.optional("headroom", headroom)?.unwrap_or(0),
        min_quota: fields
            .optional("min_quota", min_quota)?
            .unwrap_or(DEFAULT_MIN_QUOTA),
    })
}

/// The one key that says where the number comes from.
fn source<'a>(node: &Node, fields: &Fields<'a>) -> Result<&'a Entry> {
    let mut found = fields
        .entries
        .iter()
        .filter(|entry| SOURCES.contains(&entry.key.as_str()));
    let Some(first) = found.next() else {
        return Err(at_line(
            node.line,
            "`quota` does not say where its number comes from",
            "write one of `observed: 10m`, `pods: […]`, `clients: N` or `per_backend: N` in it, or leave `quota` out for no limit",
        ));
    };
    match found.next() {
        Some(second) => Err(at_line(
            second.line,
            format!(
                "`{}` beside `{}`: the number comes from one of them",
                second.key, first.key
            ),
            "keep one of the two",
        )),
        None => Ok(first),
    }
}

fn input(source: &Entry, fields: &Fields) -> Result<ClusterInput> {
    match source.key.as_str() {
        "clients" => Ok(ClusterInput::Clients {
            clients: clients(&source.node)?,
            connections_per_client: per_client(fields)?,
        }),
        "pods" => pods(&source.node).map(ClusterInput::Pods),
        _ => OBSERVED
            .read(&source.node)
            .map(|window| ClusterInput::Observed { window }),
    }
}

fn pods(node: &Node) -> Result<Vec<PodClass>> {
    let nodes = list(
        node,
        "`pods`",
        "- {selector: \"agent=java\", connections: 1}",
    )?;
    if nodes.is_empty() {
        return Err(at_line(
            node.line,
            "`pods` is an empty list: no pod would keep a connection",
            "list the pods that are monitored, or leave `quota` out for no limit",
        ));
    }
    if nodes.len() > MAX_POD_CLASSES {
        return Err(at_line(
            nodes[MAX_POD_CLASSES].line,
            format!(
                "{} classes of pods, a quota can have at most {MAX_POD_CLASSES}",
                nodes.len()
            ),
            "join those with as many connections: \"app in (one,other)\"",
        ));
    }
    let mut classes = Vec::new();
    let mut seen: Vec<(Option<String>, Selector, usize)> = Vec::new();
    for node in nodes {
        let (class, selector) = pod_class(node)?;
        let same = seen
            .iter()
            .find(|(namespace, other, _)| *namespace == class.namespace && *other == selector);
        if let Some((_, _, first)) = same {
            return Err(at_line(
                node.line,
                format!(
                    "the pods `{}` are listed twice, first on line {first}",
                    shown(&class.selector)
                ),
                "keep one of the two, with the connections of both",
            ));
        }
        seen.push((class.namespace.clone(), selector, node.line));
        classes.push(class);
    }
    Ok(classes)
}

fn pod_class(node: &Node) -> Result<(PodClass, Selector)> {
    if matches!(*node.value, Value::Scalar(_)) {
        return Err(at_line(
            node.line,
            "a class of pods must be `key: value` settings, this is a single value",
            "write {selector: \"agent=java\", connections: 1}",
        ));
    }
    let fields = Fields::of(
        node,
        "a class of pods",
        &["selector", "namespace", "connections"],
    )?;
    let (text, selector) = parsed_selector(fields.required("selector")?)?;
    let connections = fields
        .optional("connections", |node| connections_each(node, "connections"))?
        .unwrap_or(1);
    let class = PodClass {
        namespace: fields.optional("namespace", namespace)?,
        selector: text,
        connections,
    };
    Ok((class, selector))
}
