//! What keeps connects from being placed is told where an operator looks.

use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;
use testkit::fixtures::foreign::Connect4;
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Machine, Signal, eventually};

use crate::support::at;

const FRONTEND: &str = "127.0.0.9:11800";
const ENDPOINT: &str = "127.0.0.11:11800";
/// What is removed keeps its place for a second.
const SETTLES_WITHIN: Duration = Duration::from_secs(20);

fn file(endpoints: &[String]) -> String {
    format!("services:\n{}", entry("agents", FRONTEND, endpoints))
}

fn entry(name: &str, to: &str, endpoints: &[String]) -> String {
    let endpoints = endpoints.join(", ");
    format!("- name: {name}\n  connect: {{to: [\"{to}\"], endpoints: [{endpoints}]}}\n")
}

fn one_endpoint() -> String {
    file(&[format!("\"{ENDPOINT}\"")])
}

/// A finding of `doctor`, of the given file or of what is loaded.
#[track_caller]
fn finding(balancer: &Balancer, with_file: bool, name: &str) -> (String, String) {
    let (config, cgroup) = (balancer.config(), balancer.cgroup());
    let [config, cgroup] = [&config, &cgroup].map(|path| path.to_str().expect("a UTF-8 path"));
    let mut verb = vec!["doctor", "--cgroup", cgroup, "-o", "json"];
    if with_file {
        verb.extend(["--config", config]);
    }
    let said = balancer.verb(&verb);
    let said: Value = serde_json::from_str(&said.stdout).expect("JSON");
    let checks = said["checks"].as_array().expect("a list");
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.unwrap_or_else(|| panic!("no {name} in {said:#}"));
    let text = |key: &str| check[key].as_str().expect("text").to_owned();
    (text("status"), text("found"))
}

/// What `status` prints, on one line.
fn status(balancer: &Balancer) -> String {
    let status = balancer.must(&["status"]);
    status.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_program_that_allows_no_other_beside_it_is_told_as_long_as_it_is_there() {
    Machine::with(|machine| {
        let mut server = Listen::on(ENDPOINT).open();
        let other = Connect4::load("exclusive", 11_900, 11_901);
        let alone = other.attach_alone(&machine.cgroup);
        let mut balancer = Balancer::start(machine, &one_endpoint());
        let is_told = |balancer: &Balancer| {
            let place = balancer.status().place;
            let why = place.refused.as_deref().expect("it is refused");
            assert!(why.contains("EPERM") && why.contains("--cgroup"), "{why}");
            assert!(place.left_out.is_empty(), "{place:?}");
            let text = status(balancer);
            for words in [
                "Placing: OFF: connects of this node go where clients send them: another program",
                "Placing: off, as said above",
            ] {
                assert!(text.contains(words), "{words:?} is not in {text}");
            }
            let (said, found) = finding(balancer, true, "placing");
            assert!(said == "warn" && found.contains("EPERM"), "{found}");
            let (said, found) = finding(balancer, true, "other connect");
            assert!(said == "warn" && found.contains(&other.title()), "{found}");
            let metrics = balancer.must(&["metrics"]);
            assert!(metrics.contains("balancer_place_refused 1\n"), "{metrics}");
        };
        is_told(&balancer);
        assert!(tcp::connect(at(FRONTEND)).is_refused());
        // The data plane stays as it is, and so does what is said of it.
        assert!(balancer.stop(Signal::SIGTERM).success());
        is_told(&balancer);
        balancer.launch();
        is_told(&balancer);
        drop(alone);
        balancer.must(&["reload"]);
        assert_eq!(balancer.status().place.refused, None);
        let client = tcp::connect(at(FRONTEND)).connected();
        assert_eq!(server.accept_all(), 1);
        let text = status(&balancer);
        assert!(!text.contains("OFF") && !text.contains("off,"), "{text}");
        assert_eq!(finding(&balancer, true, "placing").0, "ok");
        drop(client);
    });
}

#[test]
fn what_the_maps_have_no_room_for_is_told_until_they_have() {
    Machine::with(|machine| {
        let _server = Listen::on(ENDPOINT).open();
        let balancer = Balancer::start(machine, &one_endpoint());
        let client = tcp::connect(at(FRONTEND)).connected();
        assert_eq!(finding(&balancer, true, "room to place").0, "ok");
        // As many as there is room for, and the removed one keeps its place while it has a client.
        let entries = (1..=4).map(|number| {
            let endpoints: Vec<_> = (0..=255)
                .map(|last| format!("\"127.1.{number}.{last}:11800\""))
                .collect();
            entry(
                &format!("s{number}"),
                &format!("127.0.1.{number}:11800"),
                &endpoints,
            )
        });
        balancer.configure(&format!("services:\n{}", entries.collect::<String>()));
        balancer.reload();
        let left_out = eventually(SETTLES_WITHIN, || {
            let left_out = balancer.status().place.left_out;
            ensure!(left_out.len() == 1, "{left_out:?}\n{}", balancer.logs());
            Ok(left_out)
        });
        let words = "there is no room for 1 endpoints of `s4`";
        assert!(left_out[0].contains(words), "{left_out:?}");
        let text = status(&balancer);
        assert!(text.contains(&format!("Placing: {words}")), "{text}");
        let (said, found) = finding(&balancer, true, "room to place");
        assert!(said == "warn" && found.contains(words), "{found}");
        assert_eq!(balancer.logs().matches(words).count(), 1);
        drop(client);
        eventually(SETTLES_WITHIN, || {
            let left_out = balancer.status().place.left_out;
            ensure!(left_out.is_empty(), "{left_out:?}");
            Ok(())
        });
    });
}

#[test]
fn a_file_that_only_says_where_connects_go_is_no_mistake() {
    Machine::with(|machine| {
        let mut balancer = Balancer::prepare(machine, &one_endpoint());
        assert_eq!(finding(&balancer, true, "services").0, "ok");
        assert_eq!(finding(&balancer, false, "services").0, "warn");
        balancer.launch();
        for with_file in [true, false] {
            assert_eq!(finding(&balancer, with_file, "services").0, "ok");
        }
    });
}
