//! How the verbs print.

use std::{
    cell::Cell,
    env,
    fmt::Display,
    io::{ErrorKind, Write},
    time::Duration,
};

use anyhow::{Context, Error, Result};
use clap::{Args, ValueEnum};
use rustix::termios::tcgetwinsize;
use serde::Serialize;

use crate::terminal::{Colours, stderr, stdout};

/// Where nobody says how wide a line may be, in columns: what every terminal has.
const USUAL: usize = 80;
/// Text of a wider terminal is wrapped here, in columns: longer lines are hard to read.
const WIDEST_TEXT: usize = 100;
/// A narrower terminal breaks lines itself.
const NARROWEST_TEXT: usize = 40;

thread_local! {
    /// How wide the lines of standard output may be; `None`: it is no terminal.
    static COLUMNS: Cell<Option<usize>> = const { Cell::new(None) };
}

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
    let mut stdout = stdout(Colours::Shown);
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
    say(&format!("error: {error:#}"));
}

/// Prints a line to standard error while a verb is at work.
pub(super) fn say(line: &str) {
    // With standard error gone there is nobody left to tell.
    let _ = writeln!(stderr(Colours::Shown), "{line}");
}

/// Prints what the parser of the command line has to say: help in its colours, or an error, which
/// quotes what was typed.
pub(super) fn print_usage(usage: &clap::Error) {
    let text = usage.render();
    let written = if usage.use_stderr() {
        write!(stderr(Colours::Shown), "{text}")
    } else {
        let mut stdout = stdout(Colours::Kept);
        if stdout.is_terminal() && env::var_os("NO_COLOR").is_none_or(|no| no.is_empty()) {
            write!(stdout, "{}", text.ansi())
        } else {
            write!(stdout, "{text}")
        }
    };
    // Nobody is there to hear that printing failed.
    let _ = written;
}

/// Lets what this thread prints be as wide as the terminal is, or as `COLUMNS` says, which `watch`
/// sets.
pub(super) fn fit_terminal() {
    set_columns(terminal_columns().or_else(|| env::var("COLUMNS").ok()?.parse().ok()));
}

pub(super) fn set_columns(columns: Option<usize>) {
    COLUMNS.set(columns.filter(|columns| *columns > 0));
}

fn terminal_columns() -> Option<usize> {
    let size = tcgetwinsize(rustix::stdio::stdout()).ok()?;
    // A terminal that nobody has told its size has none.
    Some(size.ws_col.into()).filter(|columns| *columns > 0)
}

/// The columns that text is wrapped to.
pub(super) fn text_columns() -> usize {
    let columns = COLUMNS.get().unwrap_or(USUAL);
    columns.clamp(NARROWEST_TEXT, WIDEST_TEXT)
}

/// A column of a table.
pub(super) struct Column {
    /// The heading; the column is right-aligned where it starts with `>`.
    pub(super) heading: &'static str,
    pub(super) cells: Vec<String>,
}

impl Column {
    fn name(&self) -> &'static str {
        self.heading.trim_start_matches('>')
    }

    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| cell.chars().count());
        cells.max().unwrap_or(0).max(self.name().len())
    }

    /// What stands in a line of the table; line 0 is the heading.
    fn line(&self, number: usize) -> String {
        let width = self.width();
        let text = match number.checked_sub(1) {
            None => self.name(),
            Some(row) => self.cells.get(row).map_or("", String::as_str),
        };
        if self.heading.starts_with('>') {
            format!("{text:>width$}")
        } else {
            format!("{text:<width$}")
        }
    }
}

/// Lines in aligned columns, indented by two. On a terminal that is too narrow for them the columns
/// of `least` are left out, in that order, until the others fit.
pub(super) fn table(mut columns: Vec<Column>, least: &[&str]) -> String {
    let widest = COLUMNS.get().unwrap_or(usize::MAX);
    let is_too_wide = |columns: &[Column]| {
        let widths = columns.iter().map(|column| column.width() + 2);
        widths.sum::<usize>() > widest
    };
    let mut left_out = Vec::new();
    for name in least {
        if !is_too_wide(&columns) {
            break;
        }
        let before = columns.len();
        columns.retain(|column| column.name() != *name);
        if columns.len() < before {
            left_out.push(*name);
        }
    }
    let rows = columns.iter().map(|column| column.cells.len()).max();
    let mut text: String = (0..=rows.unwrap_or(0))
        .map(|number| line(&columns, number))
        .collect();
    if !left_out.is_empty() {
        let words = format!("(no room for {}; `-o json` has all)", left_out.join(", "));
        text += &wrapped("  ", &words);
    }
    text
}

fn line(columns: &[Column], number: usize) -> String {
    let cells: Vec<String> = columns.iter().map(|column| column.line(number)).collect();
    let line = format!("  {}", cells.join("  "));
    format!("{}\n", line.trim_end())
}

/// `text` wrapped between words, the first line after `first`, the others indented just as far. A
/// command in backquotes stays in one piece, to be copied.
pub(super) fn wrapped(first: &str, text: &str) -> String {
    let most = text_columns();
    let indent = first.chars().count();
    let mut lines = first.to_owned();
    let mut column = indent;
    for (index, word) in words(text).enumerate() {
        let width = word.chars().count();
        if index > 0 && column + 1 + width > most {
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

/// The pieces of `text` between which a line may end. A backquote without a second one, as an error
/// in a file may quote it, keeps nothing together.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut left = text.matches('`').count();
    let mut quoted = false;
    text.split(move |c: char| {
        if c == '`' {
            left -= 1;
            quoted = !quoted && left > 0;
        }
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
