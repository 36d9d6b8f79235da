//! Where quotas must not be trusted, nobody is refused: each cause has its own reason.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use balancer::sys::bpf;
use testkit::fixtures::diag::{self, State};
use testkit::fixtures::tcp::{self, Listen, Listener, Outcome};
use testkit::fixtures::wire::Wire;
use testkit::fixtures::{Backend, Balancer, Machine, Signal, eventually, remains};

use crate::outlive::pins::links;
use crate::support::{
    accept_each, agents, agree, at, backend, in_time, open_listeners, own_port, virtual_port,
};

/// Longer than a SYN-ACK waits before it is sent again: from then on a half-open connection is not
/// expected to complete.
const NO_LONGER_YOUNG: Duration = Duration::from_millis(1_300);
/// Long enough for several comparisons with the socket table.
const SEVERAL_PASSES: Duration = Duration::from_secs(4);

/// The smallest computed quota is 16. Clients that take seconds over their handshakes are not seen
/// coming.
#[test]
fn computed_quotas_far_below_what_stands_refuse_nobody() {
    Machine::with(|machine| {
        let yaml = virtual_port(
            "least-connections",
            2,
            &["quota: {clients: 4, min_quota: 16}"],
        );
        let balancer = Balancer::start(machine, &format!("{yaml}fail_open_after: 5m\n"));
        let mut listeners = open_listeners(2);
        balancer.wait_until(|service| {
            service
                .backends
                .iter()
                .all(|backend| backend.quota == Some(16))
                && service.active() == 2
        });
        // A daemon that is stuck: otherwise it would raise the quotas within a second.
        balancer.signal(Signal::SIGSTOP);
        let wire = Wire::open(&machine.netns);
        let mut opened = Vec::new();
        for batch in 0..4 {
            let (answers, _) = wire.half_open(batch * 32..(batch + 1) * 32, agents());
            opened.extend(answers.into_values());
            thread::sleep(NO_LONGER_YOUNG);
        }
        assert!(opened.len() > 60, "only {} half-open", opened.len());
        wire.ack_all(&opened);
        let standing: usize = agree(&balancer, &mut listeners).iter().sum();
        assert!(standing > 48, "{standing} established");
        let mut late = tcp::connect_many(agents(), 5);
        assert_eq!(late.len(), 5);
        let service = balancer.service();
        assert_eq!(service.verdicts("fail-open-quota"), 5, "{service:?}");
        let explained = balancer.explain(&"127.0.0.1", &11_800);
        assert_eq!(explained.reason.as_deref(), Some("fail-open-quota"));
        // The daemon raises the quotas to what stands, and from then on they are believed again.
        balancer.signal(Signal::SIGCONT);
        balancer.wait_until(|service| {
            let quotas = service.backends.iter().filter_map(|backend| backend.quota);
            quotas.sum::<u32>() as usize >= standing + late.len()
        });
        balancer.eventually(|_| {
            // Rounding may leave room for a few.
            let refused = tcp::connect(agents())
                .ok()
                .map(|client| late.push(client))
                .is_none();
            anyhow::ensure!(refused, "let in");
            Ok(())
        });
        agree(&balancer, &mut listeners);
    });
}

/// What somebody wrote down is meant so, however many stand.
#[test]
fn a_fixed_quota_below_what_stands_refuses() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let mut listeners = vec![Listen::on(&agents()).open()];
        let _clients = tcp::connect_many(agents(), 100);
        balancer.quota_set("agents", None, 10);
        assert!(tcp::connect(agents()).is_refused());
        assert_eq!(balancer.service().verdicts("over-quota"), 1);
        assert_eq!(agree(&balancer, &mut listeners), [100]);
    });
}

/// A service has 256 backends at the most; the 257th listener serves without the balancer, and may
/// have room.
#[test]
fn listeners_without_a_slot_open_the_service() {
    Machine::with(|machine| {
        // One process has all of them: a connection each.
        let yaml = own_port("least-connections", &["quota: {per_backend: 256}"]);
        let balancer = Balancer::start(machine, &yaml);
        let open = |number: usize| -> Vec<_> {
            (0..number)
                .map(|_| Listen::on(&agents()).reuse_port().open())
                .collect()
        };
        let mut listeners = open(256);
        balancer.wait_until(|service| {
            let quotas = service.backends.iter().map(|backend| backend.quota);
            quotas.eq([Some(1); 256])
        });
        let clients = tcp::connect_many(agents(), 256);
        assert_eq!(clients.len(), 256);
        assert!(tcp::connect(agents()).is_refused());
        let homeless = open(1);
        let more = tcp::connect_many(agents(), 20);
        assert_eq!(more.len(), 20, "{:?}", balancer.service().verdicts);
        assert_eq!(balancer.service().verdicts("fail-open-full"), 20);
        balancer.wait_for_log("no slot is free", 0);
        remains(SEVERAL_PASSES, || {
            anyhow::ensure!(!tcp::connect(agents()).is_refused(), "refused");
            Ok(())
        });
        // Gone, or with a slot that has become free, it is no reason any more.
        drop(homeless);
        // Passes over so many listeners are as far apart as they are dear.
        eventually(Duration::from_secs(60), || {
            anyhow::ensure!(tcp::connect(agents()).is_refused(), "let in");
            Ok(())
        });
        let homeless = open(1);
        assert!(!tcp::connect(agents()).is_refused());
        drop((clients, more));
        drop(listeners.pop());
        eventually(Duration::from_secs(60), || {
            let active = balancer.service().active();
            anyhow::ensure!(active == 256, "{active} active");
            Ok(())
        });
        drop(homeless);
    });
}

/// Nobody has closed it: it has no part of its server's quota.
#[test]
fn listeners_without_a_slot_open_one_whose_part_is_0_too() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 255}"]);
        let balancer = Balancer::start(machine, &yaml);
        let open = |address: &SocketAddr| Listen::on(address).reuse_port().open();
        let mut listeners: Vec<_> = (0..255).map(|_| open(&agents())).collect();
        let last = at("127.0.0.2:11800");
        listeners.push(open(&last));
        balancer.wait_until(|service| {
            let part = |backend: &Backend| (backend.address == last).then_some(backend.quota);
            service.active() == 256 && service.backends.iter().find_map(part) == Some(Some(0))
        });
        assert!(tcp::connect(last).is_refused());
        let _homeless = open(&agents());
        let clients = tcp::connect_many(last, 5);
        let service = balancer.service();
        assert_eq!(clients.len(), 5, "{:?}", service.verdicts);
        assert_eq!(service.verdicts("fail-open-full"), 5, "{service:?}");
        assert_eq!(service.verdicts("over-quota"), 1, "{service:?}");
        // What somebody has closed stays closed.
        balancer.quota_set("agents", None, 0);
        assert!(tcp::connect(last).is_refused());
        assert_eq!(balancer.service().verdicts("closed-by-hand"), 1);
    });
}

/// Longer than a queue may be full before the others are refused.
const LONGER_THAN_THE_GRACE: Duration = Duration::from_millis(1_300);

/// Connects again and again for longer than the grace: none of it may end in a RST.
#[track_caller]
fn nobody_answers(from: SocketAddr) {
    let begun = Instant::now();
    while begun.elapsed() < LONGER_THAN_THE_GRACE {
        let outcome = tcp::attempt(Some(from), agents(), Duration::from_millis(150));
        assert!(outcome.is_timed_out(), "{from}: {outcome:?}");
    }
}

/// One that begins while the backends hang, and gets in when they accept again.
#[track_caller]
fn gets_in_later(from: SocketAddr, listeners: &mut [Listener]) {
    let outcome = thread::scope(|scope| {
        let client = scope.spawn(|| tcp::attempt(Some(from), agents(), Duration::from_secs(4)));
        thread::sleep(Duration::from_millis(300));
        accept_each(listeners);
        client.join().expect("no connect panics")
    });
    assert!(
        matches!(outcome, Outcome::Connected(_)),
        "{from}: {outcome:?}"
    );
}

/// Backends of a virtual port that hang: each has an accept queue of one, which is full.
fn hanging(backends: usize) -> Vec<Listener> {
    let hanging = |n| Listen::on(&backend(n)).backlog(0).open();
    let mut listeners: Vec<_> = (0..backends).map(hanging).collect();
    fill(&mut listeners);
    listeners
}

/// Past the balancer: nobody has looked at the queues.
fn fill(listeners: &mut [Listener]) {
    accept_each(listeners);
    for listener in listeners {
        drop(tcp::connect(listener.addr()).connected());
    }
}

/// On a virtual port nobody else listens: left to the kernel, who may not be refused would be.
#[test]
fn who_is_let_in_on_a_virtual_port_meets_no_rst_though_all_backends_hang() {
    Machine::with(|machine| {
        let yaml = virtual_port("least-connections", 2, &["exempt: [127.0.9.0/24]"]);
        let mut balancer = Balancer::start(machine, &format!("{yaml}fail_open_after: 1s\n"));
        let mut listeners = hanging(2);
        balancer.wait_active(2);
        let (exempt, other) = (at("127.0.9.7:0"), at("127.0.8.7:0"));
        nobody_answers(exempt);
        gets_in_later(exempt, &mut listeners);
        balancer.stop(Signal::SIGKILL);
        thread::sleep(LONGER_THAN_THE_GRACE);
        fill(&mut listeners);
        nobody_answers(other);
        gets_in_later(other, &mut listeners);
        let service = balancer.service();
        assert!(service.verdicts("exempt") > 0, "{service:?}");
        assert!(service.verdicts("fail-open-stale") > 0, "{service:?}");
        assert_eq!(service.verdicts("fail-open-error"), 0, "{service:?}");
        assert_eq!(service.verdicts("no-backend"), 0, "{service:?}");
    });
}

/// More backends than one SYN may look at.
const TOO_MANY: usize = 60;

/// Their counters say that they have room, and half-open connections hold it: who comes after as
/// many looks as one SYN may cost was not refused by anybody. Each look has put its backend right,
/// so that the next SYN is judged to the end.
#[test]
fn nobody_is_refused_before_all_were_looked_at() {
    const QUOTA: u32 = 5;
    in_time(|machine| {
        let quota = format!("quota: {{per_backend: {QUOTA}}}");
        let yaml = virtual_port("least-connections", TOO_MANY, &[&quota]);
        let balancer = Balancer::start(machine, &yaml);
        let _listeners = open_listeners(TOO_MANY);
        balancer.wait_active(TOO_MANY);
        let wire = Wire::open(&machine.netns);
        let begun = Instant::now();
        for n in 0..TOO_MANY {
            let first = u32::try_from(n).expect("few") * QUOTA;
            for client in first..first + QUOTA {
                wire.syn(Wire::client(client), backend(n));
            }
        }
        let half_open = diag::table(State::SynReceived).len();
        let (first, second) = (tcp::connect(agents()), tcp::connect(agents()));
        let explained = balancer.explain(&"127.0.0.1", &11_800);
        // SYN-ACKs are sent again after a second.
        if begun.elapsed() >= Duration::from_millis(900) {
            return None;
        }
        assert_eq!(half_open, TOO_MANY * QUOTA as usize);
        let service = balancer.service();
        assert!(matches!(first, Outcome::Connected(_)), "{first:?}");
        assert!(second.is_refused(), "{second:?}");
        assert_eq!(service.verdicts("fail-open-error"), 1, "{service:?}");
        assert_eq!(service.verdicts("over-quota"), 1, "{service:?}");
        assert_eq!(explained.reason.as_deref(), Some("over-quota"));
        Some(())
    });
}

/// The same with accept queues, which `explain` can look at as well.
#[test]
fn explain_gives_up_where_the_kernel_half_does() {
    Machine::with(|machine| {
        let yaml = virtual_port("least-connections", TOO_MANY, &[]);
        let balancer = Balancer::start(machine, &yaml);
        let mut listeners = hanging(TOO_MANY);
        balancer.wait_active(TOO_MANY);
        let explained = balancer.explain(&"127.0.0.1", &11_800);
        let reason = explained.reason.as_deref();
        assert_eq!(reason, Some("fail-open-error"), "{explained:?}");
        let outcome = tcp::attempt(None, agents(), Duration::from_millis(50));
        let service = balancer.service();
        assert!(outcome.is_timed_out(), "{outcome:?}");
        assert_eq!(service.verdicts("fail-open-error"), 1, "{service:?}");
        assert!(explained.backend.is_some(), "{explained:?}");
        gets_in_later(at("127.0.8.7:0"), &mut listeners);
    });
}

/// Takes every place for decisions of the `steer` of an instance, on each CPU, as look-ups that
/// were interrupted do.
fn take_scratch(balancer: &Balancer) {
    let steer = links(balancer.state())
        .into_iter()
        .find_map(|(pin, (_, program))| pin.to_string_lossy().contains("steer").then_some(program))
        .expect("steer is attached");
    let program = aya::programs::loaded_programs()
        .flatten()
        .find(|program| program.id() == steer)
        .expect("it is loaded");
    let maps = program
        .map_ids()
        .expect("they are told")
        .unwrap_or_default();
    let depth = maps
        .into_iter()
        .map(|id| MapData::from_id(id).expect("it is there"))
        .find(|map| bpf::map_info(map.fd()).is_ok_and(|info| info.name == "SCRATCH_DEPTH"))
        .expect("it has such a map");
    let mut depth: PerCpuArray<_, u64> =
        PerCpuArray::try_from(Map::PerCpuArray(depth)).expect("one value for each CPU");
    let cpus = aya::util::nr_cpus().expect("CPUs can be counted");
    let taken = PerCpuValues::try_from(vec![3; cpus]).expect("one for each");
    depth.set(0, taken, 0).expect("it can be written");
}

#[test]
fn without_a_place_for_the_decision_everybody_is_let_in() {
    for (yaml, open) in [
        (
            own_port("least-connections", &["quota: {per_backend: 1}"]),
            agents(),
        ),
        (
            virtual_port("least-connections", 2, &["quota: {per_backend: 1}"]),
            backend(1),
        ),
    ] {
        Machine::with(|machine| {
            let balancer = Balancer::start(machine, &yaml);
            let mut listeners = vec![Listen::on(&open).open()];
            balancer.wait_active(1);
            let _first = tcp::connect(agents()).connected();
            assert!(tcp::connect(agents()).is_refused());
            take_scratch(&balancer);
            let more = tcp::connect_many(agents(), 5);
            let service = balancer.service();
            assert_eq!(more.len(), 5, "{service:?}");
            assert_eq!(service.verdicts("fail-open-error"), 5, "{service:?}");
            assert_eq!(agree(&balancer, &mut listeners), [6]);
            if open != agents() {
                drop(listeners);
                balancer.wait_until(|service| service.active() == 0);
                assert!(tcp::connect(agents()).is_refused());
                let service = balancer.service();
                assert_eq!(service.verdicts("fail-open-error"), 5, "{service:?}");
                assert_eq!(service.verdicts("no-backend"), 1, "{service:?}");
            }
        });
    }
}
