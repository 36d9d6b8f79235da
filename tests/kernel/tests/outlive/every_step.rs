//! A start that is killed just before each single step that it makes: a system call that changes
//! something, or a store into a mapped map.

use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::net::SocketAddr;

use testkit::fixtures::load::connect_in_turn;
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Balancer, Machine, Signal, Step, StepKind, Steps, long};

use super::fixture::{agree_everywhere, assert_no_drift, random};
use super::pins::{Traces, attached, versions};
use super::upgrade::make_another_abi;
use crate::support::{accept_each, agents, at, own_port};

/// Chooses the steps that a shortened test tries; another number for each run where it is not set.
const SEED: &str = "BALANCER_TEST_SEED";
/// The steps to try, in place of chosen ones: `call 7,store 7`.
const STEPS: &str = "BALANCER_TEST_STEPS";
/// How many steps of each kind a shortened test tries.
const TRIED: usize = 2;
const QUOTA: usize = 16;

fn addresses() -> [SocketAddr; 2] {
    [agents(), at("127.0.0.2:11800")]
}

/// Kills a start before each of its steps, one start for each; before each of them `prepare` is
/// called without a daemon. After each the next start must make good what is left. Where tests are
/// shortened a few of the steps are tried.
#[track_caller]
fn killed_before_every_step(test: &str, prepare: impl Fn(&mut Balancer) + Sync) {
    Machine::with(|machine| {
        let mut listeners = addresses().map(|address| Listen::on(&address).open());
        let clients = connect_in_turn(&addresses(), 10);
        accept_each(&mut listeners);
        let rest = [format!("quota: {{per_backend: {QUOTA}}}")];
        let yaml = own_port("least-connections", &[&rest[0]]);
        let mut balancer = Balancer::start(machine, &yaml);
        let mut traces = Traces::default();
        balancer.stop(Signal::SIGTERM);
        prepare(&mut balancer);
        let steps = balancer.count_steps();
        println!("{test}: a start makes {steps:?}");
        assert!(steps.calls > 0, "no step is a system call");
        assert!(
            steps.stores > 0 || cfg!(not(target_arch = "x86_64")),
            "no store into a mapped map is seen"
        );
        let mut killed = 0;
        for step in chosen(test, steps) {
            prepare(&mut balancer);
            println!("{test}: before {step}; this one again: {STEPS}='{step}'");
            killed += usize::from(balancer.kill_before(step));
            balancer.launch();
            traces.note(balancer.state());
            assert_whole(machine, &balancer, &mut listeners, step);
            balancer.stop(Signal::SIGTERM);
        }
        println!("{test}: killed before {killed} steps");
        balancer.launch();
        drop(clients);
        assert_eq!(agree_everywhere(&balancer, &mut listeners), [0; 2]);
        assert_no_drift(&balancer);
        balancer.must(&["unload"]);
        assert!(balancer.wait().success());
        traces.assert_gone(machine, &balancer);
    });
}

/// Those to try, of so many that a start makes.
fn chosen(test: &str, steps: Steps) -> Vec<Step> {
    if let Ok(named) = std::env::var(STEPS) {
        let steps = named.split(',').map(|step| step.parse().expect(STEPS));
        return steps.collect();
    }
    let kinds = [StepKind::Call, StepKind::Store].into_iter();
    if long() {
        let every = |kind| (1..=steps.of(kind)).map(move |number| Step { kind, number });
        return kinds.flat_map(every).collect();
    }
    let seed =
        std::env::var(SEED).map_or_else(|_| random(usize::MAX), |seed| seed.parse().expect(SEED));
    println!("{test}: the same steps again: {SEED}={seed}");
    let some = |kind| {
        (0..TRIED).filter_map(move |draw| {
            let number = drawn((seed, test, kind, draw), steps.of(kind))?;
            Some(Step { kind, number })
        })
    };
    kinds.flat_map(some).collect()
}

/// A number from 1 to `count`; nearly the same one where there is one more or less.
fn drawn(seed: impl Hash, count: usize) -> Option<usize> {
    let mut hasher = DefaultHasher::new();
    seed.hash(&mut hasher);
    let scaled = (u128::from(hasher.finish()) * count as u128) >> 64;
    (count > 0).then(|| 1 + usize::try_from(scaled).expect("it is below the count"))
}

/// Both listeners are there once, with their connections, and hold to their quota.
#[track_caller]
fn assert_whole(machine: &Machine, balancer: &Balancer, listeners: &mut [Listener], step: Step) {
    let logs = balancer.logs();
    assert_eq!(attached(machine), (1, 1), "before {step}: {logs}");
    assert_eq!(versions(balancer.state()).len(), 1, "before {step}: {logs}");
    let counted = agree_everywhere(balancer, listeners);
    assert_eq!(counted, [5; 2], "before {step}: {logs}");
    let service = balancer.service();
    let backends = (service.backends.len(), service.active());
    assert_eq!(backends, (2, 2), "before {step}: {service:?}\n{logs}");
    // They are of one process and share it: the first that is full may get room of the other.
    let more = addresses().map(|address| tcp::connect_many(address, QUOTA).len());
    let more: usize = more.iter().sum();
    let room = QUOTA - 10;
    assert!(
        (room / 2..=room).contains(&more),
        "before {step}: {more}\n{logs}"
    );
    assert_eq!(agree_everywhere(balancer, listeners), [5; 2]);
}

/// A daemon that is ready goes on storing heartbeats: it is killed in the middle of one as well.
#[test]
fn a_traced_daemon_can_be_killed_at_any_time() {
    Machine::with(|machine| {
        let mut balancer = Balancer::prepare(machine, &own_port("least-connections", &[]));
        for _ in 0..if long() { 50 } else { 5 } {
            let steps = balancer.count_steps();
            assert!(steps.calls > 0, "{steps:?}");
        }
    });
}

#[test]
fn from_nothing() {
    killed_before_every_step("from_nothing", |balancer| {
        balancer.must(&["unload"]);
    });
}

#[test]
fn over_a_data_plane_that_is_there() {
    killed_before_every_step("over_a_data_plane_that_is_there", |_| {});
}

#[test]
fn over_a_data_plane_of_another_abi() {
    killed_before_every_step("over_a_data_plane_of_another_abi", |balancer| {
        make_another_abi(balancer.state());
    });
}
