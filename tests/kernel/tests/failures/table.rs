//! The matrix as a table in Markdown.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use super::{Failure, Outcome, SETTINGS};
use crate::support::cpus;

/// The whole table, and where it was made.
pub fn of(matrix: &[(&Failure, Vec<Outcome>)]) -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").expect("it is readable");
    let version = kernel.split(['-', '\n']).next().expect("a version");
    let processors = cpus();
    let settings = SETTINGS.iter().map(|setting| setting.name);
    let heads: Vec<_> = ["what fails"]
        .into_iter()
        .chain(settings)
        .chain(["own port, in a cluster", "named", "others named"])
        .collect();
    let mut table = format!("Linux {version}, {processors} processors:\n\n");
    table += &row(&heads);
    table += &row(&vec!["---"; heads.len()]);
    for (failure, outcomes) in matrix {
        let cells = outcomes.iter().map(ToString::to_string);
        let others = outcomes
            .iter()
            .flat_map(|outcome| outcome.falsely_named.clone());
        let others: BTreeSet<_> = others.collect();
        let cells: Vec<_> = [failure.name.to_owned()]
            .into_iter()
            .chain(cells)
            .chain([named(outcomes), join(others)])
            .collect();
        table += &row(&cells);
    }
    table
}

/// What was said of those that fail, and from when to when it was said first.
fn named(outcomes: &[Outcome]) -> String {
    let names: BTreeSet<_> = outcomes
        .iter()
        .flat_map(|outcome| outcome.names.clone())
        .collect();
    let after = || outcomes.iter().filter_map(|outcome| outcome.named_after);
    let seconds = |time: Option<Duration>| time.unwrap_or_default().as_secs_f64();
    let (first, last) = (seconds(after().min()), seconds(after().max()));
    if names.is_empty() {
        return join(names);
    }
    format!("{}, after {first:.1} to {last:.1} s", join(names))
}

fn join(words: BTreeSet<String>) -> String {
    if words.is_empty() {
        return "none".to_owned();
    }
    words.into_iter().collect::<Vec<_>>().join(", ")
}

fn row(cells: &[impl AsRef<str>]) -> String {
    let cells: Vec<_> = cells.iter().map(AsRef::as_ref).collect();
    format!("| {} |\n", cells.join(" | "))
}
