//! What was measured: printed as tables, written as JSON and SVG, and put into the documentation.

mod plot;

use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::{Map, Value, json};
use testkit::docs;

pub use self::plot::Chart;
use crate::settings::{Settings, processors};

/// A load above this disturbs.
const BUSY: f64 = 1.0;

/// The outcome of one measurement.
pub struct Section {
    /// Its name in the JSON, in the documentation and of its plot.
    pub key: &'static str,
    /// For people.
    pub title: &'static str,
    /// The rows for the JSON.
    pub rows: Value,
    /// The same for people.
    pub table: Rows,
    /// What was to be reached.
    pub goals: Vec<Goal>,
    /// A picture of it.
    pub chart: Option<Chart>,
}

/// Something that was to be reached, and what was seen.
#[derive(Serialize)]
pub struct Goal {
    /// What was to be reached.
    pub claim: String,
    /// What was seen.
    pub seen: String,
    /// Whether it was.
    pub met: bool,
}

impl Goal {
    /// At least so much.
    pub fn at_least(what: &str, bound: f64, seen: f64) -> Self {
        Self {
            claim: format!("{what} ≥ {bound}"),
            seen: format!("{seen:.3}"),
            met: seen >= bound,
        }
    }

    /// At most so much.
    pub fn at_most(what: &str, bound: f64, unit: &str, seen: f64) -> Self {
        Self {
            claim: format!("{what} ≤ {bound} {unit}"),
            seen: format!("{seen:.1} {unit}"),
            met: seen <= bound,
        }
    }

    fn line(&self) -> String {
        let verdict = if self.met { "met" } else { "MISSED" };
        format!("{}: {} ({verdict})", self.claim, self.seen)
    }
}

/// A table in Markdown, which is readable as it is.
pub struct Rows(Table);

impl Rows {
    /// With these headings; all columns but the first `left` are numbers.
    pub fn new(left: usize, headings: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header(headings);
        for column in table.column_iter_mut().skip(left) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        Self(table)
    }

    /// One more row.
    pub fn add(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.add_row(cells.into_iter().collect::<Vec<_>>());
    }
}

/// All outcomes of this run.
pub struct Report<'a> {
    settings: &'a Settings,
    machine: Map<String, Value>,
    sections: Vec<Section>,
}

impl<'a> Report<'a> {
    /// Nothing is measured yet.
    ///
    /// # Errors
    /// When the system does not say what it is.
    pub fn new(settings: &'a Settings) -> Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")
            .context("cannot read the kernel's release")?;
        let mut machine = Map::new();
        machine.insert("date".into(), date().into());
        machine.insert("kernel".into(), kernel.trim().into());
        machine.insert("processors".into(), processors().into());
        machine.insert("load_before".into(), load()?.into());
        machine.insert("quick".into(), settings.is_quick().into());
        Ok(Self {
            settings,
            machine,
            sections: Vec::new(),
        })
    }

    /// Prints what was measured, and keeps it.
    ///
    /// # Errors
    /// When the plot can't be written.
    pub fn add(&mut self, section: Section) -> Result<()> {
        println!("\n## {}\n\n{}", section.title, section.table.0);
        for goal in &section.goals {
            println!("- {}", goal.line());
        }
        if let Some(chart) = &section.chart {
            let path = self
                .settings
                .results()
                .join(format!("{}.svg", section.key.replace('_', "-")));
            plot::draw(chart, section.title, &path)?;
        }
        self.sections.push(section);
        Ok(())
    }

    /// Writes the JSON: one key a measurement, and the goals of all.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn finish(&self, took: Duration) -> Result<()> {
        let mut all = self.machine.clone();
        all.insert("seconds".into(), took.as_secs().into());
        for section in &self.sections {
            all.insert(section.key.into(), section.rows.clone());
        }
        let goals: Vec<_> = self
            .sections
            .iter()
            .flat_map(|section| &section.goals)
            .collect();
        all.insert("goals".into(), json!(goals));
        let path = self.settings.results().join("latest.json");
        let text = serde_json::to_string_pretty(&all).context("the results are JSON")?;
        // Whoever reads it never sees half of it.
        let new = path.with_extension("new");
        fs::write(&new, text + "\n")
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("\n{:.0} s in all; {}", took.as_secs_f64(), path.display());
        Ok(())
    }

    /// Puts the tables between their marks in the documentation.
    ///
    /// # Errors
    /// When the page or one of the marks is missing.
    pub fn write_docs(&self) -> Result<()> {
        let path = Settings::docs();
        let mut page =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = |key: &str| match self.machine.get(key) {
            Some(Value::String(text)) => text.clone(),
            other => other.map(Value::to_string).unwrap_or_default(),
        };
        let made = format!(
            "Measured on {} with Linux {} and {} processors, load {} before{}.",
            text("date"),
            text("kernel"),
            text("processors"),
            text("load_before"),
            self.settings.pick(" (quick run: coarse)", "")
        );
        for section in &self.sections {
            let mut body = format!("{made}\n\n{}\n", section.table.0);
            for (index, goal) in section.goals.iter().enumerate() {
                body += if index == 0 { "\n- " } else { "- " };
                body += &goal.line();
                body.push('\n');
            }
            page = docs::replace(&page, &format!("bench: {}", section.key), &body)
                .with_context(|| format!("in {}", path.display()))?;
        }
        fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// How many threads wanted a processor during the last minute. Says so where it is many: figures
/// are noise then.
fn load() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    let load = text.split_whitespace().next().unwrap_or_default();
    let load: f64 = load.parse().context("/proc/loadavg begins with a number")?;
    if load > BUSY {
        eprintln!("this machine is busy (load {load}): what follows is mostly noise");
    }
    Ok(load)
}

/// The day in UTC, as `2026-11-25` (Howard Hinnant's `civil_from_days`).
fn date() -> String {
    let seconds = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let days = seconds.as_secs() / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}
