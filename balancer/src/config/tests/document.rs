//! docs/configuration.md against the code.

use super::*;
use crate::config::fields::MAPPINGS;

const DOCUMENT: &str = include_str!("../../../../docs/configuration.md");

/// The keys in the table of each section, by the title of the section.
fn documented() -> Vec<(String, Vec<&'static str>)> {
    let sections = DOCUMENT.split("\n#").skip(1).map(|section| {
        let (title, text) = section.split_once('\n').unwrap();
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
        let keys = rows.filter_map(|row| Some(row.split_once('`')?.0));
        let title = title.trim_matches(['#', ' ', '`']).to_owned();
        (title, keys.collect())
    });
    sections
        .filter(|(_, keys): &(_, Vec<_>)| !keys.is_empty())
        .collect()
}

/// Each example as a file.
fn examples() -> Vec<Config> {
    let blocks = DOCUMENT.split("```yaml\n").skip(1);
    blocks
        .map(|block| parsed(block.split_once("```").unwrap().0))
        .collect()
}

#[test]
fn it_has_every_key_and_no_other() {
    let expected = MAPPINGS.map(|(path, _, keys)| {
        let title = if path.is_empty() { "The file" } else { path };
        (title.to_owned(), keys.split(' ').collect::<Vec<_>>())
    });
    assert_eq!(documented(), expected);
}

/// The first example of a kind leaves out what the second writes out.
#[test]
fn its_defaults_are_those_of_the_code() {
    let examples = examples();
    let [
        one_host,
        all,
        largest,
        quota,
        quota_all,
        connect,
        cluster,
        cluster_all,
        _,
    ] = &examples[..]
    else {
        panic!("{} examples", examples.len());
    };
    assert_eq!(one_host, all);
    assert_eq!(largest.services.len(), 2);
    assert_eq!(quota, quota_all);
    assert_eq!(connect.connects[0].endpoints.len(), 2);
    assert_eq!(cluster, cluster_all);
}
