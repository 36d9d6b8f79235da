//! `explain` says what then happens.

use std::net::SocketAddr;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use testkit::fixtures::tcp::{self, Listener, Outcome};
use testkit::fixtures::{Balancer, Explanation, Machine};

use crate::support::{agents, group, landing, open_listeners, own_port, virtual_port};

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
            &crate::support::virtual_port_of("round-robin", backends, &[]),
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
                .filter(|explanation| explanation.reason == reason)
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
                .any(|explanation| explanation.reason == "over-quota")
        );
        assert!(
            explanations
                .iter()
                .any(|explanation| explanation.reason == "admitted")
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
        let before = balancer.service().verdicts;
        balancer.explain(&"127.0.0.1:5", &"11800");
        assert_eq!(
            balancer.service().verdicts,
            before,
            "explaining changes nothing"
        );
    });
}
