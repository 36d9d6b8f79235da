//! Backends come, go and come back.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use testkit::fixtures::tcp::{self, Listen, Outcome};
use testkit::fixtures::{Balancer, Machine, Netns, Service, Signal, eventually, process};

use crate::support::{
    agents, agree, backend, connections, open_listeners, own_port, storm, virtual_port,
};

/// Nothing listens on a virtual port: only a backend that is known already can take the first SYN.
#[test]
fn a_listener_registers_itself_before_the_first_syn() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        assert!(tcp::connect(agents()).is_refused());
        for round in 0..100 {
            let listener = Listen::on(&backend(0)).open();
            let outcome = tcp::connect(agents());
            assert!(
                matches!(outcome, Outcome::Connected(_)),
                "round {round}: {outcome:?}"
            );
            drop(listener);
            assert!(tcp::connect(agents()).is_refused(), "round {round}");
        }
        balancer.wait_until(|service| service.backends.is_empty());
    });
}

#[test]
fn a_slot_is_closed_with_its_listener_and_freed_after_its_last_connection() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let mut listeners = open_listeners(2);
        let clients = tcp::connect_many(agents(), 10);
        agree(&balancer, &mut listeners);
        let closing = listeners.remove(0);
        let slot = balancer.service().backend(backend(0)).slot;
        let accepted = closing.close();
        // At once: the next SYN goes to the other one.
        let more = tcp::connect_many(agents(), 10);
        assert_eq!(more.len(), 10);
        let state = |slot: u32| {
            let service = balancer.service();
            service
                .backends
                .iter()
                .find(|backend| backend.slot == slot)
                .map(|found| (found.state.clone(), found.established))
        };
        assert_eq!(state(slot), Some(("closed".into(), 5)));
        assert_eq!(balancer.service().backend(backend(1)).established, 15);
        drop((clients, accepted));
        balancer.wait_until(|service| service.backends.len() == 1);
    });
}

#[test]
fn shutdown_and_listening_again_keeps_the_count() {
    Machine::with(|machine| {
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 5}"]),
        );
        let mut listeners = vec![Listen::on(&agents()).open()];
        let clients = tcp::connect_many(agents(), 9);
        assert_eq!(agree(&balancer, &mut listeners), [5]);
        listeners[0].shutdown();
        assert_eq!(balancer.service().backends[0].state, "closed");
        assert!(tcp::connect(agents()).is_refused());
        listeners[0].listen_again();
        assert!(tcp::connect(agents()).is_refused());
        assert_eq!(agree(&balancer, &mut listeners), [5]);
        let service = balancer.service();
        assert_eq!((service.backends.len(), service.active()), (1, 1));
        drop(clients);
        agree(&balancer, &mut listeners);
        let again = tcp::connect_many(agents(), 9);
        assert_eq!(again.len(), 5);
    });
}

#[test]
fn clients_notice_no_rolling_restart() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let mut listeners = open_listeners(3);
        let stop = AtomicBool::new(false);
        let (tried, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let restarts = 30;
        let mut round = 0;
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let outcome = tcp::connect(agents());
                        tried.fetch_add(1, Ordering::Relaxed);
                        assert!(!outcome.is_timed_out());
                        refused.fetch_add(usize::from(outcome.is_refused()), Ordering::Relaxed);
                        outcome.ok().into_iter().for_each(tcp::reset);
                        // Nobody accepts: without a pause the accept queues would fill up.
                        thread::sleep(Duration::from_micros(100));
                    }
                });
            }
            while round < restarts || round < 10 * restarts && tried.load(Ordering::Relaxed) <= 1000
            {
                let which = round % 3;
                drop(listeners.remove(which));
                listeners.insert(which, Listen::on(&backend(which)).open());
                thread::sleep(Duration::from_millis(20));
                round += 1;
            }
            stop.store(true, Ordering::Relaxed);
        });
        let (tried, refused) = (tried.into_inner(), refused.into_inner());
        assert!(tried > 1000, "only {tried} connects");
        // A SYN that was given to a listener in the instant in which it closes is lost.
        assert!(
            refused <= round / 10,
            "{refused} of {tried} refused in {round} restarts"
        );
        balancer.wait_active(3);
        agree(&balancer, &mut listeners);
    });
}

/// Listeners without a slot serve as they would without the balancer.
#[test]
fn more_listeners_than_slots_do_no_harm() {
    Machine::with(|machine| {
        let services: Vec<_> = (0..5)
            .map(|n| {
                format!(
                    "{{name: service-{n}, port: {}, policy: round-robin}}",
                    11_800 + n
                )
            })
            .collect();
        let yaml = format!("services: [{}]\n", services.join(", "));
        let balancer = Balancer::start(machine, &yaml);
        let address = |n: u16| crate::support::at(&format!("127.0.0.1:{}", 11_800 + n));
        let mut listeners: Vec<_> = (0..4)
            .flat_map(|n| {
                (0..if n == 0 { 260 } else { 256 })
                    .map(move |_| Listen::on(&address(n)).reuse_port().open())
            })
            .collect();
        listeners.push(Listen::on(&address(4)).open());
        listeners.push(Listen::on("127.0.0.2:11804").open());
        let status = balancer.status();
        for n in 0..4 {
            let active = status.service(&format!("service-{n}")).active();
            assert!(active <= 256, "{active} members");
        }
        let known: usize = status.services.iter().map(Service::active).sum();
        assert!((1020..=1024).contains(&known), "{known} of 1024 slots");
        let clients: Vec<_> = (0..5)
            .flat_map(|n| connections(storm(2, 100, address(n))))
            .collect();
        assert_eq!(clients.len(), 1000);
        let second = tcp::connect(crate::support::at("127.0.0.2:11804")).connected();
        drop((second, clients));
        balancer.wait_for_log("slot", 0);
    });
}

/// A removed service keeps its id until its last connection is gone.
#[test]
fn services_wait_for_the_ids_of_those_that_are_removed() {
    const IDS: u16 = 64;
    Machine::with(|machine| {
        let named = |name: &str| {
            let service = |n| format!("{{name: {name}-{n}, port: {}}}", 12_000 + n);
            let services: Vec<_> = (0..IDS).map(service).collect();
            format!("services: [{}]\n", services.join(", "))
        };
        let balancer = Balancer::start(machine, &named("old"));
        let address = |n: u16| crate::support::at(&format!("127.0.0.1:{}", 12_000 + n));
        let listeners: Vec<_> = (0..IDS).map(|n| Listen::on(&address(n)).open()).collect();
        let mut clients: Vec<_> = (0..IDS)
            .map(|n| tcp::connect(address(n)).connected())
            .collect();
        balancer.configure(&named("new"));
        let answer = balancer.verb(&["reload"]);
        assert_eq!(answer.code, 1, "{answer:?}");
        assert!(
            answer
                .stderr
                .contains("there is no room for new-0, new-1, "),
            "{}",
            answer.stderr
        );
        assert!(balancer.status().agent.failed_reload.is_some());
        // Nobody is refused meanwhile.
        clients.extend((0..IDS).map(|n| tcp::connect(address(n)).connected()));
        let in_force = || {
            let services = balancer.status().services;
            let new = services.iter().filter(|one| one.name.starts_with("new-"));
            new.count()
        };
        assert_eq!(in_force(), 0);
        drop(clients);
        // It is tried again after ever longer pauses, a minute at the longest.
        eventually(Duration::from_secs(90), || {
            let found = in_force();
            ensure!(found == usize::from(IDS), "{found} are in force");
            let failed = balancer.status().agent.failed_reload;
            ensure!(failed.is_none(), "{failed:?}");
            Ok(())
        });
        drop(listeners);
    });
}

#[test]
fn a_new_daemon_goes_on_where_the_old_one_left() {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        Machine::with(|machine| {
            let mut balancer = Balancer::start(
                machine,
                &virtual_port("least-connections", 2, &["quota: {per_backend: 10}"]),
            );
            let mut listeners = open_listeners(2);
            let mut clients = tcp::connect_many(agents(), 12);
            agree(&balancer, &mut listeners);
            balancer.stop(signal);
            // Counting and refusing need no daemon.
            clients.truncate(8);
            agree(&balancer, &mut listeners);
            clients.extend(tcp::connect_many(agents(), 20));
            assert_eq!(agree(&balancer, &mut listeners), [10; 2]);
            let slots = balancer.service().slots();
            balancer.launch();
            assert!(tcp::connect(agents()).is_refused());
            assert_eq!(agree(&balancer, &mut listeners), [10; 2]);
            let after = balancer.service().slots();
            assert_eq!(slots, after);
            drop(clients);
            assert_eq!(agree(&balancer, &mut listeners), [0; 2]);
        });
    }
}

/// What came and went while no daemon lived.
#[test]
fn a_new_daemon_frees_the_slots_of_those_that_left() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let mut listeners = open_listeners(2);
        let _clients = tcp::connect_many(agents(), 4);
        balancer.stop(Signal::SIGKILL);
        drop(listeners.remove(0));
        listeners.push(Listen::on(&backend(2)).open());
        let more = tcp::connect_many(agents(), 4);
        assert_eq!(more.len(), 4);
        balancer.launch();
        balancer.wait_until(|service| service.loads().into_keys().eq([backend(1), backend(2)]));
        agree(&balancer, &mut listeners);
    });
}

#[test]
fn a_listener_of_another_namespace_is_no_backend() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 1, &[]));
        let other = Netns::new();
        let _foreign = other.run(|| Listen::on(&backend(0)).open());
        assert!(tcp::connect(agents()).is_refused());
        let mut listeners = open_listeners(1);
        let _clients = tcp::connect_many(agents(), 5);
        assert_eq!(agree(&balancer, &mut listeners), [5]);
        assert_eq!(balancer.service().active(), 1);
    });
}

#[test]
fn namespaces_that_are_named_are_guarded() {
    Machine::with(|machine| {
        let others = [Netns::new(), Netns::new()];
        let paths: Vec<_> = others
            .iter()
            .map(|netns| format!("\"{}\"", netns.path().display()))
            .collect();
        let yaml = own_port("least-connections", &["quota: {per_backend: 4}"]);
        let balancer = Balancer::start(
            machine,
            &format!("{yaml}namespaces: [{}]\n", paths.join(", ")),
        );
        // Both listen before anybody connects: each is the only choice of its own netns.
        let _listeners = others.each_ref().map(|netns| {
            netns.run(|| {
                machine.cgroup.enter();
                Listen::on(&agents()).open()
            })
        });
        let clients = others
            .each_ref()
            .map(|netns| netns.run(|| tcp::connect_many(agents(), 7)));
        assert_eq!(clients.each_ref().map(Vec::len), [4, 4]);
        // The daemon's own netns is not named.
        let own = Listen::on(&agents()).open();
        assert_eq!(tcp::connect_many(agents(), 7).len(), 7);
        balancer.wait_until(|service| {
            let active = service
                .backends
                .iter()
                .filter(|backend| backend.state == "active");
            active.map(|backend| backend.established).eq([4, 4])
        });
        drop(own);
    });
}

/// With `namespaces: all` a namespace is guarded once a process of it is found; until then its
/// listeners are candidates.
#[test]
fn with_all_namespaces_a_new_one_is_found_and_guarded() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 4}"]);
        let balancer = Balancer::start(machine, &format!("{yaml}namespaces: all\n"));
        let other = Netns::new();
        let mut tenant = other
            .run(|| {
                process::spawn(
                    Command::new("sleep")
                        .arg("60")
                        .stdin(Stdio::null())
                        .process_group(0),
                )
            })
            .expect("sleep");
        let listener = other.run(|| {
            machine.cgroup.enter();
            Listen::on(&agents()).open()
        });
        balancer.wait_active(1);
        let clients = other.run(|| tcp::connect_many(agents(), 7));
        let _ = tenant.kill();
        let _ = tenant.wait();
        assert_eq!(clients.len(), 4);
        drop(listener);
    });
}
