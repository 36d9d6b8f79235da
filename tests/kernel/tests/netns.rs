//! Netns come and go, as those of pods do.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{
    Backend, Balancer, Deed, Machine, Netns, Signal, Stranger, eventually, long,
};

use crate::support::{agents, agree, own_port};

const SETTLES_WITHIN: Duration = Duration::from_secs(10);

/// The pins of a data plane, by name.
fn pins(balancer: &Balancer) -> Vec<String> {
    let mut found = Vec::new();
    let planes = fs::read_dir(balancer.state()).expect("the state directory");
    for plane in planes.flatten() {
        let pins = fs::read_dir(plane.path()).expect("a data plane");
        found.extend(
            pins.flatten()
                .map(|pin| pin.file_name().into_string().expect("UTF-8")),
        );
    }
    found.sort();
    found
}

fn steers(balancer: &Balancer) -> usize {
    let steer = |pin: &&String| pin.starts_with("link_steer_");
    pins(balancer).iter().filter(steer).count()
}

fn files_of(balancer: &Balancer) -> usize {
    let directory = format!("/proc/{}/fd", balancer.pid());
    fs::read_dir(directory).expect("the daemon lives").count()
}

/// Resident memory in KiB.
fn memory_of(balancer: &Balancer) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", balancer.pid()));
    let status = status.expect("the daemon lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.trim().parse().ok()).expect("VmRSS")
}

/// From `listen` until `steer` is there; with it the quota holds.
fn live_and_die(machine: &Machine, balancer: &Balancer, round: usize) -> Duration {
    let netns = Netns::new();
    netns.run(|| {
        machine.cgroup.enter();
        let cookie = balancer::sys::netns::cookie().expect("the netns has a cookie");
        let listener = Listen::on(&agents()).open();
        let begin = Instant::now();
        eventually(SETTLES_WITHIN, || {
            let guarded = pins(balancer).contains(&format!("link_steer_{cookie}"));
            ensure!(guarded, "round {round}: not guarded");
            Ok(())
        });
        let attached = begin.elapsed();
        balancer.eventually(|service| {
            let here = |backend: &&Backend| backend.netns == cookie;
            let state = service
                .backends
                .iter()
                .find(here)
                .map(|backend| &backend.state);
            ensure!(
                state.is_some_and(|state| state == "active"),
                "not confirmed"
            );
            Ok(())
        });
        let mut clients = tcp::connect_many(agents(), 7);
        assert_eq!(clients.len(), 4, "round {round}: {}", balancer.logs());
        if round.is_multiple_of(3) {
            // A listener that goes before its connections.
            drop(listener);
            clients.clear();
        }
        attached
    })
}

/// Nobody confirms it while no daemon lives.
#[test]
fn of_a_stranger_with_very_many_connections_1024_are_counted() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &[]) + "namespaces: all\n";
        let mut balancer = Balancer::start(machine, &yaml);
        balancer.stop(Signal::SIGKILL);
        let netns = Netns::new();
        netns.run(|| {
            machine.cgroup.enter();
            let mut listener = Listen::on(&agents()).open();
            let mut clients = Vec::new();
            for _ in 0..12 {
                clients.extend(tcp::connect_many(agents(), 100));
                listener.accept_all();
            }
            assert_eq!(clients.len(), 1_200);
            let counted = balancer.service();
            assert_eq!(counted.backends[0].state, "candidate");
            assert_eq!(counted.established(), 1_024);
            // The uncounted ones change nothing when they go.
            clients.truncate(1_100);
            assert_eq!(balancer.service().established(), 1_024);
            drop(clients);
            balancer.wait_until(|service| service.established() == 0);
        });
    });
}

#[test]
fn namespaces_that_come_and_go_leave_nothing() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 4}"]);
        let balancer = Balancer::start(machine, &format!("{yaml}namespaces: all\n"));
        let cycles = if long() { 200 } else { 25 };
        live_and_die(machine, &balancer, 0);
        let settled = || {
            balancer.eventually(|service| {
                ensure!(service.backends.is_empty(), "slots are left");
                Ok(())
            });
            eventually(SETTLES_WITHIN, || {
                let pins = pins(&balancer);
                ensure!(steers(&balancer) == 1, "links are left: {pins:?}");
                Ok(pins)
            })
        };
        let (pins, files, memory) = (settled(), files_of(&balancer), memory_of(&balancer));
        let mut attached: Vec<_> = (0..cycles)
            .map(|round| live_and_die(machine, &balancer, round))
            .collect();
        assert_eq!(settled(), pins);
        eventually(SETTLES_WITHIN, || {
            let now = files_of(&balancer);
            ensure!(now <= files, "{now} descriptors, {files} before");
            Ok(())
        });
        let grown = memory_of(&balancer).saturating_sub(memory);
        assert!(grown < 16 << 10, "{grown} KiB more in {cycles} cycles");
        let agent = balancer.status().agent;
        assert_eq!((agent.drift, agent.repairs), (Some(0), Some(0)));
        attached.sort();
        println!(
            "{cycles} namespaces: guarded {:?} after listen (median), {:?} at the most; {grown} KiB more",
            attached[cycles / 2],
            attached[cycles - 1]
        );
        balancer.must(&["unload"]);
        assert!(!balancer.state().exists());
    });
}

/// A name for a netns that can be given to another one, as `ip netns` does.
struct Name {
    directory: tempfile::TempDir,
}

impl Name {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        Self { directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("blue")
    }

    fn give_to(&self, netns: &Netns) {
        self.take_away();
        symlink(netns.path(), self.path()).expect("a symbolic link can be made");
    }

    fn take_away(&self) {
        let _ = fs::remove_file(self.path());
    }
}

fn serve(machine: &Machine, netns: &Netns) -> Listener {
    netns.run(|| {
        machine.cgroup.enter();
        Listen::on(&agents()).open()
    })
}

/// How many of seven clients get in.
fn admitted(netns: &Netns) -> usize {
    netns.run(|| tcp::connect_many(agents(), 7)).len()
}

#[test]
fn a_namespace_that_is_named_may_come_late_go_and_be_another() {
    Machine::with(|machine| {
        let name = Name::new();
        let yaml = own_port("least-connections", &["quota: {per_backend: 4}"]);
        let yaml = format!("{yaml}namespaces: [\"{}\"]\n", name.path().display());
        let balancer = Balancer::start(machine, &yaml);
        balancer.wait_for_log("is not there", 0);
        for round in 0..2 {
            let netns = Netns::new();
            let cookie = netns
                .run(balancer::sys::netns::cookie)
                .expect("it has a cookie");
            // It may serve before it has its name.
            let _listener = serve(machine, &netns);
            name.give_to(&netns);
            eventually(SETTLES_WITHIN, || {
                let service = balancer.service();
                let mut here = service.backends.iter();
                let here = here.find(|backend| backend.netns == cookie);
                ensure!(
                    here.is_some_and(|backend| backend.state == "active"),
                    "{service:?}"
                );
                ensure!(
                    pins(&balancer).contains(&format!("link_steer_{cookie}")),
                    "not guarded"
                );
                Ok(())
            });
            assert_eq!(admitted(&netns), 4, "round {round}");
        }
        // The second one is gone, and its name leads nowhere.
        name.take_away();
        eventually(SETTLES_WITHIN, || {
            let service = balancer.service();
            ensure!(service.backends.is_empty(), "{service:?}");
            ensure!(steers(&balancer) == 0, "{:?}", pins(&balancer));
            Ok(())
        });
        let agent = balancer.status().agent;
        agent
            .drift
            .filter(|drift| *drift == 0)
            .context("drift")
            .expect("none");
    });
}

/// What listens in another netns before the daemon comes.
#[test]
fn what_runs_already_in_another_namespace_is_adopted() {
    Machine::with(|machine| {
        let other = Netns::new();
        // This thread stays there: by it the netns is found.
        other.run(|| {
            machine.cgroup.enter();
            let mut listeners = vec![Listen::on(&agents()).open()];
            let before = tcp::connect_many(agents(), 3);
            let yaml = own_port("least-connections", &["quota: {per_backend: 4}"]);
            let balancer = Balancer::start(machine, &format!("{yaml}namespaces: all\n"));
            balancer.wait_active(1);
            assert_eq!(agree(&balancer, &mut listeners), [3]);
            assert_eq!(tcp::connect_many(agents(), 7).len(), 1);
            drop(before);
            agree(&balancer, &mut listeners);
            drop(listeners);
            balancer.wait_until(|service| service.backends.is_empty());
        });
    });
}

fn slots_elsewhere(balancer: &Balancer, own: u64) -> usize {
    let service = balancer.service();
    let elsewhere = |backend: &&Backend| backend.netns != own;
    service.backends.iter().filter(elsewhere).count()
}

/// Where every netns is guarded, whoever can make one can have slots there: not all of them.
#[test]
fn strangers_leave_slots_to_the_namespace_of_the_daemon() {
    Machine::with(|machine| {
        let own = balancer::sys::netns::cookie().expect("the netns has a cookie");
        let yaml = own_port("least-connections", &["quota: {per_backend: 4}"]);
        let balancer = Balancer::start(machine, &format!("{yaml}namespaces: all\n"));
        let churning = Stranger::start(agents(), 2, Deed::Churn(1000));
        // Two thousand listeners came and went, and nobody needs their slots.
        let held = slots_elsewhere(&balancer, own);
        assert!(held < 100, "{held} slots are held");
        drop(churning);
        let _stranger = Stranger::start(agents(), 12, Deed::Connect(100));
        let held = slots_elsewhere(&balancer, own);
        assert!(held <= 768, "strangers hold {held} slots");
        let mut listener = Listen::on(&agents()).open();
        balancer.eventually(|service| {
            let ours = service
                .backends
                .iter()
                .filter(|backend| backend.netns == own);
            let ready = ours.filter(|backend| backend.state == "active").count();
            ensure!(
                ready == 1,
                "not registered: {} slots",
                service.backends.len()
            );
            Ok(())
        });
        assert_eq!(tcp::connect_many(agents(), 7).len(), 4);
        assert_eq!(balancer.service().verdicts("fail-open-full"), 0);
        assert_eq!(listener.accept_all(), 4);
    });
}
