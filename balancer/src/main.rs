//! The `balancer` program: see [`balancer::cli`].

fn main() -> std::process::ExitCode {
    balancer::cli::main()
}
