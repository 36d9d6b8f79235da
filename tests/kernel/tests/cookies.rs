//! SYN cookies: the listener that answered the SYN must be the one that gets the ACK, for nothing
//! was remembered in between.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use testkit::fixtures::tcp::{Listen, Listener};
use testkit::fixtures::wire::{Segment, Wire, flag};
use testkit::fixtures::{Balancer, Machine};

use crate::support::{accept_each, agents, agree, backend, own_port, virtual_port};

const BACKENDS: usize = 3;
const FIRST_TTL: u32 = 101;
const THREADS: u32 = 4;
const BATCHES: u32 = 12;
const BATCH: u32 = 20;
/// Hand-made clients that never complete, to make the SYN queues overflow.
const DEAD: u32 = 1500;
/// Less than a third of [`DEAD`], so that every SYN queue overflows; more than a third of all
/// handshakes, so that no accept queue is full when this test gets no CPU to accept.
const BACKLOG: i32 = 400;

fn listeners_with_ttl(backlog: i32) -> Vec<Listener> {
    let ttl = |n| FIRST_TTL + u32::try_from(n).expect("small");
    (0..BACKENDS)
        .map(|n| Listen::on(&backend(n)).backlog(backlog).ttl(ttl(n)).open())
        .collect()
}

/// Opens and completes connections in one thread; returns the SYN-ACKs, and how many got a RST for
/// their ACK.
fn handshakes(machine: &Machine, thread: u32) -> (Vec<Segment>, usize) {
    let wire = Wire::open(&machine.netns);
    let (mut answers, mut reset) = (Vec::new(), 0);
    for batch in 0..BATCHES {
        let first = DEAD + (thread * BATCHES + batch) * BATCH;
        let (opened, refused) = wire.half_open(first..first + BATCH, agents());
        assert_eq!(
            (opened.len(), refused),
            (BATCH as usize, 0),
            "every SYN is answered"
        );
        wire.ack_all(opened.values());
        let late = wire.answers(Duration::from_millis(20));
        reset += late
            .iter()
            .filter(|late| late.flags & flag::RST != 0 && opened.contains_key(&late.to))
            .count();
        answers.extend(opened.into_values());
    }
    (answers, reset)
}

/// How many connections another listener accepted than the one that answered their SYN.
fn strayed(answers: &[Segment], listeners: &mut [Listener]) -> usize {
    accept_each(listeners);
    let landed: HashMap<SocketAddr, u32> = listeners
        .iter()
        .zip(FIRST_TTL..)
        .flat_map(|(listener, ttl)| listener.peers().into_iter().map(move |peer| (peer, ttl)))
        .collect();
    let arrived = |answer: &&Segment| landed.get(&answer.to.into()) == Some(&u32::from(answer.ttl));
    answers.len() - answers.iter().filter(arrived).count()
}

fn the_ack_finds_the_listener_of_the_syn(policy: &str, syncookies: &str, backlog: i32) {
    Machine::with(|machine| {
        machine.netns.sysctl("net.ipv4.tcp_syncookies", syncookies);
        let balancer = Balancer::start(machine, &virtual_port(policy, BACKENDS, &[]));
        let mut listeners = listeners_with_ttl(backlog);
        balancer.wait_active(BACKENDS);
        Wire::open(&machine.netns).half_open(0..DEAD, agents());
        let done = AtomicBool::new(false);
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|n| scope.spawn(move || handshakes(machine, n)))
                .collect();
            let accepting = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    accept_each(&mut listeners);
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let results = threads
                .into_iter()
                .map(ScopedJoinHandle::join)
                .collect::<Vec<_>>();
            done.store(true, Ordering::Relaxed);
            accepting.join().expect("accepting");
            results
                .into_iter()
                .map(|result| result.expect("handshakes"))
                .collect()
        });
        let reset: usize = results.iter().map(|(_, reset)| reset).sum();
        let answers: Vec<_> = results
            .into_iter()
            .flat_map(|(answers, _)| answers)
            .collect();
        let strayed = strayed(&answers, &mut listeners);
        assert_eq!(
            (strayed, reset),
            (0, 0),
            "of {} with tcp_syncookies={syncookies}",
            answers.len()
        );
        let loads = agree(&balancer, &mut listeners);
        assert!(
            loads.iter().all(|load| *load > answers.len() / 5),
            "all take part: {loads:?}"
        );
    });
}

#[test]
fn least_connections_with_cookies_always() {
    the_ack_finds_the_listener_of_the_syn("least-connections", "2", 4096);
}

#[test]
fn round_robin_with_cookies_always() {
    the_ack_finds_the_listener_of_the_syn("round-robin", "2", 4096);
}

#[test]
fn source_hash_with_cookies_always() {
    the_ack_finds_the_listener_of_the_syn("source-hash", "2", 4096);
}

#[test]
fn least_connections_with_cookies_after_an_overflow() {
    the_ack_finds_the_listener_of_the_syn("least-connections", "1", BACKLOG);
}

#[test]
fn round_robin_with_cookies_after_an_overflow() {
    the_ack_finds_the_listener_of_the_syn("round-robin", "1", BACKLOG);
}

#[test]
fn source_hash_with_cookies_after_an_overflow() {
    the_ack_finds_the_listener_of_the_syn("source-hash", "1", BACKLOG);
}

/// Cookies begin in the middle of a stream of SYNs: none of those answered before, at and after
/// that moment may be lost.
#[test]
fn nobody_is_lost_when_cookies_begin() {
    for policy in ["least-connections", "round-robin", "source-hash"] {
        Machine::with(|machine| {
            let balancer = Balancer::start(machine, &virtual_port(policy, BACKENDS, &[]));
            let mut listeners = listeners_with_ttl(32);
            balancer.wait_active(BACKENDS);
            let wire = Wire::open(&machine.netns);
            let (opened, refused) = wire.half_open(0..300, agents());
            assert_eq!((opened.len(), refused), (300, 0));
            let mut reset = 0;
            let answers: Vec<_> = opened.into_values().collect();
            for few in answers.chunks(20) {
                wire.ack_all(few);
                let late = wire.answers(Duration::from_millis(10));
                reset += late
                    .iter()
                    .filter(|late| late.flags & flag::RST != 0)
                    .count();
                accept_each(&mut listeners);
            }
            let strayed = strayed(&answers, &mut listeners);
            assert_eq!((strayed, reset), (0, 0), "{policy}");
            assert_eq!(
                agree(&balancer, &mut listeners).iter().sum::<usize>(),
                300,
                "{policy}"
            );
        });
    }
}

/// With cookies the room is only known at the ACK: the refusal is a RST to a client that believes
/// to be connected.
#[test]
fn over_quota_at_the_ack_of_a_cookie() {
    Machine::with(|machine| {
        machine.netns.sysctl("net.ipv4.tcp_syncookies", "2");
        let balancer = Balancer::start(
            machine,
            &own_port("least-connections", &["quota: {per_backend: 20}"]),
        );
        let mut listeners = vec![Listen::on(&agents()).open()];
        let wire = Wire::open(&machine.netns);
        let (opened, refused) = wire.half_open(0..100, agents());
        assert_eq!(
            (opened.len(), refused),
            (100, 0),
            "none is pending with cookies"
        );
        wire.ack_all(opened.values());
        let late = wire.answers(Duration::from_millis(250));
        let reset = late
            .iter()
            .filter(|late| late.flags & flag::RST != 0)
            .count();
        assert_eq!(reset, 80);
        assert_eq!(agree(&balancer, &mut listeners), [20]);
        assert!(balancer.service().verdicts("over-quota-cookie") >= 80);
    });
}
