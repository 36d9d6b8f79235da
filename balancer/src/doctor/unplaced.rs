//! Which clients of a cluster are not placed, or not among all pods, and what to do about each.

use std::collections::BTreeSet;

use super::{Check, listing};
use crate::kubernetes::{ClusterStatus, PlacingStatus, Restriction};

/// What keeps clients of the cluster from being placed; nothing where this node does not place: why
/// it does not is told elsewhere.
pub(super) fn checks(cluster: &ClusterStatus) -> Vec<Check> {
    let placing = &cluster.placing;
    if !placing.on || placing.services.is_empty() {
        return Vec::new();
    }
    let mut checks: Vec<Check> = RESTRICTIONS
        .iter()
        .filter_map(|restriction| restriction.check(placing))
        .collect();
    checks.extend(zones(placing));
    checks.extend(without_a_daemon(placing));
    if checks.is_empty() {
        checks.push(Check::ok(
            "placed clients",
            "every Service that is found is placed on every node with a daemon",
            "connects go to the pod that should have them",
        ));
    }
    checks
}

/// A setting of a Service, and what to say of it.
struct Told {
    restriction: Restriction,
    name: &'static str,
    means: &'static str,
    /// `None`: somebody wants it so, and there is nothing to do.
    advice: Option<&'static str>,
}

const RESTRICTIONS: [Told; 5] = [
    Told {
        restriction: Restriction::SwitchedOff,
        name: "place annotations",
        means: "they say off, so kube-proxy chooses for their clients, at random; without the \
                annotation balancer.skywalking.apache.org/place they are placed",
        advice: None,
    },
    Told {
        restriction: Restriction::SessionAffinity,
        name: "session affinity",
        means: "sessionAffinity is ClientIP: kube-proxy sends a client to the same pod again, also \
                where that one has refused it, and its clients are not placed",
        advice: Some(
            "set `sessionAffinity: None` (kubectl patch service), or give the entry no quota",
        ),
    },
    Told {
        restriction: Restriction::ForeignEndpoints,
        name: "foreign endpoints",
        means: "an EndpointSlice names an address that is no pod of the Service's namespace; what it \
                has, nobody counts, so kube-proxy chooses for all clients of the Service",
        advice: Some(
            "give that address a Service of its own (kubectl get endpointslices shows it)",
        ),
    },
    Told {
        restriction: Restriction::OwnNode,
        name: "own node only",
        means: "internalTrafficPolicy is Local: clients only get pods of their own node, and wait \
                where all of these are full; where there is none, kube-proxy drops them",
        advice: Some("set `internalTrafficPolicy: Cluster`, or give the entry no quota"),
    },
    Told {
        restriction: Restriction::Outside,
        name: "node ports",
        means: "who comes through node ports, load balancers or external addresses is not placed: \
                kube-proxy or the load balancer chooses, at random, and a full pod refuses",
        advice: Some(
            "let clients inside of the cluster connect to the Service's cluster address or name. A \
             host outside that reaches the pods can place by itself (`connect:` in its file)",
        ),
    },
];

impl Told {
    fn check(&self, placing: &PlacingStatus) -> Option<Check> {
        let found = services_with(placing, self.restriction);
        if found.is_empty() {
            return None;
        }
        let found = listing(&found);
        Some(match self.advice {
            Some(advice) => Check::warn(self.name, found, self.means, advice),
            None => Check::ok(self.name, found, self.means),
        })
    }
}

fn services_with(placing: &PlacingStatus, restriction: Restriction) -> Vec<String> {
    let services = placing.services.iter();
    let with = services.filter(|service| service.restrictions.contains(&restriction));
    // One may have several ports.
    let names: BTreeSet<String> = with.map(|service| service.service.to_string()).collect();
    names.into_iter().collect()
}

/// Services whose clients get near pods first, and whether it is known which these are.
fn zones(placing: &PlacingStatus) -> Option<Check> {
    const NAME: &str = "zones";
    const MEANS: &str = "near pods come first while they hold no more than a fifth above their share \
                         of the connections; then all are chosen from";
    let found = services_with(placing, Restriction::NearFirst);
    if found.is_empty() {
        return None;
    }
    let found = listing(&found);
    Some(match &placing.zone {
        Some(zone) => Check::ok(NAME, format!("{found}; this node is in {zone}"), MEANS),
        None => Check::warn(
            NAME,
            format!("{found}; the zone of this node is not known"),
            "clients of this node get any pod, unless an EndpointSlice names the node itself",
            "label the node with topology.kubernetes.io/zone, and see the check `permissions` (get \
             nodes)",
        ),
    })
}

fn without_a_daemon(placing: &PlacingStatus) -> Option<Check> {
    let daemons = placing.daemons?;
    let without = daemons.wanted.saturating_sub(daemons.ready);
    (without > 0).then(|| {
        Check::warn(
            "nodes without a daemon",
            format!(
                "{without} of the {} nodes that the DaemonSet selects, {} s ago",
                daemons.wanted, daemons.seconds_ago
            ),
            "no daemon is ready there: kube-proxy chooses for their clients, at random, and a full \
             pod refuses them",
            "`balancer doctor --cluster`, from a machine with a kubeconfig, names them, and those \
             that the DaemonSet does not select (nodeSelector, affinity, tolerations of the chart)",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Match;
    use crate::doctor::Status;
    use crate::kubernetes::{DaemonsStatus, ObjectName, PlacedService};

    fn cluster(restrictions: &[Restriction]) -> ClusterStatus {
        let service = |name: &str, restrictions: &[Restriction]| PlacedService {
            entry: "agents".to_owned(),
            service: ObjectName {
                namespace: "skywalking".to_owned(),
                name: name.to_owned(),
            },
            frontends: vec![([10, 96, 0, 7], 11800).into()],
            matching: Match::Service,
            placed: true,
            restrictions: restrictions.to_vec(),
            notes: Vec::new(),
        };
        ClusterStatus {
            schema: 1,
            node: "a".to_owned(),
            complete: true,
            silent_seconds: 0,
            problems: Vec::new(),
            groups: Vec::new(),
            placing: PlacingStatus {
                on: true,
                services: vec![service("oap", restrictions), service("other", &[])],
                ..PlacingStatus::default()
            },
        }
    }

    fn only(cluster: &ClusterStatus) -> Check {
        let mut checks = checks(cluster);
        assert_eq!(checks.len(), 1, "{checks:?}");
        checks.remove(0)
    }

    #[test]
    fn each_setting_names_its_services_and_what_to_do() {
        for (restriction, name, status) in [
            (Restriction::SwitchedOff, "place annotations", Status::Ok),
            (
                Restriction::SessionAffinity,
                "session affinity",
                Status::Warn,
            ),
            (
                Restriction::ForeignEndpoints,
                "foreign endpoints",
                Status::Warn,
            ),
            (Restriction::OwnNode, "own node only", Status::Warn),
            (Restriction::Outside, "node ports", Status::Warn),
            (Restriction::NearFirst, "zones", Status::Warn),
        ] {
            let check = only(&cluster(&[restriction]));
            assert_eq!((check.name, check.status), (name, status), "{check:?}");
            assert!(check.found.starts_with("skywalking/oap"), "{check:?}");
            assert!(!check.found.contains("other"), "{check:?}");
            assert_eq!(check.advice.is_some(), status == Status::Warn, "{check:?}");
        }
    }

    #[test]
    fn where_everybody_is_placed_that_is_said() {
        let mut all = cluster(&[]);
        assert_eq!(only(&all).name, "placed clients");
        all.placing.on = false;
        assert_eq!(checks(&all), []);
    }

    #[test]
    fn a_zone_that_is_known_is_no_warning() {
        let mut near = cluster(&[Restriction::NearFirst]);
        near.placing.zone = Some("east".to_owned());
        let check = only(&near);
        assert_eq!(check.status, Status::Ok);
        assert_eq!(check.found, "skywalking/oap; this node is in east");
    }

    #[test]
    fn nodes_whose_daemon_is_missing_are_counted() {
        let mut some = cluster(&[]);
        let daemons = |ready| DaemonsStatus {
            wanted: 100,
            ready,
            seconds_ago: 7,
        };
        some.placing.daemons = Some(daemons(97));
        let check = only(&some);
        assert_eq!(check.name, "nodes without a daemon");
        assert!(check.found.starts_with("3 of the 100 nodes"), "{check:?}");
        some.placing.daemons = Some(daemons(100));
        assert_eq!(only(&some).status, Status::Ok);
    }
}
