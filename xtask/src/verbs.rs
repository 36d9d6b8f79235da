//! The verbs that are more than one step.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::build::{self, PRODUCT, Profile};
use crate::setup::{self, Need};
use crate::{command, comments, fuzz, helm, image, kubernetes, machine, places, unsafe_code};

/// Formatting, the width of comments, the kernel half's warnings and unsafe code, and clippy on
/// everything that the host can compile.
pub fn lint() -> Result<ExitCode> {
    setup::ensure(&[Need::Build, Need::Lint, Need::Fuzz])?;
    command::run(build::cargo("fmt").args(["--all", "--check"]))?;
    command::run(fuzz::cargo("fmt").arg("--check"))?;
    comments::check()?;
    unsafe_code::check()?;
    build::check_kernel_half()?;
    build::kernel_half(Profile::Debug)?;
    command::run(build::cargo("clippy").args([
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    // In the workspace's target directory, where the kernel half and some of the dependencies are
    // already.
    let mut clippy = fuzz::cargo("clippy");
    // Their lock file is a second one, which a new dependency of the product leaves behind.
    clippy.arg("--locked");
    clippy.arg("--target-dir").arg(places::target()?);
    command::run(clippy.args(["--", "-D", "warnings"]))?;
    Ok(ExitCode::SUCCESS)
}

/// Set, it makes the tests run at their full length.
const LONG: &str = "BALANCER_TEST_LONG";

/// Tells the failures of servers which page their table goes into.
const DOCS: &str = "BALANCER_TEST_DOCS";

/// Tells the tests where the Kubernetes is that they run.
const KUBEALL: &str = "BALANCER_KUBEALL";

/// The package of the tests on the running kernel and on Kubernetes.
const TESTS: &str = "balancer-tests";

/// What these tests start, beside Kubernetes.
const TEST_PROGRAMS: [&str; 8] = [
    PRODUCT,
    "crowd",
    "failing-server",
    "kill-before",
    "kernel-half-cost",
    "hold-connections",
    "standin-oap",
    "stranger",
];

/// All tests; `long`: those that are shortened otherwise at their full length.
pub fn test(long: bool, arguments: &[String]) -> Result<ExitCode> {
    let mut test = tests(arguments)?;
    if long {
        test.env(LONG, "1");
    }
    command::run_for_code(&mut test)
}

/// The failures of servers, against each way to balance; `docs`: the table goes into its page.
pub fn failures(docs: bool) -> Result<ExitCode> {
    let matrix = "-p balancer-tests failures::the_whole_matrix -- --exact --ignored --nocapture";
    let arguments: Vec<_> = matrix.split(' ').map(str::to_owned).collect();
    let mut test = tests(&arguments)?;
    if docs {
        test.env(DOCS, places::workspace().join("docs/operations.md"));
    }
    command::run_for_code(&mut test)
}

/// What runs these tests, all of whose needs are there.
fn tests(arguments: &[String]) -> Result<Command> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel])?;
    let arguments = kernel_tests_by_target(arguments);
    let some_packages = to_cargo(&arguments).any(names_a_package);
    let mut test = build::cargo("test");
    if !some_packages {
        test.arg("--workspace");
    }
    if !some_packages || to_cargo(&arguments).any(|argument| argument.contains(TESTS)) {
        // Tests bound what either kernel half costs the kernel.
        build::kernel_half(Profile::Release)?;
        build::debug_programs(&TEST_PROGRAMS)?;
        setup::ensure(&[Need::Kubernetes, Need::Cluster])?;
        test.env(KUBEALL, kubernetes::program()?);
    } else {
        build::kernel_half(Profile::Debug)?;
    }
    test.args(arguments);
    Ok(test)
}

/// The arguments that are for cargo: those after `--` are for the tests themselves.
fn to_cargo(arguments: &[String]) -> impl Iterator<Item = &str> {
    let arguments = arguments.iter().map(String::as_str);
    arguments.take_while(|argument| *argument != "--")
}

/// With `--workspace` cargo would pass over the package that somebody names.
fn names_a_package(argument: &str) -> bool {
    argument.starts_with("-p") || argument.starts_with("--package")
}

/// `--test kernel` in place of `-p balancer-tests`: with the whole workspace selected, dependencies
/// have the features that the programs were built with, and are not compiled again. Beside another
/// package it stays as it is: cargo would look for the test program in that one.
fn kernel_tests_by_target(arguments: &[String]) -> Vec<String> {
    let mut arguments = arguments.to_vec();
    let is_package = |pair: &[String]| matches!(&*pair[0], "-p" | "--package") && pair[1] == TESTS;
    let packages = to_cargo(&arguments).filter(|argument| names_a_package(argument));
    if packages.count() == 1
        && let Some(at) = arguments.windows(2).position(is_package)
    {
        arguments.splice(at..at + 2, ["--test", "kernel"].map(str::to_owned));
    }
    arguments
}

/// `balancer` itself.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    setup::ensure(&[Need::Build])?;
    build::product(Profile::Debug)?;
    become_program(Profile::Debug, PRODUCT, arguments)
}

/// What the kernel half costs.
pub fn cost(profile: Profile) -> Result<ExitCode> {
    setup::ensure(&[Need::Build])?;
    build::kernel_half(profile)?;
    build::debug_programs(&["kernel-half-cost"])?;
    let object = build::object(profile)?.display().to_string();
    become_program(Profile::Debug, "kernel-half-cost", &[object])
}

/// The demonstration.
pub fn demo() -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel])?;
    build::debug_programs(&[PRODUCT, "standin-oap", "standin-client", "demo"])?;
    become_program(Profile::Debug, "demo", &[])
}

/// The balancer in front of real OAPs; `agent_defaults`: with the agents' own defaults, measured.
pub fn end_to_end_oap(agent_defaults: bool) -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel, Need::RealOap])?;
    build::debug_programs(&[PRODUCT, "e2e-oap"])?;
    let arguments: &[_] = if agent_defaults {
        &["--agent-defaults".to_owned()]
    } else {
        &[]
    };
    become_program(Profile::Debug, "e2e-oap", arguments)
}

/// The measurements, of an optimised build.
pub fn bench(arguments: &[String]) -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel, Need::Bench, Need::Kubernetes])?;
    build::measurements()?;
    let mut bench = program(Profile::Release, "bench")?;
    bench.env(KUBEALL, kubernetes::program()?).args(arguments);
    become_it(&mut bench)
}

/// What is played on a real Kubernetes, and how.
#[derive(Args)]
#[expect(clippy::struct_excessive_bools, reason = "options of a command line")]
pub struct KubernetesScenario {
    /// Instead: two nodes, two clustered Apache SkyWalking OAPs and Java agents as pods. Fetches
    /// them first.
    #[arg(long, conflicts_with = "short")]
    real_oap: bool,
    /// Only the main steps, in about two minutes once it is built: install, refuse, upgrade, place,
    /// a node is killed, uninstall. The image has the build that tests have, which is not
    /// optimised.
    #[arg(long)]
    short: bool,
    /// Install the chart with `privileged: false`.
    #[arg(long)]
    unprivileged: bool,
    /// Only these chapters, between installing and uninstalling: change, daemons, pods, api, node,
    /// place, one-without, place-off, ipv6. `pods` and `node` come after `daemons`, and `api` after
    /// `pods`.
    #[arg(long, value_delimiter = ',', value_name = "CHAPTER,…", conflicts_with_all = ["real_oap", "short"])]
    only: Vec<String>,
    /// Put the picture of how even connections are, with clients placed and not, into docs.
    #[arg(long, conflicts_with_all = ["real_oap", "short"])]
    docs: bool,
    /// Leave the cluster up at the end, also after a failure, until Ctrl-C, and say how to reach
    /// it.
    #[arg(long)]
    keep: bool,
}

impl KubernetesScenario {
    /// What is asked for, as the program that plays it takes it.
    fn options(&self) -> impl Iterator<Item = &'static str> {
        let options = [
            (self.real_oap, "--real-oap"),
            (self.short, "--short"),
            (self.unprivileged, "--unprivileged"),
            (self.docs, "--docs"),
            (self.keep, "--keep"),
        ];
        let asked = options.into_iter().filter(|(is_asked, _)| *is_asked);
        asked.map(|(_, option)| option)
    }
}

/// The balancer's image and chart on a real Kubernetes.
pub fn end_to_end_kubernetes(scenario: &KubernetesScenario) -> Result<ExitCode> {
    machine::check()?;
    setup::ensure(&[Need::Build, Need::Kernel, Need::Kubernetes, Need::Cluster])?;
    if scenario.real_oap {
        setup::ensure(&[Need::RealOap])?;
    }
    let kubernetes = kubernetes::program()?;
    let helm = helm::program()?;
    // The main steps are the same with what is built for the tests anyway.
    let profile = Profile::of(!scenario.short);
    let image = image::make(None, None, profile)?;
    build::debug_programs(&[PRODUCT, "standin-oap", "standin-client", "e2e-k8s"])?;
    let program = places::target()?.join("debug/e2e-k8s");
    let mut play = Command::new(&program);
    play.env(KUBEALL, kubernetes)
        .arg("--helm")
        .arg(helm)
        .arg("--image")
        .arg(image.archive)
        .args(["--name", &image.name])
        .arg("--balancer")
        .arg(image.program)
        .args(scenario.options());
    for chapter in &scenario.only {
        play.args(["--only", chapter]);
    }
    let error = play.exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}

/// Becomes a program that was just built: the signals of the terminal and the exit code are its
/// own.
fn become_program(profile: Profile, name: &str, arguments: &[String]) -> Result<ExitCode> {
    become_it(program(profile, name)?.args(arguments))
}

fn program(profile: Profile, name: &str) -> Result<Command> {
    let path = places::target()?.join(profile.name()).join(name);
    Ok(Command::new(path))
}

fn become_it(program: &mut Command) -> Result<ExitCode> {
    let error = program.exec();
    let name = program.get_program().display();
    Err(error).with_context(|| format!("cannot start {name}"))
}

#[cfg(test)]
mod tests {
    use super::kernel_tests_by_target;

    #[test]
    fn the_package_of_the_kernel_tests_is_selected_by_its_test_program() {
        let translate = |line: &str| {
            let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
            kernel_tests_by_target(&words).join(" ")
        };
        for (given, expected) in [
            ("-p balancer-tests admission::", "--test kernel admission::"),
            (
                "--package balancer-tests -- --nocapture",
                "--test kernel -- --nocapture",
            ),
            ("-p balancer config", "-p balancer config"),
            (
                "-p balancer -p balancer-tests",
                "-p balancer -p balancer-tests",
            ),
            ("admission::", "admission::"),
        ] {
            assert_eq!(translate(given), expected);
        }
    }
}
