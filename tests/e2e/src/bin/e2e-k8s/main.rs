//! The balancer's image and its Helm chart on a real Kubernetes: three nodes, stand-in OAPs behind a Service, several hundred clients in
//! pods and outside, and what may happen to all of them. Or, with `--real-oap`, two nodes, real OAPs and real Java agents.
//!
//! Each row of the table that it prints is a check. It goes on after a difference; the exit code is 1 then. The counts are held against
//! the socket tables of the pods. The cluster is made of namespaces and ends with this program, however that ends.
#![forbid(unsafe_code)]

mod agents;
mod chapters;
mod checks;
mod clients;
mod kernel;
mod lab;
mod layout;
mod oaps;
mod real_oap;
mod stamp;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Parser;
use testkit::fixtures::binary;
use testkit::kubernetes::Image;
use testkit::scenario::{Report, interrupt};

use lab::{Lab, Product};
use layout::{NODES, STANDINS};
use world::World;

/// The balancer on a real Kubernetes.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    product: Product,
    /// Real OAPs and Java agents, as pods of two nodes.
    #[arg(long)]
    real_oap: bool,
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
    // Fixtures panic where the machine lacks something. What was made is removed all the same while that unwinds.
    caught(|| {
        let lab = if arguments.real_oap {
            real_oap::start(arguments.product)?
        } else {
            Lab::start(arguments.product, NODES.len(), standins)?
        };
        let mut world = World::new(lab);
        let mut report = Report::begin_and_go_on();
        let played = caught(|| {
            if arguments.real_oap {
                real_oap::play(&mut world, &mut report)
            } else {
                chapters::play(&mut world, &mut report)
            }
        });
        if let Err(error) = &played {
            eprintln!("the story ended early: {error:#}");
            world.explain();
        }
        if arguments.keep {
            world.lab.print_how_to_reach_it();
            while interrupt::pause(Duration::from_millis(200)).is_ok() {}
        }
        played.and_then(|()| report.end())
    })
}

/// Writes the image of stand-in OAPs and clients.
#[expect(
    clippy::unnecessary_wraps,
    reason = "others that write an image may fail"
)]
fn standins(to: &Path) -> Result<()> {
    let built = |name: &str| binary().with_file_name(name);
    Image::new(STANDINS)
        .program("bin/standin-oap", &built("standin-oap"))
        .program("bin/standin-client", &built("standin-client"))
        .write(to);
    Ok(())
}

/// A panic as an error; what it says is printed already.
fn caught(work: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        interrupt::check()?;
        Err(anyhow!("it panicked, see above"))
    })
}
