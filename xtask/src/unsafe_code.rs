//! What clippy's `undocumented_unsafe_blocks` would find in the kernel half: the compiler that
//! builds it may come without clippy.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::places;

/// Fails where an unsafe block, function or implementation of the kernel half has no comment that
/// says why it is sound.
///
/// # Errors
/// With every such line, or when a source can't be read.
pub fn check() -> Result<()> {
    let root = places::workspace().join("balancer-ebpf").join("src");
    let mut undocumented = Vec::new();
    for file in sources(&root)? {
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let lines = undocumented_lines(&text);
        undocumented.extend(
            lines
                .into_iter()
                .map(|line| format!("{}:{line}", file.display())),
        );
    }
    if !undocumented.is_empty() {
        bail!(
            "unsafe code without a reason (write `// SAFETY: …` above its statement, or a section \
             `# Safety` for a function):\n  {}",
            undocumented.join("\n  ")
        );
    }
    Ok(())
}

fn sources(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = || format!("cannot list {}", directory.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if path.is_dir() {
            found.extend(sources(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The numbers of the lines of a formatted source with unsafe code that no comment explains.
fn undocumented_lines(source: &str) -> Vec<usize> {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let unsafe_code = |at: &usize| is_unsafe(lines[*at]) && !is_explained(&lines[..*at]);
    (0..lines.len())
        .filter(unsafe_code)
        .map(|at| at + 1)
        .collect()
}

fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let function = code.trim_start_matches("pub ").starts_with("unsafe ") && code.contains("fn ");
    function || code.contains("unsafe {") || code.contains("unsafe impl")
}

/// Whether the comment right above the statement that goes on after these lines has a reason.
fn is_explained(before: &[&str]) -> bool {
    let in_statement =
        |line: &&&str| !line.is_empty() && !line.ends_with([';', '{', '}', ',']) && !is_note(line);
    let above = before.iter().rev().skip_while(in_statement);
    above
        .take_while(|line| is_note(line))
        .any(|line| line.contains("SAFETY:") || line.contains("# Safety"))
}

/// A comment or an attribute.
fn is_note(line: &str) -> bool {
    line.starts_with("//") || line.starts_with("#[")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_right_above_the_statement() {
        let source = "
            // SAFETY: so
            let a = unsafe { f() };
            let b = unsafe { f() };
            // SAFETY: of two lines,
            // and the code goes on.
            if a == b
                && unsafe { f() }
            {
                unsafe { f() };
            }
            // No reason.
            unsafe { f() };";
        assert_eq!(undocumented_lines(source), [4, 10, 13]);
    }

    #[test]
    fn functions_and_implementations_have_one_too() {
        let source = "
            /// Does.
            ///
            /// # Safety
            /// Never null.
            #[inline(always)]
            pub unsafe fn f() {}
            /// Does.
            unsafe extern \"C\" fn g() {}
            unsafe impl Sync for A {}
            #[unsafe(no_mangle)]
            fn h(g: unsafe extern \"C\" fn()) {} // unsafe { }";
        assert_eq!(undocumented_lines(source), [9, 10]);
    }
}
