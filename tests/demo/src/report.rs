//! What was seen, what was expected, and how it is printed.

use std::fmt;
use std::time::Duration;

use crate::node::Loads;

/// The pictures and the checks, in the order in which they were taken.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
    checks: Vec<Check>,
}

struct Row {
    title: String,
    loads: Loads,
}

struct Check {
    claim: String,
    seen: String,
    holds: bool,
}

impl Report {
    /// Takes down how many connections each OAP holds.
    pub fn picture(&mut self, title: &str, loads: &Loads) {
        self.rows.push(Row {
            title: title.to_owned(),
            loads: loads.clone(),
        });
    }

    /// Takes down whether what was claimed is so, and says it at once.
    pub fn check(&mut self, claim: impl Into<String>, seen: impl fmt::Display, holds: bool) {
        let check = Check {
            claim: claim.into(),
            seen: seen.to_string(),
            holds,
        };
        println!("    {check}");
        self.checks.push(check);
    }

    /// Whether every check holds.
    pub fn is_as_expected(&self) -> bool {
        self.checks.iter().all(|check| check.holds)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.names();
        let width = self
            .rows
            .iter()
            .map(|row| row.title.len())
            .max()
            .unwrap_or(0);
        write!(f, "{:width$}", "connections held, from the socket table")?;
        names.iter().try_for_each(|name| write!(f, " {name:>6}"))?;
        writeln!(f, "  max - min")?;
        for row in &self.rows {
            write!(f, "{:width$}", row.title)?;
            for name in &names {
                match row.loads.iter().find(|(owner, _)| owner == *name) {
                    Some((_, load)) => write!(f, " {load:>6}")?,
                    None => write!(f, " {:>6}", "")?,
                }
            }
            writeln!(f, " {:>10}", spread(&row.loads))?;
        }
        writeln!(f)?;
        self.checks
            .iter()
            .try_for_each(|check| writeln!(f, "{check}"))?;
        let wrong = self.checks.iter().filter(|check| !check.holds).count();
        match wrong {
            0 => write!(f, "All {} checks hold.", self.checks.len()),
            _ => write!(f, "{wrong} of {} checks DO NOT HOLD.", self.checks.len()),
        }
    }
}

impl Report {
    fn names(&self) -> Vec<&String> {
        let mut names: Vec<_> = self
            .rows
            .iter()
            .flat_map(|row| row.loads.iter().map(|(name, _)| name))
            .collect();
        names.sort();
        names.dedup();
        names
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.holds { "ok   " } else { "WRONG" };
        write!(f, "{mark} {}: {}", self.claim, self.seen)
    }
}

/// The title of a picture.
pub fn heading(title: &str, text: &str) {
    println!("\n{title} {text}");
}

/// A line of what each OAP holds, while it happens.
pub fn progress(since: Duration, loads: &Loads) {
    let bar = |load: usize| "▪".repeat(load.div_ceil(10));
    let bars: Vec<_> = loads
        .iter()
        .map(|(name, load)| format!("{name} {load:>3} {:<12}", bar(*load)))
        .collect();
    println!(
        "  {:>5.2} s  {}",
        since.as_secs_f64(),
        bars.join("  ").trim_end()
    );
}

/// The most loaded less the least loaded.
pub fn spread(loads: &Loads) -> usize {
    let loads = loads.iter().map(|(_, load)| *load);
    loads.clone().max().unwrap_or(0) - loads.min().unwrap_or(0)
}

/// All connections.
pub fn total(loads: &Loads) -> usize {
    loads.iter().map(|(_, load)| load).sum()
}

/// Median, 99th percentile and maximum of some durations.
pub struct Quantiles {
    sorted: Vec<Duration>,
}

impl Quantiles {
    /// Of these.
    pub fn of(durations: impl Iterator<Item = Duration>) -> Self {
        let mut sorted: Vec<_> = durations.collect();
        sorted.sort();
        Self { sorted }
    }

    /// The longest. Where there is none: endless, so that no check holds.
    pub fn worst(&self) -> Duration {
        self.sorted.last().copied().unwrap_or(Duration::MAX)
    }

    /// The smallest one that so many percent do not exceed (nearest rank).
    fn percentile(&self, percent: usize) -> Option<Duration> {
        let rank = (self.sorted.len() * percent).div_ceil(100);
        self.sorted.get(rank.checked_sub(1)?).copied()
    }
}

impl fmt::Display for Quantiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(median), Some(p99)) = (self.percentile(50), self.percentile(99)) else {
            return f.write_str("none");
        };
        let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
        write!(
            f,
            "median {:.1} ms, p99 {:.1} ms, worst {:.1} ms",
            ms(median),
            ms(p99),
            ms(self.worst())
        )
    }
}
