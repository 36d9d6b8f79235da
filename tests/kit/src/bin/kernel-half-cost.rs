#![forbid(unsafe_code)]
//! Says what a kernel half costs on the running kernel: `kernel-half-cost
//! target/bpf/debug/balancer.o`. Loads its programs for that, and attaches nothing. Ends with 1
//! where that is not possible here, which it says on standard output as well.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use testkit::cost::{Cost, ProgramCost, Stack, measure};

fn main() -> ExitCode {
    let Some(object) = std::env::args_os().nth(1) else {
        eprintln!("usage: kernel-half-cost OBJECT");
        return ExitCode::from(2);
    };
    match cost(Path::new(&object)) {
        Ok(cost) => {
            print(&cost);
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("The kernel half was not measured: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn cost(object: &Path) -> Result<Cost> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "its programs are loaded for that, which takes root (or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN)"
    );
    let object =
        std::fs::read(object).with_context(|| format!("cannot read {}", object.display()))?;
    measure(&object)
}

fn print(cost: &Cost) {
    println!("The kernel half, as this kernel takes it:");
    for program in &cost.programs {
        println!("  {}", line(program));
    }
    println!(
        "  {} maps, {} KiB",
        cost.maps.len(),
        cost.map_bytes().div_ceil(1024)
    );
}

fn line(program: &ProgramCost) -> String {
    let (bytes, chain) = program.stack.deepest();
    let frames: Vec<_> = chain
        .iter()
        .map(|function| program.stack.frames[*function].to_string())
        .collect();
    format!(
        "{}: {} instructions, {} verified; stack {bytes} of {} bytes (frames of {}, each rounded up to {})",
        program.name,
        program.size,
        program.verified,
        Stack::LIMIT,
        frames.join(" + "),
        Stack::ROUNDING
    )
}
