//! Programs of others beside ours: counts come back to the socket table whatever they do, and
//! `doctor` names them.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use aya_obj::generated::bpf_attach_type::{BPF_CGROUP_SOCK_OPS, BPF_SK_LOOKUP};
use balancer::sys::bpf::prog_query;
use serde::Deserialize;
use testkit::fixtures::foreign::{Action, Answer, Attachment, Event, RTT_FLAG, SkLookup, SockOps};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Cgroup, Machine, Netns, Signal, eventually, preflight};

use crate::support::{agents, agree, at, backend, loads, open_listeners, virtual_port};

/// A lasting drift is put right at the third comparison; they are a second apart, or more where
/// they are dear.
const PUT_RIGHT_WITHIN: Duration = Duration::from_secs(30);
/// More comparisons than a lasting drift needs to be put right.
const COMPARISONS: u64 = 4;
const QUOTA: usize = 5;
const ORDINARY: &str = "127.0.0.1:0";
const EXEMPT: &str = "127.0.9.1:0";
const REST: [&str; 2] = ["quota: {per_backend: 5}", "exempt: [127.0.9.0/24]"];

/// Where the other program sits, in the order in which programs are run for a socket of the inner
/// cgroup (`compute_effective_progs`, kernel/bpf/cgroup.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the inner cgroup, below the balancer's.
    Below,
    /// In the balancer's cgroup, attached before ours.
    Before,
    /// In the balancer's cgroup, attached after ours.
    After,
    /// In the outer cgroup, above the balancer's.
    Above,
}

impl Place {
    const ALL: [Self; 4] = [Self::Below, Self::Before, Self::After, Self::Above];

    /// Whether the foreign program runs after ours, and so has the last word.
    fn is_last(self) -> bool {
        matches!(self, Self::After | Self::Above)
    }
}

/// The balancer's cgroup between two others. Servers live in the inner one.
struct Neighbourhood {
    inner: Cgroup,
    machine: Machine,
    outer: Cgroup,
}

impl Neighbourhood {
    fn new() -> Self {
        preflight();
        let outer = Cgroup::new();
        let machine = Machine {
            netns: Netns::new(),
            cgroup: outer.below(),
        };
        let inner = machine.cgroup.below();
        Self {
            inner,
            machine,
            outer,
        }
    }

    fn cgroup(&self, place: Place) -> &Cgroup {
        match place {
            Place::Below => &self.inner,
            Place::Before | Place::After => &self.machine.cgroup,
            Place::Above => &self.outer,
        }
    }

    fn listen(&self, n: usize) -> Listener {
        self.inner.run(|| Listen::on(&backend(n)).open())
    }
}

/// A balancer of two backends beside another `sock_ops` program.
struct Fixture<'a> {
    place: Place,
    home: &'a Neighbourhood,
    balancer: Balancer<'a>,
    program: &'a SockOps,
    neighbour: Option<Attachment>,
}

/// Plays a fixture with the other program at each place.
fn at_each_place(rules: &[(Event, Action)], check: impl Fn(&mut Fixture<'_>) + Sync) {
    at_places(&Place::ALL, rules, check);
}

/// Plays a fixture with the other program at these places, all at the same time.
fn at_places(places: &[Place], rules: &[(Event, Action)], check: impl Fn(&mut Fixture<'_>) + Sync) {
    let check = &check;
    thread::scope(|scope| {
        for &place in places {
            thread::Builder::new()
                .name(format!("{place:?}"))
                .spawn_scoped(scope, move || {
                    let home = Neighbourhood::new();
                    let program = SockOps::load("neighbour", rules);
                    home.machine
                        .run(|| check(&mut Fixture::set(&home, &program, place)));
                })
                .expect("a thread can be started");
        }
    });
}

impl<'a> Fixture<'a> {
    fn set(home: &'a Neighbourhood, program: &'a SockOps, place: Place) -> Self {
        let attach = || program.attach(home.cgroup(place));
        let early = (place == Place::Before).then(attach);
        let yaml = virtual_port("least-connections", 2, &REST);
        let balancer = Balancer::start(&home.machine, &yaml);
        Self {
            place,
            home,
            balancer,
            program,
            neighbour: early.or_else(|| Some(attach())),
        }
    }

    /// Waits until these listeners have so many connections, by the balancer's count and by the
    /// socket table.
    #[track_caller]
    fn settle(&self, listeners: &mut [Listener], expected: &[usize]) {
        eventually(PUT_RIGHT_WITHIN, || {
            let service = self.balancer.service();
            let counted: Vec<_> = listeners
                .iter()
                .map(|listener| service.backend(listener.addr()).established as usize)
                .collect();
            let real = loads(listeners);
            ensure!(
                counted == expected && real == expected,
                "{:?}: counted {counted:?}, in the socket table {real:?}, want {expected:?}",
                self.place
            );
            Ok(())
        });
    }

    /// Fills a lone listener to its quota: exactly so many more find room.
    #[track_caller]
    fn fill(&self, listener: &mut [Listener; 1], held: usize, room: usize) -> Vec<TcpStream> {
        let clients = tcp::connect_many(agents(), room);
        assert_eq!(clients.len(), room, "{:?}: there is room", self.place);
        self.settle(listener, &[held + room]);
        for _ in 0..3 {
            let outcome = tcp::connect(agents());
            assert!(outcome.is_refused(), "{:?}: {outcome:?}", self.place);
        }
        clients
    }

    #[track_caller]
    fn is_named(&self) {
        let found = finding(&self.balancer, "other sock_ops");
        let cgroup = self.home.cgroup(self.place).path().display();
        let expected = format!("{} at {cgroup}", self.program.title());
        assert_eq!(
            (found.status.as_str(), found.found),
            ("warn", expected),
            "{:?}",
            self.place
        );
    }

    /// After the last connection that it has touched, everything is as if it had never been.
    #[track_caller]
    fn moves_out(&mut self, listener: &mut [Listener; 1]) {
        self.settle(listener, &[0]);
        // It shares its server's quota with those whose end was not seen, until that is put right.
        self.balancer.eventually(|service| {
            let active = service.backends.iter().filter(|one| one.state == "active");
            let quotas: Vec<_> = active.map(|one| one.quota).collect();
            ensure!(quotas == [Some(u32::try_from(QUOTA)?)], "{quotas:?}");
            Ok(())
        });
        drop(self.neighbour.take());
        let repaired = repairs(&self.balancer);
        // Without the daemon it is the kernel half alone that counts.
        self.balancer.stop(Signal::SIGKILL);
        let clients = tcp::connect_many(agents(), 3);
        self.settle(listener, &[3]);
        drop(clients);
        self.settle(listener, &[0]);
        self.balancer.launch();
        let _clients = self.fill(listener, 0, QUOTA);
        stays_right(&self.balancer, repaired);
        self.settle(listener, &[QUOTA]);
    }
}

/// A finding of `doctor`.
#[derive(Debug, Deserialize)]
struct Finding {
    name: String,
    status: String,
    found: String,
}

#[track_caller]
fn finding(balancer: &Balancer, name: &str) -> Finding {
    #[derive(Deserialize)]
    struct Report {
        checks: Vec<Finding>,
    }
    let (config, cgroup) = (balancer.config(), balancer.cgroup());
    let [config, cgroup] = [&config, &cgroup].map(|path| path.to_str().expect("a UTF-8 path"));
    let finished = balancer.verb(&[
        "doctor", "--config", config, "--cgroup", cgroup, "-o", "json",
    ]);
    let report: Report = serde_json::from_str(&finished.stdout)
        .unwrap_or_else(|error| panic!("{error} in {finished:?}"));
    let mut checks = report.checks.into_iter();
    checks
        .find(|check| check.name == name)
        .unwrap_or_else(|| panic!("no check {name} in {}", finished.stdout))
}

/// How many comparisons there were, by how much the last one found counts off, and how often one
/// has put them right.
#[track_caller]
fn audit_counts(balancer: &Balancer) -> (u64, u64, u64) {
    let agent = balancer.status().agent;
    let all = agent.checks.zip(agent.drift).zip(agent.repairs);
    let ((checks, drift), repairs) = all.expect("status tells what the comparisons have found");
    (checks, drift, repairs)
}

#[track_caller]
fn repairs(balancer: &Balancer) -> u64 {
    audit_counts(balancer).2
}

/// Lets some comparisons pass, in which nothing may be off.
#[track_caller]
fn stays_right(balancer: &Balancer, repaired: u64) {
    let until = audit_counts(balancer).0 + COMPARISONS;
    eventually(PUT_RIGHT_WITHIN, || {
        let (checks, drift, repairs) = audit_counts(balancer);
        assert_eq!((drift, repairs), (0, repaired), "{}", balancer.logs());
        ensure!(checks >= until, "{checks} comparisons, want {until}");
        Ok(())
    });
}

/// It wipes our flag before a connection enters ESTABLISHED: where it has the last word, the kernel
/// half sees neither entry nor end.
#[test]
fn flags_replaced_on_new_connections() {
    let rules = [(Event::Accepted, Action::Replace(RTT_FLAG))];
    at_each_place(&rules, |fixture| {
        let mut listener = [fixture.home.listen(0)];
        let mut clients = tcp::connect_many(agents(), 2);
        fixture.settle(&mut listener, &[2]);
        clients.extend(fixture.fill(&mut listener, 2, 3));
        fixture.is_named();
        clients.truncate(1);
        fixture.settle(&mut listener, &[1]);
        clients.extend(fixture.fill(&mut listener, 1, 4));
        let logs = fixture.balancer.logs();
        let put_right = repairs(&fixture.balancer) > 0;
        let expected = if fixture.place.is_last() {
            (9, true)
        } else {
            (0, false)
        };
        assert_eq!(
            (unseen(&logs), put_right),
            expected,
            "{:?}: {logs}",
            fixture.place
        );
        drop(clients);
        fixture.moves_out(&mut listener);
    });
}

/// How many connections a log says came unseen.
fn unseen(logs: &str) -> u32 {
    const WORDS: &str = "backend 127.0.0.1:21000 (slot 0): the socket table has +";
    let told = logs.lines().filter_map(|line| line.split_once(WORDS));
    told.filter_map(|(_, rest)| rest.split(' ').next()?.parse::<u32>().ok())
        .sum()
}

const CLEARS_LATER: [(Event, Action); 3] = [
    (Event::Accepted, Action::Add(RTT_FLAG)),
    (Event::Acknowledged, Action::Count),
    (Event::Acknowledged, Action::Replace(0)),
];

/// It wipes our flag while connections are established: the kernel half counts them and never sees
/// their end, wherever it sits.
#[test]
fn flags_cleared_during_connections() {
    at_each_place(&CLEARS_LATER, |fixture| {
        let mut listener = [fixture.home.listen(0)];
        let mut exempt: Vec<_> = (0..2)
            .map(|_| tcp::connect_from(at(EXEMPT), agents()).connected())
            .collect();
        let mut clients = fixture.fill(&mut listener, 2, QUOTA);
        for mut stream in &listener[0].accepted {
            stream.write_all(b"x").expect("it stands");
        }
        eventually(PUT_RIGHT_WITHIN, || {
            let counted = fixture.program.counted();
            ensure!(counted == 7, "it has cleared the flags of {counted}");
            Ok(())
        });
        clients.truncate(2);
        exempt.truncate(1);
        fixture.settle(&mut listener, &[3]);
        assert_eq!(fixture.balancer.service().backends[0].exempt, 1);
        assert!(repairs(&fixture.balancer) > 0);
        fixture.balancer.wait_for_log(
            "backend 127.0.0.1:21000 (slot 0): the socket table has 3 connections, -4 (-1 exempt) against the count",
            0,
        );
        clients.extend(fixture.fill(&mut listener, 3, 3));
        fixture.is_named();
        drop((clients, exempt));
        fixture.moves_out(&mut listener);
    });
}

/// The same while connections come and go, so that each comparison finds the count further off:
/// what was off before is put right.
#[test]
fn flags_cleared_while_connections_keep_coming() {
    at_places(&[Place::After], &CLEARS_LATER, |fixture| {
        let mut listener = [fixture.home.listen(0)];
        let mut served = 0;
        eventually(PUT_RIGHT_WITHIN, || {
            for _ in 0..20 {
                served += u64::from(serve_one(&mut listener[0], EXEMPT));
            }
            let repairs = repairs(&fixture.balancer);
            ensure!(repairs >= 3, "{repairs} repairs after {served} connections");
            Ok(())
        });
        fixture.settle(&mut listener, &[0]);
        assert_eq!(fixture.balancer.service().backends[0].exempt, 0);
    });
}

/// It adds its flag to those that are there, as it should: both are served, and nothing needs to be
/// put right.
#[test]
fn flags_added() {
    let rules = [
        (Event::Accepted, Action::Add(RTT_FLAG)),
        (Event::Acknowledged, Action::Count),
    ];
    at_each_place(&rules, |fixture| {
        let mut listener = [fixture.home.listen(0)];
        let clients = tcp::connect_many(agents(), 3);
        fixture.settle(&mut listener, &[3]);
        let until = audit_counts(&fixture.balancer).0 + COMPARISONS;
        let mut served = 0;
        while audit_counts(&fixture.balancer).0 < until {
            for _ in 0..20 {
                served += u64::from(serve_one(&mut listener[0], ORDINARY));
            }
        }
        fixture.settle(&mut listener, &[3]);
        let counted = fixture.program.counted();
        assert!(
            served > 0 && counted >= served,
            "{:?}: it was called {counted} times for {served} connections",
            fixture.place
        );
        fixture.is_named();
        drop(clients);
        fixture.moves_out(&mut listener);
        assert_eq!(repairs(&fixture.balancer), 0, "{:?}", fixture.place);
    });
}

/// One connection from its beginning to its end; whether the quota had room for it.
fn serve_one(listener: &mut Listener, source: &str) -> bool {
    let Some(mut client) = tcp::connect_from(at(source), agents()).ok() else {
        return false;
    };
    eventually(PUT_RIGHT_WITHIN, || {
        ensure!(listener.accept_all() > 0, "nothing to accept");
        Ok(())
    });
    let mut server = listener.accepted.pop().expect("one was accepted");
    server.write_all(b"x").expect("it stands");
    client.read_exact(&mut [0]).expect("it stands");
    true
}

/// It wipes our flag from listeners: where it has the last word, the kernel half doesn't see them
/// close.
#[test]
fn flags_cleared_on_listeners() {
    let rules = [(Event::Listens, Action::Replace(0))];
    at_each_place(&rules, |fixture| {
        let mut listeners = vec![fixture.home.listen(0), fixture.home.listen(1)];
        let mut clients = tcp::connect_many(agents(), 4);
        fixture.settle(&mut listeners, &[2, 2]);
        let kept = listeners.remove(0).close();
        // Nobody is sent to the one that has closed, whether that was seen or not.
        clients.extend(fixture.fill(one(&mut listeners), 2, 3));
        clients.truncate(4);
        fixture.settle(&mut listeners, &[2]);
        let words = if fixture.place.is_last() {
            "backend 127.0.0.1:21000 (slot 0): its listener is gone"
        } else {
            "127.0.0.1:21000 listens no more (slot 0)"
        };
        eventually(PUT_RIGHT_WITHIN, || {
            let logs = fixture.balancer.logs();
            ensure!(logs.contains(words), "{words:?} is not in the log:\n{logs}");
            Ok(())
        });
        let service = fixture.balancer.service();
        let old = |address| service.backends.iter().find(|old| old.address == address);
        let old = old(backend(0)).expect("it still has connections");
        assert_eq!((old.state.as_str(), old.established), ("closed", 2));
        // One that takes the address again is another backend.
        listeners.push(fixture.home.listen(0));
        clients.extend(tcp::connect_many(agents(), 2));
        fixture.settle(&mut listeners, &[2, 2]);
        drop(kept);
        eventually(PUT_RIGHT_WITHIN, || {
            let service = fixture.balancer.service();
            let closed = service.backends.iter().any(|old| old.state == "closed");
            ensure!(!closed, "the old slot is not free: {service:?}");
            Ok(())
        });
        fixture.is_named();
        drop((clients, listeners.pop()));
        drop(fixture.neighbour.take());
        drop(listeners);
        let mut listener = [fixture.home.listen(0)];
        fixture.moves_out(&mut listener);
        assert_eq!(repairs(&fixture.balancer), 0, "{:?}", fixture.place);
        drop(listener);
        fixture
            .balancer
            .wait_for_log("127.0.0.1:21000 listens no more", 0);
    });
}

fn one(listeners: &mut [Listener]) -> &mut [Listener; 1] {
    listeners.try_into().expect("one listener")
}

/// A program that allows no other, at the balancer's cgroup or above: `run` says so and leaves
/// nothing.
#[test]
fn an_exclusive_program_in_the_way() {
    for place in [Place::Before, Place::Above] {
        let home = Neighbourhood::new();
        let program = SockOps::load("exclusive", &[]);
        home.machine.run(|| {
            let neighbour = program.attach_alone(home.cgroup(place));
            let yaml = virtual_port("least-connections", 1, &REST);
            let mut balancer = Balancer::prepare(&home.machine, &yaml);
            balancer.spawn();
            let status = balancer.wait();
            assert_eq!(status.code(), Some(1), "{}", balancer.logs());
            let cgroup = balancer.cgroup();
            let error = format!("cannot attach `account` to the cgroup {}", cgroup.display());
            for words in [
                error.as_str(),
                "allows no other",
                "`balancer doctor` names it",
            ] {
                assert!(balancer.logs().contains(words), "{}", balancer.logs());
            }
            assert!(!balancer.is_loaded() && !balancer.socket().exists());
            let others = usize::from(place == Place::Before);
            assert_eq!(programs_at(&home.machine), (others, 0));
            let found = finding(&balancer, "other sock_ops");
            assert_eq!(found.status, "fail");
            for words in [&program.title(), path(home.cgroup(place).path())] {
                assert!(found.found.contains(words), "{found:?}");
            }
            drop(neighbour);
            balancer.launch();
            let mut listeners = [home.listen(0)];
            let _clients = tcp::connect_many(agents(), 3);
            assert_eq!(agree(&balancer, &mut listeners), [3]);
        });
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// How many programs are attached to the cgroup and the netns of a machine.
fn programs_at(machine: &Machine) -> (usize, usize) {
    let cgroup = File::open(machine.cgroup.path()).expect("a cgroup can be opened");
    let netns = File::open(machine.netns.path()).expect("a netns can be opened");
    let count = |attached: std::io::Result<balancer::sys::bpf::Attached>| {
        attached.expect("it can be queried").programs.len()
    };
    (
        count(prog_query(cgroup, BPF_CGROUP_SOCK_OPS)),
        count(prog_query(netns, BPF_SK_LOOKUP)),
    )
}

/// A program that allows no other in a cgroup below: ours is run for its sockets all the same.
#[test]
fn an_exclusive_program_below() {
    for early in [true, false] {
        let home = Neighbourhood::new();
        let program = SockOps::load("exclusive", &[]);
        home.machine.run(|| {
            let attach = || program.attach_alone(&home.inner);
            let before = early.then(attach);
            let yaml = virtual_port("least-connections", 1, &REST);
            let balancer = Balancer::start(&home.machine, &yaml);
            let neighbour = before.or_else(|| Some(attach()));
            let mut fixture = Fixture {
                place: Place::Below,
                home: &home,
                balancer,
                program: &program,
                neighbour,
            };
            fixture.is_named();
            // Without the daemon it is the kernel half alone that registers and counts.
            fixture.balancer.stop(Signal::SIGKILL);
            let mut listener = [home.listen(0)];
            let clients = fixture.fill(&mut listener, 0, QUOTA);
            drop(clients);
            fixture.settle(&mut listener, &[0]);
        });
    }
}

/// Whether another `sk_lookup` program was attached before ours, and so is run before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Before,
    After,
}

/// Two listeners with a quota of three each, and one that is none of ours, beside another
/// `sk_lookup` program.
struct Lookups<'a> {
    turn: Turn,
    balancer: Balancer<'a>,
    program: SkLookup,
    ours: Vec<Listener>,
    theirs: Listener,
}

/// How the other program answers, given our listeners and its own.
type Choice = for<'l> fn(&'l [Listener], &'l Listener) -> Answer<'l>;

fn beside_sk_lookup(turn: Turn, choice: Choice, check: impl FnOnce(&mut Lookups<'_>) + Send) {
    Machine::with(|machine| {
        let (ours, theirs) = (open_listeners(2), Listen::on("127.0.0.1:22000").open());
        let program = SkLookup::load("neighbour", agents().port(), choice(&ours, &theirs));
        let attach = || program.attach(&machine.netns);
        let before = (turn == Turn::Before).then(attach);
        let yaml = virtual_port("least-connections", 2, &["quota: {per_backend: 3}"]);
        let balancer = Balancer::start(machine, &yaml);
        let _neighbour = before.or_else(|| Some(attach()));
        let mut lookups = Lookups {
            turn,
            balancer,
            program,
            ours,
            theirs,
        };
        check(&mut lookups);
        let (_, drift, repairs) = audit_counts(&lookups.balancer);
        assert_eq!((drift, repairs), (0, 0), "{turn:?}");
    });
}

impl Lookups<'_> {
    /// Waits until the counts of our listeners are those of the socket table, and compares them.
    #[track_caller]
    fn settle(&mut self, expected: &[usize]) {
        let loads = agree(&self.balancer, &mut self.ours);
        assert_eq!(loads, expected, "{:?}", self.turn);
    }

    #[track_caller]
    fn is_named(&self) {
        let found = finding(&self.balancer, "other sk_lookup");
        let expected = format!("{} in this network namespace", self.program.title());
        let turn = self.turn;
        assert_eq!(
            (found.status.as_str(), found.found),
            ("warn", expected),
            "{turn:?}"
        );
    }
}

/// So many connects, none of which may be refused.
#[track_caller]
fn connect_all(number: usize) -> Vec<TcpStream> {
    let clients = tcp::connect_many(agents(), number);
    assert_eq!(clients.len(), number, "nothing is refused");
    clients
}

/// A choice of ours stands against a refusal of others (`BPF_PROG_SK_LOOKUP_RUN_ARRAY`,
/// include/linux/filter.h).
#[test]
fn sk_lookup_that_chooses_nothing() {
    let choices: [Choice; 2] = [|_, _| Answer::Pass, |_, _| Answer::Drop];
    for turn in [Turn::Before, Turn::After] {
        for choice in choices {
            beside_sk_lookup(turn, choice, |lookups| {
                let clients = connect_all(6);
                lookups.settle(&[3, 3]);
                assert!(tcp::connect(agents()).is_refused());
                let service = lookups.balancer.service();
                let reasons = ["steered", "over-quota", "foreign-sk-lookup"];
                assert_eq!(reasons.map(|reason| service.verdicts(reason)), [6, 1, 0]);
                drop(clients);
                lookups.settle(&[0, 0]);
            });
        }
    }
}

/// The first to choose wins, unless a later one insists: such connections are none of ours.
#[test]
fn sk_lookup_that_chooses_a_socket_of_its_own() {
    let choose: Choice = |_, theirs| Answer::Choose(theirs);
    let insist: Choice = |_, theirs| Answer::Insist(theirs);
    for (turn, choice, reason) in [
        (Turn::Before, choose, "foreign-sk-lookup"),
        (Turn::Before, insist, "foreign-sk-lookup"),
        (Turn::After, insist, "steered"),
    ] {
        beside_sk_lookup(turn, choice, |lookups| {
            let _clients = connect_all(10);
            assert_eq!(lookups.theirs.accept_all(), 10);
            lookups.settle(&[0, 0]);
            let service = lookups.balancer.service();
            assert_eq!(service.verdicts(reason), 10, "{turn:?}: {service:?}");
        });
    }
}

/// Whom it has chosen a socket for we can't refuse, and don't say that we did.
#[test]
fn sk_lookup_that_chooses_where_we_would_refuse() {
    beside_sk_lookup(
        Turn::Before,
        |_, theirs| Answer::Choose(theirs),
        |lookups| {
            lookups.balancer.quota_set("agents", None, 0);
            let _clients = connect_all(3);
            let service = lookups.balancer.service();
            let reasons = ["foreign-sk-lookup", "closed-by-hand"];
            assert_eq!(reasons.map(|reason| service.verdicts(reason)), [3, 0]);
        },
    );
}

/// It comes after ours and only helps where nobody has chosen: what we have no room for goes to it.
#[test]
fn sk_lookup_that_takes_what_is_left() {
    beside_sk_lookup(
        Turn::After,
        |_, theirs| Answer::Choose(theirs),
        |lookups| {
            let clients = connect_all(10);
            lookups.settle(&[3, 3]);
            assert_eq!(lookups.theirs.accept_all(), 4);
            drop(clients);
            lookups.settle(&[0, 0]);
        },
    );
}

/// It sends everything to one of our backends, beyond its quota: counted where it is, not where we
/// would have sent it.
#[test]
fn sk_lookup_that_chooses_a_socket_of_ours() {
    let choose: Choice = |ours, _| Answer::Choose(&ours[0]);
    let insist: Choice = |ours, _| Answer::Insist(&ours[0]);
    for (turn, choice) in [(Turn::Before, choose), (Turn::After, insist)] {
        beside_sk_lookup(turn, choice, |lookups| {
            let mut clients = connect_all(8);
            lookups.settle(&[8, 0]);
            lookups.is_named();
            clients.truncate(2);
            lookups.settle(&[2, 0]);
        });
    }
}
