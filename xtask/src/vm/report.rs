//! What came out of a guest.

use std::fmt::Write as _;
use std::time::Duration;

use super::Kernel;
use super::debian::Files;

/// Begins what the guest itself says, and not a test.
const GUEST: &str = "guest: ";

/// What came out of one guest.
#[derive(Debug, Default)]
pub struct Report {
    name: String,
    release: String,
    package: String,
    supported: bool,
    /// Our own first program has said something.
    booted: bool,
    passed: usize,
    failed: Vec<String>,
    /// The exit code of the tests; none: they did not come to their end.
    code: Option<i32>,
    /// What the release build's programs cost, a line each.
    costs: Vec<String>,
    /// From its start to its end.
    pub took: Duration,
}

impl Report {
    /// Of a guest that has said nothing yet.
    pub fn new(kernel: &Kernel, files: &Files) -> Self {
        Self {
            name: kernel.name.clone(),
            release: files.release.clone(),
            package: files.package.clone(),
            supported: kernel.supported,
            ..Self::default()
        }
    }

    /// Takes a line that the guest has said.
    pub fn read(&mut self, line: &str) {
        if let Some(said) = line.strip_prefix(GUEST) {
            self.booted = true;
            if let Some(code) = said.strip_prefix("the tests ended with ") {
                self.code = code.trim().parse().ok();
            } else if let Some(cost) = said.strip_prefix("costs ") {
                // The frames of the stack are in the log.
                let sum = cost.split_once(" (").map_or(cost, |(sum, _)| sum);
                self.costs.push(sum.trim().to_owned());
            }
            return;
        }
        let Some(test) = line.strip_prefix("test ") else {
            return;
        };
        match test.split_once(" ... ") {
            Some((_, "ok")) => self.passed += 1,
            Some((name, "FAILED")) => self.failed.push(name.to_owned()),
            _ => {}
        }
    }

    /// Whether its kernel came as far as our own first program.
    pub const fn has_booted(&self) -> bool {
        self.booted
    }

    /// Whether all tests passed. None at all is no success.
    pub fn passed(&self) -> bool {
        self.code == Some(0) && self.failed.is_empty() && self.passed > 0
    }

    /// In a few words.
    pub fn outcome(&self) -> String {
        let (passed, failed) = (self.passed, self.failed.len());
        match self.code {
            None => format!("did not come to its end: {passed} passed, {failed} failed until then"),
            Some(_) if self.passed() && !self.supported => {
                format!("refused as it should be: {passed} checks passed")
            }
            Some(_) if self.passed() => format!("all {passed} tests passed"),
            Some(code) => format!("{failed} of {} failed (exit code {code})", passed + failed),
        }
    }
}

/// The kernels as a table in Markdown, and below it what failed on which.
pub fn table(reports: &[Report]) -> String {
    let mut text = String::from(
        "| kernel | Debian's package | outcome | the programs, as this kernel's verifier reports them | time |\n|---|---|---|---|--:|\n",
    );
    for report in reports {
        let costs = if report.costs.is_empty() {
            "—".to_owned()
        } else {
            report.costs.join("<br>")
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {costs} | {} s |",
            report.release,
            report.package,
            report.outcome(),
            report.took.as_secs()
        );
    }
    for report in reports.iter().filter(|report| !report.failed.is_empty()) {
        let _ = writeln!(text, "\nFailed on {}:", report.name);
        for test in &report.failed {
            let _ = writeln!(text, "  {test}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &[&str]) -> Report {
        let mut report = Report {
            supported: true,
            ..Report::default()
        };
        for line in lines {
            report.read(line);
        }
        report
    }

    #[test]
    fn what_passed_and_what_failed_is_counted() {
        let report = after(&[
            "running 2 tests",
            "test a::b ... ok",
            "test c ... FAILED",
            "guest: the tests ended with 101",
        ]);
        assert!(report.has_booted() && !report.passed());
        assert_eq!(report.outcome(), "1 of 2 failed (exit code 101)");
        assert!(table(&[report]).contains("  c\n"));
    }

    #[test]
    fn only_an_end_with_tests_is_a_success() {
        let end = "guest: the tests ended with 0";
        assert!(after(&["test a ... ok", end]).passed());
        assert!(!after(&["test a ... ok"]).passed());
        assert!(!after(&[end]).passed());
        assert!(!after(&["Kernel panic - not syncing"]).has_booted());
    }
}
