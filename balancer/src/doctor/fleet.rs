//! The balancer of a whole cluster, looked at from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Check, Report, listing};
use crate::kubernetes::{STALE, Survey};

/// What there is to say of a cluster's balancer.
pub fn of_cluster(survey: &Survey, server: &str, version: &str) -> Report {
    Report {
        checks: vec![
            Check::ok(
                "API server",
                format!("{server} answers, {version}"),
                "what follows is what it knows",
            ),
            daemons(survey),
            without(survey),
            unfit(survey),
            reports(survey),
            versions(survey),
        ],
    }
}

fn daemons(survey: &Survey) -> Check {
    let ready = survey
        .daemons
        .values()
        .filter(|daemon| daemon.ready)
        .count();
    let found = format!(
        "{ready} of {} daemons of {} are ready",
        survey.desired, survey.daemon_set
    );
    let waiting = (survey.daemons.iter()).filter(|(_, daemon)| !daemon.ready);
    let waiting: Vec<_> = waiting
        .map(|(node, daemon)| format!("{} on {node}", daemon.pod))
        .collect();
    if waiting.is_empty() {
        return Check::ok("daemons", found, "each answers on its node");
    }
    Check::warn(
        "daemons",
        format!("{found}; not: {}", listing(&waiting)),
        "connections of these nodes are counted and steered by what an earlier daemon has left \
         there, or not at all, and nobody is refused",
        format!(
            "see `kubectl -n {} describe pod` and `kubectl logs` of these",
            survey.daemon_set.namespace
        ),
    )
}

fn without(survey: &Survey) -> Check {
    let nodes = survey.nodes.iter();
    let without: Vec<_> = nodes
        .filter(|node| !survey.daemons.contains_key(*node))
        .cloned()
        .collect();
    Check::warn_of(
        "nodes without a daemon",
        &without,
        ("none", "every node has one"),
        "an OAP there is not counted and has no quota, and clients there are not placed: they roll \
         the dice of kube-proxy",
        "see the chart's values nodeSelector, affinity and tolerations; virtual nodes have no kernel \
         to load anything into, and are left out on purpose",
    )
}

fn unfit(survey: &Survey) -> Check {
    let mut nodes: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (node, report) in &survey.reports {
        let report = report.report.as_ref().ok();
        if let Some(why) = report.and_then(|report| report.unfit.as_deref()) {
            nodes.entry(why).or_default().push(node);
        }
    }
    let sentences: Vec<_> = nodes
        .into_iter()
        .map(|(why, nodes)| format!("{}: {why}", listing(&nodes)))
        .collect();
    Check::warn_of(
        "unfit nodes",
        &sentences,
        (
            "none",
            "every node that has an OAP, or clients to place, can be guarded",
        ),
        "their daemons are ready and do what still works; the other nodes are not concerned",
        "`kubectl exec` into the daemon's pod of such a node, and run `balancer doctor`",
    )
}

fn reports(survey: &Survey) -> Check {
    const NAME: &str = "node reports";
    const ADVICE: &str = "see the log of the node's daemon, and whether its node reaches the API \
         server";
    let ages = survey.reports.values().filter_map(|report| report.age);
    let oldest = ages.max().unwrap_or_default();
    let well = format!(
        "{} of {} nodes tell, the oldest report is {} s old",
        survey.reports.len(),
        survey.nodes.len(),
        oldest.as_secs()
    );
    let known: BTreeSet<&String> = survey.nodes.iter().collect();
    let mut wrong = Vec::new();
    for (node, report) in &survey.reports {
        if let Err(why) = &report.report {
            wrong.push(format!("that of {node} can't be read ({why})"));
        } else if !known.contains(node) {
            wrong.push(format!("that of {node}, which is no node any more"));
        } else if report.age.is_some_and(|age| age >= STALE) {
            let seconds = report.age.unwrap_or(Duration::ZERO).as_secs();
            wrong.push(format!("that of {node} is {seconds} s old"));
        }
    }
    Check::warn_of(
        NAME,
        &wrong,
        (&well, "a node with nothing to tell has no report"),
        "what these nodes count is not known to the others; a report that is older than a minute \
         counts for nothing",
        ADVICE,
    )
}

fn versions(survey: &Survey) -> Check {
    const NAME: &str = "versions";
    let mut images: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (node, daemon) in &survey.daemons {
        images.entry(&daemon.image).or_default().push(node);
    }
    let one = |(image, nodes): (&&str, &Vec<&str>)| format!("{image} on {} nodes", nodes.len());
    let found: Vec<_> = images.iter().map(one).collect();
    if images.len() < 2 {
        let found = found
            .first()
            .cloned()
            .unwrap_or_else(|| "no daemon".to_owned());
        return Check::ok(NAME, found, "all daemons are of one build");
    }
    Check::warn(
        NAME,
        listing(&found),
        "a rollout is under way, or hangs: daemons of different builds work together as far as they \
         read each other's reports",
        format!(
            "see `kubectl -n {} rollout status daemonset/{}`",
            survey.daemon_set.namespace, survey.daemon_set.name
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::kubernetes::{NodeReport, ObjectName, SurveyedDaemon, SurveyedReport};

    fn survey() -> Survey {
        let daemon = |ready, image: &str| SurveyedDaemon {
            pod: "balancer-x".to_owned(),
            image: image.to_owned(),
            ready,
        };
        let report = |seconds, unfit: Option<&str>| SurveyedReport {
            age: Some(Duration::from_secs(seconds)),
            report: Ok(NodeReport {
                unfit: unfit.map(str::to_owned),
                ..NodeReport::default()
            }),
        };
        Survey {
            daemon_set: ObjectName {
                namespace: "balancer-system".to_owned(),
                name: "balancer".to_owned(),
            },
            desired: 2,
            daemons: [("a", daemon(true, "b:1")), ("b", daemon(true, "b:1"))]
                .map(|(node, daemon)| (node.to_owned(), daemon))
                .into(),
            nodes: ["a", "b"].map(str::to_owned).into(),
            reports: [("a", report(7, None)), ("b", report(8, None))]
                .map(|(node, report)| (node.to_owned(), report))
                .into(),
        }
    }

    fn found(survey: &Survey, name: &str) -> (Status, String) {
        let report = of_cluster(survey, "https://a", "v1.34.0");
        let check = report.checks.into_iter().find(|check| check.name == name);
        let check = check.expect("there is such a check");
        (check.status, check.found)
    }

    #[test]
    fn a_cluster_where_all_is_well() {
        let report = of_cluster(&survey(), "https://a", "v1.34.0");
        assert_eq!(report.worst(), Status::Ok, "{report:?}");
        let (_, said) = found(&survey(), "node reports");
        assert_eq!(said, "2 of 2 nodes tell, the oldest report is 8 s old");
    }

    #[test]
    fn each_thing_that_is_wrong_is_named_with_its_node() {
        let mut survey = survey();
        survey.nodes.push("c".to_owned());
        assert_eq!(
            found(&survey, "nodes without a daemon"),
            (Status::Warn, "c".to_owned())
        );
        let b = survey.daemons.get_mut("b").expect("it is there");
        (b.ready, b.image) = (false, "b:2".to_owned());
        let (status, said) = found(&survey, "daemons");
        assert!(
            status == Status::Warn && said.ends_with("not: balancer-x on b"),
            "{said}"
        );
        let (_, said) = found(&survey, "versions");
        assert_eq!(said, "b:1 on 1 nodes, b:2 on 1 nodes");
        let report = survey.reports.get_mut("b").expect("it is there");
        report.age = Some(Duration::from_secs(75));
        report.report.as_mut().expect("it is good").unfit = Some("too old".to_owned());
        assert_eq!(found(&survey, "node reports").1, "that of b is 75 s old");
        assert_eq!(found(&survey, "unfit nodes").1, "b: too old");
    }
}
