//! Which netns an explanation is for, as arguments.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    dataplane::Snapshot,
    discover::OpenNetns,
    kubernetes::{BackendStatus, ClusterStatus, ObjectName},
    sys::netns,
};

/// Where `ip netns` keeps the netns that have names.
const NAMED: &str = "/run/netns";

/// A netns as an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Netns {
    /// The cookie, as `status` shows it.
    Cookie(u64),
    /// A file that stands for it.
    File(PathBuf),
}

impl FromStr for Netns {
    type Err = String;

    /// A path has a slash, a cookie only digits; anything else is a name.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("write a name, a file or a number".to_owned());
        }
        if text.contains('/') {
            return Ok(Self::File(text.into()));
        }
        Ok(match text.parse() {
            Ok(cookie) => Self::Cookie(cookie),
            Err(_) => Self::File(Path::new(NAMED).join(text)),
        })
    }
}

/// Opens the netns that a file stands for.
pub(super) fn open(path: &Path) -> Result<OpenNetns> {
    let file = netns::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => anyhow!("there is no {}{}", path.display(), named(path)),
        _ => anyhow!(error).context(format!("cannot open {}", path.display())),
    })?;
    let cookie = netns::cookie_of(&file).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => anyhow!(
            "{} is no network namespace; such files are {NAMED}/NAME and /proc/PID/ns/net",
            path.display()
        ),
        _ => anyhow!(error).context(format!(
            "cannot enter the network namespace {} (needs CAP_SYS_ADMIN)",
            path.display()
        )),
    })?;
    Ok(OpenNetns { cookie, file })
}

/// The names that there are, where one of them was looked for.
fn named(path: &Path) -> String {
    if path.parent() != Some(Path::new(NAMED)) {
        return String::new();
    }
    let entries = fs::read_dir(NAMED).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    names.sort();
    let names: Vec<_> = names.iter().map(|name| name.to_string_lossy()).collect();
    match names.len() {
        0 => format!("; {NAMED} has no network namespace"),
        _ => format!("; {NAMED} has {}", names.join(", ")),
    }
}

/// A pod as an argument.
pub(in crate::cli) fn pod(text: &str) -> Result<ObjectName, String> {
    match text.split_once('/') {
        Some((namespace, name))
            if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
        {
            Ok(ObjectName {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            })
        }
        _ => Err("write namespace/name, as `balancer status --cluster` shows it".to_owned()),
    }
}

/// The slots of the listeners of a pod of this node, one for each port that it serves.
pub(in crate::cli) fn slots_of(cluster: &ClusterStatus, pod: &ObjectName) -> Result<Vec<u32>> {
    let of_pod = of_pod(cluster, pod)?;
    let slots = of_pod.iter().filter_map(|(_, backend)| backend.slot);
    let slots: BTreeSet<u32> = slots.collect();
    if slots.is_empty() {
        bail!(
            "no listener of the pod {pod} is known: it may not have started yet; see `balancer \
             status --cluster`"
        );
    }
    Ok(slots.into_iter().collect())
}

/// A pod of this node, for each of its ports.
fn of_pod<'a>(
    cluster: &'a ClusterStatus,
    pod: &ObjectName,
) -> Result<Vec<(u16, &'a BackendStatus)>> {
    let of_pod: Vec<_> = backends(cluster)
        .filter(|(_, backend)| backend.pod == *pod)
        .collect();
    let Some((_, any)) = of_pod.first() else {
        bail!("no service has a pod {pod}; {}", pods_here(cluster));
    };
    if !is_here(cluster, any) {
        bail!(
            "the pod {pod} is on node {}, and this is node {}: ask the balancer there; {}",
            any.node.as_deref().unwrap_or("?"),
            cluster.node,
            pods_here(cluster)
        );
    }
    Ok(of_pod)
}

/// The slot of the pod's listener on that port.
pub(in crate::cli) fn slot_of(cluster: &ClusterStatus, pod: &ObjectName, port: u16) -> Result<u32> {
    let of_pod = of_pod(cluster, pod)?;
    let mut on_port = of_pod
        .iter()
        .filter(|(served, _)| *served == port)
        .peekable();
    if on_port.peek().is_none() {
        let ports: BTreeSet<_> = of_pod
            .iter()
            .map(|(served, _)| served.to_string())
            .collect();
        bail!(
            "the pod {pod} serves port {}, not {port}",
            Vec::from_iter(ports).join(" and ")
        );
    }
    on_port.find_map(|(_, backend)| backend.slot).with_context(|| {
        format!(
            "no listener on port {port} is known in the pod {pod}: it may not have started yet; \
             see `balancer status --cluster`"
        )
    })
}

/// The pods in each netns of this node that a backend listens in, by its cookie.
pub(in crate::cli) fn pods(cluster: &ClusterStatus, snapshot: &Snapshot) -> Pods {
    let mut pods = Pods::new();
    for (_, backend) in backends(cluster).filter(|(_, backend)| is_here(cluster, backend)) {
        if let Some(cookie) = backend.slot.and_then(|slot| netns_of(snapshot, slot)) {
            pods.entry(cookie).or_default().insert(backend.pod.clone());
        }
    }
    pods
}

/// Pods by the cookies of their netns.
pub(in crate::cli) type Pods = BTreeMap<u64, BTreeSet<ObjectName>>;

/// The netns of a pod of this node that a service has.
pub(super) fn netns_of_pod(
    cluster: &ClusterStatus,
    snapshot: &Snapshot,
    pod: &ObjectName,
) -> Result<u64> {
    let here = pods(cluster, snapshot).into_iter();
    let mut found = here.filter(|(_, pods)| pods.contains(pod));
    let (cookie, _) = found.next().with_context(|| {
        format!(
            "the daemon of this node knows the network namespace of no pod {pod}: it knows those \
             of services. Write the pod's address or the number of one of its processes after \
             --from"
        )
    })?;
    Ok(cookie)
}

/// The netns that a slot's listener is in.
pub(super) fn netns_of(snapshot: &Snapshot, slot: u32) -> Option<u64> {
    let mut backends = snapshot
        .services
        .iter()
        .flat_map(|service| &service.backends);
    let backend = backends.find(|backend| backend.slot == slot)?;
    Some(backend.netns)
}

/// The pods of all groups, with the ports that they serve there.
fn backends(cluster: &ClusterStatus) -> impl Iterator<Item = (u16, &BackendStatus)> {
    cluster.groups.iter().flat_map(|group| {
        let backends = group.backends.iter();
        backends.map(|backend| (group.id.port, backend))
    })
}

fn is_here(cluster: &ClusterStatus, backend: &BackendStatus) -> bool {
    let node = backend.node.as_ref();
    node.is_none_or(|node| *node == cluster.node)
}

fn pods_here(cluster: &ClusterStatus) -> String {
    let pods: BTreeSet<_> = backends(cluster)
        .filter(|(_, backend)| is_here(cluster, backend))
        .map(|(_, backend)| backend.pod.to_string())
        .collect();
    let pods = Vec::from_iter(pods).join(", ");
    match (pods.is_empty(), cluster.complete) {
        (false, true) => format!("those of this node are {pods}"),
        (true, true) => "no service has a pod on this node".to_owned(),
        (_, false) => "the API server has not told the daemon of all pods yet".to_owned(),
    }
}
