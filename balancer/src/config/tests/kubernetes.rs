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
                policy: Policy::LeastConnections,
                quota: ClusterQuota::Unlimited,
                exempt: Vec::new(),
            }],
            publish_every: Duration::from_secs(2),
            hold_for: Duration::from_secs(300),
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
      policy: round-robin
      quota:
        pods:
          - {selector: "agent=java", namespace: shop, connections: 2}
          - selector: " sidecar in (envoy, istio),!test "
        headroom: 15%
        min_quota: 20
      exempt: [10.0.0.0/24]
    - name: als
      selector: app=oap
      namespace: mesh
      port: 11802
      quota: {observed: 10m, headroom: 20%}
  publish_every: 500ms
  hold_for: 24h
fail_open_after: 1m
"#,
    );
    assert_eq!(config.fail_open_after, Duration::from_secs(60));
    let section = config.kubernetes.expect("a section");
    assert_eq!(section.publish_every, Duration::from_millis(500));
    assert_eq!(section.hold_for, Duration::from_secs(86_400));
    let [agents, als] = &section.services[..] else {
        panic!("{section:?}");
    };
    let expected = ServiceChoice::Named {
        namespace: "skywalking".to_owned(),
        name: "skywalking-oap".to_owned(),
    };
    assert_eq!(agents.of, expected);
    assert_eq!(agents.port, PortChoice::Name("grpc".to_owned()));
    assert_eq!(agents.policy, Policy::RoundRobin);
    assert_eq!(agents.exempt, ["10.0.0.0/24".parse().unwrap()]);
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
    let expected = ServiceChoice::Selected {
        namespace: Some("mesh".to_owned()),
        selectors: vec!["app=oap".to_owned()],
    };
    assert_eq!(als.of, expected);
    assert_eq!(als.port, PortChoice::Number(11802));
    let window = Duration::from_secs(600);
    let expected = ClusterQuota::Shared {
        input: ClusterInput::Observed { window },
        headroom_percent: 20,
        min_quota: 16,
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
        min_quota: 16,
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
        "300 clients × 2 + 15% shared by weight, at least 16 each"
    );
    assert_eq!(
        words("{pods: [{selector: a}], min_quota: 3}"),
        "pods of one class + 0% shared by weight, at least 3 each"
    );
    assert_eq!(
        words("{pods: [{selector: a}, {selector: b}]}"),
        "pods of 2 classes + 0% shared by weight, at least 16 each"
    );
    assert_eq!(
        words("{observed: 10m, headroom: 15%}"),
        "the most observed in 600 seconds + 15% shared by weight, at least 16 each"
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
        // Whether it is the name of that port is for the cluster to say.
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

/// Text, line, what the message must say.
#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_mistake_has_its_line_and_its_words() {
    let quota = |text: &str| in_cluster(&format!("    quota: {text}\n"));
    let pods = |text: &str| {
        quota(&format!(
            "\n      pods:\n      - {{selector: a=b}}\n      - {text}"
        ))
    };
    let selects = |text: &str| in_cluster(&format!("    selector: {text}\n"));
    let second = |text: &str| in_cluster(&format!("  - {text}\n"));
    let two = |one: &str, other: &str| {
        format!("kubernetes:\n  services:\n  - {{name: x, {one}}}\n  - {{name: y, {other}}}\n")
    };
    let same = "`y` selects the same Services and port as `x` on line 3; a port is guarded for one of them";
    let cases = [
        // beside what is of this machine
        (
            in_cluster("services:\n  - {name: a, port: 1}\n"),
            4,
            "`services` beside `kubernetes`; what the cluster's Services are",
        ),
        (
            in_cluster("namespaces: all\n"),
            4,
            "`namespaces` beside `kubernetes`; the pods' namespaces are found: remove it",
        ),
        (
            "namespaces: nonsense\nkubernetes: {}\n".to_owned(),
            1,
            "`namespaces` beside `kubernetes`",
        ),
        (
            "fail_open_after: 3s\n".to_owned(),
            1,
            "`services` is missing in the file, and so is `kubernetes`; add `services: …`, or `kubernetes: …`",
        ),
        (
            "kubernets: {}\n".to_owned(),
            1,
            "unknown key `kubernets` in the file; did you mean `kubernetes`?",
        ),
        // the section
        (
            "kubernetes:\n".to_owned(),
            1,
            "`kubernetes` must be `key: value` settings, this is empty",
        ),
        (
            "kubernetes: [a]\n".to_owned(),
            1,
            "`kubernetes` must be `key: value` settings, this is a list; the keys are services, publish_every, hold_for",
        ),
        (
            "kubernetes: {}\n".to_owned(),
            1,
            "`services` is missing in `kubernetes`",
        ),
        (
            "kubernetes:\n  services: []\n".to_owned(),
            2,
            "`services` is empty: nothing to balance; start with\n  kubernetes:",
        ),
        (
            "kubernetes:\n  services:\n".to_owned(),
            2,
            "`services` has no value",
        ),
        (
            "kubernetes:\n  services: [a]\n".to_owned(),
            2,
            "a service must be `key: value` settings",
        ),
        (
            in_cluster("  service: a/b\n"),
            4,
            "unknown key `service` in `kubernetes`; did you mean `services`?",
        ),
        (
            in_cluster("  publish_every: 499ms\n"),
            4,
            "publish_every `499ms` is out of bounds; write a time from 500ms (shorter",
        ),
        (
            in_cluster("  publish_every: 61s\n"),
            4,
            "publish_every `61s` is out of bounds",
        ),
        (
            in_cluster("  publish_every: 2\n"),
            4,
            "publish_every `2` is not a time; write a whole number with a unit, from 500ms to 1m, for example 2s",
        ),
        (
            in_cluster("  hold_for: 9s\n"),
            4,
            "hold_for `9s` is out of bounds; write a time from 10s (shorter",
        ),
        (
            in_cluster("  hold_for: 25h\n"),
            4,
            "hold_for `25h` is out of bounds",
        ),
        (
            in_cluster("  hold_for: never\n"),
            4,
            "hold_for `never` is not a time",
        ),
        (
            in_cluster("  hold_for: [5m]\n"),
            4,
            "hold_for must be a single value, this is a list",
        ),
        // entries
        (
            in_cluster("    address: 10.0.0.9\n"),
            4,
            "unknown key `address` in a service; the keys are name, service, selector",
        ),
        (
            in_cluster("    backends: []\n"),
            4,
            "unknown key `backends` in a service",
        ),
        (in_cluster("    polcy: x\n"), 4, "did you mean `policy`?"),
        (
            in_cluster("    policy: random\n"),
            4,
            "`random` is not a policy",
        ),
        (
            in_cluster("    exempt: [10.0.0.1/24]\n"),
            4,
            "`10.0.0.1/24` has address bits beyond its mask",
        ),
        (
            "kubernetes:\n  services:\n  - service: a/b\n".to_owned(),
            3,
            "`name` is missing in a service",
        ),
        (
            second("{name: OAP, service: a/b}"),
            4,
            "the name `OAP` has `O` in it",
        ),
        (
            second("{name: agents, service: a/b}"),
            4,
            "a second service is named `agents`, the first on line 3",
        ),
        // which Services
        (
            in_cluster("    service: skywalking-oap\n"),
            4,
            "the Service `skywalking-oap` has no namespace; write NAMESPACE/NAME",
        ),
        (
            in_cluster("    service: /oap\n"),
            4,
            "the namespace is empty",
        ),
        (
            in_cluster("    service: sky/\n"),
            4,
            "the Service's name is empty",
        ),
        (
            in_cluster("    service: sky/oap/grpc\n"),
            4,
            "the Service's name `oap/grpc` has `/` in it",
        ),
        (
            in_cluster("    service: Sky/oap\n"),
            4,
            "the namespace `Sky` has `S` in it; use up to 63 of a-z, 0-9 and -",
        ),
        (
            in_cluster("    service: sky/-oap\n"),
            4,
            "the Service's name `-oap` starts or ends with a -",
        ),
        (
            in_cluster(&format!("    service: {}/oap\n", "a".repeat(64))),
            4,
            "is 64 bytes long",
        ),
        (
            in_cluster("    service: {namespace: a, name: b}\n"),
            4,
            "a Service must be a single value, this is a mapping",
        ),
        (
            in_cluster("    service:\n"),
            4,
            "a Service is missing here; write a value, for example skywalking/skywalking-oap",
        ),
        (
            in_cluster("    service: a/b\n    selector: a=b\n"),
            5,
            "`selector` beside `service`, which names one Service; keep",
        ),
        (
            in_cluster("    namespace: a\n    service: a/b\n"),
            4,
            "`namespace` beside `service`",
        ),
        (
            in_cluster("    namespace: a.b\n"),
            4,
            "the namespace `a.b` has `.` in it",
        ),
        (
            in_cluster("    namespace: [a, b]\n"),
            4,
            "a namespace must be a single value, this is a list",
        ),
        // selectors
        (
            selects("\"\""),
            4,
            "the selector `` is not possible: it selects everything; write it as for `kubectl get -l`",
        ),
        (selects("\" \""), 4, "it selects everything"),
        (
            selects("\"a=b,\""),
            4,
            "the selector `a=b,` is not possible: it ends where a key should be",
        ),
        (
            selects("{app: oap}"),
            4,
            "a selector must be a single value, this is a mapping; write for example app=oap",
        ),
        // which port
        (in_cluster("    port: 0\n"), 4, "`0` is not a TCP port"),
        (
            in_cluster("    port: 65536\n"),
            4,
            "`65536` is not a TCP port",
        ),
        (in_cluster("    port: -1\n"), 4, "`-1` is not a TCP port"),
        (in_cluster("    port: \"\"\n"), 4, "`` is not a TCP port"),
        (
            in_cluster("    port: gRPC\n"),
            4,
            "the port's name `gRPC` has `R` in it",
        ),
        (
            in_cluster("    port: 0x10-\n"),
            4,
            "the port's name `0x10-` starts or ends with a -",
        ),
        (
            in_cluster("    port: [grpc]\n"),
            4,
            "a port must be a single value",
        ),
        // two that select the same
        (two("service: a/b", "service: a/b"), 4, same),
        (two("service: a/b", "service: a/b, port: 11800"), 4, same),
        (
            two("service: a/b, port: grpc", "service: a/b, port: grpc"),
            4,
            same,
        ),
        (two("policy: source-hash", "policy: round-robin"), 4, same),
        (
            two("selector: \"a=b,c\"", "selector: \"c , a == b\""),
            4,
            same,
        ),
        (
            two(
                "selector: \"a in (x,y)\", namespace: z",
                "selector: \"a in (y,x)\"",
            ),
            4,
            same,
        ),
        (two("namespace: a", "port: 11800"), 4, same),
        // quotas
        (
            quota("{}"),
            4,
            "`quota` does not say where its number comes from; write one of `observed: 10m`",
        ),
        (
            quota("{headroom: 15%}"),
            4,
            "`quota` does not say where its number comes from",
        ),
        (quota("100"), 4, "`quota` must be `key: value` settings"),
        (quota("{observd: 10m}"), 4, "did you mean `observed`?"),
        (
            quota("\n      clients: 3\n      observed: 10m"),
            6,
            "`observed` beside `clients`: the number comes from one of them; keep one",
        ),
        (
            quota("\n      pods: [{selector: a}]\n      per_backend: 3"),
            6,
            "`per_backend` beside `pods`",
        ),
        (
            quota("\n      per_backend: 3\n      min_quota: 3"),
            6,
            "`min_quota` beside `per_backend`: a quota is either fixed or computed",
        ),
        (
            quota("\n      per_backend: 3\n      connections_per_client: 3"),
            6,
            "`connections_per_client` beside `per_backend`",
        ),
        (
            quota("\n      observed: 5m\n      connections_per_client: 3"),
            6,
            "`connections_per_client` beside `observed`; it goes with `clients`",
        ),
        (
            quota("{per_backend: 0}"),
            4,
            "per_backend `0` is not possible",
        ),
        (quota("{clients: 0}"), 4, "clients `0` is not possible"),
        (
            quota("{clients: 1, connections_per_client: 0}"),
            4,
            "connections_per_client `0` is not possible",
        ),
        (
            quota("{clients: 1, headroom: 15}"),
            4,
            "headroom `15` is not a percentage",
        ),
        (
            quota("{clients: 1, min_quota: 0}"),
            4,
            "min_quota `0` is not possible",
        ),
        (
            quota("{observed: yes}"),
            4,
            "observed `yes` is not a time; write a whole number with a unit, from 1m to 24h, for example 10m",
        ),
        (
            quota("{observed: 59s}"),
            4,
            "observed `59s` is out of bounds; write a time from 1m",
        ),
        (
            quota("{observed: 25h}"),
            4,
            "observed `25h` is out of bounds",
        ),
        // pods
        (
            quota("{pods: []}"),
            4,
            "`pods` is an empty list: no pod would keep a connection",
        ),
        (quota("{pods: }"), 4, "`pods` has no value"),
        (
            quota("{pods: {selector: a}}"),
            4,
            "`pods` must be a list, this is a mapping",
        ),
        (
            quota("{pods: [a=b]}"),
            4,
            "a class of pods must be `key: value` settings, this is a single value; write {selector",
        ),
        (
            pods("{connections: 1}"),
            7,
            "`selector` is missing in a class of pods",
        ),
        (
            pods("{selector: \"a=b c\"}"),
            7,
            "the selector `a=b c` is not possible: `c` where a comma should be",
        ),
        (
            pods("{selector: c, connections: 0}"),
            7,
            "connections `0` is not possible; write a whole number from 1 to 10000",
        ),
        (
            pods("{selector: c, connection: 1}"),
            7,
            "did you mean `connections`?",
        ),
        (
            pods("{selector: c, namespace: B}"),
            7,
            "the namespace `B` has `B` in it",
        ),
        (
            pods("{selector: a==b, connections: 3}"),
            7,
            "the pods `a==b` are listed twice, first on line 6; keep one of the two, with the connections of both",
        ),
    ];
    for (text, line, words) in cases {
        is_refused(&text, line, words);
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
