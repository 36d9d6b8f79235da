//! From located YAML to a valid section `kubernetes`.

use kube::core::Selector;

use super::{
    ClusterInput, ClusterQuota, ClusterService, DEFAULT_HOLD_FOR, DEFAULT_PORT,
    DEFAULT_PUBLISH_EVERY, DEFAULT_SELECTORS, Kubernetes, MAX_POD_CLASSES, Match, PodClass,
    PortChoice, ServiceChoice,
    conflicts::check_choices,
    error::Result,
    fields::Fields,
    selector::selector,
    values::{
        Time, clients, connections, exempt, headroom, is_on, keepalive, label, min_quota, moving,
        per_backend, policy, port, quota_fields, service_entries, service_name,
    },
    yaml::{Entry, Node, Value, shown},
};

const SMALLEST: &str = "start with `kubernetes: {services: [{name: agents}]}`";

const PUBLISH_EVERY: Time = Time {
    key: "publish_every",
    least: 500,
    most: 60_000,
    shorter: "the API server would have much to write",
    longer: "quotas would lag behind",
    example: "2s",
};

const HOLD_FOR: Time = Time {
    key: "hold_for",
    least: 10_000,
    most: 86_400_000,
    shorter: "a restart of the API server alone would lift every quota",
    longer: "quotas of a cluster long changed would refuse clients",
    example: "5m",
};

const OBSERVED: Time = Time {
    key: "observed",
    least: 60_000,
    most: 86_400_000,
    shorter: "clients that are just reconnecting would be forgotten",
    longer: "clients long gone would count for days",
    example: "10m",
};

pub(super) fn kubernetes(node: &Node) -> Result<Kubernetes> {
    let fields = Fields::of(node, "kubernetes")?;
    let nodes = fields.required("services", |node| service_entries(node, SMALLEST))?;
    let services = nodes.iter().map(service).collect::<Result<Vec<_>>>()?;
    check_choices(&services, nodes)?;
    Ok(Kubernetes {
        services,
        publish_every: fields
            .optional("publish_every", |node| PUBLISH_EVERY.read(node))?
            .unwrap_or(DEFAULT_PUBLISH_EVERY),
        hold_for: fields
            .optional("hold_for", |node| HOLD_FOR.read(node))?
            .unwrap_or(DEFAULT_HOLD_FOR),
        place: is_on(&fields, "place")?,
    })
}

fn service(node: &Node) -> Result<ClusterService> {
    let fields = Fields::of(node, "kubernetes.services")?;
    let name = fields.required("name", service_name)?;
    Ok(ClusterService {
        moving: moving(&fields, &name)?,
        rebalance: is_on(&fields, "rebalance")?,
        name,
        of: choice(&fields)?,
        port: fields
            .optional("port", port_choice)?
            .unwrap_or(PortChoice::Number(DEFAULT_PORT)),
        matching: fields.optional("match", matching)?.unwrap_or_default(),
        policy: policy(&fields)?,
        quota: fields
            .optional("quota", quota)?
            .unwrap_or(ClusterQuota::Unlimited),
        exempt: exempt(&fields)?,
        health: is_on(&fields, "health")?,
        keepalive: keepalive(&fields, "kubernetes.services.keepalive")?,
    })
}

fn choice(fields: &Fields) -> Result<ServiceChoice> {
    let named = fields.optional("service", |node| {
        fields.none_of(&["selector", "namespace"], |key| {
            format!(
                "`{key}` beside `service`, which names one Service; keep `service: namespace/name` for this one, or `selector` and `namespace` for all with these labels"
            )
        })?;
        service_of(node)
    })?;
    if let Some(named) = named {
        return Ok(named);
    }
    let one = fields.optional("selector", parsed_selector)?;
    Ok(ServiceChoice::Selected {
        namespace: fields.optional("namespace", namespace)?,
        selectors: one.map_or_else(
            || DEFAULT_SELECTORS.map(str::to_owned).into(),
            |(text, _)| vec![text],
        ),
    })
}

fn service_of(node: &Node) -> Result<ServiceChoice> {
    let text = node.scalar("a Service", "skywalking/skywalking-oap")?;
    let Some((namespace, name)) = text.split_once('/') else {
        return node.fail(format!(
            "the Service `{}` has no namespace; write NAMESPACE/NAME, for example skywalking/skywalking-oap",
            shown(text)
        ));
    };
    Ok(ServiceChoice::Named {
        namespace: label(node, "namespace", namespace)?,
        name: label(node, "Service's name", name)?,
    })
}

fn namespace(node: &Node) -> Result<String> {
    label(node, "namespace", node.scalar("a namespace", "skywalking")?)
}

fn parsed_selector(node: &Node) -> Result<(String, Selector)> {
    let text = node.scalar("a selector", "app=oap")?.trim();
    match selector(text) {
        Ok(parsed) => Ok((text.to_owned(), parsed)),
        Err(error) => node.fail(format!(
            "the selector `{}` is not possible: {error}; write it as for `kubectl get -l`, for example app=oap,tier!=test or \"app in (oap,collector)\"",
            shown(text)
        )),
    }
}

fn port_choice(node: &Node) -> Result<PortChoice> {
    let text = node.scalar("a port", "11800")?;
    if text.bytes().any(|byte| byte.is_ascii_alphabetic()) {
        return label(node, "port's name", text).map(PortChoice::Name);
    }
    port(node).map(PortChoice::Number)
}

fn matching(node: &Node) -> Result<Match> {
    let text = node.scalar("what is matched", "endpoints")?;
    match Match::ALL.into_iter().find(|one| one.name() == text) {
        Some(matching) => Ok(matching),
        None => node.fail(format!(
            "match `{}` is not understood; write service (connects to the Service's addresses) or endpoints (to the pods' own addresses, too)",
            shown(text)
        )),
    }
}

fn quota(node: &Node) -> Result<ClusterQuota> {
    let fields = quota_fields(node, "kubernetes.services.quota")?;
    let source = source(node, &fields)?;
    if let Some(limit) = per_backend(&fields)? {
        return Ok(ClusterQuota::Fixed(limit));
    }
    Ok(ClusterQuota::Shared {
        input: input(source, &fields)?,
        headroom_percent: headroom(&fields)?,
        min_quota: min_quota(&fields)?,
    })
}

/// The one key that says where the number comes from.
fn source<'a>(node: &Node, fields: &Fields<'a>) -> Result<&'a Entry> {
    let sources = ["per_backend", "clients", "pods", "observed"];
    let Some(first) = fields.first(&sources) else {
        return node.fail(
            "`quota` does not say where its number comes from; write one of `observed: 10m`, `pods: […]`, `clients: N` or `per_backend: N` in it, or leave `quota` out for no limit",
        );
    };
    let others = sources.map(|key| if key == first.key { "" } else { key });
    fields.none_of(&others, |second| {
        format!(
            "`{second}` beside `{}`: the number comes from one of them; keep one of the two",
            first.key
        )
    })?;
    if ["pods", "observed"].contains(&&*first.key) {
        fields.none_of(&["connections_per_client"], |each| {
            format!(
                "`{each}` beside `{}`; it goes with `clients`: remove it (a class of `pods` has `connections`)",
                first.key
            )
        })?;
    }
    Ok(first)
}

fn input(source: &Entry, fields: &Fields) -> Result<ClusterInput> {
    match &*source.key {
        "clients" => Ok(ClusterInput::Clients {
            clients: clients(&source.node)?,
            connections_per_client: connections(fields, "connections_per_client")?,
        }),
        "pods" => pods(&source.node).map(ClusterInput::Pods),
        _ => OBSERVED
            .read(&source.node)
            .map(|window| ClusterInput::Observed { window }),
    }
}

fn pods(node: &Node) -> Result<Vec<PodClass>> {
    let nodes = node.list("`pods`", "- {selector: \"agent=java\", connections: 1}")?;
    if nodes.is_empty() {
        return node.fail(
            "`pods` is an empty list: no pod would keep a connection; list the pods that are monitored, or leave `quota` out for no limit",
        );
    }
    if let Some(node) = nodes.get(MAX_POD_CLASSES) {
        return node.fail(format!(
            "{} classes of pods, a quota can have at most {MAX_POD_CLASSES}; join those with as many connections: \"app in (one,other)\"",
            nodes.len()
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
            return node.fail(format!(
                "the pods `{}` are listed twice, first on line {first}; keep one of the two, with the connections of both",
                shown(&class.selector)
            ));
        }
        seen.push((class.namespace.clone(), selector, node.place.line));
        classes.push(class);
    }
    Ok(classes)
}

fn pod_class(node: &Node) -> Result<(PodClass, Selector)> {
    if matches!(*node.value, Value::Scalar(_)) {
        return node.fail(
            "a class of pods must be `key: value` settings, this is a single value; write {selector: \"agent=java\", connections: 1}",
        );
    }
    let fields = Fields::of(node, "kubernetes.services.quota.pods")?;
    let (text, selector) = fields.required("selector", parsed_selector)?;
    let class = PodClass {
        namespace: fields.optional("namespace", namespace)?,
        selector: text,
        connections: connections(&fields, "connections")?,
    };
    Ok((class, selector))
}
