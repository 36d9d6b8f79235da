//! The table of what was expected and what was seen, printed row by row.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::interrupt;

const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

/// What a check wants to see, and what it sees.
pub struct Check {
    /// Wanted.
    pub expected: String,
    /// Seen.
    pub seen: String,
    ok: bool,
}

impl Check {
    /// Both as they are shown, which must be the same.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "most are made for this call; references can be given too"
    )]
    pub fn new(expected: impl ToString, seen: impl ToString) -> Self {
        let (expected, seen) = (expected.to_string(), seen.to_string());
        let ok = expected == seen;
        Self::judged(expected, seen, ok)
    }

    /// Both as they are shown, where being the same is not what matters.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "most are made for this call; references can be given too"
    )]
    pub fn judged(expected: impl ToString, seen: impl ToString, ok: bool) -> Self {
        Self {
            expected: expected.to_string(),
            seen: seen.to_string(),
            ok,
        }
    }

    /// A time that must not be longer than a limit.
    pub fn within(limit: Duration, seen: Duration) -> Self {
        let show = |time: Duration| format!("{:.1} s", time.as_secs_f64());
        Self::judged(
            format!("at most {}", show(limit)),
            show(seen),
            seen <= limit,
        )
    }

    /// Whether what was seen is what was expected.
    pub const fn is_as_expected(&self) -> bool {
        self.ok
    }
}

/// The table.
pub struct Report {
    begun: Instant,
    rows: usize,
    goes_on: bool,
    differences: Vec<String>,
}

impl Report {
    /// Prints the head. The first difference will be an error.
    pub fn begin() -> Self {
        print_row("s", "step", "expected", "seen", "ok");
        Self {
            begun: Instant::now(),
            rows: 0,
            goes_on: false,
            differences: Vec::new(),
        }
    }

    /// Begins a report that goes on after a difference: only its [end](Self::end) is an error then.
    pub fn begin_and_go_on() -> Self {
        Self {
            goes_on: true,
            ..Self::begin()
        }
    }

    /// Since the head was printed.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// A row that nothing is expected of.
    pub fn tell(&self, step: &str, seen: &str) {
        let seconds = self.begun.elapsed().as_secs().to_string();
        print_row(&seconds, step, "-", seen, "");
    }

    /// A row, as things are.
    ///
    /// # Errors
    /// When they are not as expected.
    pub fn check(&mut self, step: &str, check: &Check) -> Result<()> {
        let ok = check.ok;
        let seconds = self.begun.elapsed().as_secs().to_string();
        let word = if ok { "yes" } else { "NO" };
        print_row(&seconds, step, &check.expected, &check.seen, word);
        self.rows += 1;
        if !ok {
            let difference = format!("{step}: expected {}, saw {}", check.expected, check.seen);
            ensure!(self.goes_on, "{difference}");
            self.differences.push(difference);
        }
        Ok(())
    }

    /// A row, once things are as expected or the time is up.
    ///
    /// # Errors
    /// When they are not as expected by then, when looking fails for good, and when a signal comes.
    pub fn wait(
        &mut self,
        step: &str,
        within: Duration,
        mut look: impl FnMut() -> Result<Check>,
    ) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            let check = look()?;
            if check.ok || Instant::now() >= deadline {
                return self.check(step, &check);
            }
            interrupt::pause(BETWEEN_LOOKS)?;
        }
    }

    /// Prints the foot.
    ///
    /// # Errors
    /// When there was a difference.
    pub fn end(&self) -> Result<()> {
        let seconds = self.begun.elapsed().as_secs();
        let number = self.differences.len();
        ensure!(
            number == 0,
            "{number} of {} checks are not as expected, in {seconds} s:\n  {}",
            self.rows,
            self.differences.join("\n  ")
        );
        println!("{} checks, all as expected, in {seconds} s", self.rows);
        Ok(())
    }
}

fn print_row(seconds: &str, step: &str, expected: &str, seen: &str, ok: &str) {
    println!("{seconds:>4}  {step:<58}  {expected:<34}  {seen:<34}  {ok}");
}
