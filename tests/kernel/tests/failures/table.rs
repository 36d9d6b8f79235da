//! The matrix as a table in Markdown.

use std::collections::BTreeSet;
use std::fs;

use super::{Failure, Outcome, SETTINGS};
use crate::support::cpus;

/// The whole table, and where it was made.
pub fn of(matrix: &[(&Failure, Vec<Outcome>)]) -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").expect("it is readable");
    let processors = cpus();
    let settings = SETTINGS.iter().map(|setting| setting.name);
    let heads: Vec<_> = ["what fails"]
        .into_iter()
        .chain(settings)
        .chain(["own port, in a cluster", "named", "others named"])
        .collect();
    let mut table = format!("Linux {}, {processors} processors:\n\n", kernel.trim());
    table += &row(&heads);
    table += &row(&vec!["---"; heads.len()]);
    for (failure, outcomes) in matrix {
        let cells = outcomes.iter().map(ToString::to_string);
        let named = outcomes.iter().map(named).collect::<BTreeSet<_>>();
        let others = outcomes
            .iter()
            .flat_map(|outcome| outcome.falsely_named.clone());
        let others: BTreeSet<_> = others.collect();
        let cells: Vec<_> = [failure.name.to_owned()]
            .into_iter()
            .chain(cells)
            .chain([join(named), join(others)])
            .collect();
        table += &row(&cells);
    }
    table
}

fn named(outcome: &Outcome) -> String {
    let named = outcome.named.as_ref();
    named.map_or("no".to_owned(), |(after, state)| {
        format!("{state} after {:.1} s", after.as_secs_f64())
    })
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
