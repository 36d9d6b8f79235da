//! What the kernel half costs when it is loaded, in time and in the kernel's resources, and what is
//! said where the kernel refuses it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use caps::{CapSet, Capability};
use testkit::cost::{Cost, ProgramCost, Stack, measure};
use testkit::fixtures::{Balancer, Finished, Machine, binary, patiently, preflight, process};

use crate::support::{open_listeners, virtual_port};

/// A tenth of a heartbeat's time. The budgets below are what keeps it short; this is for what they
/// don't see.
const LIMIT: Duration = Duration::from_millis(500);

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
            let listeners = open_listeners(256);
            balancer.wait_active(256);
            drop(listeners);
            balancer.stop(testkit::fixtures::Signal::SIGINT);
            taken
        });
        let fastest = fastest.min().flatten().expect("three starts");
        let limit = patiently(LIMIT);
        assert!(fastest < limit, "the slowest program took {fastest:?}");
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

/// What a program may cost: a little more than it does. Whoever needs more says here for what.
#[derive(Clone, Copy)]
struct Budget {
    program: &'static str,
    /// Instructions.
    size: usize,
    /// Instructions that the verifier goes through, on any kernel: Linux 6.12 sees soonest that two
    /// states are the same, and 7 latest.
    verified: u32,
    /// Bytes of the deepest chain of calls, which Linux 6.1 computes highest.
    stack: u32,
}

/// The budgets of the kernel half as it is shipped.
const RELEASE: [Budget; 6] = [
    Budget {
        program: "account",
        // A walk over all slots counts what strangers have. Keepalive sets five options, each where
        // the server has none. The end of each young connection is judged.
        // Connections that were placed are counted, and the failures of their endpoints.
        size: 2_500,
        verified: 9_500,
        stack: 320,
    },
    Budget {
        program: "steer",
        // Its attempts judge a backend's health, too.
        size: 3_100,
        verified: 62_000,
        stack: 416,
    },
    PLACING[0],
    PLACING[1],
    PLACING[2],
    PLACING[3],
];

/// They log nothing, so they are the same in both builds.
const PLACING: [Budget; 4] = [
    Budget {
        program: "place_connect4",
        // Two walks over the endpoints. The first adds up what two ways of choosing need.
        size: 1_550,
        verified: 20_000,
        stack: 480,
    },
    Budget {
        program: "place_connect6",
        size: 1_600,
        verified: 30_000,
        stack: 480,
    },
    Budget {
        program: "place_peer4",
        size: 70,
        verified: 150,
        stack: 64,
    },
    Budget {
        program: "place_peer6",
        size: 90,
        verified: 150,
        stack: 64,
    },
];

/// With the log lines of the programs.
const DEBUG: [Budget; 6] = [
    Budget {
        program: "account",
        size: 3_000,
        verified: 13_500,
        stack: 320,
    },
    Budget {
        program: "steer",
        size: 3_550,
        verified: 66_000,
        stack: 416,
    },
    PLACING[0],
    PLACING[1],
    PLACING[2],
    PLACING[3],
];

/// What all maps together may take, but for what they have on each CPU. Two of the daemon have a
/// word for each slot, and that of moved connections has three. What is placed takes half a
/// megabyte: endpoints, their counts, their names.
const RELEASE_MAPS: u64 = 2_955 * 1024;
/// With the ring buffer of the log lines.
const DEBUG_MAPS: u64 = RELEASE_MAPS + 150 * 1024;
/// What they may take for each CPU that the machine could have: counters and scratch.
const MAPS_PER_CPU: u64 = 16 * 1024;

#[test]
fn the_release_build_stays_within_its_budget() {
    stays_within("release", &RELEASE, RELEASE_MAPS);
}

#[test]
fn the_debug_build_stays_within_its_budget() {
    stays_within("debug", &DEBUG, DEBUG_MAPS);
}

fn stays_within(profile: &str, budgets: &[Budget], maps: u64) {
    let cost = cost(profile);
    assert_eq!(cost.programs.len(), budgets.len());
    let mut exceeded: Vec<_> = budgets
        .iter()
        .flat_map(|budget| budget.exceeded_by(&cost))
        .collect();
    let maps = maps + MAPS_PER_CPU * possible_cpus();
    if cost.map_bytes() > maps {
        exceeded.push(format!(
            "  the maps take {} bytes, budget {maps}: {:?}",
            cost.map_bytes(),
            cost.maps
        ));
    }
    assert!(
        exceeded.is_empty(),
        "the {profile} build of the kernel half costs more than it may:\n{}\n\
         Where it has to be so, raise the budget in tests/kernel/tests/load.rs and say for what. No chain of calls may take more than {} bytes of \
         stack, or Linux 6.1 refuses the program. Less stack: fewer values that live across a call, less inlined into the largest frame, \
         large values in a map. Less work for the verifier: fewer branches before the global functions, which it looks at once.",
        exceeded.join("\n"),
        Stack::LIMIT
    );
}

impl Budget {
    /// A sentence for each thing of which the program takes more.
    fn exceeded_by(&self, cost: &Cost) -> Vec<String> {
        let program = cost.programs.iter().find(|cost| cost.name == self.program);
        let program = program.unwrap_or_else(|| panic!("no program {}", self.program));
        let ProgramCost { size, verified, .. } = program;
        let (stack, chain) = program.stack.deepest();
        let mut exceeded = Vec::new();
        if *size > self.size {
            exceeded.push(format!("it has {size} instructions, budget {}", self.size));
        }
        if *verified > self.verified {
            exceeded.push(format!(
                "the verifier goes through {verified} instructions, budget {}",
                self.verified
            ));
        }
        if stack > self.stack {
            exceeded.push(format!(
                "the chain of its functions {chain:?} takes {stack} bytes of stack, budget {}; the frames are {:?}",
                self.stack, program.stack.frames
            ));
        }
        exceeded
            .into_iter()
            .map(|sentence| format!("  {}: {sentence}", self.program))
            .collect()
    }
}

fn cost(profile: &str) -> Cost {
    preflight();
    let object = kernel_half(profile);
    let object = fs::read(&object).unwrap_or_else(|error| {
        panic!(
            "{}: {error}; `cargo xtask test` builds it",
            object.display()
        )
    });
    measure(&object).unwrap_or_else(|error| panic!("{error:#}"))
}

/// `target/bpf/release/balancer.o`; the daemon under test is `target/debug/balancer`.
fn kernel_half(profile: &str) -> PathBuf {
    let daemon = binary();
    let target = daemon.ancestors().nth(2).expect("a target directory");
    target.join("bpf").join(profile).join("balancer.o")
}

/// `0-3` is four.
fn possible_cpus() -> u64 {
    let range = fs::read_to_string("/sys/devices/system/cpu/possible").expect("a range");
    let last = range.trim().rsplit(['-', ',']).next();
    last.and_then(|last| last.parse::<u64>().ok())
        .expect("a number")
        + 1
}

/// Without `CAP_PERFMON` the verifier takes neither program: what it minds comes after several
/// hundred instructions.
#[test]
fn what_the_verifier_says_of_a_refused_program_is_shown_in_full() {
    Machine::with(|machine| {
        let balancer = Balancer::prepare(machine, &virtual_port("least-connections", 2, &[]));
        let (config, cgroup) = (balancer.config(), balancer.cgroup());
        let [config, cgroup] = [&config, &cgroup].map(|path| path.to_str().expect("plain letters"));
        let place = ["--config", config, "--cgroup", cgroup];

        let refused = without_perfmon(machine, &balancer, &[&["run"], &place[..]].concat());
        assert_eq!(refused.code, 1, "{}", refused.stderr);
        assert!(refused.stderr.contains("refused the program `account`"));
        assert_is_whole(&refused.stderr);
        assert!(!balancer.is_loaded());

        let doctor = [&["doctor", "-o", "json"], &place[..]].concat();
        let doctor = without_perfmon(machine, &balancer, &doctor);
        assert_eq!(doctor.code, 1, "{}", doctor.stderr);
        let report: serde_json::Value = serde_json::from_str(&doctor.stdout).expect("JSON");
        let checks = report["checks"].as_array().expect("a list of checks");
        let programs = checks.iter().find(|check| check["name"] == "programs");
        let found = programs.and_then(|check| check["found"].as_str());
        assert_is_whole(found.expect("the check of the programs"));
    });
}

fn without_perfmon(machine: &Machine, balancer: &Balancer, arguments: &[&str]) -> Finished {
    let mut command = balancer.command(arguments);
    // Of this thread and of what it starts. CAP_SYS_ADMIN would do instead of the other.
    let output = machine.netns.run(|| {
        for capability in [Capability::CAP_PERFMON, Capability::CAP_SYS_ADMIN] {
            caps::drop(None, CapSet::Bounding, capability).expect("it can be given up");
        }
        process::output_within(&mut command, patiently(Duration::from_secs(20)))
    });
    output.expect("the balancer ends").into()
}

/// From what the verifier says first, over what it minds, to its statistics. Of the paths that it
/// was content with it says nothing itself.
#[track_caller]
fn assert_is_whole(text: &str) {
    let (_, log) = text.split_once("log of the verifier:\n").expect("a log");
    // The first instruction, or a global function: Linux 6.1 looks at these before the program, and
    // forgets what it has said before one that it was content with (`do_check_common`,
    // kernel/bpf/verifier.c).
    let begins = ["0: ", "Validating ", "Func#"];
    let begins = begins.iter().any(|begin| log.starts_with(begin));
    assert!(begins, "it has no beginning:\n{text}");
    let is_instruction = |line: &str| {
        line.split_once(": (")
            .is_some_and(|(at, _)| at.parse::<usize>().is_ok())
    };
    let count = log.lines().filter(|line| is_instruction(line)).count();
    assert!(count > 20, "only {count} instructions:\n{text}");
    let lines: Vec<_> = log.lines().collect();
    let last = lines.iter().rposition(|line| is_instruction(line));
    let minds = lines[last.expect("instructions") + 1];
    assert!(
        minds.contains("cannot use helper")
            || minds.contains("prohibited")
            || minds.contains("attempt to corrupt spilled pointer")
            || minds.contains("unknown func"),
        "it does not say what it minds, but {minds:?}:\n{text}"
    );
    let statistics = lines.iter().find(|line| line.starts_with("processed "));
    assert!(
        statistics.is_some_and(|line| line.contains("peak_states")),
        "{text}"
    );
}
