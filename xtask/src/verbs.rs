//! The verbs that are more than one step.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::build::{self, Profile};
use crate::setup::{self, Need};
use crate::{command, fuzz, machine, places};

/// Formatting, the kernel half's warnings, and clippy on everything that the host can compile.
pub fn lint() -> Result<ExitCode> {
    setup::ensure(&[Need::Build, Need::Lint, Need::Fuzz])?;
    command::run(build::cargo("fmt").args(["--all", "--check"]))?;
    command::run(fuzz::cargo("fmt").arg("--check"))?;
    build::check_kernel_half()?;
    build::kernel_half(Profile::Debug)?;
    command::run(build::cargo("clippy").args([
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    // In the workspace's target directory, where the kernel half and some of the dependencies are already.
    let mut clippy = fuzz::cargo("clippy");
    clippy.arg("--target-dir").arg(places::target()?);
    command::run(clippy.args(["--", "-D", "warnings"]))?;
    Ok(ExitCode::SUCCESS)
}

/// Set, it makes the tests run at their full length.
const LONG: &str = "BALANCER_TEST_LONG";

/// All tests; `long`: those that are shortened otherwise at their full length.
pub fn test(long: bool, arguments: &[String]) -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel])?;
    // Tests bound what either kernel half costs the kernel.
    build::kernel_half(Profile::Release)?;
    build::everything(Profile::Debug)?;
    let mut test = build::cargo("test");
    if long {
        test.env(LONG, "1");
    }
    let mut to_cargo = arguments.iter().take_while(|argument| *argument != "--");
    if !to_cargo.any(|argument| names_a_package(argument)) {
        test.arg("--workspace");
    }
    command::run_for_code(test.args(arguments))
}

/// With `--workspace` cargo would pass over the package that somebody names.
fn names_a_package(argument: &str) -> bool {
    argument.starts_with("-p") || argument.starts_with("--package")
}

/// `balancer` itself.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    setup::ensure(&[Need::Build])?;
    build::everything(Profile::Debug)?;
    become_program("balancer", arguments)
}

/// The demonstration.
pub fn demo() -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel])?;
    build::everything(Profile::Debug)?;
    become_program("demo", &[])
}

/// The balancer in front of real OAPs.
pub fn end_to_end_oap() -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel, Need::RealOap])?;
    build::everything(Profile::Debug)?;
    become_program("e2e-oap", &[])
}

/// Becomes a program that was just built: the signals of the terminal and the exit code are its own.
fn become_program(name: &str, arguments: &[String]) -> Result<ExitCode> {
    let program = places::target()?.join("debug").join(name);
    let error = Command::new(&program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
