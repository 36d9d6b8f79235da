//! `doctor` names what would go wrong.

use testkit::fixtures::tcp::Listen;
use testkit::fixtures::{Balancer, Machine};

use crate::support::{agents, open_listeners, virtual_port};

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
        let _mptcp = Listen::on(&crate::support::backend(0)).mptcp().open();
        let warned = with_status(&balancer, "warn");
        for subject in SUBJECTS.iter().chain(&["backends"]) {
            assert!(
                warned.iter().any(|name| name == subject),
                "{subject} is not among {warned:?}"
            );
        }
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
