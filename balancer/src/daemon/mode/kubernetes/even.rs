//! The backend groups as the rule of evening out takes them: what this node counts, and what the
//! daemons of the other nodes report.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::super::moves::is_drained;
use super::super::super::rebalancing::{BackendGroup, OwnBackend, matters, own_backend};
use super::group::{Group, Load};
use super::pod_resolver::PodResolver;
use crate::config::MoveRule;
use crate::dataplane::SlotView;
use crate::kubernetes::{Endpoint, ServicePort, View};
use crate::rebalance::{self, Backend, BalanceBy, Counts, Fitness, Phase, Published};

/// What is known of the cluster beside the group itself.
#[derive(Clone, Copy)]
pub struct Around<'a> {
    pub view: &'a View,
    pub node: &'a str,
    pub resolver: &'a PodResolver,
    pub slots: &'a [SlotView],
}

/// The group for the rule, by the name of its service; `None`: this node has no pod of it.
pub fn backend_group(
    group: &Group<'_>,
    service: &str,
    are_refused: bool,
    around: Around<'_>,
) -> Option<BackendGroup> {
    let own = own_backends(group, around);
    if own.is_empty() {
        return None;
    }
    let backend = |(endpoint, load): (&Endpoint, Option<Load>)| {
        let name = name(endpoint);
        match own.iter().find(|own| own.name == name) {
            Some(own) => Some(own_backend(
                name,
                endpoint.weight,
                phase(endpoint, own.listeners.iter().any(is_drained)),
                &own.listeners,
            )),
            None => other(group, endpoint, load, name),
        }
    };
    let pods = || group.pods().map(|(endpoint, _)| endpoint);
    let ports = || around.view.ports.iter().filter(|port| shares(group, port));
    let is_asked = group.entry.rebalance && group.entry.moving != MoveRule::Off;
    let kept = ports().find_map(why_kept).filter(|_| is_asked);
    Some(BackendGroup {
        name: format!("{service} {}", group.id.service),
        kept,
        own_node_only: ports().any(|port| port.traffic.own_node_only),
        rule: Some(group.entry.moving),
        group: rebalance::Group {
            is_on: is_asked && kept.is_none(),
            balance_by: BalanceBy::Connections,
            slow_start: Duration::ZERO,
            are_refused,
            unheard_for: around.view.silent_for,
            backends: group.pods().filter_map(backend).collect(),
        },
        own,
        shown: (pods().map(|pod| (name(pod), pod.pod.to_string()))).collect(),
    })
}

/// What tells a pod from all others: one of a `StatefulSet` comes back under its name.
fn name(endpoint: &Endpoint) -> String {
    format!("{} {}", endpoint.pod, endpoint.uid)
}

fn phase(endpoint: &Endpoint, drained: bool) -> Phase {
    match (endpoint.terminating, drained, endpoint.ready) {
        (true, ..) => Phase::Terminating,
        (false, true, _) => Phase::Draining,
        (false, false, true) => Phase::Ready,
        (false, false, false) => Phase::NotReady,
    }
}

/// The pods of the group on this node that listen, or have connections.
fn own_backends(group: &Group<'_>, around: Around<'_>) -> Vec<OwnBackend> {
    let mut own: BTreeMap<String, Vec<SlotView>> = BTreeMap::new();
    for view in around.slots.iter().filter(|view| matters(view)) {
        let pod = around.resolver.pod(view, &around.view.groups);
        let pod = pod.filter(|(id, endpoint)| {
            *id == group.id && endpoint.node.as_deref() == Some(around.node)
        });
        if let Some((_, endpoint)) = pod {
            own.entry(name(endpoint)).or_default().push(*view);
        }
    }
    let own = own.into_iter();
    own.map(|(name, listeners)| OwnBackend { name, listeners })
        .collect()
}

/// A pod that others count; `None`: it gets nothing, and nothing is known of it.
fn other(
    group: &Group<'_>,
    endpoint: &Endpoint,
    load: Option<Load>,
    name: String,
) -> Option<Backend> {
    let phase = phase(endpoint, load.is_some_and(Load::is_drained));
    let unknown = Published {
        age: Duration::MAX,
        ..Published::default()
    };
    if load.is_none() && phase != Phase::Ready {
        return None;
    }
    let others = || group.counted_without(endpoint.node.as_deref().unwrap_or_default());
    Some(Backend {
        name,
        weight: endpoint.weight,
        phase,
        fitness: load.map_or(Fitness::Serves, Load::fitness),
        limit: load.and_then(Load::limit).map(u64::from),
        counts: Counts::Published(load.map_or(unknown, |load| load.published(others()))),
    })
}

/// Whether clients of the group may come through a Service: it has one of the group's pods.
fn shares(group: &Group<'_>, port: &ServicePort) -> bool {
    let is_shared = |(endpoint, target): &(Endpoint, u16)| {
        let mut pods = group.pods();
        *target == group.id.port && pods.any(|(pod, _)| pod.uid == endpoint.uid)
    };
    port.service == group.id.service || port.endpoints.iter().any(is_shared)
}

/// Why clients that connect again through a Service would not come to the pod that has too few;
/// `None`: they would.
fn why_kept(port: &ServicePort) -> Option<&'static str> {
    let traffic = &port.traffic;
    if traffic.affinity {
        Some("with sessionAffinity ClientIP clients come back to their pod")
    } else if traffic.own_node_only {
        Some("with internalTrafficPolicy Local clients stay on their node")
    } else if traffic.left_alone {
        Some("its annotation balancer.skywalking.apache.org/place says off: kube-proxy chooses")
    } else if traffic.near && are_apart(port) {
        Some("it prefers near pods, and its pods are near to different clients")
    } else {
        None
    }
}

/// Whether its hints name other pods for some clients than for others.
fn are_apart(port: &ServicePort) -> bool {
    let hints = |(endpoint, _): &(Endpoint, u16)| {
        let offered = &endpoint.offered;
        (offered.for_zones.clone(), offered.for_nodes.clone())
    };
    let mut hints = port.endpoints.iter().map(hints);
    let first = hints.next();
    hints.any(|other| Some(other) != first)
}

#[cfg(test)]
mod tests {
    use super::super::super::super::moves::Departures;
    use super::super::fuzzing::{endpoint, entry, group, report};
    use super::*;
    use crate::config::Match;
    use crate::kubernetes::{GroupId, ReceivedReport, ReportedBackend, Traffic};

    /// What the plan takes of a pod of node `b`, of three, of which the report says this.
    fn taken(change: impl Fn(&mut ReportedBackend)) -> Backend {
        let id = group();
        let endpoints = ["a", "b", "c"].map(endpoint);
        let mut view = View::default();
        view.groups.insert(id.clone(), endpoints.to_vec());
        for node in ["a", "b", "c"] {
            let mut report = report(&id, node, 30);
            if node == "b" {
                change(&mut report.backends[0]);
            }
            let received = ReceivedReport {
                age: Duration::from_secs(3),
                node_report: report.into(),
            };
            view.nodes.insert(node.to_owned(), received);
        }
        let entry = entry();
        let group = Group::new(&id, &entry, &view, Vec::new(), &Departures::default());
        let (pod, load) = group.pods().nth(1).expect("three");
        other(&group, pod, load, name(pod)).expect("it is ready")
    }

    fn published(backend: &Backend) -> Published {
        match &backend.counts {
            Counts::Published(published) => *published,
            Counts::Own { .. } => panic!("{backend:?}"),
        }
    }

    #[test]
    fn a_pod_of_another_node_is_as_its_report_says() {
        let plain = taken(|_| ());
        assert_eq!((plain.name.as_str(), plain.phase), ("sw/b b", Phase::Ready));
        assert_eq!((plain.fitness, plain.limit), (Fitness::Serves, None));
        let age = Duration::from_secs(3);
        let held = |held, moving| Published {
            held,
            moving,
            age,
            ..Published::default()
        };
        assert_eq!(published(&plain), held(30, 0));
        let moving = taken(|told| {
            (told.exempt, told.moving, told.returning) = (2, 5, 9);
            (told.drained, told.quota) = (true, Some(70));
        });
        assert_eq!(published(&moving), held(23, 9));
        assert_eq!((moving.phase, moving.limit), (Phase::Draining, Some(70)));
    }

    #[test]
    fn a_lie_is_cut_to_what_is_plausible_beside_the_others() {
        let lie = taken(|told| {
            (told.established, told.returning) = (u32::MAX, u32::MAX);
            told.moving = 7;
        });
        let Published { held, moving, .. } = published(&lie);
        assert_eq!((held, moving), (993, 1000));
        let more_than_all = taken(|told| told.moving = u32::MAX);
        assert_eq!(published(&more_than_all).held, 0);
    }

    #[test]
    fn a_pod_that_comes_back_under_its_name_is_another_one() {
        let mut again = endpoint("a");
        again.uid = "other".to_owned();
        assert_ne!(name(&endpoint("a")), name(&again));
    }

    #[test]
    fn who_is_kept_where_it_is_by_its_service_is_not_moved() {
        let with = |change: fn(&mut ServicePort)| {
            let mut port = port(&group());
            change(&mut port);
            why_kept(&port).is_some()
        };
        assert!(!with(|_| ()));
        assert!(with(|port| port.traffic.affinity = true));
        assert!(with(|port| port.traffic.own_node_only = true));
        assert!(with(|port| port.traffic.left_alone = true));
        assert!(!with(|port| port.traffic.near = true));
        assert!(with(|port| {
            port.traffic.near = true;
            port.endpoints[0].0.offered.for_zones.insert("a".to_owned());
        }));
    }

    #[test]
    fn clients_may_come_through_another_service_of_the_same_pods() {
        let (id, entry, mut view) = (group(), entry(), View::default());
        view.groups.insert(id.clone(), vec![endpoint("a")]);
        let group = Group::new(&id, &entry, &view, Vec::new(), &Departures::default());
        let mut other = port(&id);
        other.service.name = "other".to_owned();
        assert!(shares(&group, &other));
        for (_, target) in &mut other.endpoints {
            *target += 1;
        }
        assert!(!shares(&group, &other));
        assert!(shares(&group, &port(&id)));
    }

    /// A Service of two pods.
    fn port(id: &GroupId) -> ServicePort {
        ServicePort {
            entry: id.entry.clone(),
            service: id.service.clone(),
            frontends: Vec::new(),
            matching: Match::Service,
            endpoints: ["a", "b"].map(|name| (endpoint(name), id.port)).into(),
            has_others: false,
            traffic: Traffic::default(),
        }
    }
}
