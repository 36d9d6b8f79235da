//! `doctor` names what would go wrong.

use testkit::fixtures::tcp::Listen;
use testkit::fixtures::{Balancer, Machine};

use crate::support::{agents, backend, open_listeners, virtual_port, virtual_port_of};

/// The names of the checks with this status.
fn with_status(balancer: &Balancer, status: &str) -> Vec<String> {
    let (config, cgroup) = (balancer.config(), balancer.cgroup());
    let [config, cgroup] = [&config, &cgroup].map(|path| path.to_str().expect("a UTF-8 path"));
    let json = balancer.must(&[
        "doctor", "--config", config, "--cgroup", cgroup, "-o", "json",
    ]);
    let report: serde_json::Value =
        serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error} in {json}"));
    assert_eq!(report["schema"], 1);
    let checks = report["checks"].as_array().expect("a list of checks");
    let name = |check: &serde_json::Value| check["name"].as_str().expect("a name").to_owned();
    checks
        .iter()
        .filter(|check| check["status"] == status)
        .map(name)
        .collect()
}

const SUBJECTS: [&str; 6] = [
    "MPTCP listeners",
    "hidden listeners",
    "other sk_lookup",
    "other sock_ops",
    "tcp_migrate_req",
    "tcp_syncookies",
];

#[test]
fn a_machine_in_order_is_said_to_be_so() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let _listeners = open_listeners(2);
        let fine = with_status(&balancer, "ok");
        for subject in SUBJECTS {
            assert!(
                fine.iter().any(|name| name == subject),
                "{subject} is not among {fine:?}"
            );
        }
        assert_eq!(with_status(&balancer, "fail"), Vec::<String>::new());
    });
}

#[test]
fn each_thing_that_would_go_wrong_is_named() {
    Machine::with(|machine| {
        machine.netns.sysctl("net.ipv4.tcp_migrate_req", "1");
        machine.netns.sysctl("net.ipv4.tcp_syncookies", "2");
        let _other = Balancer::start(machine, "services: [{name: other, port: 11900}]\n");
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let _hidden = Listen::on(&agents()).open();
        let _mptcp = Listen::on(&backend(0)).mptcp().open();
        let warned = with_status(&balancer, "warn");
        for subject in SUBJECTS.iter().chain(&["backends"]) {
            assert!(
                warned.iter().any(|name| name == subject),
                "{subject} is not among {warned:?}"
            );
        }
    });
}

/// Said at the start and at each reload, and by `status` for as long as it is so.
#[test]
fn mistakes_of_the_file_are_said_where_people_look() {
    let hidden = "the listener 127.0.0.1:11800";
    let foreign = "the backend 10.99.0.3:21803";
    let no_clients = "`quota:` without `clients`";
    Machine::with(|machine| {
        let listener = Listen::on(&agents()).open();
        let wrong = virtual_port_of(
            "least-connections",
            &format!("\"{}\", \"10.99.0.3:21803\"", backend(0)),
            &["quota: {headroom: 10%}"],
        );
        let balancer = Balancer::start(machine, &wrong);
        let said = |text: &str| balancer.logs().matches(text).count();
        for mistake in [hidden, foreign, no_clients] {
            assert_eq!(said(mistake), 1, "{mistake}: {}", balancer.logs());
        }
        let (text, json) = (
            balancer.must(&["status"]),
            balancer.must(&["status", "-o", "json"]),
        );
        for output in [text, json] {
            assert!(
                output.contains(hidden) && output.contains(foreign),
                "{output}"
            );
        }
        balancer.must(&["reload"]);
        assert_eq!(said(hidden), 2, "{}", balancer.logs());
        drop(listener);
        balancer.configure(&virtual_port("least-connections", 1, &[]));
        balancer.must(&["reload"]);
        assert_eq!((said(hidden), said(foreign)), (2, 2), "{}", balancer.logs());
        let now = balancer.must(&["status", "-o", "json"]);
        assert!(now.contains("\"warnings\": []"), "{now}");
        balancer.configure(&virtual_port("least-connections", 2, &[]));
        balancer.must(&["reload"]);
        let _one = Listen::on(&backend(0)).open();
        let now = balancer.must(&["status", "-o", "json"]);
        let missing = format!("nobody listens on {}: ", backend(1));
        assert!(now.contains(&missing), "{now}");
    });
}

#[test]
fn doctor_changes_nothing() {
    Machine::with(|machine| {
        let balancer = Balancer::prepare(machine, &virtual_port("least-connections", 2, &[]));
        with_status(&balancer, "ok");
        assert!(!balancer.state().exists());
        assert!(!balancer.socket().exists());
    });
}
