#![forbid(unsafe_code)]
//! Measures this build side by side with the bare kernel, nft, `HAProxy` and Envoy, on this
//! machine's kernel.
//!
//! Every subject has a netns and a cgroup of its own, with the same servers and clients. Subjects
//! are measured in turns, so that what disturbs the machine disturbs all of them, and compared with
//! what stood beside them in the same round. docs/performance.md says what each figure is and what
//! limits it.

mod agents;
mod children;
mod control;
mod drive;
mod evenness;
mod grpc;
mod hold;
mod peers;
mod placing;
mod programs;
mod rate;
mod report;
mod scale;
mod serve;
mod settings;
mod slab;
mod statistics;
mod storm;
mod syn_cost;
mod traffic;
mod usage;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, Subcommand};
use testkit::scenario::{interrupt, process};

use crate::report::Report;
use crate::settings::{Measurement, Settings};

#[derive(Parser)]
#[command(about = "Measure this build side by side with the kernel, nft, HAProxy and Envoy")]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Arguments {
    /// Fewer and shorter rounds: under two minutes in all, to see that it works. The figures are
    /// coarse.
    #[arg(long)]
    quick: bool,
    /// Only these measurements.
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    only: Vec<Measurement>,
    /// Also put the tables into docs/performance.md.
    #[arg(long)]
    docs: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What the program is when it has started itself.
#[derive(Subcommand)]
enum Role {
    #[command(hide = true)]
    Serve(serve::Arguments),
    #[command(hide = true)]
    Hold(hold::Arguments),
    #[command(hide = true)]
    ServeGrpc(grpc::Arguments),
    #[command(hide = true)]
    Fleet(agents::fleet::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.role {
        Some(Role::Serve(role)) => serve::run(&role),
        Some(Role::Hold(role)) => hold::run(&role),
        Some(Role::ServeGrpc(role)) => grpc::run(&role),
        Some(Role::Fleet(role)) => agents::fleet::run(&role),
        None => measure(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    interrupt::watch()?;
    let settings = Settings::new(arguments.quick)?;
    let began = Instant::now();
    let mut report = Report::new(&settings)?;
    for measurement in Measurement::ALL {
        if !arguments.only.is_empty() && !arguments.only.contains(&measurement) {
            continue;
        }
        eprintln!(
            "{:>5.0} s  {}",
            began.elapsed().as_secs_f64(),
            measurement.title()
        );
        match measurement {
            Measurement::Rate => report.add(rate::measure(&settings)?)?,
            Measurement::Syn => report.add(syn_cost::measure(&settings)?)?,
            Measurement::Traffic => report.add(traffic::measure(&settings)?)?,
            Measurement::Scale => report.add(scale::measure(&settings)?)?,
            Measurement::Control => report.add(control::measure(&settings)?)?,
            Measurement::Storm => report.add(storm::measure(&settings)?)?,
            Measurement::Placing => report.add(placing::measure(&settings)?)?,
            Measurement::Evenness => report.add(evenness::measure(&settings)?)?,
            Measurement::Agents => report.add(agents::measure(&settings)?)?,
        }
    }
    report.finish(began.elapsed())?;
    if arguments.docs {
        report.write_docs()?;
    }
    Ok(())
}
