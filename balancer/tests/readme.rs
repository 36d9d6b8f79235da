//! What the documents say is so: the table of reasons, the README's configurations.

use balancer::config::Config;
use balancer_common::Reason;

const README: &str = include_str!("../../README.md");
const REFERENCE: &str = include_str!("../../docs/reference.md");

#[test]
fn the_table_of_reasons_is_that_of_the_code() {
    let rows: Vec<_> = REFERENCE
        .lines()
        .skip_while(|line| *line != "## Reasons")
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter(|line| line.starts_with("| `"))
        .collect();
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
    assert_eq!(blocks.len(), 2);
    for block in blocks {
        let yaml = block.split("```").next().unwrap_or_default();
        if let Err(error) = Config::parse(yaml) {
            panic!("{error}\n{yaml}");
        }
    }
}
