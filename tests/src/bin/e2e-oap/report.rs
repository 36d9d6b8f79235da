//! The table of what was expected and what was seen, printed row by row.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::interrupt;

const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

/// What a check wants to see, and what it sees.
pub struct Sight {
    /// Wanted.
    pub expected: String,
    /// Seen.
    pub seen: String,
}

impl Sight {
    /// Both as they are shown.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "most are made for this call; references can be given too"
    )]
    pub fn new(expected: impl ToString, seen: impl ToString) -> Self {
        Self {
            expected: expected.to_string(),
            seen: seen.to_string(),
        }
    }

    fn is_as_expected(&self) -> bool {
        self.expected == self.seen
    }
}

/// The table.
pub struct Report {
    begun: Instant,
    rows: usize,
}

impl Report {
    /// Prints the head.
    pub fn begin() -> Self {
        print_row("s", "step", "expected", "seen", "ok");
        Self {
            begun: Instant::now(),
            rows: 0,
        }
    }

    /// A row, as things are.
    ///
    /// # Errors
    /// When they are not as expected.
    pub fn check(&mut self, step: &str, sight: &Sight) -> Result<()> {
        let ok = sight.is_as_expected();
        let seconds = self.begun.elapsed().as_secs().to_string();
        let word = if ok { "yes" } else { "NO" };
        print_row(&seconds, step, &sight.expected, &sight.seen, word);
        self.rows += 1;
        ensure!(
            ok,
            "{step}: expected {}, saw {}",
            sight.expected,
            sight.seen
        );
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
        mut look: impl FnMut() -> Result<Sight>,
    ) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            let sight = look()?;
            if sight.is_as_expected() || Instant::now() >= deadline {
                return self.check(step, &sight);
            }
            interrupt::pause(BETWEEN_LOOKS)?;
        }
    }

    /// Prints the foot.
    pub fn end(&self) {
        let seconds = self.begun.elapsed().as_secs();
        println!("{} checks, all as expected, in {seconds} s", self.rows);
    }
}

fn print_row(seconds: &str, step: &str, expected: &str, seen: &str, ok: &str) {
    println!("{seconds:>4}  {step:<58}  {expected:<34}  {seen:<34}  {ok}");
}
