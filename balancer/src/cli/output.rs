//! How the verbs print.

use std::{
    fmt::Display,
    io::{self, ErrorKind, Write},
    time::Duration,
};

use anyhow::{Context, Error, Result};
use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// The widest line that text output is wrapped to, in columns.
const WIDTH: usize = 100;

/// How a reading verb shows what it found.
#[derive(Debug, Args)]
pub(super) struct Output {
    /// As text for people, or as JSON for programs
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

impl Output {
    /// Prints what was found, in the form that was asked for.
    pub(super) fn show(&self, json: &impl Serialize, text: impl FnOnce() -> String) -> Result<()> {
        print(&match self.format {
            Format::Text => text(),
            Format::Json => serde_json::to_string_pretty(json).context("can't write JSON")? + "\n",
        })
    }
}

/// Prints to standard output. A reader that has seen enough (`balancer status | head`) is no error.
pub(super) fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("can't write to standard output")
        }
        _ => Ok(()),
    }
}

/// Prints why a verb failed to standard error.
pub(super) fn print_error(error: &Error) {
    // With standard error gone there is nobody left to tell.
    let _ = writeln!(io::stderr(), "error: {error:#}");
}

/// Lines in aligned columns, indented by two. A column is right-aligned where its heading starts
/// with `>`.
pub(super) fn table(headings: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(
        headings
            .iter()
            .map(|heading| heading.trim_start_matches('>')),
    );
    table.add_rows(rows);
    for (column, heading) in table.column_iter_mut().zip(headings) {
        column.set_padding((0, 2));
        if heading.starts_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `text` wrapped between words, the first line after `first`, the others indented just as far. A
/// command in backquotes stays in one piece, to be copied.
pub(super) fn wrapped(first: &str, text: &str) -> String {
    let indent = first.chars().count();
    let mut lines = first.to_owned();
    let mut column = indent;
    for (index, word) in words(text).enumerate() {
        let width = word.chars().count();
        if index > 0 && column + 1 + width > WIDTH {
            lines.push('\n');
            lines.push_str(&" ".repeat(indent));
            column = indent;
        } else if index > 0 {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += width;
    }
    lines.truncate(lines.trim_end().len());
    lines.push('\n');
    lines
}

/// The pieces of `text` between which a line may end.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c: char| {
        quoted ^= c == '`';
        c.is_whitespace() && !quoted
    })
    .filter(|word| !word.is_empty())
}

/// A time span as people say it, in one or two units.
pub(super) fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{seconds}.{} s", duration.subsec_millis() / 100),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The value, or `none` in its place.
pub(super) fn or(value: Option<impl Display>, none: &str) -> String {
    value.map_or_else(|| none.to_owned(), |value| value.to_string())
}
