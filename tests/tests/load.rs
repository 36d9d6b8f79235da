//! How long loading takes.

use std::time::Duration;

use balancer_tests::fixtures::{Balancer, Machine};

use crate::support::{farm, virtual_port};

const LIMIT: Duration = Duration::from_millis(20);

/// The verifier walks the loop over the backends once, not once a backend.
#[test]
fn programs_load_fast_with_256_members() {
    Machine::with(|machine| {
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
            let listeners = farm(256);
            balancer.wait_active(256);
            drop(listeners);
            balancer.stop(balancer_tests::fixtures::Signal::SIGINT);
            taken
        });
        let fastest = fastest.min().flatten().expect("three starts");
        assert!(fastest < LIMIT, "the slowest program took {fastest:?}");
    });
}

/// The time in the log line `loaded PROGRAM in 3.2 ms (…)`.
fn loaded_in(logs: &str, program: &str) -> Duration {
    let milliseconds = || {
        let (_, rest) = logs.split_once(&format!("loaded {program} in "))?;
        let (number, _) = rest.split_once(" ms")?;
        number.parse::<f64>().ok()
    };
    let milliseconds = milliseconds()
        .unwrap_or_else(|| panic!("no `loaded {program} in … ms` in the log:\n{logs}"));
    Duration::from_secs_f64(milliseconds / 1e3)
}
