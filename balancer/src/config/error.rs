//! What is wrong with a configuration, where, and what to do about it.

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// Why a configuration can't be used. Displays as `FILE:LINE: what is wrong; what to do`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    file: Option<PathBuf>,
    line: Option<usize>,
    problem: String,
    advice: String,
}

impl ConfigError {
    /// An error about the text as a whole.
    pub(super) fn new(problem: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            file: None,
            line: None,
            problem: problem.into(),
            advice: advice.into(),
        }
    }

    /// The same error, found in `file`.
    pub(super) fn in_file(mut self, file: &Path) -> Self {
        self.file = Some(file.to_owned());
        self
    }

    /// The line it is about, counted from 1; `None` when it is about the file as a whole.
    pub fn line(&self) -> Option<usize> {
        self.line
    }
}

/// An error about one line.
pub(super) fn at_line(
    line: usize,
    problem: impl Into<String>,
    advice: impl Into<String>,
) -> ConfigError {
    ConfigError {
        line: Some(line),
        ..ConfigError::new(problem, advice)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, "{}:{line}: ", file.display())?,
            (Some(file), None) => write!(f, "{}: ", file.display())?,
            (None, Some(line)) => write!(f, "line {line}: ")?,
            (None, None) => {}
        }
        write!(f, "{}; {}", self.problem, self.advice)
    }
}

impl std::error::Error for ConfigError {}
