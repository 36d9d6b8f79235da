//! The one way out to standard output and standard error.
//!
//! Process names, paths and what an API server tells are written by others, and may hold characters
//! that steer a terminal. They become visible here, so that nobody who prints need think of it.

use std::{
    borrow::Cow,
    io::{self, IsTerminal, Write},
};

/// What becomes of colours in what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// They are shown by their codes, as everything else that steers a terminal.
    Shown,
    /// They pass: the text is ours, or was made safe before it was coloured.
    Kept,
}

/// Standard output, made safe for terminals.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn stdout(colours: Colours) -> Safe<io::Stdout> {
    let to = io::stdout();
    Safe { to, colours }
}

/// Standard error, made safe for terminals.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn stderr(colours: Colours) -> Safe<io::Stderr> {
    let to = io::stderr();
    Safe { to, colours }
}

/// A writer that makes text safe for terminals. Characters must not be divided between two writes.
pub struct Safe<W> {
    to: W,
    colours: Colours,
}

impl<W: IsTerminal> Safe<W> {
    /// Whether a person may read it at once.
    pub fn is_terminal(&self) -> bool {
        self.to.is_terminal()
    }
}

impl<W: Write> Write for Safe<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        self.to.write_all(safe(&text, self.colours).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// `text` with the characters that steer a terminal, or the order of others, shown by their codes,
/// as JSON writes them. Ends of lines and tabs stay.
fn safe(text: &str, colours: Colours) -> Cow<'_, str> {
    if !text.contains(steers) {
        return text.into();
    }
    let mut safe = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let kept = match colours {
            _ if !steers(next) => next.len_utf8(),
            Colours::Kept => colour(rest).len(),
            Colours::Shown => 0,
        };
        if kept > 0 {
            safe += &rest[..kept];
            rest = &rest[kept..];
        } else {
            safe += &code(next);
            rest = &rest[next.len_utf8()..];
        }
    }
    safe.into()
}

fn code(steering: char) -> String {
    format!("\\u{:04x}", u32::from(steering))
}

/// Control characters, and those that change the direction of text (Unicode Standard Annex 9).
fn steers(character: char) -> bool {
    match character {
        '\n' | '\t' => false,
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        other => other.is_control(),
    }
}

/// The sequence that sets colours (SGR, ECMA-48 8.3.117) at the beginning of `text`; empty where
/// there is none.
fn colour(text: &str) -> &str {
    let Some(parameters) = text.strip_prefix("\u{1b}[") else {
        return "";
    };
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';');
    match end {
        Some(end) if parameters[end..].starts_with('m') => &text[..end + 3],
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_steers_a_terminal_is_shown_by_its_code() {
        for (text, shown) in [
            (
                "as it is: ü ✓ \\ \"\n\tand a tab",
                "as it is: ü ✓ \\ \"\n\tand a tab",
            ),
            ("a\u{1b}[2Jb", "a\\u001b[2Jb"),
            ("\u{1b}]0;title\u{7}", "\\u001b]0;title\\u0007"),
            ("over\rwritten", "over\\u000dwritten"),
            ("\u{9b}31m\u{7f}", "\\u009b31m\\u007f"),
            ("a\u{202e}cba", "a\\u202ecba"),
            ("\u{1b}[31mred", "\\u001b[31mred"),
        ] {
            assert_eq!(safe(text, Colours::Shown), shown, "{text:?}");
        }
    }

    #[test]
    fn only_colours_are_kept_where_they_are_ours() {
        for (text, shown) in [
            ("\u{1b}[1;31mred\u{1b}[0m", "\u{1b}[1;31mred\u{1b}[0m"),
            ("\u{1b}[m\u{1b}[2J", "\u{1b}[m\\u001b[2J"),
            ("\u{1b}[31", "\\u001b[31"),
            ("\u{1b}", "\\u001b"),
        ] {
            assert_eq!(safe(text, Colours::Kept), shown, "{text:?}");
        }
    }

    #[test]
    fn json_stays_json_of_the_same_value() {
        let value = "\u{1b}[31m\u{9b}\u{7f}\u{202e}\r\n";
        let json = serde_json::to_string(value).expect("JSON");
        let shown = safe(&json, Colours::Shown);
        assert!(!shown.contains(steers));
        assert_eq!(serde_json::from_str::<String>(&shown).expect("JSON"), value);
    }

    proptest! {
        #[test]
        fn nothing_that_steers_is_ever_written(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut written = Vec::new();
            let mut writer = Safe { to: &mut written, colours: Colours::Shown };
            writer.write_all(&bytes).expect("a vector takes all");
            let written = String::from_utf8(written).expect("UTF-8");
            prop_assert!(!written.contains(steers));
        }
    }
}
