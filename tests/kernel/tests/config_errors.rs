//! Bad files: one clear error with the line, exit code 1, and nothing changed in the kernel.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Machine, Signal, eventually, process};

use crate::support::{agents, agree, open_listeners, own_port, virtual_port};

/// A wrong file: the line of its error if one can be named, what the error must name, the file.
type Bad = (Option<u32>, &'static [&'static str], &'static str);

#[rustfmt::skip]
const BAD: &[Bad] = &[
    (Some(4), &["polixy"], "services:\n  - name: agents\n    port: 11800\n    polixy: round-robin\n"),
    (Some(1), &["servizes"], "servizes: []\n"),
    (Some(4), &["port"], "services:\n  - name: agents\n    port: 11800\n    port: 11801\n"),
    (Some(3), &["11800", "a"], "services:\n  - {name: a, port: 11800}\n  - {name: b, port: 11800}\n"),
    (Some(3), &["10.0.0.9"], "services:\n  - {name: a, port: 11800, address: 10.0.0.9}\n  - {name: b, port: 11800, address: 10.0.0.9}\n"),
    (Some(3), &["a"], "services:\n  - {name: a, port: 11800}\n  - {name: a, port: 11801}\n"),
    (Some(3), &["port", "0"], "services:\n  - name: agents\n    port: 0\n"),
    (Some(3), &["70000"], "services:\n  - name: agents\n    port: 70000\n"),
    (Some(5), &["per_backend", "0"], "services:\n  - name: agents\n    port: 11800\n    quota:\n      per_backend: 0\n"),
    (Some(6), &["headroom", "-5"], "services:\n  - name: agents\n    port: 11800\n    quota:\n      clients: 10\n      headroom: -5\n"),
    (Some(6), &["headroom", "lots"], "services:\n  - name: agents\n    port: 11800\n    quota:\n      clients: 10\n      headroom: lots\n"),
    (Some(6), &["per_backend"], "services:\n  - name: agents\n    port: 11800\n    quota:\n      per_backend: 10\n      clients: 10\n"),
    (Some(4), &["fastest"], "services:\n  - name: agents\n    port: 11800\n    policy: fastest\n"),
    (Some(4), &["127.0.0.1"], "services:\n  - name: agents\n    port: 11800\n    backends: [\"127.0.0.1\"]\n"),
    (Some(4), &["oap.example:11800"], "services:\n  - name: agents\n    port: 11800\n    backends: [\"oap.example:11800\"]\n"),
    (Some(4), &["127.0.0.1:21000"], "services:\n  - name: agents\n    port: 11800\n    backends: [\"127.0.0.1:21000\", \"127.0.0.1:21000\"]\n"),
    (Some(5), &["weight"], "services:\n  - name: agents\n    port: 11800\n    backends:\n      - {address: \"127.0.0.1:21000\", weight: 0}\n"),
    (Some(4), &["backends"], "services:\n  - name: agents\n    port: 11800\n    backends: []\n"),
    (Some(4), &["10.0.0.0/33"], "services:\n  - name: agents\n    port: 11800\n    exempt: [10.0.0.0/33]\n"),
    (Some(4), &["soon"], "services:\n  - name: agents\n    port: 11800\nfail_open_after: soon\n"),
    (None, &[], "services:\n  - name: [\n"),
    (None, &["services"], "services: []\n"),
    (None, &[], ""),
    (None, &[], "\0\u{1}\u{2}"),
];

/// One error, with what is wrong and where.
fn check((line, words, yaml): &Bad, said: &str) {
    for word in *words {
        assert!(
            said.contains(word),
            "{word:?} is not named for\n{yaml}\nin:\n{said}"
        );
    }
    if let Some(line) = line {
        let named = said.contains(&format!(":{line}:")) || said.contains(&format!("line {line}"));
        assert!(named, "line {line} is not named for\n{yaml}\nin:\n{said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn a_bad_file_ends_the_daemon_before_it_changes_anything() {
    Machine::with(|machine| {
        for bad @ (_, _, yaml) in BAD {
            let balancer = Balancer::prepare(machine, yaml);
            let (code, said) = run(&balancer);
            assert_eq!(code, 1, "for\n{yaml}\n{said}");
            check(bad, &said);
            assert!(!balancer.state().exists(), "state was made for\n{yaml}");
            assert!(!balancer.socket().exists(), "a socket was made for\n{yaml}");
        }
    });
}

/// `balancer run` to its end, which must come by itself: its exit code and what it said.
fn run(balancer: &Balancer) -> (i32, String) {
    let config = balancer.config();
    let finished = balancer.verb(&["run", "--config", config.to_str().expect("a UTF-8 path")]);
    (finished.code, finished.stderr)
}

#[test]
fn files_that_cannot_be_read_are_named() {
    Machine::with(|machine| {
        let balancer = Balancer::prepare(machine, "");
        let config = balancer.config();
        let name = config.to_str().expect("a UTF-8 path");
        let expect = |why: &str| {
            let (code, said) = run(&balancer);
            assert_eq!(code, 1, "{why}: {said}");
            assert!(
                said.contains(name),
                "{why}: the file is not named in {said}"
            );
            assert!(!balancer.state().exists());
        };
        std::fs::remove_file(&config).expect("removed");
        expect("missing");
        std::fs::create_dir(&config).expect("made");
        expect("a directory");
        std::fs::remove_dir(&config).expect("removed");
        balancer.configure(&format!(
            "# {}\n{}",
            "x".repeat(10 << 20),
            own_port("round-robin", &[])
        ));
        expect("10 MB");
        std::fs::write(&config, b"services: \xff\xfe").expect("written");
        expect("not UTF-8");
    });
}

#[test]
fn a_bad_file_at_a_reload_leaves_the_old_one_in_force() {
    Machine::with(|machine| {
        let good = virtual_port("least-connections", 2, &["quota: {per_backend: 4}"]);
        let balancer = Balancer::start(machine, &good);
        let mut listeners = open_listeners(2);
        let mut clients = tcp::connect_many(agents(), 3);
        for (round, (_, words, yaml)) in BAD.iter().enumerate() {
            balancer.configure(yaml);
            let already = balancer.logs().matches("ERROR").count();
            balancer.reload();
            balancer.wait_for_log("ERROR", already);
            if let Some(word) = words.first() {
                let logs = balancer.logs();
                let last = logs.rsplit("ERROR").next().unwrap_or_default();
                assert!(
                    last.contains(word),
                    "round {round}: {word:?} is not named in {last}"
                );
            }
        }
        clients.extend(tcp::connect_many(agents(), 10));
        assert_eq!(agree(&balancer, &mut listeners), [4, 4]);
        // A good one is taken.
        balancer.configure(&virtual_port(
            "least-connections",
            2,
            &["quota: {per_backend: 6}"],
        ));
        balancer.reload();
        balancer.eventually(|service| {
            anyhow::ensure!(
                service
                    .backends
                    .iter()
                    .all(|backend| backend.quota == Some(6))
            );
            Ok(())
        });
        clients.extend(tcp::connect_many(agents(), 10));
        assert_eq!(agree(&balancer, &mut listeners), [6, 6]);
    });
}

/// `balancer reload` answers when it is done, and a shell can tell whether it was.
#[test]
fn the_verb_reload_says_whether_the_new_file_is_in_force() {
    Machine::with(|machine| {
        let with = |quota: u32| {
            let quota = format!("quota: {{per_backend: {quota}}}");
            virtual_port("least-connections", 2, &[&quota])
        };
        let balancer = Balancer::start(machine, &with(4));
        let _listeners = open_listeners(2);
        balancer.wait_active(2);
        let file = balancer.config();
        let quotas = || {
            let backends = balancer.service().backends;
            let quotas: Vec<_> = backends.iter().map(|backend| backend.quota).collect();
            quotas
        };
        balancer.configure(&with(6));
        assert_eq!(
            balancer.must(&["reload"]),
            format!("reloaded {}\n", file.display())
        );
        assert_eq!(quotas(), [Some(6); 2]);
        balancer.configure("services:\n  - name: agents\n    prot: 1\n");
        let failed = balancer.verb(&["reload"]);
        assert_eq!(failed.code, 1, "{}", failed.stderr);
        let place = format!("{}:3:5: unknown key `prot`", file.display());
        assert!(
            failed.stderr.contains(&place) && failed.stderr.contains("the old one stays in force"),
            "{}",
            failed.stderr
        );
        assert_eq!(quotas(), [Some(6); 2]);
        balancer.wait_active(2);
    });
}

/// By signal as well as by the verb: who comes later must see that the file is not in force.
#[test]
fn a_failed_reload_stays_in_status_until_one_succeeds() {
    Machine::with(|machine| {
        let with = |quota: u32| {
            let quota = format!("quota: {{per_backend: {quota}}}");
            virtual_port("least-connections", 2, &[&quota])
        };
        let mut balancer = Balancer::start(machine, &with(4));
        let _listeners = open_listeners(2);
        balancer.wait_active(2);
        let failed = |balancer: &Balancer| balancer.status().agent.failed_reload;
        assert!(failed(&balancer).is_none());
        let place = format!("{}:3:5: unknown key `prot`", balancer.config().display());
        for by_verb in [false, true] {
            balancer.configure("services:\n  - name: agents\n    prot: 1\n");
            if by_verb {
                assert_eq!(balancer.verb(&["reload"]).code, 1);
            } else {
                balancer.reload();
                balancer.wait_for_log(&place, 0);
            }
            let seen = failed(&balancer).expect("the reload failed");
            assert!(
                seen.error.contains(&place) && seen.age_ms < 60_000,
                "{seen:?}"
            );
            let text = balancer.must(&["status"]);
            let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(
                text.contains("Reload: FAILED") && text.contains(&place),
                "{text}"
            );
            let quotas = balancer.service().backends;
            assert!(
                quotas.iter().all(|backend| backend.quota == Some(4)),
                "{quotas:?}"
            );

            balancer.configure(&with(4));
            balancer.must(&["reload"]);
            assert!(failed(&balancer).is_none());
            assert!(!balancer.must(&["status"]).contains("Reload:"));
        }
        // The next daemon reads the file anew.
        balancer.configure("services: []\n");
        assert_eq!(balancer.verb(&["reload"]).code, 1);
        balancer.stop(Signal::SIGKILL);
        assert!(failed(&balancer).is_some());
        balancer.configure(&with(4));
        balancer.launch();
        assert!(failed(&balancer).is_none());
    });
}

#[test]
fn a_reload_can_change_everything_about_a_service() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 2}"]),
        );
        let mut own = Listen::on(&agents()).open();
        let _clients = tcp::connect_many(agents(), 5);
        assert_eq!(own.accept_all(), 2);
        balancer.configure(&virtual_port("round-robin", 2, &["exempt: [127.0.9.0/24]"]));
        balancer.reload();
        balancer.wait_for_log("reloaded", 0);
        let mut listeners = open_listeners(2);
        let more = tcp::connect_many(agents(), 10);
        assert_eq!((more.len(), own.accept_all()), (10, 0));
        assert_eq!(crate::support::loads(&mut listeners), [5, 5]);
        // And to another port: the old one is the kernel's again.
        balancer.configure("services: [{name: agents, port: 11900, policy: source-hash}]\n");
        balancer.reload();
        balancer.wait_for_log("reloaded", 1);
        assert_eq!(balancer.service().port, 11900);
        let _direct = tcp::connect(agents()).connected();
        assert_eq!(own.accept_all(), 1);
    });
}

/// Somebody corrects a number that was far too high: what was computed by it is not lowered slowly.
#[test]
fn a_rule_that_was_changed_in_the_file_holds_at_once() {
    Machine::with(|machine| {
        let yaml = |clients: u32| {
            let quota = format!("quota: {{clients: {clients}}}");
            virtual_port("least-connections", 2, &[&quota])
        };
        let mut balancer = Balancer::start(machine, &yaml(4_000));
        let _listeners = open_listeners(2);
        let is = |balancer: &Balancer, quota| {
            balancer.wait_until(|service| {
                let quotas = service.backends.iter().map(|backend| backend.quota);
                quotas.eq([Some(quota); 2])
            });
        };
        is(&balancer, 2_000);
        balancer.configure(&yaml(400));
        balancer.reload();
        is(&balancer, 200);
        balancer.stop(Signal::SIGTERM);
        balancer.configure(&yaml(40));
        balancer.launch();
        is(&balancer, 20);
        let shown = balancer.must(&["quota", "show", "agents"]);
        assert!(!shown.contains("by hand"), "{shown}");
    });
}

#[test]
fn quotas_of_what_does_not_exist_are_errors() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        for arguments in [
            &["quota", "set", "nobody", "5"][..],
            &["quota", "set", "agents", "5", "--slot", "77"],
            &["quota", "clear", "nobody"],
            &["quota", "set", "\u{1b}[2J", "5"],
            &["quota", "show", "\u{1b}[2J"],
        ] {
            let finished = balancer.verb(arguments);
            assert_eq!(finished.code, 1, "{arguments:?}: {}", finished.stderr);
            assert!(!finished.stderr.contains('\u{1b}'), "{}", finished.stderr);
        }
    });
}

/// A request may wait for a daemon that hangs longer than the one who asked.
#[test]
fn a_daemon_that_was_stopped_does_not_do_what_nobody_waits_for() {
    Machine::with(|machine| {
        let rest = ["quota: {per_backend: 4}"];
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &rest));
        let _listeners = open_listeners(1);
        balancer.wait_active(1);
        balancer.signal(Signal::SIGSTOP);
        let hung = balancer.verb(&["ping", "--within", "1"]);
        let process = format!("process {}, has not answered within 1 s", balancer.pid());
        assert!(hung.code == 1 && hung.stderr.contains(&process), "{hung:?}");
        let mut command = balancer.command(&["quota", "set", "agents", "2"]);
        command.stderr(Stdio::piped());
        let mut asking = process::spawn(&mut command).expect("started");
        let mut told = BufReader::new(asking.stderr.take().expect("piped"));
        let mut line = String::new();
        told.read_line(&mut line)
            .expect("it tells for whom it waits");
        let waiting = format!("waiting for the daemon, process {}, …\n", balancer.pid());
        assert_eq!(line, waiting);
        asking.kill().expect("killed");
        asking.wait().expect("it ends");
        balancer.signal(Signal::SIGCONT);
        balancer.wait_for_log("not done: who asked for it has gone", 1);
        assert_eq!(balancer.service().backends[0].quota, Some(4));
        balancer.quota_set("agents", None, 3);
        assert_eq!(balancer.service().backends[0].quota, Some(3));
    });
}

#[test]
fn a_run_that_fails_leaves_nothing_and_says_why() {
    Machine::with(|machine| {
        let balancer = Balancer::prepare(machine, &own_port("round-robin", &[]));
        let config = balancer.config();
        let config = config.to_str().expect("a UTF-8 path");
        for (cgroup, words) in [
            ("/tmp", "/tmp is no cgroup2 directory: give one below"),
            (
                "/no/such/cgroup",
                "there is no cgroup /no/such/cgroup: make it first",
            ),
        ] {
            let failed = balancer.verb(&["run", "--config", config, "--cgroup", cgroup]);
            assert!(
                failed.code == 1 && failed.stderr.contains(words),
                "{failed:?}"
            );
            assert!(!balancer.state().exists());
        }
        // What fails once the lock is taken.
        std::fs::write(balancer.socket(), "").expect("written");
        let failed = balancer.verb(&["run", "--config", config]);
        let words = "something else than a socket";
        assert!(
            failed.code == 1 && failed.stderr.contains(words),
            "{failed:?}"
        );
        assert!(!balancer.state().exists());
        std::fs::remove_file(balancer.socket()).expect("removed");
    });
}

#[test]
fn a_daemon_that_was_killed_is_dead_in_status_before_it_is_silent() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &own_port("round-robin", &[]));
        let dead = format!("Daemon: DEAD: its process {} is gone", balancer.pid());
        balancer.stop(Signal::SIGKILL);
        eventually(Duration::from_secs(3), || {
            let text = balancer.must(&["status"]);
            anyhow::ensure!(text.starts_with(&dead), "{text}");
            Ok(())
        });
    });
}

/// Each would count and steer as if it were alone.
#[test]
fn two_daemons_on_one_port_of_a_netns_are_refused() {
    Machine::with(|machine| {
        let on_port = |port: u16| format!("services: [{{name: agents, port: {port}}}]\n");
        let mut first = Balancer::start(machine, &on_port(11_800));
        let mut second = Balancer::prepare(machine, &on_port(11_800));
        let state = first.state().to_owned();
        let named = |said: &str, daemon: &str| {
            for words in [
                format!(
                    "with its state in {} ({daemon}) has port 11800",
                    state.display()
                ),
                format!("`balancer unload --state-dir {}`", state.display()),
            ] {
                assert!(said.contains(&words), "{words:?} is not in {said}");
            }
        };
        let (code, said) = run(&second);
        assert_eq!(code, 1, "{said}");
        named(&said, &format!("process {}", first.pid()));
        assert!(!second.state().exists());
        // Beside it is room for others, and a reload can't come closer either.
        second.configure(&on_port(11_900));
        second.launch();
        second.configure(&on_port(11_800));
        let reload = second.verb(&["reload"]);
        assert_eq!(reload.code, 1, "{}", reload.stderr);
        named(&reload.stderr, &format!("process {}", first.pid()));
        assert_eq!(second.service().port, 11_900);
        // What a daemon has left goes on deciding.
        first.stop(Signal::SIGTERM);
        let reload = second.verb(&["reload"]);
        named(&reload.stderr, "no daemon runs there");
        first.must(&["unload"]);
        second.must(&["reload"]);
        assert_eq!(second.service().port, 11_800);
    });
}
