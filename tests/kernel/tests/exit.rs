//! How the daemon ends, and what it leaves.

use std::process::Command;

use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Machine, Signal, process};

use crate::support::{agents, own_port};

const QUOTA: usize = 3;

fn yaml() -> String {
    own_port("least-connections", &["quota: {per_backend: 3}"])
}

/// Whether refusals still happen once the daemon has ended in this way.
fn is_enforced_after(arguments: &[&str], signal: Signal) -> bool {
    let mut enforced = false;
    Machine::with(|machine| {
        let mut balancer = Balancer::prepare(machine, &yaml()).with_arguments(arguments);
        balancer.launch();
        let _listener = Listen::on(&agents()).open();
        let _clients = tcp::connect_many(agents(), QUOTA);
        assert!(tcp::connect(agents()).is_refused());
        let status = balancer.stop(signal);
        assert!(status.success(), "{status:?}: {}", balancer.logs());
        enforced = tcp::connect(agents()).is_refused();
        assert_eq!(
            balancer.is_loaded(),
            enforced,
            "state and programs go together"
        );
        assert!(!balancer.socket().exists(), "the admin socket is gone");
        balancer.must(&["unload"]);
        assert!(!balancer.is_loaded());
        tcp::connect(agents()).connected();
    });
    enforced
}

#[test]
fn sigint_takes_everything_out() {
    assert!(!is_enforced_after(&[], Signal::SIGINT));
}

#[test]
fn sigterm_leaves_everything_for_the_next_daemon() {
    assert!(is_enforced_after(&[], Signal::SIGTERM));
}

#[test]
fn on_exit_keep_overrides_sigint() {
    assert!(is_enforced_after(&["--on-exit", "keep"], Signal::SIGINT));
}

#[test]
fn on_exit_unload_overrides_sigterm() {
    assert!(!is_enforced_after(
        &["--on-exit", "unload"],
        Signal::SIGTERM
    ));
}

/// With too few descriptors `unload` says so, and leaves pins that a later one finds.
#[test]
fn unload_without_descriptors_loses_no_link() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &yaml());
        let _listener = Listen::on(&agents()).open();
        balancer.wait_active(1);
        balancer.stop(Signal::SIGKILL);
        let mut failures = 0;
        for files in 4..100 {
            let verb = balancer.command(&["unload"]);
            let script = format!("ulimit -n {files} && exec \"$@\"");
            let mut limited = Command::new("sh");
            limited.args(["-c", &script, "sh"]).arg(verb.get_program());
            limited.args(verb.get_args());
            let output = process::output(&mut limited).expect("it can be started");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!said.contains("only its pin"), "{files} files: {said}");
            if output.status.success() {
                assert!(!balancer.is_loaded(), "{files} files: {said}");
                break;
            }
            assert!(balancer.is_loaded(), "{files} files: {said}");
            failures += 1;
        }
        println!("{failures} limits were too low");
        assert!((1..90).contains(&failures), "{failures}");
    });
}

#[test]
fn unload_asks_a_daemon_that_lives() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &yaml());
        let _listener = Listen::on(&agents()).open();
        let _clients = tcp::connect_many(agents(), QUOTA);
        balancer.must(&["unload"]);
        tcp::connect(agents()).connected();
        assert!(!balancer.is_loaded());
        assert!(balancer.wait().success(), "{}", balancer.logs());
    });
}

#[test]
fn unload_cleans_up_after_a_daemon_that_was_killed() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &yaml());
        let listener = Listen::on(&agents()).open();
        let _clients = tcp::connect_many(agents(), QUOTA);
        balancer.stop(Signal::SIGKILL);
        assert!(tcp::connect(agents()).is_refused());
        balancer.must(&["unload"]);
        tcp::connect(agents()).connected();
        assert!(!balancer.state().exists(), "the state directory is gone");
        // And again from nothing.
        drop(listener);
        balancer.launch();
        let _listener = Listen::on(&agents()).open();
        balancer.wait_active(1);
    });
}
