//! The section `kubernetes`.

use kube::core::SelectorExt as _;

use super::*;

/// A service that is right, then `more` of it from line 4.
fn in_cluster(more: &str) -> String {
    format!("kubernetes:\n  services:\n  - name: agents\n{more}")
}

fn section(text: &str) -> Kubernetes {
    parsed(text).kubernetes.expect("a section `kubernetes`")
}

fn quota_of(text: &str) -> ClusterQuota {
    section(&in_cluster(&format!("    quota: {text}\n"))).services[0]
        .quota
        .clone()
}

#[test]
fn the_smallest_file() {
    let config = parsed(&in_cluster(""));
    assert!(config.services.is_empty());
    assert_eq!(config.fail_open_after, Duration::from_secs(30));
    assert_eq!(
        config.kubernetes,
        Some(Kubernetes {
            services: vec![ClusterService {
                name: "agents".to_owned(),
                of: ServiceChoice::Selected {
                    namespace: None,
                    selectors: DEFAULT_SELECTORS.map(str::to_owned).into(),
                },
                port: PortChoice::Number(11800),
                matching: Match::Service,
                policy: Policy::LeastConnections,
                quota: ClusterQuota::Unlimited,
                exempt: Vec::new(),
                health: true,
                keepalive: Some(Keepalive::DEFAULT),
                moving: MoveRule::Graceful,
                rebalance: true,
            }],
            publish_every: Duration::from_secs(2),
            hold_for: Duration::from_secs(300),
            place: true,
        })
    );
}

#[test]
fn the_largest_file() {
    let config = parsed(
        r#"
# every key there is
kubernetes:
  services:
    - name: agents
      service: skywalking/skywalking-oap
      port: grpc
      match: endpoints
      policy: round-robin
      quota:
        pods:
          - {selector: "agent=java", namespace: shop, connections: 2}
          - selector: " sidecar in (envoy, istio),!test "
        headroom: 15%
        min_quota: 20
      exempt: [10.0.0.0/24]
      health: off
      keepalive: {idle: 2h, interval: 10m}
      move: off
      rebalance: off
    - name: als
      selector: app=oap
      namespace: mesh
      port: 11802
      quota: {observed: 10m, headroom: 20%}
  publish_every: 500ms
  hold_for: 24h
  place: off
fail_open_after: 1m
"#,
    );
    assert_eq!(config.fail_open_after, Duration::from_secs(60));
    let section = config.kubernetes.expect("a section");
    assert_eq!(section.publish_every, Duration::from_millis(500));
    assert_eq!(section.hold_for, Duration::from_secs(86_400));
    assert!(!section.place);
    let [agents, als] = &section.services[..] else {
        panic!("{section:?}");
    };
    let expected = ServiceChoice::Named {
        namespace: "skywalking".to_owned(),
        name: "skywalking-oap".to_owned(),
    };
    assert_eq!(agents.of, expected);
    assert_eq!(agents.port, PortChoice::Name("grpc".to_owned()));
    assert_eq!(agents.matching, Match::Endpoints);
    assert_eq!(agents.policy, Policy::RoundRobin);
    assert_eq!(agents.exempt, ["10.0.0.0/24".parse().unwrap()]);
    assert!(!agents.health);
    assert_eq!((agents.moving, agents.rebalance), (MoveRule::Off, false));
    let class = |namespace: Option<&str>, selector: &str, connections| PodClass {
        namespace: namespace.map(str::to_owned),
        selector: selector.to_owned(),
        connections,
    };
    let expected = ClusterQuota::Shared {
        input: ClusterInput::Pods(vec![
            class(Some("shop"), "agent=java", 2),
            class(None, "sidecar in (envoy, istio),!test", 1),
        ]),
        headroom_percent: 15,
        min_quota: 20,
    };
    assert_eq!(agents.quota, expected);
    let keepalive = Keepalive {
        idle: 7_200,
        interval: 600,
        probes: 3,
    };
    assert_eq!(agents.keepalive, Some(keepalive));
    let expected = ServiceChoice::Selected {
        namespace: Some("mesh".to_owned()),
        selectors: vec!["app=oap".to_owned()],
    };
    assert_eq!(als.of, expected);
    assert_eq!(als.port, PortChoice::Number(11802));
    assert_eq!(als.matching, Match::Service);
    assert_eq!((als.moving, als.rebalance), (MoveRule::Close, true));
    let window = Duration::from_secs(600);
    let expected = ClusterQuota::Shared {
        input: ClusterInput::Observed { window },
        headroom_percent: 20,
        min_quota: 1,
    };
    assert_eq!(als.quota, expected);
}

#[test]
fn quotas_by_number() {
    assert_eq!(quota_of("{per_backend: 100}"), ClusterQuota::Fixed(100));
    let by_clients = |clients, connections_per_client| ClusterQuota::Shared {
        input: ClusterInput::Clients {
            clients,
            connections_per_client,
        },
        headroom_percent: 0,
        min_quota: 1,
    };
    assert_eq!(quota_of("{clients: 300}"), by_clients(300, 1));
    assert_eq!(
        quota_of("{clients: 300, connections_per_client: 3}"),
        by_clients(300, 3)
    );
}

#[test]
fn rules_in_words() {
    let words = |text: &str| quota_of(text).to_string();
    assert_eq!(ClusterQuota::Unlimited.to_string(), "none: counting only");
    assert_eq!(words("{per_backend: 100}"), "100 for each backend");
    assert_eq!(
        words("{clients: 300, connections_per_client: 2, headroom: 15%}"),
        "300 clients × 2 + 15% shared by weight"
    );
    assert_eq!(
        words("{pods: [{selector: a}], min_quota: 3}"),
        "pods of one class + 0% shared by weight, at least 3 each"
    );
    assert_eq!(
        words("{pods: [{selector: a}, {selector: b}]}"),
        "pods of 2 classes + 0% shared by weight"
    );
    assert_eq!(
        words("{observed: 10m, headroom: 15%}"),
        "the most observed in 600 seconds + 15% shared by weight"
    );
    let longest = ClusterQuota::Shared {
        input: ClusterInput::Clients {
            clients: u32::MAX,
            connections_per_client: u32::MAX,
        },
        headroom_percent: u32::MAX,
        min_quota: u32::MAX,
    };
    assert!(longest.to_string().len() < 128);
}

#[test]
fn the_default_selectors_select_the_oap_and_nothing_beside_it() {
    const APPLICATION: &str = "operator.skywalking.apache.org/application";
    const COMPONENT: &str = "operator.skywalking.apache.org/component";
    let selected = |labels: &[(&str, &str)]| {
        let labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        DEFAULT_SELECTORS
            .iter()
            .any(|text| selector(text).unwrap().matches(&labels))
    };
    let chart = |component| {
        let mut labels = vec![("component", component)];
        labels.extend([("app", "demo"), ("release", "demo"), ("heritage", "Helm")]);
        labels.push(("chart", "skywalking-4.8.0"));
        labels
    };
    assert!(selected(&chart("oap")));
    for component in ["ui", "satellite", "demo-skywalking-job"] {
        assert!(!selected(&chart(component)), "{component}");
    }
    assert!(!selected(&[("component", "oap"), ("app", "demo")]));

    let operator = |app, application, component| {
        selected(&[
            ("app", app),
            (APPLICATION, application),
            (COMPONENT, component),
        ])
    };
    assert!(operator("oap", "oapserver", "service"));
    assert!(!operator("satellite", "satellite", "service"));
    assert!(!operator("ui", "ui", "service"));
    assert!(!operator("banyandb", "banyandb", "service"));
    assert!(!operator("oap", "oapserver", "pod"));
}

#[test]
fn entries_that_may_select_different_services_are_fine() {
    for (one, other) in [
        ("service: a/b", "service: a/c"),
        ("service: a/b", "service: b/b"),
        ("service: a/b", "selector: app=b"),
        ("service: a/b, port: 1", "service: a/b, port: 2"),
        // Whether 11800 and `grpc` are one port is for the cluster to say.
        ("service: a/b, port: 11800", "service: a/b, port: grpc"),
        ("selector: a=b", "selector: a=c"),
        ("selector: a=b, namespace: a", "selector: a=b, namespace: b"),
        ("namespace: a", "namespace: b"),
    ] {
        parsed(&format!(
            "kubernetes:\n  services:\n  - {{name: x, {one}}}\n  - {{name: y, {other}}}\n"
        ));
    }
}

#[test]
fn too_many_of_anything() {
    let mut services = "kubernetes:\n  services:\n".to_owned();
    for index in 0..=MAX_SERVICES {
        writeln!(services, "  - {{name: s{index}, service: a/s{index}}}").unwrap();
    }
    is_refused(&services, 67, "65 services, at most 64 are possible");

    let mut pods = in_cluster("    quota:\n      pods:\n");
    for index in 0..=MAX_POD_CLASSES {
        writeln!(pods, "      - {{selector: app=a{index}}}").unwrap();
    }
    is_refused(&pods, 70, "65 classes of pods, a quota can have at most 64");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_damage_to_a_good_file_makes_it_panic(at in 0..400usize, with in "[-a-z0-9:,\\[\\]{}\"'&*!|=()>\n ]{0,3}", cut in 0..5usize) {
        let good = "kubernetes:\n  services:\n  - name: agents\n    service: skywalking/skywalking-oap\n    port: grpc\n    \
            quota: {observed: 10m, headroom: 15%}\n  - name: als\n    selector: \"app in (a,b),!c\"\n    namespace: mesh\n    \
            quota:\n      pods:\n      - {selector: \"a!=b\", namespace: shop, connections: 3}\n  publish_every: 2s\n  hold_for: 5m\n";
        parsed(good);
        let at = at.min(good.len());
        let end = (at + cut).min(good.len());
        let damaged = format!("{}{with}{}", &good[..at], &good[end..]);
        if let Err(error) = Config::parse(&damaged) {
            let message = error.to_string();
            prop_assert!(message.contains("; "), "{}", message);
            prop_assert!(error.line().is_some() || message.contains("no settings"), "{}", message);
        }
    }
}
