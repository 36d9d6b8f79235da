//! The build: the kernel half first, then the host's programs, which embed it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::kernel_half::{Compiler, TARGET};
use crate::{command, linker, places};

/// How the host's programs are built, and which kernel half they embed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// With the log lines of the kernel programs.
    Debug,
    /// Optimised, and without these lines.
    Release,
}

impl Profile {
    /// The profile of an optimised build, or of one that is not.
    pub fn of(release: bool) -> Self {
        if release { Self::Release } else { Self::Debug }
    }

    /// The directory below the target directory that cargo builds into.
    pub fn name(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Release => "release",
        }
    }
}

/// Builds the kernel half and the balancer, and nothing else.
///
/// # Errors
/// When a compiler fails or there is none for the kernel half.
pub fn product(profile: Profile) -> Result<()> {
    match profile {
        Profile::Debug => debug_programs(&[PRODUCT]),
        Profile::Release => {
            kernel_half(profile)?;
            release(&["--package", PRODUCT])
        }
    }
}

/// Builds these programs of the workspace, with the kernel half of the same profile.
///
/// The whole workspace is selected, so that dependencies have the same features whatever is built,
/// and are compiled once.
///
/// # Errors
/// When a compiler fails or there is none for the kernel half.
pub fn debug_programs(names: &[&str]) -> Result<()> {
    kernel_half(Profile::Debug)?;
    let mut build = cargo("build");
    build.arg("--workspace");
    for name in names {
        build.args(["--bin", name]);
    }
    command::run(&mut build)
}

/// Builds the product and the program that measures it, both optimised.
///
/// # Errors
/// When a compiler fails or there is none for the kernel half.
pub fn measurements() -> Result<()> {
    product(Profile::Release)?;
    release(&["--package", "bench"])
}

/// The package of the balancer, and its program.
pub const PRODUCT: &str = "balancer";

fn release(selection: &[&str]) -> Result<()> {
    command::run(cargo("build").arg("--release").args(selection))
}

/// Where the kernel half is that [`kernel_half`] built.
///
/// # Errors
/// When the target directory can't be told.
pub fn object(profile: Profile) -> Result<PathBuf> {
    Ok(places::target()?
        .join("bpf")
        .join(profile.name())
        .join("balancer.o"))
}

/// Builds the kernel half and puts it where balancer's build script looks:
/// `<target>/bpf/<profile>/balancer.o`, and beside it `balancer.d`, cargo's list of the sources
/// that went into it.
///
/// # Errors
/// When there is no compiler for it, or the compiler fails.
pub fn kernel_half(profile: Profile) -> Result<()> {
    let mut cargo = kernel_half_cargo("build", &[])?;
    if profile == Profile::Debug {
        cargo.args(["--features", "log"]);
    }
    command::run(&mut cargo).context("the kernel half was not built")?;
    let outcome = scratch_directory()?.join(TARGET).join("bpf");
    let object = object(profile)?;
    let sources = object.with_extension("d");
    // Only what is new, so that the host's programs are built again only then. cargo writes its
    // list anew each time.
    if !sources.is_file() || is_older(&object, &outcome.join("balancer-bpf"))? {
        copy(&outcome.join("balancer-bpf.d"), &sources)?;
        copy(&outcome.join("balancer-bpf"), &object)?;
    }
    Ok(())
}

/// Checks the kernel half with the compiler's warnings as errors, with and without its log lines.
/// Clippy can't: the compiler for it may come without one.
///
/// # Errors
/// When there is no compiler for it, or the compiler complains.
pub fn check_kernel_half() -> Result<()> {
    for features in [&[][..], &["--features", "log"]] {
        let mut check = kernel_half_cargo("check", &["-D", "warnings"])?;
        command::run(check.args(features)).context("the kernel half is not clean")?;
    }
    Ok(())
}

/// cargo in the workspace, with a verb.
pub fn cargo(verb: &str) -> Command {
    let mut cargo = Command::new(places::cargo());
    cargo.arg(verb).current_dir(places::workspace());
    cargo
}

fn kernel_half_cargo(verb: &str, flags: &[&str]) -> Result<Command> {
    let Some(compiler) = Compiler::find() else {
        bail!("no compiler here can build for BPF: run `cargo xtask setup`")
    };
    let Some(linker) = linker::find() else {
        bail!("bpf-linker is missing: run `cargo xtask setup`")
    };
    let mut cargo = compiler.cargo(verb, &linker, flags);
    cargo.args([
        "--package",
        "balancer-ebpf",
        "--bin",
        "balancer-bpf",
        "--profile",
        "bpf",
    ]);
    cargo
        .arg("--target-dir")
        .arg(scratch_directory()?)
        .current_dir(places::workspace());
    Ok(cargo)
}

/// A target directory of its own: another compiler and other flags would undo the host's build each
/// time.
fn scratch_directory() -> Result<PathBuf> {
    Ok(places::target()?.join("bpf").join("cargo"))
}

/// Whether `copied` is older than `built`, or not there.
fn is_older(copied: &Path, built: &Path) -> Result<bool> {
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified());
    let built = modified(built).with_context(|| format!("cargo built no {}", built.display()))?;
    Ok(!modified(copied).is_ok_and(|copied| copied >= built))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(directory) = to.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    std::fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
