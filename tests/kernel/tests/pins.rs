//! Pins and cgroups that go away under a running daemon.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Machine, Signal, eventually};

use crate::support::{agents, agree, open_listeners, own_port, virtual_port};

const BPFFS: &str = "/sys/fs/bpf";
/// The daemon has put pins back.
const PUT_BACK: &str = "that were gone: somebody had removed them";

/// The files of the data plane that is loaded.
fn pins(balancer: &Balancer) -> Vec<String> {
    let versions = fs::read_dir(balancer.state())
        .into_iter()
        .flatten()
        .flatten();
    let files = versions.flat_map(|version| fs::read_dir(version.path()).expect("a directory"));
    let name = |file: fs::DirEntry| file.file_name().into_string().expect("UTF-8");
    let mut names: Vec<_> = files.map(|file| name(file.expect("a pin"))).collect();
    names.sort();
    names
}

/// Without its daemon a data plane lives by its pins alone.
#[test]
fn lost_pins_are_put_back_and_outlive_the_daemon() {
    Machine::with(|machine| {
        let rest = ["quota: {per_backend: 4}"];
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &rest));
        let mut listeners = open_listeners(2);
        let _clients = tcp::connect_many(agents(), 4);
        let before = pins(&balancer);
        let link = before.iter().find(|name| name.starts_with("link_steer"));
        let version = fs::read_dir(balancer.state()).expect("a directory").next();
        let version = version.expect("a version").expect("a version").path();
        fs::remove_file(version.join(link.expect("a link"))).expect("removed");
        balancer.wait_for_log(PUT_BACK, 0);
        assert_eq!(pins(&balancer), before);
        fs::remove_dir_all(balancer.state()).expect("removed");
        balancer.wait_for_log(PUT_BACK, 1);
        assert_eq!(pins(&balancer), before);
        balancer.stop(Signal::SIGKILL);
        let more = tcp::connect_many(agents(), 10);
        assert_eq!(
            (more.len(), agree(&balancer, &mut listeners)),
            (4, vec![4; 2])
        );
        balancer.launch();
        assert!(tcp::connect(agents()).is_refused());
        assert_eq!(agree(&balancer, &mut listeners), [4; 2]);
    });
}

/// Gives the calling thread, and what it starts, a BPF file system of its own.
fn own_bpffs() {
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private mounts");
    mount_bpffs();
}

fn mount_bpffs() {
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .expect("mounted");
}

/// As `umount -l` does it, until nothing is mounted there.
fn unmount_bpffs() {
    while umount2(BPFFS, MntFlags::MNT_DETACH).is_ok() {}
}

#[test]
fn an_unmounted_file_system_is_said_once_and_followed_when_it_is_back() {
    Machine::with(|machine| {
        own_bpffs();
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let mut listeners = open_listeners(1);
        unmount_bpffs();
        balancer.wait_for_log("mount -t bpf", 0);
        let status = balancer.verb(&["status"]);
        assert!(
            status.stderr.contains("the daemon lives, but its pins"),
            "{status:?}"
        );
        let _client = tcp::connect(agents()).connected();
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(
            balancer.logs().matches("mount -t bpf").count(),
            1,
            "{}",
            balancer.logs()
        );
        mount_bpffs();
        balancer.wait_for_log(PUT_BACK, 0);
        assert_eq!(agree(&balancer, &mut listeners), [1]);
        balancer.stop(Signal::SIGKILL);
        let _second = tcp::connect(agents()).connected();
        balancer.launch();
        assert_eq!(agree(&balancer, &mut listeners), [2]);
    });
}

#[test]
fn unload_works_without_the_file_system() {
    Machine::with(|machine| {
        own_bpffs();
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let _listeners = open_listeners(1);
        let _client = tcp::connect(agents()).connected();
        unmount_bpffs();
        balancer.wait_for_log("mount -t bpf", 0);
        balancer.must(&["unload"]);
        assert!(
            tcp::connect(agents()).is_refused(),
            "nothing steers any more"
        );
        assert!(balancer.wait().success());
        mount_bpffs();
        let cgroup = balancer.cgroup();
        let doctor = balancer.must(&["doctor", "--cgroup", text(&cgroup), "-o", "json"]);
        assert!(!doctor.contains("another balancer's"), "{doctor}");
    });
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A service manager makes the cgroup of its servers anew when it restarts them.
#[test]
fn a_cgroup_that_is_removed_is_said_and_followed_when_it_is_back() {
    let machine = Machine::new();
    let balancer = Balancer::start(&machine, &own_port("least-connections", &[]));
    let listen = || {
        machine
            .netns
            .run(|| machine.cgroup.run(|| Listen::on(&agents()).open()))
    };
    let connect = || machine.netns.run(|| tcp::connect_many(agents(), 3));
    let first = listen();
    balancer.wait_active(1);
    drop(first);
    let path = machine.cgroup.path();
    let counted = machine.netns.run(|| balancer.must(&["doctor"]));
    let named = format!("cgroup2: {}", path.display());
    assert!(counted.contains(&named), "{counted}");
    eventually(Duration::from_secs(5), || Ok(fs::remove_dir(path)?));
    balancer.wait_for_log("nothing that listens or connects is counted", 0);
    let doctor = || machine.netns.run(|| balancer.verb(&["doctor"]));
    let failed = doctor();
    assert!(
        failed.code == 1 && failed.stdout.contains("FAIL  counted cgroup"),
        "{failed:?}"
    );
    fs::create_dir(path).expect("a cgroup");
    fs::write(path.join("cgroup.type"), "threaded").expect("a threaded cgroup");
    balancer.wait_for_log("counting in the cgroup", 0);
    let _listener = listen();
    let _clients = connect();
    balancer.wait_until(|service| service.active() == 1 && service.established() == 3);
    assert!(doctor().stdout.contains("ok    counted cgroup"));
}
