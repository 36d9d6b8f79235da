//! The balancer's image and its Helm chart on a real Kubernetes: three nodes, stand-in OAPs behind
//! a Service, several hundred clients in pods and outside, and what may happen to all of them. Or,
//! with `--real-oap`, two nodes, real OAPs and real Java agents.
//!
//! Each row of the table that it prints is a check. It goes on after a difference; the exit code is
//! 1 then. The counts are held against the socket tables of the pods. The cluster is made of
//! namespaces and ends with this program, however that ends.
#![forbid(unsafe_code)]

mod checks;
mod clients;
mod cluster;
mod daemons;
mod fixture;
mod kernel;
mod layout;
mod oaps;
mod picture;
mod real_oap;
mod recording;
mod steps;
mod timestamp;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Parser;
use oci_archive::Root;
use testkit::fixtures::binary;
use testkit::kubernetes::images;
use testkit::scenario::{Report, interrupt};

use cluster::{Product, TestCluster};
use fixture::Fixture;
use layout::{NODES, STANDINS};
use steps::Chapter;

/// The balancer on a real Kubernetes.
#[derive(Parser)]
#[expect(clippy::struct_excessive_bools, reason = "options of a command line")]
struct Arguments {
    #[command(flatten)]
    product: Product,
    /// Real OAPs and Java agents, as pods of two nodes.
    #[arg(long)]
    real_oap: bool,
    /// Only the main steps.
    #[arg(long, conflicts_with = "real_oap")]
    short: bool,
    /// Of the chapters only these, between installing and uninstalling.
    #[arg(long, value_delimiter = ',', value_name = "CHAPTER,…", conflicts_with_all = ["real_oap", "short"])]
    only: Vec<Chapter>,
    /// Put the picture of how even connections are into the documentation.
    #[arg(long, conflicts_with_all = ["real_oap", "short"])]
    docs: bool,
    /// Leave the cluster up at the end, also after a failure, until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("e2e k8s failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    interrupt::watch()?;
    // Fixtures panic where the machine lacks something. What was made is removed all the same while
    // that unwinds.
    caught(|| {
        let cluster = if arguments.real_oap {
            real_oap::start(arguments.product)?
        } else {
            TestCluster::start(arguments.product, NODES.len(), standins)?
        };
        let mut fixture = Fixture::new(cluster);
        let mut report = Report::begin_and_go_on();
        let outcome = caught(|| {
            if arguments.real_oap {
                real_oap::run(&mut fixture, &mut report)
            } else {
                let steps = if arguments.short {
                    steps::main_ones()
                } else {
                    steps::all_or(&arguments.only)
                };
                steps::run(&mut fixture, &mut report, &steps)
            }
        });
        if let Err(error) = &outcome {
            eprintln!("the scenario ended early: {error:#}");
            fixture.explain();
        }
        if arguments.docs && outcome.is_ok() {
            picture::publish(&fixture.cluster.picture())?;
        }
        if arguments.keep {
            fixture.cluster.print_how_to_reach_it();
            while interrupt::pause(Duration::from_millis(200)).is_ok() {}
        }
        outcome.and_then(|()| report.end())
    })
}

/// Writes the image of stand-in OAPs and clients.
fn standins(to: &Path) -> Result<()> {
    let mut root = Root::default();
    for name in ["standin-oap", "standin-client"] {
        root.program(&format!("bin/{name}"), &binary().with_file_name(name))?;
    }
    images::write(STANDINS, root, &[], to)
}

/// A panic as an error; what it says is printed already.
fn caught(work: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        interrupt::check()?;
        Err(anyhow!("it panicked, see above"))
    })
}
