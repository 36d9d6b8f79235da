//! What the documents say is so: the table of reasons, the README's configurations, the tests that
//! security rests on.

use std::path::Path;

use balancer::config::Config;
use balancer_common::Reason;
use balancer_common::place::PlaceReason;

const README: &str = include_str!("../../README.md");
const REFERENCE: &str = include_str!("../../docs/reference.md");
const SECURITY: &str = include_str!("../../docs/security.md");

/// The rows of the table below a heading of the reference.
fn rows_below(heading: &str) -> Vec<&'static str> {
    REFERENCE
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter(|line| line.starts_with("| `"))
        .collect()
}

#[test]
fn the_table_of_reasons_of_placing_is_that_of_the_code() {
    let of = |reason: &PlaceReason| {
        let placed = if reason.is_placed() { "yes" } else { "no" };
        let (name, meaning) = (reason.name(), reason.meaning());
        format!("| `{name}` | {placed} | {meaning} |")
    };
    let reasons: Vec<_> = PlaceReason::ALL.iter().map(of).collect();
    assert_eq!(rows_below("## Reasons of placing"), reasons);
}

#[test]
fn the_table_of_reasons_is_that_of_the_code() {
    let rows = rows_below("## Reasons");
    let reasons: Vec<_> = Reason::ALL
        .iter()
        .map(|reason| {
            let [own, on_virtual] = [false, true].map(|port| reason.verdict(port).name());
            let verdict = if own == on_virtual {
                own.to_owned()
            } else {
                format!("{own}; virtual port: {on_virtual}")
            };
            format!("| `{}` | {verdict} | {} |", reason.name(), reason.meaning())
        })
        .collect();
    assert_eq!(rows, reasons);
}

#[test]
fn the_configurations_are_valid() {
    let blocks: Vec<_> = README.split("```yaml\n").skip(1).collect();
    assert_eq!(blocks.len(), 3);
    for block in blocks {
        let yaml = block.split("```").next().unwrap_or_default();
        if let Err(error) = Config::parse(yaml) {
            panic!("{error}\n{yaml}");
        }
    }
}

/// A name of four words or more is one of a test there.
#[test]
fn the_tests_that_security_rests_on_are_there() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut sources = String::new();
    for directory in ["balancer/src", "balancer-common/src", "tests/kernel/tests"] {
        read_all(&workspace.join(directory), &mut sources);
    }
    let quoted = SECURITY.split('`').skip(1).step_by(2);
    let tests: Vec<_> = quoted
        .filter(|word| word.matches('_').count() >= 3)
        .collect();
    assert!(tests.len() > 30, "{tests:?}");
    let is_missing = |test: &&&str| !sources.contains(&format!("fn {test}("));
    let missing: Vec<_> = tests.iter().filter(is_missing).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

fn read_all(directory: &Path, into: &mut String) {
    for entry in std::fs::read_dir(directory).expect("a directory of the workspace") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            read_all(&path, into);
        } else {
            *into += &std::fs::read_to_string(&path).unwrap_or_default();
        }
    }
}
