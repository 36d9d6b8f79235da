//! Who was refused: told to the log in few lines, and to the quotas of a cluster.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Machine, eventually, long};

use crate::support::{agents, own_port, source};

/// One source that is refused a hundred times a second hides no other, and fills no log.
#[test]
fn a_noisy_source_hides_no_other_and_fills_no_log() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 1}"]);
        let balancer = Balancer::start(machine, &yaml);
        let _listener = Listen::on(&agents()).open();
        let _first = tcp::connect(agents()).connected();
        let (time, every) = if long() { (120, 10) } else { (24, 6) };
        let (noisy, quiet) = (source(1), source(2));
        let began = Instant::now();
        let mut seldom = 0;
        while began.elapsed() < Duration::from_secs(time) {
            assert!(tcp::connect_from(noisy, agents()).is_refused());
            if began.elapsed() >= Duration::from_secs(every * seldom) {
                assert!(tcp::connect_from(quiet, agents()).is_refused());
                seldom += 1;
            }
            thread::sleep(Duration::from_millis(10));
        }
        // The last line is due ten seconds after the one before.
        thread::sleep(Duration::from_secs(11));
        let logs = balancer.logs();
        let lines: Vec<_> = logs
            .lines()
            .filter(|line| line.contains("refused"))
            .collect();
        let most = time / 10 + 3;
        assert!(lines.len() as u64 <= most, "{} lines:\n{logs}", lines.len());
        let quiet = quiet.ip().to_string();
        let told = |line: &&str| -> u64 {
            let after = line.split(&format!("{quiet} (")).nth(1);
            let count = after.and_then(|rest| rest.split(')').next());
            count.and_then(|count| count.parse().ok()).unwrap_or(0)
        };
        let seen: u64 = lines.iter().map(told).sum();
        assert_eq!(seen, seldom, "each of its refusals is told:\n{logs}");
        let service = balancer.service();
        assert!(service.verdicts("over-quota") > 50 * time, "{service:?}");
    });
}

/// Addresses without number are counted in bounded memory and told in one line.
#[test]
fn sources_without_number_make_no_more_lines() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 1}"]);
        let balancer = Balancer::start(machine, &yaml);
        let _listener = Listen::on(&agents()).open();
        let _first = tcp::connect(agents()).connected();
        for number in 10..3_010 {
            assert!(tcp::connect_from(source(number), agents()).is_refused());
        }
        balancer.wait_for_log(" sources (", 0);
        eventually(Duration::from_secs(25), || {
            let told: u64 = balancer.logs().lines().filter_map(connections).sum();
            ensure!(told >= 2_999, "{told} told");
            Ok(())
        });
        let logs = balancer.logs();
        let lines = logs.lines().filter(|line| line.contains("refused")).count();
        assert!((1..=6).contains(&lines), "{lines} lines:\n{logs}");
    });
}

/// How many connections a line says were refused.
fn connections(line: &str) -> Option<u64> {
    let rest = line.split("refused ").nth(1)?;
    match rest.split_whitespace().next()? {
        "a" => Some(1),
        count => count.parse().ok(),
    }
}
