//! How long loading takes.

use std::time::Duration;

use balancer_tests::fixtures::{Balancer, Machine};

use crate::support::{farm, virtual_port};

const LIMIT: Duration = Duration::from_millis(20);

/// The verifier walks the loop over the backends once, not once a backend.
#[test]
fn programs_load_fast_with_256_members() {
    Machine::with(|machine| {
        let _listeners = farm(256);
        let balancer = Balancer::prepare(
            machine,
            &virtual_port("least-connections", 256, &["quota: {per_backend: 10}"]),
        );
        let mut balancer = balancer.with_arguments(&["--log", "debug"]);
        // The fastest of three: the others measure who else uses the CPUs.
        let fastest = (0..3).map(|_| {
            balancer.launch();
            let taken = ["steer", "account"]
                .map(|program| loaded_in(&balancer.logs(), program))
                .into_iter()
                .max();
            balancer.wait_active(256);
            balancer.stop(balancer_tests::fixtures::Signal::SIGINT);
            taken
        });
        let fastest = fastest.min().flatten().expect("three starts");
        assert!(fastest < LIMIT, "the slowest program took {fastest:?}");
    });
}

/// The time in the log line `loaded PROGRAM in 3.2ms`.
fn loaded_in(logs: &str, program: &str) -> Duration {
    let (_, rest) = logs
        .split_once(&format!("loaded {program} in "))
        .unwrap_or_else(|| panic!("no `loaded {program} in …` in the log:\n{logs}"));
    let text = rest.split_whitespace().next().unwrap_or_default();
    let (number, scale) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.trim_end_matches("µs"), 1e-6),
    };
    let number: f64 = number
        .parse()
        .unwrap_or_else(|_| panic!("{text:?} is no time in ms or µs"));
    Duration::from_secs_f64(number * scale)
}
