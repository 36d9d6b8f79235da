//! Tables in a page of the documentation, between marks.

use anyhow::{Context, Result};

/// The page with `body` between the marks of `key`.
///
/// # Errors
/// When a mark is missing.
pub fn replace(page: &str, key: &str, body: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- {key} -->\n"), "<!-- end -->");
    let missing = || format!("the mark {} is missing", begin.trim_end());
    let start = page.find(&begin).with_context(missing)? + begin.len();
    let length = page[start..].find(end).with_context(missing)?;
    Ok([&page[..start], body, &page[start + length..]].concat())
}

#[cfg(test)]
mod tests {
    use super::replace;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n";
        let one = replace(page, "one", "new\n").unwrap();
        assert_eq!(
            one,
            "a\n<!-- one -->\nnew\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
        );
        assert!(
            replace(&one, "two", "2\n")
                .unwrap()
                .contains("two -->\n2\n<!--")
        );
        assert!(replace(page, "three", "").is_err());
    }
}
