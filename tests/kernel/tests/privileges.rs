//! What the daemon may still do once it has started, and that it is enough.

use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Machine, Netns, Signal, process};

use crate::support::{agents, own_port};

/// Their numbers in include/uapi/linux/capability.h.
const CAP_DAC_READ_SEARCH: u64 = 1 << 2;
const CAP_SYS_PTRACE: u64 = 1 << 19;
const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_PERFMON: u64 = 1 << 38;
const CAP_BPF: u64 = 1 << 39;

const OWN: u64 = CAP_DAC_READ_SEARCH | CAP_SYS_PTRACE | CAP_PERFMON | CAP_BPF;
const ALL: u64 = OWN | CAP_SYS_ADMIN | CAP_NET_ADMIN;

/// A user without any privilege, on every machine.
const NOBODY: u32 = 65_534;
const QUOTA: usize = 4;

fn yaml(namespaces: &str) -> String {
    let service = own_port(
        "least-connections",
        &["quota: {per_backend: 4}", "move: off"],
    );
    format!("{service}namespaces: {namespaces}\n")
}

/// The service of [`yaml`] on a port on which nobody listens.
fn elsewhere(namespaces: &str) -> String {
    yaml(namespaces).replace("11800", "11900")
}

/// A process of `uid` that does nothing but hold this descriptor, killed when dropped.
struct Holder(Child);

impl Holder {
    fn of(uid: u32, descriptor: Stdio) -> Self {
        let mut command = Command::new("sleep");
        command.arg("60").stdin(descriptor).process_group(0);
        Self(process::spawn(command.uid(uid).gid(uid)).expect("`sleep` can be started"))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The capability sets, `no_new_privs` and the seccomp mode of a thread; `None`: it has ended.
fn privileges(status: &Path) -> Option<Vec<(String, u64)>> {
    let status = fs::read_to_string(status).ok()?;
    let fields = status.lines().filter_map(|line| line.split_once(":\t"));
    let of_interest =
        |name: &str| name.starts_with("Cap") || matches!(name, "NoNewPrivs" | "Seccomp");
    Some(
        fields
            .filter(|(name, _)| of_interest(name))
            .map(|(name, value)| {
                (
                    name.to_owned(),
                    u64::from_str_radix(value, 16).expect("a number"),
                )
            })
            .collect(),
    )
}

/// Looks at every thread many times, so that the short-lived ones are among them.
#[track_caller]
fn every_thread_has_only(balancer: &Balancer, capabilities: u64) {
    let expected = [
        ("CapInh", 0),
        ("CapPrm", capabilities),
        ("CapEff", capabilities),
        ("CapBnd", capabilities),
        ("CapAmb", 0),
        ("NoNewPrivs", 1),
        ("Seccomp", 2),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value));
    let tasks = format!("/proc/{}/task", balancer.pid());
    let mut seen = 0;
    for _ in 0..200 {
        for task in fs::read_dir(&tasks).expect("the daemon lives").flatten() {
            let Some(found) = privileges(&task.path().join("status")) else {
                continue;
            };
            assert_eq!(found, expected, "{}", task.path().display());
            seen += 1;
        }
        std::thread::yield_now();
    }
    assert!(seen >= 200, "the main thread was there each time");
}

/// The file that says which process holds the state directory.
fn holder(balancer: &Balancer) -> PathBuf {
    let state = balancer.state().to_str().expect("plain letters");
    Path::new("/run/balancer").join(format!("{}.pid", state.trim_matches('/').replace('/', "-")))
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("it is there").mode() & 0o7777
}

/// Every capability that it may keep is one that it cannot do without: see docs/privileges.md.
#[test]
fn for_its_own_namespace_it_keeps_four_capabilities() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &yaml("own"));
        every_thread_has_only(&balancer, OWN);
        assert!(holder(&balancer).exists());
        assert_eq!(mode(balancer.state()), 0o700);
        assert_eq!(mode(&balancer.socket()), 0o600);
        assert_eq!(
            fs::metadata(balancer.socket()).expect("it is there").uid(),
            0
        );

        // What it does all day: a listener, a reload (which loads `steer` again), requests.
        let _listener = Listen::on(&agents()).open();
        balancer.reload();
        balancer.wait_for_log(" reloaded /", 0);
        assert_eq!(tcp::connect_many(agents(), 2 * QUOTA).len(), QUOTA);
        balancer.quota_set("agents", None, 6);
        let _more = tcp::connect_many(agents(), 2 * QUOTA);
        balancer.wait_until(|service| service.established() <= 6);
        every_thread_has_only(&balancer, OWN);
        let status = balancer.stop(Signal::SIGINT);
        assert!(status.success(), "{}", balancer.logs());
        for denied in ["ERROR", "not permitted", "denied"] {
            assert!(!balancer.logs().contains(denied), "{}", balancer.logs());
        }
        for made in [balancer.state(), &balancer.socket(), &holder(&balancer)] {
            assert!(!made.exists(), "{} is still there", made.display());
        }
    });
}

#[test]
fn for_all_namespaces_it_can_still_enter_and_guard_new_ones() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &yaml("all"));
        every_thread_has_only(&balancer, ALL);
        let other = Netns::new();
        let listener = other.run(|| {
            machine.cgroup.enter();
            Listen::on(&agents()).open()
        });
        let _tenant = other.run(|| Holder::of(NOBODY, Stdio::null()));
        balancer.wait_active(1);
        balancer.wait_for_log("guarding the network namespace", 0);
        let clients = other.run(|| tcp::connect_many(agents(), 2 * QUOTA));
        assert_eq!(clients.len(), QUOTA);
        every_thread_has_only(&balancer, ALL);
        drop((listener, clients));
        let status = balancer.stop(Signal::SIGINT);
        assert!(status.success(), "{}", balancer.logs());
        assert!(!balancer.state().exists(), "the state directory is gone");
    });
}

/// Only a process of another user has the listener, and only after the daemon gave up its
/// capabilities is it wanted.
fn a_listener_of_another_user_is_adopted(namespaces: &str) {
    Machine::with(|machine| {
        let listener = std::net::TcpListener::bind(agents()).expect("the port is free");
        let _holder = Holder::of(NOBODY, OwnedFd::from(listener).into());
        let before = tcp::connect_many(agents(), 3);
        let balancer = Balancer::start(machine, &elsewhere(namespaces));
        balancer.configure(&yaml(namespaces));
        balancer.reload();
        balancer.wait_for_log("adopted the listener on 127.0.0.1:11800", 0);
        balancer.wait_until(|service| service.active() == 1 && service.established() == 3);
        let after = tcp::connect_many(agents(), QUOTA);
        assert_eq!(before.len() + after.len(), QUOTA);
    });
}

#[test]
fn in_its_own_namespace_a_listener_of_another_user_is_adopted() {
    a_listener_of_another_user_is_adopted("own");
}

#[test]
fn with_all_namespaces_a_listener_of_another_user_is_adopted() {
    a_listener_of_another_user_is_adopted("all");
}

#[test]
fn a_reload_that_needs_what_was_given_up_changes_nothing() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &yaml("own"));
        let _listener = Listen::on(&agents()).open();
        let other = Netns::new();
        let path = format!("[\"{}\"]", other.path().display());
        for (already, namespaces) in ["all", &path].into_iter().enumerate() {
            balancer.configure(&elsewhere(namespaces));
            balancer.reload();
            balancer.wait_for_log("needs CAP_SYS_ADMIN", already);
        }
        assert!(
            balancer.logs().contains("restart it"),
            "{}",
            balancer.logs()
        );
        // The old one is in force, for its port and its netns.
        assert_eq!(balancer.service().port, 11800);
        assert_eq!(tcp::connect_many(agents(), 2 * QUOTA).len(), QUOTA);
        // And a good one is taken.
        balancer.configure(&yaml("own").replace("per_backend: 4", "per_backend: 6"));
        balancer.reload();
        balancer.wait_for_log(" reloaded /", 0);
        balancer.wait_until(|service| {
            service
                .backends
                .iter()
                .all(|backend| backend.quota == Some(6))
        });
    });
}

/// What was kept at the start stays: there and back again.
#[test]
fn a_daemon_that_may_enter_namespaces_may_do_so_after_any_reload() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &yaml("all"));
        for (already, namespaces) in ["own", "all"].into_iter().enumerate() {
            balancer.configure(&yaml(namespaces));
            balancer.reload();
            balancer.wait_for_log(" reloaded /", already);
        }
        every_thread_has_only(&balancer, ALL);
    });
}

#[test]
fn a_state_directory_that_others_could_look_into_is_closed_to_them() {
    Machine::with(|machine| {
        let mut balancer = Balancer::prepare(machine, &yaml("own"));
        fs::create_dir(balancer.state()).expect("a directory on bpffs");
        fs::set_permissions(balancer.state(), Permissions::from_mode(0o777)).expect("chmod");
        balancer.launch();
        assert_eq!(mode(balancer.state()), 0o700);
    });
}

/// Whoever owns it can replace what is pinned in it.
#[test]
fn a_state_directory_of_another_user_is_refused() {
    Machine::with(|machine| {
        let mut balancer = Balancer::prepare(machine, &yaml("own"));
        fs::create_dir(balancer.state()).expect("a directory on bpffs");
        std::os::unix::fs::chown(balancer.state(), Some(NOBODY), None).expect("chown");
        balancer.spawn();
        assert!(!balancer.wait().success());
        assert!(
            balancer.logs().contains("belongs to user 65534"),
            "{}",
            balancer.logs()
        );
        assert!(!balancer.is_loaded());
    });
}

/// The root of a BPF file system is shared: narrowing it would shut others out of theirs.
#[test]
fn a_shared_directory_is_left_as_it_is_and_refused() {
    Machine::with(|machine| {
        let mut balancer = Balancer::prepare(machine, &yaml("own"));
        fs::create_dir(balancer.state()).expect("a directory on bpffs");
        fs::set_permissions(balancer.state(), Permissions::from_mode(0o1777)).expect("chmod");
        balancer.spawn();
        assert!(!balancer.wait().success());
        assert!(
            balancer.logs().contains("shared with others"),
            "{}",
            balancer.logs()
        );
        assert_eq!(mode(balancer.state()), 0o1777);
    });
}
