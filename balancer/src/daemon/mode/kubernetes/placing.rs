//! What this node should place where, from what is known of the cluster. Pure.
//!
//! An endpoint is chosen from those that kube-proxy would choose from on this node
//! (`CategorizeEndpoints` in `pkg/proxy/topology.go`), and from no others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::excluded::Peers;
use crate::config::Match;
use crate::kubernetes::{Endpoint, ObjectName, Offered, ServicePort};
use crate::place::{EndpointPlan, GroupPlan, PublishedTotal};

/// What is known of the connections of pods, by uid and target port.
pub type Totals = BTreeMap<(String, u16), PublishedTotal>;

/// The node that places.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Its name.
    pub node: &'a str,
    /// Its zone, where that is known.
    pub zone: Option<&'a str>,
    /// Its rank among the nodes that place, and how many they are.
    pub rank: (u32, u32),
    /// How long ago the cluster was heard of.
    pub heard: Duration,
    /// Pods of this node whose connects can't be told from those of clients. Nobody is placed at
    /// own addresses of other pods of their Services, which they may mean.
    pub unknown_peers: &'a BTreeSet<ObjectName>,
    /// The pods that are drained by hand, by uid and target port.
    pub drained: &'a BTreeSet<(String, u16)>,
}

/// A pod with its target port.
type Target = (Endpoint, u16);

/// What is placed, by the Services' ports, and what is known of their pods.
pub fn groups(ports: &[ServicePort], totals: &Totals, client: Client<'_>) -> Vec<GroupPlan> {
    let mut groups: Vec<(&str, GroupPlan)> = Vec::new();
    let mut own_addresses = BTreeSet::new();
    for port in ports.iter().filter(|port| is_placed(port)) {
        let mut plan = group(port, totals, client);
        // A pod of several Services belongs to the first of them.
        plan.own_addresses.retain(|at| own_addresses.insert(*at));
        // Two Services of the same pods: what is placed through one counts for the other.
        let same = groups.iter_mut().find(|(entry, other)| {
            *entry == port.entry && !plan.endpoints.is_empty() && other.endpoints == plan.endpoints
        });
        match same {
            Some((_, other)) => other.frontends.extend(plan.frontends),
            None => groups.push((&port.entry, plan)),
        }
    }
    groups.into_iter().map(|(_, plan)| plan).collect()
}

/// Whether connects of a Service's clients are placed.
pub fn is_placed(port: &ServicePort) -> bool {
    let has_frontends = !port.frontends.is_empty() || port.matching == Match::Endpoints;
    has_frontends && why_not_placed(port).is_none()
}

/// The pods of this node that are behind a Service whose pods' own addresses are frontends;
/// `None`: there is no such Service.
pub fn peers(ports: &[ServicePort], node: &str) -> Option<Peers> {
    let matched = || {
        ports
            .iter()
            .filter(|port| port.matching == Match::Endpoints)
    };
    matched().next()?;
    let endpoints = matched().flat_map(|port| &port.endpoints);
    let here = endpoints.filter(|(endpoint, _)| endpoint.node.as_deref() == Some(node));
    let peers = here.map(|(endpoint, _)| {
        let (uid, addresses) = (endpoint.uid.clone(), endpoint.addresses.clone());
        (endpoint.pod.clone(), (uid, addresses))
    });
    Some(peers.collect())
}

/// Why a Service's clients are left to kube-proxy; `None`: they are not.
fn why_not_placed(port: &ServicePort) -> Option<&'static str> {
    if port.traffic.left_alone {
        Some("its annotation balancer.skywalking.apache.org/place says off")
    } else if port.traffic.affinity {
        Some("sessionAffinity is ClientIP: kube-proxy sends a client to the same pod again")
    } else if port.has_others {
        Some("an EndpointSlice of it names an address that is no pod of its namespace")
    } else if port.traffic.other_proxy {
        Some("its label service.kubernetes.io/service-proxy-name leaves it to another proxy")
    } else {
        None
    }
}

/// What is to be known of how a Service's clients are placed, a sentence each.
pub fn notes(port: &ServicePort, zone: Option<&str>) -> Vec<String> {
    let traffic = &port.traffic;
    if port.frontends.is_empty() && port.matching == Match::Service && !traffic.other_proxy {
        return vec![
            "it has no cluster address: its clients connect to the pods' own, and choose \
             themselves (`match: endpoints` places them)"
                .to_owned(),
        ];
    }
    let mut notes: Vec<String> = why_not_placed(port)
        .map(str::to_owned)
        .into_iter()
        .collect();
    if traffic.own_node_only {
        notes.push(
            "internalTrafficPolicy is Local: clients only get pods of their own node, and are left \
             to kube-proxy where there is none"
                .to_owned(),
        );
    } else if traffic.near {
        let zone = zone.map_or_else(
            || "the zone of this node is not known".to_owned(),
            |zone| format!("this node is in zone {zone}"),
        );
        notes.push(format!(
            "it prefers near pods: these come first while they hold no more than a fifth above their \
             share ({zone})"
        ));
    }
    if port.matching == Match::Endpoints {
        notes.extend(on_hosts(port));
    }
    if traffic.outside {
        notes.push(
            "who comes through its node ports, load balancer or external addresses is not placed"
                .to_owned(),
        );
    }
    notes
}

/// Whose own addresses are no frontends.
fn on_hosts(port: &ServicePort) -> Option<String> {
    let endpoints = port.endpoints.iter().map(|(endpoint, _)| endpoint);
    let mut on_hosts = endpoints.filter(|endpoint| endpoint.host_network);
    let first = on_hosts.next()?;
    let more = match on_hosts.count() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!(
        "connects to the address of {}{more} are left as they are: it is the node's, and others may \
         be meant",
        first.pod
    ))
}

fn group(port: &ServicePort, totals: &Totals, client: Client<'_>) -> GroupPlan {
    let considered = considered(port, client);
    let total = |target: &Target| totals.get(&(target.0.uid.clone(), target.1)).copied();
    let near = near(&considered, client)
        .filter(|near| are_near_enough(&considered, near, |target| total(target)));
    let is_chosen = |index: usize| near.as_ref().is_none_or(|near| near[index]);
    let endpoints = considered.iter().enumerate();
    let endpoints = endpoints.filter_map(|(index, target)| {
        let (endpoint, port) = target;
        let address = |is_wanted: fn(&IpAddr) -> bool| {
            let mut addresses = endpoint.addresses.iter().copied();
            addresses.find(is_wanted)
        };
        let (v4, v6) = (address(IpAddr::is_ipv4), address(IpAddr::is_ipv6));
        (v4.is_some() || v6.is_some()).then(|| EndpointPlan {
            name: endpoint.pod.to_string(),
            v4: v4.and_then(as_v4),
            v6: v6.and_then(as_v6),
            port: *port,
            node: endpoint.node.clone(),
            weight: if is_chosen(index) { endpoint.weight } else { 0 },
            published: total(target),
        })
    });
    GroupPlan {
        name: format!("{} {}", port.entry, port.service),
        frontends: port.frontends.clone(),
        endpoints: endpoints.collect(),
        own_addresses: own_addresses(port, &offered(port, client), client.unknown_peers),
        rank: client.rank,
        heard: Some(client.heard),
    }
}

/// The own addresses of pods where these are frontends, too: of those only that nobody else has,
/// as the pods themselves say.
fn own_addresses(
    port: &ServicePort,
    offered: &[&Target],
    unknown_peers: &BTreeSet<ObjectName>,
) -> Vec<SocketAddr> {
    let is_unknown = |(endpoint, _): &Target| unknown_peers.contains(&endpoint.pod);
    if port.matching == Match::Service || port.endpoints.iter().any(is_unknown) {
        return Vec::new();
    }
    let of_their_own = offered
        .iter()
        .filter(|(endpoint, _)| endpoint.confirmed && !endpoint.host_network);
    let addresses = of_their_own.flat_map(|(endpoint, port)| {
        let addresses = endpoint.addresses.iter();
        addresses.map(|address| SocketAddr::new(*address, *port))
    });
    addresses.collect()
}

const fn as_v4(address: IpAddr) -> Option<std::net::Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

const fn as_v6(address: IpAddr) -> Option<std::net::Ipv6Addr> {
    match address {
        IpAddr::V6(address) => Some(address),
        IpAddr::V4(_) => None,
    }
}

/// Those that clients are placed on, hints aside, of those that are [`offered`]. Who is drained, or
/// is ended though it is published as ready, only where all are.
fn considered<'a>(port: &'a ServicePort, client: Client<'_>) -> Vec<&'a Target> {
    let offered = offered(port, client);
    let is_drained = |(endpoint, port): &Target| {
        let mut drained = client.drained.iter();
        drained.any(|(uid, of)| *uid == endpoint.uid && of == port)
    };
    let takes = |target: &Target| !target.0.terminating && !is_drained(target);
    let taking: Vec<&Target> = offered.iter().copied().filter(|one| takes(one)).collect();
    if taking.is_empty() { offered } else { taking }
}

/// Those that kube-proxy would choose from on this node, hints aside: the ready ones; where there
/// are none, those that serve while they are being ended.
fn offered<'a>(port: &'a ServicePort, client: Client<'_>) -> Vec<&'a Target> {
    let reachable = || {
        port.endpoints.iter().filter(|(endpoint, _)| {
            !port.traffic.own_node_only || endpoint.node.as_deref() == Some(client.node)
        })
    };
    let ready: Vec<&Target> = reachable()
        .filter(|(endpoint, _)| endpoint.offered.ready)
        .collect();
    if !ready.is_empty() {
        return ready;
    }
    let ending = reachable();
    ending
        .filter(|(endpoint, _)| endpoint.offered.serving && endpoint.terminating)
        .collect()
}

/// Which of the considered ones kube-proxy would choose from by their hints; `None`: from all.
fn near(considered: &[&Target], client: Client<'_>) -> Option<Vec<bool>> {
    let offered = || considered.iter().map(|(endpoint, _)| &endpoint.offered);
    let by = |is_hinted: fn(&Offered) -> bool, is_near: &dyn Fn(&Offered) -> bool| {
        let near: Vec<bool> = offered().map(is_near).collect();
        (offered().all(is_hinted) && near.contains(&true)).then_some(near)
    };
    let by_node = by(|offered| !offered.for_nodes.is_empty(), &|offered| {
        offered.for_nodes.contains(client.node)
    });
    by_node.or_else(|| {
        let zone = client.zone?;
        by(|offered| !offered.for_zones.is_empty(), &|offered| {
            offered.for_zones.contains(zone)
        })
    })
}

/// By how much, in parts of a hundred, near endpoints may be above their share.
const NEAR_MAY_HAVE: u128 = 120;

/// Whether the near ones are not above their share of all connections by more than a fifth, and one
/// each. What nobody says counts for neither.
fn are_near_enough(
    considered: &[&Target],
    near: &[bool],
    total: impl Fn(&Target) -> Option<PublishedTotal>,
) -> bool {
    let (mut theirs, mut all, mut number) = ((0, 0), (0, 0), 0);
    for (target, is_near) in considered.iter().zip(near) {
        let Some(total) = total(target) else {
            continue;
        };
        let (connections, weight) = (u128::from(total.connections), u128::from(target.0.weight));
        all = (all.0 + connections, all.1 + weight);
        if *is_near {
            theirs = (theirs.0 + connections, theirs.1 + weight);
            number += 1;
        }
    }
    // theirs ≤ all × weight of theirs / weight of all × 1.2 + number, without a division.
    theirs.0 * all.1 * 100 <= all.0 * theirs.1 * NEAR_MAY_HAVE + number * all.1 * 100
}

#[cfg(test)]
mod tests;
