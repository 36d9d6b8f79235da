//! Moments, in milliseconds since 1970.

use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result};

/// When a line was written: `kubectl logs --timestamps` puts `2026-11-25T16:28:45.123456789Z`
/// before it, in UTC.
pub fn of_line(line: &str) -> Option<u64> {
    let (date, time) = line.split(' ').next()?.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(str::parse::<i64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let mut time = time.splitn(3, ':');
    let hours: i64 = time.next()?.parse().ok()?;
    let minutes: i64 = time.next()?.parse().ok()?;
    let seconds = time.next()?;
    let (seconds, fraction) = seconds.split_once('.').unwrap_or((seconds, ""));
    let seconds: i64 = seconds.parse().ok()?;
    let millis: i64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    let minutes = (days(year, month, day) * 24 + hours) * 60 + minutes;
    u64::try_from((minutes * 60 + seconds) * 1000 + millis).ok()
}

/// When a file was made that nobody has written to since.
pub fn of_file(path: &Path) -> Result<u64> {
    let made = path.metadata().and_then(|metadata| metadata.modified());
    let made = made.with_context(|| format!("cannot see when {} was made", path.display()))?;
    let since = made.duration_since(UNIX_EPOCH)?;
    Ok(since.as_millis().try_into()?)
}

/// Days since 1970 (Howard Hinnant,
/// <https://howardhinnant.github.io/date_algorithms.html#days_from_civil>), for years after 1.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year) = (year / 400, year % 400);
    let day = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year * 365 + year / 4 - year / 100 + day - 719_468
}

#[cfg(test)]
mod tests {
    use super::of_line;

    #[test]
    fn reads_the_time_before_a_line() {
        assert_eq!(of_line("1970-01-01T00:00:00.5Z x"), Some(500));
        assert_eq!(
            of_line("2026-11-25T16:28:45.123456789Z listening on [::]:11800"),
            Some(1_795_624_125_123)
        );
        assert_eq!(of_line("2024-02-29T00:00:00Z"), Some(1_709_164_800_000));
        assert_eq!(of_line("listening"), None);
    }
}
