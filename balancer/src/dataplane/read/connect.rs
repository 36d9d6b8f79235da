//! Where a connect of this node would go now, and why: the decision of the kernel program on a
//! snapshot of the maps. Nothing is drawn, and nothing is counted.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context as _, Result, bail};
use balancer_common::abi::Frontend;
use balancer_common::place::{PlaceReason, SIDECAR_PORTS};

use super::placing::{EndpointGroupSnapshot, EndpointSnapshot};
use super::snapshot::Snapshot;
use crate::dataplane::paths::Paths;
use crate::dataplane::place_tables::PlaceTables;
use crate::dataplane::programs::Part;
use crate::discover::{Look, OpenNetns, cgroup2_mount, has_address, listening, look_everywhere};
use crate::sys::netns;

/// Who connects.
#[derive(Debug)]
pub struct Client {
    /// The netns that it connects in; `None`: none of this node's is known to have its address.
    netns: Option<OpenNetns>,
    /// How many more netns of this node have its address.
    namesakes: usize,
    /// The ids of its cgroup and of those above; `None`: they are not known.
    cgroups: Option<Vec<u64>>,
}

impl Client {
    /// A process of this node.
    ///
    /// # Errors
    /// When there is none, or it can't be looked at.
    pub fn of_process(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        let file = match netns::open(Path::new(&path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!(
                    "there is no process {pid} here: write the number that `ps` shows on this node"
                )
            }
            opened => opened.with_context(|| format!("cannot open {path} (are we root?)"))?,
        };
        let cookie = netns::cookie_of(&file).with_context(|| {
            format!("cannot enter the network namespace of process {pid} (needs CAP_SYS_ADMIN)")
        })?;
        Ok(Self {
            netns: Some(OpenNetns { cookie, file }),
            namesakes: 0,
            cgroups: cgroups_of(pid).ok(),
        })
    }

    /// Whoever has that address on this node: the network namespace of this command where it has
    /// it, else the first one that does.
    ///
    /// # Errors
    /// When the network namespaces can't be looked at.
    pub fn with_address(address: IpAddr) -> Result<Self> {
        let own = netns::current().context("cannot open this network namespace")?;
        if address.is_loopback() || has_address(address).unwrap_or(false) {
            let cookie = netns::cookie().context("cannot read this network namespace's cookie")?;
            return Ok(Self::in_netns(OpenNetns { cookie, file: own }));
        }
        let (mut first, mut namesakes) = (None, 0);
        for look in look_everywhere()? {
            let Look::Found(netns) = look? else { continue };
            let there = netns::inside(netns.as_fd(), || has_address(address));
            if !there.is_ok_and(|has| has.unwrap_or(false)) {
                continue;
            }
            if first.is_some() {
                namesakes += 1;
            } else {
                first = Some(netns.into());
            }
        }
        Ok(Self {
            netns: first,
            namesakes,
            cgroups: None,
        })
    }

    /// Whoever is in that network namespace.
    pub const fn in_netns(netns: OpenNetns) -> Self {
        Self {
            netns: Some(netns),
            namesakes: 0,
            cgroups: None,
        }
    }
}

/// The ids of a process's cgroup and of those above.
fn cgroups_of(pid: u32) -> Result<Vec<u64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let root = cgroup2_mount()?;
    let own: PathBuf = root.join(path.context("it is in no cgroup2")?);
    let above = own.ancestors().take_while(|path| path.starts_with(&root));
    above.map(|path| Ok(fs::metadata(path)?.ino())).collect()
}

/// Where a connect would go, and why.
#[derive(Debug)]
pub struct ConnectExplanation {
    /// Cookie of the netns that it is made in, where that is known.
    pub netns: Option<u64>,
    /// The group that the address is a frontend of; `None`: it is none.
    pub group: Option<EndpointGroupSnapshot>,
    /// Why; `None`: the kernel program does not look at it.
    pub reason: Option<PlaceReason>,
    /// Where it goes; `None`: to the address itself.
    pub endpoint: Option<EndpointSnapshot>,
    /// All of it in a sentence.
    pub sentence: String,
}

/// Explains a connect to an address.
///
/// # Errors
/// When a map or the socket table can't be read.
pub fn explain(
    tables: &PlaceTables,
    paths: &Paths,
    snapshot: &Snapshot,
    client: &Client,
    to: SocketAddr,
) -> Result<ConnectExplanation> {
    let netns = client.netns.as_ref();
    let mut explanation = ConnectExplanation {
        netns: netns.map(|netns| netns.cookie),
        group: group_of(snapshot, to).cloned(),
        reason: None,
        endpoint: None,
        sentence: String::new(),
    };
    let Some(group) = explanation.group.clone() else {
        explanation.sentence = format!("{to} is no frontend: the connect is left as it is");
        return Ok(explanation);
    };
    if let Some(why) = not_attached(paths, client)? {
        explanation.sentence = format!("{why}: the connect is left as it is");
        return Ok(explanation);
    }
    let alone = left_alone(tables, snapshot, &group, netns, to)?;
    let (reason, chosen) = match alone {
        Some(reason) => (reason, None),
        None => group.next(to.is_ipv4()),
    };
    explanation.reason = Some(reason);
    explanation.endpoint = chosen.filter(|_| reason.is_placed()).cloned();
    explanation.sentence = sentence(&explanation, to);
    explanation.sentence += &whose(client);
    Ok(explanation)
}

/// Which client the answer holds for, where that is not clear.
fn whose(client: &Client) -> String {
    match (&client.netns, client.namesakes) {
        (None, _) => ". No network namespace of this node has the client's address: what is said \
                      holds for one that is not left alone"
            .to_owned(),
        (Some(_), 0) => String::new(),
        (Some(netns), more) => format!(
            ". More than one network namespace of this node has the client's address ({more} more): \
             what is said holds for the one with cookie {}; name a process or a pod after --from \
             for another",
            netns.cookie
        ),
    }
}

/// The group that an address is a frontend of.
pub fn group_of(snapshot: &Snapshot, to: SocketAddr) -> Option<&EndpointGroupSnapshot> {
    let mut groups = snapshot.placing.iter();
    groups.find(|group| group.has_frontend(&to))
}

/// Why the kernel program does not run for a client.
fn not_attached(paths: &Paths, client: &Client) -> Result<Option<String>> {
    let links = Paths::links(&paths.current()).context("cannot list the pinned links")?;
    let mut placing = links
        .iter()
        .filter(|link| link.program.hook.part() == Part::Placing);
    let Some(link) = placing.next() else {
        return Ok(Some(
            "the programs that place are not attached (`balancer doctor` says why)".to_owned(),
        ));
    };
    let outside = client
        .cgroups
        .as_ref()
        .is_some_and(|cgroups| !cgroups.contains(&link.target));
    Ok(outside.then(|| {
        "the process is not in the cgroup that the programs are attached to, nor below it"
            .to_owned()
    }))
}

/// Why a connect to a frontend is left as it is whatever endpoints there are, in the order of the
/// kernel program.
fn left_alone(
    tables: &PlaceTables,
    snapshot: &Snapshot,
    group: &EndpointGroupSnapshot,
    netns: Option<&OpenNetns>,
    to: SocketAddr,
) -> Result<Option<PlaceReason>> {
    if !snapshot.daemon.refuses {
        return Ok(Some(PlaceReason::Stale));
    }
    if group.known_for.is_some_and(|left| left.is_zero()) {
        return Ok(Some(PlaceReason::Unknown));
    }
    let Some(netns) = netns else {
        return Ok(None);
    };
    let flags = if group.own_addresses.contains(&to) {
        Frontend::OWN_ADDRESS
    } else {
        0
    };
    let excluded = tables.excluded()?.get(&netns.cookie).copied();
    let excluded = excluded.and_then(|value| PlaceReason::of_excluded(value as u32, flags));
    if excluded.is_some() {
        return Ok(excluded);
    }
    let sidecar = has_sidecar(&netns.file, to.is_ipv4());
    let sidecar = sidecar.context("cannot list who listens in the client's network namespace")?;
    Ok(sidecar.then_some(PlaceReason::Sidecar))
}

/// Whether somebody listens there for what the network namespace sends out.
fn has_sidecar(netns: impl AsFd, is_ipv4: bool) -> io::Result<bool> {
    let reaches = |address: SocketAddr, v6only: Option<bool>| {
        let ip = address.ip();
        if is_ipv4 {
            let both = ip.is_ipv6() && ip.is_unspecified() && v6only == Some(false);
            both || ip.to_canonical().is_ipv4() && takes_loopback(ip)
        } else {
            ip.is_ipv6() && takes_loopback(ip)
        }
    };
    let listeners = listening(netns)?;
    Ok(listeners
        .iter()
        .any(|one| SIDECAR_PORTS.contains(&one.local.port()) && reaches(one.local, one.v6only)))
}

/// Whether a listener at that address takes what is sent to the first loopback address.
fn takes_loopback(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.is_unspecified() || v4 == std::net::Ipv4Addr::LOCALHOST,
        IpAddr::V6(v6) => v6.is_unspecified() || v6 == std::net::Ipv6Addr::LOCALHOST,
    }
}

fn sentence(explanation: &ConnectExplanation, to: SocketAddr) -> String {
    let reason = explanation.reason.map_or("", PlaceReason::meaning);
    let Some(endpoint) = &explanation.endpoint else {
        return format!("it goes to {to} itself: {reason}");
    };
    let address = endpoint.address(to.is_ipv4()).unwrap_or(to);
    let name = if endpoint.name == address.to_string() {
        String::new()
    } else {
        format!(" ({})", endpoint.name)
    };
    let knows = explanation
        .group
        .as_ref()
        .is_some_and(|one| one.knows_others);
    let how = if knows {
        "the draw falls into its room below the level"
    } else {
        "it has the fewest connections of this node for its weight"
    };
    format!("it goes to {address}{name}: {how}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_the_port_of_a_sidecar_is_one_where_it_takes_loopback() {
        for (ip, takes) in [
            ("0.0.0.0", true),
            ("127.0.0.1", true),
            ("127.0.0.6", false),
            ("10.0.0.7", false),
            ("::", true),
            ("::1", true),
            ("fd00::7", false),
        ] {
            assert_eq!(takes_loopback(ip.parse().unwrap()), takes, "{ip}");
        }
    }
}
