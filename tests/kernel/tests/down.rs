//! Backends that are named and don't listen.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use testkit::fixtures::tcp::Listen;
use testkit::fixtures::{Balancer, Machine, Server, Service, Signal};

use crate::support::{backend, virtual_port};

fn down(service: &Service) -> Vec<SocketAddr> {
    let down = service.down.iter();
    down.map(|backend| backend.address).collect()
}

fn wait_down(balancer: &Balancer, expected: &[SocketAddr]) {
    balancer.eventually(|service| {
        ensure!(down(service) == expected, "want {expected:?} down");
        ensure!(
            service.down.iter().all(|down| down.since_ms.is_some()),
            "not noted yet"
        );
        Ok(())
    });
}

#[test]
fn each_backend_that_does_not_listen_has_a_row_with_since_when() {
    Machine::with(|machine| {
        let mut balancer = Balancer::start(machine, &virtual_port("least-connections", 3, &[]));
        let all = [0, 1, 2].map(backend);
        wait_down(&balancer, &all);
        let servers = all.map(|address| Server::on(&[address]));
        wait_down(&balancer, &[]);
        let metrics = balancer.must(&["metrics"]);
        assert!(!metrics.contains("state=\"down\""), "{metrics}");

        let [one, two, three] = servers;
        drop(two);
        wait_down(&balancer, &all[1..2]);
        let text = balancer.must(&["status"]);
        let row = format!("{} is down: nobody listens there for ", all[1]);
        assert!(text.contains(&row), "{text}");
        let metrics = balancer.must(&["metrics"]);
        let series = format!("backend=\"{}\",netns=\"\",state=\"down\"}} 1", all[1]);
        assert!(metrics.contains(&series), "{metrics}");
        let doctor = balancer.verb(&["doctor"]).stdout;
        assert!(
            doctor.contains(&format!("nobody listens on {}", all[1])),
            "{doctor}"
        );

        // A daemon that is started again knows since when; without one it is known who.
        let since = balancer.service().down[0].since_ms.expect("noted");
        thread::sleep(Duration::from_millis(300));
        balancer.stop(Signal::SIGKILL);
        drop(one);
        let service = balancer.service();
        assert_eq!(down(&service), all[1..2], "{service:?}");
        let closed = service.backends.iter().filter(|one| one.state == "closed");
        assert_eq!(closed.count(), 1, "{service:?}");
        balancer.launch();
        wait_down(&balancer, &all[..2]);
        let [first, second] = &balancer.service().down[..] else {
            panic!("two are down");
        };
        assert!(second.since_ms > Some(since + 300), "{since}: {second:?}");
        assert!(first.since_ms < second.since_ms, "{first:?}");
        let _again = Server::on(&[all[1]]);
        wait_down(&balancer, &all[..1]);
        drop(three);
    });
}

/// A listener on any address of the port is the backend, too.
#[test]
fn a_wildcard_listener_is_the_backend() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &virtual_port("least-connections", 2, &[]));
        let any = SocketAddr::from(([0, 0, 0, 0], backend(0).port()));
        let _listener = Listen::on(&any).open();
        wait_down(&balancer, &[backend(1)]);
    });
}
