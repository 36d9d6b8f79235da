//! The tools themselves: a test that trusts a blind tool shows nothing.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use testkit::fixtures::diag::{self, State};
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::wire::Wire;
use testkit::fixtures::{Machine, Netns, eventually, process};

fn service() -> SocketAddr {
    "127.0.0.1:11800".parse().expect("an address")
}

#[test]
fn the_socket_table_shows_accept_sides_and_listeners() {
    Machine::with(|_| {
        let mut listener = Listen::on(&service()).backlog(7).open();
        let clients = tcp::connect_many(service(), 5);
        let row = diag::table(State::Listen)[0];
        assert_eq!(
            (row.local, row.receive_queue, row.send_queue),
            (service(), 5, 7)
        );
        assert_eq!(listener.established(), 5);
        assert_eq!(diag::established_by_address(11800)[&service().ip()], 5);
        clients.into_iter().for_each(tcp::reset);
        eventually(Duration::from_secs(1), || {
            anyhow::ensure!(listener.established() == 0);
            Ok(())
        });
    });
}

#[test]
fn sockets_of_a_machine_belong_to_its_cgroup() {
    Machine::with(|machine| {
        let _listener = Listen::on(&service()).open();
        let output =
            process::output(Command::new("ss").args(["-Htln", "--cgroup"])).expect("ss runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let name = machine
            .cgroup
            .path()
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name");
        assert!(text.contains(name), "{text}");
    });
}

#[test]
fn handmade_connections_stay_half_open_until_they_are_completed() {
    Machine::with(|machine| {
        let mut listener = Listen::on(&service()).open();
        let wire = Wire::open(&machine.netns);
        let (opened, refused) = wire.half_open(0..1000, service());
        assert_eq!((opened.len(), refused), (1000, 0));
        assert_eq!(diag::table(State::SynReceived).len(), 1000);
        assert_eq!(listener.accept_all(), 0);
        opened
            .values()
            .take(300)
            .for_each(|answer| wire.ack(answer));
        opened
            .values()
            .skip(300)
            .for_each(|answer| wire.rst(answer));
        eventually(Duration::from_secs(1), || {
            anyhow::ensure!(diag::table(State::SynReceived).is_empty());
            anyhow::ensure!(listener.established() == 300, "{}", listener.established());
            Ok(())
        });
        let nobody = "127.0.0.1:9".parse().expect("an address");
        assert_eq!(wire.half_open(0..3, nobody).1, 3);
    });
}

#[test]
fn a_full_accept_queue_makes_clients_wait() {
    Machine::with(|_| {
        let _listener = Listen::on(&service()).backlog(1).open();
        let _clients = tcp::connect_many(service(), 2);
        assert!(tcp::connect(service()).is_timed_out());
        let nobody = "127.0.0.1:9".parse().expect("an address");
        assert!(tcp::connect(nobody).is_refused());
    });
}

#[test]
fn a_cable_joins_two_namespaces() {
    Machine::with(|machine| {
        let other = Netns::new();
        machine
            .netns
            .connect_to(&other, "10.1.0.1/24", "10.1.0.2/24");
        let mut listener = Listen::on("10.1.0.1:11800").open();
        let address = listener.addr();
        // The cable carries nothing for a moment after it was laid: the first SYN may be lost.
        let patience = Duration::from_secs(5);
        let client = other.run(|| tcp::attempt(None, address, patience).connected());
        assert_eq!(listener.accept_all(), 1);
        assert_eq!(
            listener.peers(),
            [client.local_addr().expect("it has one")].into()
        );
    });
}

#[test]
fn handmade_answers_to_cookies_are_accepted_and_tell_the_listener() {
    Machine::with(|machine| {
        machine.netns.sysctl("net.ipv4.tcp_syncookies", "2");
        let mut listener = Listen::on(&service()).ttl(77).open();
        let wire = Wire::open(&machine.netns);
        let (opened, _) = wire.half_open(0..100, service());
        assert!(opened.values().all(|answer| answer.ttl == 77));
        assert!(
            diag::table(State::SynReceived).is_empty(),
            "a cookie leaves no trace"
        );
        wire.ack_all(opened.values());
        eventually(Duration::from_secs(1), || {
            anyhow::ensure!(listener.established() == 100, "{}", listener.established());
            Ok(())
        });
    });
}

#[test]
fn a_handmade_fast_open_can_be_accepted_before_its_ack() {
    Machine::with(|machine| {
        machine.netns.sysctl(
            "net.ipv4.tcp_fastopen",
            &(0x1 | 0x2 | 0x200 | 0x400).to_string(),
        );
        let mut listener = Listen::on(&service()).open();
        let wire = Wire::open(&machine.netns);
        wire.syn_with_data(Wire::client(0), service(), b"hello");
        let answers = wire.answers(Duration::from_millis(20));
        assert_eq!(
            (answers.len(), listener.accept_all(), listener.established()),
            (1, 1, 0)
        );
        wire.ack_all(&answers);
        assert_eq!(listener.established(), 1);
    });
}
