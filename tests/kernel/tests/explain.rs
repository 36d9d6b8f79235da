//! `explain` says what then happens.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::ensure;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use serde_json::Value;
use testkit::fixtures::tcp::{self, Listen, Listener, Outcome};
use testkit::fixtures::{Balancer, Explanation, Finished, Machine, Netns, process};

use crate::support::{
    agents, at, backend, group, landing, open_listeners, own_port, virtual_port, virtual_port_of,
};

/// Random sources that each configuration is asked about; 1,400 in all.
const SOURCES_EACH: usize = 200;

fn random_sources(number: usize) -> Vec<SocketAddr> {
    let mut runner = TestRunner::new(Config {
        failure_persistence: None,
        ..Config::default()
    });
    let source = (any::<[u8; 3]>(), 1024..32_000u16)
        .prop_map(|([a, b, c], port)| SocketAddr::from(([127, a, b, c.clamp(1, 254)], port)));
    let unique = prop::collection::hash_set(source, number);
    let sources = unique
        .new_tree(&mut runner)
        .expect("sources can be made")
        .current();
    sources.into_iter().collect()
}

/// Explains, connects, and compares, for each source.
fn explained(
    yaml: &str,
    open: impl FnOnce() -> Vec<Listener>,
    machine: &Machine,
) -> Vec<Explanation> {
    let balancer = Balancer::start(machine, yaml);
    let mut listeners = open();
    balancer.wait_active(listeners.len());
    let mut held = Vec::new();
    let mut explanations = Vec::new();
    for (n, source) in random_sources(SOURCES_EACH).into_iter().enumerate() {
        let explanation = balancer.explain(&source, &"127.0.0.1:11800");
        let outcome = tcp::connect_from(source, agents());
        check(&explanation, &outcome, &mut listeners, source);
        // Two of three stay, so that loads differ.
        held.extend(outcome.ok().filter(|_| n % 3 != 0));
        explanations.push(explanation);
    }
    explanations
}

fn check(
    explanation: &Explanation,
    outcome: &Outcome,
    listeners: &mut [Listener],
    source: SocketAddr,
) {
    assert_eq!(explanation.service.as_deref(), Some("agents"));
    assert!(!explanation.sentence.is_empty());
    match explanation.verdict.as_str() {
        "refuse" => assert!(
            outcome.is_refused(),
            "{source}: {outcome:?} after {explanation:?}"
        ),
        "steer" | "pass" => {
            assert!(
                matches!(outcome, Outcome::Connected(_)),
                "{source}: {outcome:?} after {explanation:?}"
            );
            let landed = listeners[landing(listeners)].addr();
            if let Some(backend) = &explanation.backend {
                assert_eq!(backend.address, landed, "{source}: {explanation:?}");
            }
        }
        other => panic!("verdict {other}"),
    }
}

#[test]
fn with_least_connections() {
    Machine::with(|machine| {
        explained(
            &virtual_port("least-connections", 4, &[]),
            || open_listeners(4),
            machine,
        );
    });
}

#[test]
fn with_syn_cookies_for_all() {
    Machine::with(|machine| {
        machine.netns.sysctl("net.ipv4.tcp_syncookies", "2");
        let explanations = explained(
            &virtual_port("least-connections", 4, &[]),
            || open_listeners(4),
            machine,
        );
        for explanation in explanations {
            let sentence = explanation.sentence;
            assert!(sentence.contains("SYN cookies are in use"), "{sentence}");
        }
    });
}

#[test]
fn with_round_robin() {
    Machine::with(|machine| {
        explained(
            &virtual_port("round-robin", 5, &[]),
            || open_listeners(5),
            machine,
        );
    });
}

#[test]
fn with_round_robin_and_weights() {
    Machine::with(|machine| {
        let backends = r#"{address: "127.0.0.1:21000", weight: 3}, "127.0.0.1:21001", {address: "127.0.0.1:21002", weight: 2}"#;
        explained(
            &virtual_port_of("round-robin", backends, &[]),
            || open_listeners(3),
            machine,
        );
    });
}

#[test]
fn with_source_hash() {
    Machine::with(|machine| {
        explained(
            &virtual_port("source-hash", 5, &[]),
            || open_listeners(5),
            machine,
        );
    });
}

#[test]
fn with_quotas_and_exempt_sources() {
    Machine::with(|machine| {
        let rest = ["quota: {per_backend: 20}", "exempt: [127.128.0.0/10]"];
        let explanations = explained(
            &virtual_port("source-hash", 3, &rest),
            || open_listeners(3),
            machine,
        );
        for reason in ["steered", "over-quota", "exempt"] {
            let number = explanations
                .iter()
                .filter(|explanation| explanation.reason.as_deref() == Some(reason))
                .count();
            assert!(number > 10, "{reason}: {number}");
        }
    });
}

#[test]
fn on_an_own_port() {
    Machine::with(|machine| {
        let explanations = explained(
            &own_port("least-connections", &["quota: {per_backend: 50}"]),
            || group(2),
            machine,
        );
        assert!(
            explanations
                .iter()
                .any(|explanation| explanation.reason.as_deref() == Some("over-quota"))
        );
        assert!(
            explanations
                .iter()
                .any(|explanation| explanation.reason.as_deref() == Some("admitted"))
        );
    });
}

#[test]
fn a_destination_of_no_service_is_passed() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let explanation = balancer.explain(&"127.0.0.1", &"11801");
        assert_eq!(
            (explanation.service, explanation.verdict.as_str()),
            (None, "pass")
        );
        assert_eq!(explanation.reason, None, "none is counted");
        let before = balancer.service().verdicts;
        balancer.explain(&"127.0.0.1:5", &"11800");
        assert_eq!(
            balancer.service().verdicts,
            before,
            "explaining changes nothing"
        );
    });
}

/// A listener in a netns of its own.
struct Elsewhere {
    netns: Netns,
    cookie: u64,
    listener: Listener,
}

impl Elsewhere {
    fn new(machine: &Machine) -> Self {
        let netns = Netns::new();
        let (cookie, listener) = netns.run(|| {
            machine.cgroup.enter();
            let cookie = balancer::sys::netns::cookie().expect("a netns has a cookie");
            (cookie, Listen::on(&agents()).open())
        });
        Self {
            netns,
            cookie,
            listener,
        }
    }

    /// How it is named by a file.
    fn file(&self) -> String {
        self.netns.path().display().to_string()
    }
}

/// Two netns that are guarded, with a listener each; that of the command has none.
fn with_two_netns(test: impl FnOnce(&Balancer, Elsewhere, Elsewhere) + Send) {
    Machine::with(|machine| {
        let (one, two) = (Elsewhere::new(machine), Elsewhere::new(machine));
        let yaml = own_port("least-connections", &["quota: {per_backend: 2}"]);
        let yaml = format!(
            "{yaml}namespaces: [\"{}\", \"{}\"]\n",
            one.file(),
            two.file()
        );
        let balancer = Balancer::start(machine, &yaml);
        balancer.wait_active(2);
        test(&balancer, one, two);
    });
}

const ASK: [&str; 5] = ["explain", "--from", "127.0.0.9", "--to", "11800"];

fn json(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:?}"))
}

/// Runs a command as it was printed.
fn as_said(command: &str) -> Finished {
    let output = process::output(Command::new("sh").args(["-c", command]));
    output.expect("a shell can be started").into()
}

#[test]
fn where_several_netns_have_listeners_they_are_listed() {
    with_two_netns(|balancer, one, two| {
        let listed = balancer.verb(&[&ASK[..], &["-o", "json"]].concat());
        assert_eq!(listed.code, 1, "{listed:?}");
        let listed = json(&listed);
        assert_eq!(listed["service"], "agents");
        assert_eq!(
            (&listed["netns"], &listed["verdict"]),
            (&Value::Null, &Value::Null)
        );
        let choices = listed["choices"].as_array().expect("choices").clone();
        let mut cookies = [one.cookie, two.cookie];
        cookies.sort_unstable();
        assert_eq!(choices.len(), 2, "{choices:?}");
        let text = balancer.verb(&ASK);
        assert_eq!((text.code, text.stderr.as_str()), (1, ""));
        for (choice, cookie) in choices.iter().zip(cookies) {
            assert_eq!(choice["netns"], cookie);
            assert_eq!(
                choice["backends"][0]["address"], "127.0.0.1:11800",
                "{choice}"
            );
            assert_eq!(choice["backends"][0]["state"], "active", "{choice}");
            assert!(text.stdout.contains(&cookie.to_string()), "{}", text.stdout);
            let command = choice["command"].as_str().expect("a command");
            let answer = json(&as_said(command));
            assert_eq!(answer["netns"], cookie, "{answer}");
            assert_eq!(answer["backend"]["slot"], choice["backends"][0]["slot"]);
        }
    });
}

#[test]
fn each_netns_has_an_answer_of_its_own() {
    with_two_netns(|balancer, one, two| {
        let explain =
            |netns: &str| balancer.explain_with(&"127.0.0.9", &11_800, &["--netns", netns]);
        let full = one.netns.run(|| tcp::connect_many(agents(), 2));
        assert_eq!(full.len(), 2);
        two.netns.sysctl("net.ipv4.tcp_syncookies", "2");
        for (elsewhere, verdict) in [(&one, "refuse"), (&two, "steer")] {
            for netns in [elsewhere.file(), elsewhere.cookie.to_string()] {
                let explanation = explain(&netns);
                assert_eq!(explanation.netns, elsewhere.cookie);
                assert_eq!(explanation.verdict, verdict, "{explanation:?}");
                let cookies = explanation.sentence.contains("SYN cookies are in use");
                assert_eq!(
                    cookies,
                    verdict == "steer",
                    "its own settings: {explanation:?}"
                );
                let in_truth = elsewhere.netns.run(|| tcp::connect(agents()));
                assert_eq!(in_truth.is_refused(), verdict == "refuse", "{in_truth:?}");
            }
        }
    });
}

#[test]
fn the_only_netns_with_listeners_is_answered_for() {
    with_two_netns(|balancer, one, two| {
        let empty = two.file();
        drop(two.listener);
        balancer.wait_active(1);
        let explanation = balancer.explain(&"127.0.0.9", &11_800);
        assert_eq!(explanation.netns, one.cookie);
        assert_eq!(explanation.verdict, "steer", "{explanation:?}");
        let words = format!(
            "in the network namespace {} (the only one with listeners of agents) a SYN from",
            one.cookie
        );
        assert!(explanation.sentence.starts_with(&words), "{explanation:?}");
        let empty = balancer.explain_with(&"127.0.0.9", &11_800, &["--netns", &empty]);
        assert_eq!(empty.reason.as_deref(), Some("no-backend"));
        let words = format!(
            "no backend of agents listens there, but in the network namespace {}",
            one.cookie
        );
        assert!(empty.sentence.contains(&words), "{empty:?}");
    });
}

#[test]
fn a_netns_without_steer_is_left_to_the_kernel() {
    with_two_netns(|balancer, _one, _two| {
        let own = ["--netns", "/proc/self/ns/net"];
        let explanation = balancer.explain_with(&"127.0.0.9", &11_800, &own);
        assert_eq!(explanation.verdict, "pass");
        assert_eq!(explanation.reason, None, "nothing is counted");
        assert!(
            explanation.sentence.contains("is not guarded"),
            "{explanation:?}"
        );
    });
}

#[test]
fn what_is_no_netns_is_said() {
    with_two_netns(|balancer, one, two| {
        for (netns, words) in [
            ("no-such-netns", "there is no /run/netns/no-such-netns"),
            (
                "/proc/self/ns/mnt",
                "/proc/self/ns/mnt is no network namespace",
            ),
            ("/", "/ is no network namespace"),
            (
                "18446744073709551615",
                "there is no network namespace 18446744073709551615",
            ),
        ] {
            let refused = balancer.verb(&[&ASK[..], &["--netns", netns]].concat());
            assert_eq!(refused.code, 1, "{refused:?}");
            assert!(refused.stderr.contains(words), "{refused:?}");
            assert_eq!(refused.stdout, "");
        }
        let unknown = balancer
            .verb(&[&ASK[..], &["--netns", "1"]].concat())
            .stderr;
        for known in [one.cookie, two.cookie] {
            assert!(unknown.contains(&known.to_string()), "{unknown}");
        }
        let pod = balancer.verb(&[&ASK[..], &["--pod", "skywalking/oap-0"]].concat());
        assert_eq!(pod.code, 1);
        assert!(
            pod.stderr.contains("not in a Kubernetes cluster"),
            "{pod:?}"
        );
    });
}

/// What is said of it is what happens.
#[test]
fn on_a_backends_own_port_connections_are_counted_and_not_judged() {
    Machine::with(|machine| {
        let yaml = virtual_port("least-connections", 1, &["quota: {per_backend: 1}"]);
        let balancer = Balancer::start(machine, &yaml);
        let to = backend(0).port();
        let silent = balancer.explain(&"127.0.0.1", &to).sentence;
        assert!(
            silent.contains("a backend of agents may listen there, and none does now"),
            "{silent}"
        );
        let _listeners = open_listeners(1);
        balancer.wait_active(1);
        let before = balancer.service().verdicts;
        for to in [to.to_string(), backend(0).to_string()] {
            let explanation = balancer.explain(&"127.0.0.1", &to);
            assert_eq!((explanation.service, explanation.reason), (None, None));
            assert_eq!(explanation.verdict, "pass");
            assert_eq!(
                explanation.backend.map(|backend| backend.address),
                Some(backend(0))
            );
            for words in [
                "is counted on it",
                "is not judged",
                "Clients of agents connect to port 11800",
            ] {
                assert!(
                    explanation.sentence.contains(words),
                    "{}",
                    explanation.sentence
                );
            }
        }
        let connections = tcp::connect_many(backend(0), 3);
        assert_eq!(connections.len(), 3, "past the quota");
        balancer.eventually(|service| {
            ensure!(service.established() == 3, "{service:?}");
            Ok(())
        });
        assert_eq!(balancer.service().verdicts, before);
        assert_eq!(balancer.explain(&"127.0.0.1", &agents()).verdict, "refuse");
    });
}

#[test]
fn backends_of_the_other_family_are_unsuited() {
    Machine::with(|machine| {
        let both = virtual_port_of(
            "least-connections",
            r#""127.0.0.1:21000", "[::1]:21001""#,
            &[],
        );
        let balancer = Balancer::start(machine, &both);
        let v4 = Listen::on(&backend(0)).open();
        balancer.wait_active(1);
        let alone = balancer.explain(&"::1", &11_800);
        assert_eq!(alone.reason.as_deref(), Some("no-backend"));
        assert!(alone.sentence.contains("each takes no IPv6"), "{alone:?}");
        let v6 = at("[::1]:11800");
        assert!(tcp::connect(v6).is_refused());
        let _other = Listen::on(&at("[::1]:21001")).open();
        balancer.wait_active(2);
        let explanation = balancer.explain(&"::1", &11_800);
        assert_eq!(
            explanation.backend.map(|backend| backend.address),
            Some(at("[::1]:21001"))
        );
        let unsuited: Vec<_> = explanation
            .unsuited
            .iter()
            .map(|unsuited| unsuited.why.as_str())
            .collect();
        assert_eq!(unsuited, ["takes no IPv6"]);
        let _connection = tcp::connect(v6).connected();
        drop(v4);
        let families = balancer.verb(&["explain", "--from", "::1", "--to", "127.0.0.1:11800"]);
        assert_eq!(families.code, 2, "{families:?}");
        assert!(
            families.stderr.contains("two address families"),
            "{families:?}"
        );
    });
}

#[test]
fn a_service_with_an_address_is_asked_about_by_it() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["address: 127.0.0.5"]);
        let balancer = Balancer::start(machine, &yaml);
        let _listener = Listen::on(&at("127.0.0.5:11800")).open();
        balancer.wait_active(1);
        let incomplete = balancer.verb(&ASK);
        assert_eq!(incomplete.code, 1);
        assert!(
            incomplete
                .stderr
                .contains("write `--to 127.0.0.5:11800` for agents"),
            "{incomplete:?}"
        );
        let explanation = balancer.explain(&"127.0.0.9", &"127.0.0.5:11800");
        assert_eq!(explanation.service.as_deref(), Some("agents"));
        let other = balancer.explain(&"127.0.0.9", &"127.0.0.6:11800");
        assert_eq!((other.service, other.reason), (None, None));
        assert!(
            other
                .sentence
                .contains("on port 11800 there is agents at 127.0.0.5:11800"),
            "{}",
            other.sentence
        );
    });
}
