//! `cargo xtask vm`: the tests on other kernels than this machine's. Each is Debian's own, and runs
//! in QEMU with nothing else than an initramfs that holds the tests.

mod debian;
mod guest;
mod initramfs;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};

use crate::build::{self, Profile};
use crate::setup::{self, Need};
use crate::{command, places};

use report::Report;

/// A kernel to run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel's name on the command line.
    name: String,
    /// The suite of Debian's archive that has it.
    suite: &'static str,
    /// The kernel's package in that suite.
    package: Package,
    /// Whether the balancer is to run on it. If not, it is to say so.
    supported: bool,
}

/// Which package of a suite is a kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Package {
    /// The suite's own, whichever version that is.
    Latest,
    /// The newest of this version.
    Version(String),
}

/// The kernels that are run on when none is named.
pub const DEFAULT: &str = "5.10,6.1,6.12,backports,sid";

impl Kernel {
    /// `6.1`, the kernel of a Debian release; `backports` and `sid`, whatever these have; `7.0`, a
    /// version that trixie-backports has.
    ///
    /// # Errors
    /// What may stand there.
    pub fn parse(name: &str) -> Result<Self, String> {
        let (suite, package) = match name {
            "5.10" => ("bullseye", Package::Latest),
            "6.1" => ("bookworm", Package::Latest),
            "6.12" => ("trixie", Package::Latest),
            "backports" => ("trixie-backports", Package::Latest),
            "sid" => ("sid", Package::Latest),
            version if is_version(version) => {
                ("trixie-backports", Package::Version(version.to_owned()))
            }
            other => {
                return Err(format!(
                    "no kernel `{other}`: 5.10 (bullseye), 6.1 (bookworm), 6.12 (trixie), backports, sid, or a version that \
                     trixie-backports has, as in 7.0"
                ));
            }
        };
        Ok(Self {
            name: name.to_owned(),
            suite,
            package,
            supported: name != "5.10",
        })
    }
}

fn is_version(name: &str) -> bool {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    name.split_once('.')
        .is_some_and(|(major, minor)| is_number(major) && is_number(minor))
}

/// What to run.
pub struct Options {
    /// Where.
    pub kernels: Vec<Kernel>,
    /// Fetch the kernels anew, also those that are there.
    pub refresh: bool,
    /// Run only one test of each thing.
    pub quick: bool,
    /// Arguments of the test program, a filter mostly; none: those in `tests/kernel/vm/default` or
    /// `tests/kernel/vm/quick`.
    pub arguments: Vec<String>,
}

/// Runs the tests on each kernel, one after the other, and prints what came out.
///
/// # Errors
/// When something can't be fetched, built or started; a failed test is not an error.
pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "the guests are x86-64 machines that run what is built here: this works on x86-64 alone"
    );
    setup::ensure(&[Need::Build, Need::Kernel, Need::Vm])?;
    let kernels: Vec<_> = options
        .kernels
        .iter()
        .map(|kernel| {
            debian::fetch(kernel, options.refresh)
                .with_context(|| format!("cannot get the kernel {}", kernel.name))
        })
        .collect::<Result<_>>()?;
    build::kernel_half(Profile::Release)?;
    build::debug_programs(&initramfs::PROGRAMS)?;
    let test = test_program()?;
    let mut reports = Vec::new();
    for (kernel, files) in options.kernels.iter().zip(&kernels) {
        let arguments = arguments(kernel, options)?;
        let image = initramfs::make(kernel, files, &test, &arguments)?;
        println!("\n=== {}: {}", kernel.name, files.release);
        let report = guest::run(kernel, files, &image)?;
        println!("--- {}: {}", kernel.name, report.outcome());
        reports.push(report);
    }
    print!("\n{}", report::table(&reports));
    Ok(if reports.iter().all(Report::passed) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What the test program is started with in the guest.
fn arguments(kernel: &Kernel, options: &Options) -> Result<Vec<String>> {
    if !kernel.supported || !options.arguments.is_empty() {
        return Ok(options.arguments.clone());
    }
    let list = if options.quick { "quick" } else { "default" };
    let path = places::workspace().join("tests/kernel/vm").join(list);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines().map(str::trim);
    Ok(lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect())
}

/// Builds the integration tests and says where their program is.
fn test_program() -> Result<PathBuf> {
    let mut build = build::cargo("test");
    build.args(["--workspace", "--test", "kernel"]);
    build.args(["--no-run", "--message-format", "json"]);
    build.stderr(std::process::Stdio::inherit());
    let messages = command::output(&mut build).context("the tests do not compile")?;
    let program = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_test = message["target"]["name"] == "kernel" && message["profile"]["test"] == true;
        is_test.then(|| message["executable"].as_str().map(PathBuf::from))?
    };
    messages
        .lines()
        .find_map(program)
        .context("cargo does not say where the test program is")
}

#[cfg(test)]
mod tests {
    use super::{DEFAULT, Kernel, Package};

    #[test]
    fn kernels_are_named_by_version_or_suite() {
        let suite = |name: &str| Kernel::parse(name).map(|kernel| kernel.suite);
        assert_eq!(suite("6.1"), Ok("bookworm"));
        assert_eq!(suite("sid"), Ok("sid"));
        let other = Kernel::parse("7.0").expect("a version");
        assert_eq!(
            (other.suite, other.package),
            ("trixie-backports", Package::Version("7.0".to_owned()))
        );
        for wrong in ["", "6", "6.x", "6.1.2", "trixie", "6.1;reboot"] {
            assert!(suite(wrong).is_err(), "{wrong}");
        }
        assert!(DEFAULT.split(',').all(|name| suite(name).is_ok()));
    }
}
