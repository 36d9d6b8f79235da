//! What is wrong with a configuration, where, and what to do about it.

use std::{
    fmt,
    path::{Path, PathBuf},
};

pub(super) type Result<T> = std::result::Result<T, ConfigError>;

/// A place in the file; both numbers begin at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Place {
    /// An error here. Its message says what is wrong and, after a semicolon, what to do.
    pub(super) fn fail<T>(self, message: impl Into<String>) -> Result<T> {
        let place = Some(self);
        Err(ConfigError {
            place,
            ..ConfigError::new(message)
        })
    }
}

/// Why a configuration can't be used, as `FILE:LINE:COLUMN: what is wrong; what to do`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    file: Option<PathBuf>,
    place: Option<Place>,
    message: String,
}

impl ConfigError {
    /// An error about the file as a whole.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self {
            file: None,
            place: None,
            message: message.into(),
        }
    }

    /// The error with the name of the file that it was found in.
    pub(super) fn in_file(self, file: &Path) -> Self {
        Self {
            file: Some(file.to_owned()),
            ..self
        }
    }

    /// The line that it is about, counted from 1; `None` when it is about the file as a whole.
    pub fn line(&self) -> Option<usize> {
        self.place.map(|place| place.line)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
        }
        match (self.place, &self.file) {
            (Some(Place { line, column }), Some(_)) => write!(f, "{line}:{column}: ")?,
            (Some(Place { line, column }), None) => write!(f, "line {line}, column {column}: ")?,
            (None, Some(_)) => f.write_str(" ")?,
            (None, None) => {}
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConfigError {}
