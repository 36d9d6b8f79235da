//! The report of one node: whatever it says, the quotas of the others' pods are computed, and no
//! further from what the others count than one node is believed.
#![no_main]

use balancer::fuzzing::{parse_report, quota_beside_report};
use libfuzzer_sys::fuzz_target;

/// What each of two other nodes counts.
const COUNTED: u32 = 500;
/// A half of what the others count and four times as much (it may say that its own pod does not
/// serve), with the 64 sources that a report may call starved, and room for each of these.
const MOST: u32 = 10 * COUNTED / 2 + 64 / 2 + 1 + 64;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    match quota_beside_report(text, COUNTED) {
        Ok(quota) => {
            assert!(quota.limit().is_none_or(|quota| quota <= MOST), "{quota}");
            is_read_as_it_is_written(text);
        }
        Err(problem) => assert!(
            !problem.is_empty() && problem.chars().count() < 1000,
            "{problem}"
        ),
    }
});

fn is_read_as_it_is_written(text: &str) {
    let report = parse_report(text, "balancer-b").expect("it was read before");
    let written = serde_json::to_string(&report).expect("a report can be written");
    assert_eq!(parse_report(&written, "balancer-b"), Ok(report));
}
