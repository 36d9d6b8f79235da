//! The width of comments, which the stable rustfmt neither checks nor wraps.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{command, places};

/// The last column of a comment.
const WIDTH: usize = 100;

/// Fails where a line of a comment in the workspace's sources is too long.
///
/// # Errors
/// With every such line.
pub fn check() -> Result<()> {
    let mut list = Command::new("git");
    list.current_dir(places::workspace());
    list.args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.rs",
    ]);
    let files = command::output(&mut list).context("cannot list the sources with git")?;
    let mut wide = Vec::new();
    for file in files.lines() {
        let path = places::workspace().join(file);
        // One that was removed is listed until that is committed.
        if path.exists() {
            wide.extend(wide_lines(&path)?.map(|line| format!("{file}:{line}")));
        }
    }
    if !wide.is_empty() {
        bail!(
            "comments go beyond column {WIDTH} (wrap them: `cargo +nightly fmt -- --config \
             wrap_comments=true,comment_width={WIDTH}`):\n  {}",
            wide.join("\n  ")
        );
    }
    Ok(())
}

fn wide_lines(path: &Path) -> Result<impl Iterator<Item = usize>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines: Vec<_> = text
        .lines()
        .zip(1..)
        .filter(|(line, _)| is_too_wide(line))
        .map(|(_, number)| number)
        .collect();
    Ok(lines.into_iter())
}

/// A word that can't be wrapped, as an address, may be longer.
fn is_too_wide(line: &str) -> bool {
    let comment = line.trim_start();
    let words = comment.split_whitespace().count();
    comment.starts_with("//") && words > 2 && line.chars().count() > WIDTH
}

#[cfg(test)]
mod tests {
    use super::is_too_wide;

    #[test]
    fn only_comments_that_can_be_wrapped_are_too_wide() {
        let long = "x".repeat(120);
        for (line, expected) in [
            (format!("    // A {long}"), true),
            (format!("/// {long} is one"), true),
            (format!("// {long}"), false),
            (format!("let x = \"{long}\"; // short"), false),
            ("// short".to_owned(), false),
        ] {
            assert_eq!(is_too_wide(&line), expected, "{line}");
        }
    }
}
