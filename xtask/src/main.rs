#![forbid(unsafe_code)]
//! `cargo xtask`: the verbs of development. Each one first makes sure that what it needs is
//! installed.

mod build;
mod command;
mod comments;
mod envoy;
mod fuzz;
mod helm;
mod image;
mod kernel_half;
mod kubernetes;
mod linker;
mod machine;
mod places;
mod setup;
mod unsafe_code;
mod verbs;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::build::Profile;
use crate::setup::Need;

/// Set up, build, test and demonstrate the balancer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Find what is missing to build, test and demonstrate, and install it (apt-get and cargo;
    /// needs root).
    ///
    /// Changes nothing when nothing is missing. Without apt-get, or without root, it prints the
    /// commands and fails.
    Setup,
    /// Build the kernel half, then the balancer, which embeds it.
    Build {
        /// An optimised build, without log lines from the kernel programs.
        #[arg(long)]
        release: bool,
    },
    /// Say what the kernel half costs the kernel: size, the verifier's work, stack and maps. Needs
    /// root.
    ///
    /// Its programs are loaded for that, and attached to nothing.
    Cost {
        /// Of the kernel half without log lines, which an optimised build has.
        #[arg(long)]
        release: bool,
    },
    /// Check the formatting, and run clippy on everything with warnings as errors.
    Lint,
    /// Build, then run all tests: those on the running kernel too, so it needs root.
    ///
    /// Those that take minutes are shortened to seconds, unless `--long` comes first.
    Test {
        /// Run the shortened tests at their full length, as `BALANCER_TEST_LONG=1` does.
        #[arg(long)]
        long: bool,
        /// Passed on to `cargo test` (a filter, `-p balancer`, `-- --nocapture` …).
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Make servers fail in each way, under each way to balance, and print where their clients are
    /// then. Takes three minutes; needs root.
    Failures {
        /// Put the table into docs/operations.md.
        #[arg(long)]
        docs: bool,
    },
    /// Feed the readers of untrusted bytes with inputs that coverage guides, a bounded time for
    /// each.
    ///
    /// The growing corpus and inputs that make a reader fail are kept in `target/fuzz`.
    Fuzz {
        /// How long each target runs.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
        seconds: u32,
        /// Run one target once, on this file: an input that was kept because of a failure.
        #[arg(long, value_name = "FILE", conflicts_with = "seconds")]
        input: Option<PathBuf>,
        /// Targets by name (the files of `tests/fuzz/targets`); all when none is given.
        #[arg(value_name = "TARGET")]
        targets: Vec<String>,
    },
    /// Build, then run `balancer` with these arguments: `cargo xtask run -- status`.
    Run {
        /// Passed on to `balancer`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build an optimised balancer, and write it as an OCI image archive. Needs no container
    /// engine.
    ///
    /// `ctr -n k8s.io images import FILE` takes it to a node, `docker load`, `podman load` and
    /// `skopeo copy oci-archive:FILE` into an engine or a registry.
    Image {
        /// The archive [default: target/image/balancer-VERSION.tar].
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// What the image is called once it is loaded [default: localhost/balancer:VERSION].
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
    },
    /// Render the Helm chart into the plain manifests in `deploy/manifests`, with the real helm
    /// (needs Go the first time).
    Manifests {
        /// Change nothing: check the chart and its schema, and fail with a difference where the
        /// manifests are not current.
        #[arg(long)]
        check: bool,
    },
    /// Watch it balance: stand-in servers, several hundred gRPC clients and the daemon, in a
    /// network namespace of their own.
    Demo,
    /// Measure this build side by side with the bare kernel, nft, `HAProxy` and Envoy;
    /// docs/performance.md says what and how.
    ///
    /// Prints tables, and writes `target/bench/latest.json` and plots beside it. `bench --help`
    /// after `--` lists the measurements.
    Bench {
        /// Passed on to `bench`: `--quick` takes under two minutes, `--only rate,syn` measures only
        /// these, `--docs` puts the tables into docs/performance.md.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run the tests on other kernels: Debian's, in QEMU, which emulates a machine. Prints a table
    /// of what passed where.
    ///
    /// Kernels: 5.10 (bullseye; too old, so the balancer must say so), 6.1 (bookworm), 6.12
    /// (trixie), backports, sid, or a version that trixie-backports has, as in 7.0. They are
    /// fetched from Debian's archive once, and kept in target/vm.
    Vm {
        /// On which ones, in this order.
        #[arg(long, value_name = "NAME,…", value_delimiter = ',', default_value = vm::DEFAULT, value_parser = vm::Kernel::parse)]
        kernel: Vec<vm::Kernel>,
        /// Fetch these kernels anew.
        #[arg(long)]
        refresh: bool,
        /// Run one test of each thing, which takes two or three minutes a kernel: those in
        /// tests/kernel/vm/quick.
        #[arg(long, conflicts_with = "arguments")]
        quick: bool,
        /// Arguments of the test program: a filter, `--skip NAME`, `--exact` …; if none is given,
        /// those in tests/kernel/vm/default.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Run the balancer in front of the real thing.
    #[command(subcommand)]
    E2e(EndToEnd),
}

#[derive(Subcommand)]
enum EndToEnd {
    /// Three clustered Apache SkyWalking OAPs with Java and Python agents and an Envoy. Fetches
    /// them first.
    Oap {
        /// Instead: measure how long agents with their own defaults take to come back after a
        /// refusal, and after their OAP's end. Takes about a quarter of an hour.
        #[arg(long)]
        agent_defaults: bool,
    },
    /// The image and the Helm chart on a real Kubernetes of three nodes: stand-in OAPs, several
    /// hundred clients, and all that may happen.
    ///
    /// The cluster is made of namespaces on this machine, and is gone afterwards. The first time,
    /// Kubernetes and helm are built.
    K8s(verbs::KubernetesScenario),
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            // Not `{error:?}`: that adds a backtrace where RUST_BACKTRACE is set.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Setup => {
            setup::ensure(&Need::ALL)?;
            println!("Nothing is missing.");
            for line in kernel_half::tools() {
                println!("{line}");
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Build { release } => {
            setup::ensure(&[Need::Build])?;
            build::product(Profile::of(release))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Cost { release } => verbs::cost(Profile::of(release)),
        Verb::Lint => verbs::lint(),
        Verb::Test { long, arguments } => verbs::test(long, &with_leading_dashes(arguments)),
        Verb::Failures { docs } => verbs::failures(docs),
        Verb::Fuzz {
            seconds,
            input,
            targets,
        } => {
            setup::ensure(&[Need::Fuzz])?;
            match input {
                Some(input) => fuzz::reproduce(&targets, &input),
                None => fuzz::run(&targets, seconds),
            }
        }
        Verb::Run { arguments } => verbs::run(&arguments),
        Verb::Image { output, name } => image::image(output, name.as_deref()),
        Verb::Manifests { check } => helm::manifests(check),
        Verb::Demo => verbs::demo(),
        Verb::Bench { arguments } => verbs::bench(&arguments),
        Verb::Vm {
            kernel,
            refresh,
            quick,
            arguments,
        } => vm::run(&vm::Options {
            kernels: kernel,
            refresh,
            quick,
            arguments,
        }),
        Verb::E2e(EndToEnd::Oap { agent_defaults }) => verbs::end_to_end_oap(agent_defaults),
        Verb::E2e(EndToEnd::K8s(scenario)) => verbs::end_to_end_kubernetes(&scenario),
    }
}

/// clap takes a `--` away that comes first, but to `cargo test` it is the beginning of what goes to
/// the tests themselves.
fn with_leading_dashes(mut arguments: Vec<String>) -> Vec<String> {
    if std::env::args()
        .skip(2)
        .find(|argument| argument != "--long")
        .is_some_and(|argument| argument == "--")
    {
        arguments.insert(0, "--".to_owned());
    }
    arguments
}
