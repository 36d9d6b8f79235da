//! The verbs that are more than one step.

use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::build::{self, Profile};
use crate::setup::{self, Need};
use crate::{command, machine, places};

/// Formatting and clippy, on everything that the host can compile.
pub fn lint() -> Result<ExitCode> {
    setup::ensure(&[Need::Build, Need::Lint])?;
    command::run(build::cargo("fmt").args(["--all", "--check"]))?;
    build::kernel_half(Profile::Debug)?;
    command::run(build::cargo("clippy").args([
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    Ok(ExitCode::SUCCESS)
}

/// All tests.
pub fn test(arguments: &[String]) -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel])?;
    build::everything(Profile::Debug)?;
    command::run_for_code(build::cargo("test").arg("--workspace").args(arguments))
}

/// `balancer` itself.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    setup::ensure(&[Need::Build])?;
    build::everything(Profile::Debug)?;
    program("balancer", arguments)
}

/// The demonstration.
pub fn demo() -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel])?;
    build::everything(Profile::Debug)?;
    program("demo", &[])
}

/// The balancer in front of real OAPs.
pub fn end_to_end_oap() -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel, Need::RealOap])?;
    build::everything(Profile::Debug)?;
    program("e2e-oap", &[])
}

/// Runs a program that was just built. It gets the signals of the terminal itself, being in the same process group.
fn program(name: &str, arguments: &[String]) -> Result<ExitCode> {
    command::run_for_code(Command::new(places::target()?.join("debug").join(name)).args(arguments))
}
