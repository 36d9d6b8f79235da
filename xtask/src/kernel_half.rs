//! The compiler of the kernel half. Stable Rust from rustup can't build for BPF: it has no `core`
//! for it. Two that can:
//!
//! - rustup's nightly with the `rust-src` component, which builds `core` from source (`-Z
//!   build-std=core`);
//! - Debian's `rustc-web` with `libstd-rust-web-dev-bpf`, a stable compiler with a precompiled
//!   `core`.
//!
//! The first is taken where it is usable, else the second.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{command, linker, places};

/// The oldest compiler whose output was tried: the workspace's `rust-version`.
const OLDEST_MINOR: u32 = 88;
/// What the kernel half is compiled for.
pub const TARGET: &str = "bpfel-unknown-none";

/// A compiler that can build the kernel half.
pub enum Compiler {
    /// Builds `core` itself; `cargo` and `rustc` are of one toolchain.
    BuildsCore { bin: PathBuf },
    /// Brings a `core` for BPF; works with any cargo.
    BringsCore { rustc: PathBuf },
}

impl Compiler {
    /// The compiler to use, or `None`: nothing here can build for BPF.
    pub fn find() -> Option<Self> {
        nightly().or_else(debian)
    }

    /// cargo with this verb, set up for the kernel half but without a package; `flags` go to the
    /// compiler.
    pub fn cargo(&self, verb: &str, linker: &Path, flags: &[&str]) -> Command {
        let mut build = match self {
            Self::BuildsCore { bin } => {
                let mut build = Command::new(bin.join("cargo"));
                build
                    .env("RUSTC", bin.join("rustc"))
                    .args([verb, "-Z", "build-std=core"]);
                build
            }
            Self::BringsCore { rustc } => {
                let mut build = Command::new(places::cargo());
                // aya-ebpf uses unstable features of the compiler, which a stable one permits only
                // so.
                build
                    .env("RUSTC", rustc)
                    .env("RUSTC_BOOTSTRAP", "1")
                    .arg(verb);
                build
            }
        };
        build.args(["--target", TARGET]);
        build.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker);
        build.env("CARGO_ENCODED_RUSTFLAGS", rustflags(flags).join("\u{1f}"));
        // A wrapper is set up for the host's compiler; one from a configuration file gives way to
        // an empty variable.
        build
            .env("RUSTC_WRAPPER", "")
            .env("RUSTC_WORKSPACE_WRAPPER", "");
        build
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("RUSTDOC")
            .env_remove("RUSTFLAGS");
        build
    }
}

/// A line for each tool that builds the kernel half here.
pub fn tools() -> impl Iterator<Item = String> {
    let compiler = Compiler::find().map(|compiler| match compiler {
        Compiler::BuildsCore { bin } => format!(
            "The kernel half is compiled by {}, which builds core itself,",
            bin.join("rustc").display()
        ),
        Compiler::BringsCore { rustc } => format!(
            "The kernel half is compiled by {}, which brings core,",
            rustc.display()
        ),
    });
    let linker = linker::find().map(|linker| format!("and linked by {}.", linker.display()));
    compiler.into_iter().chain(linker)
}

/// BTF and line information, atomics with a result (v3), and aya-ebpf's layout of this machine's
/// registers.
fn rustflags(more: &[&str]) -> Vec<String> {
    let architecture = format!("bpf_target_arch=\"{}\"", std::env::consts::ARCH);
    [
        "-C",
        "debuginfo=2",
        "-C",
        "link-arg=--btf",
        "-C",
        "target-cpu=v3",
        "--cfg",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain([architecture])
    .chain(more.iter().map(ToString::to_string))
    .collect()
}

fn nightly() -> Option<Compiler> {
    let toolchain = rustup_home()?
        .join("toolchains")
        .join(format!("nightly-{}", host()?));
    let bin = toolchain.join("bin");
    let usable = toolchain.join("lib/rustlib/src/rust/library/core").is_dir()
        && Version::of(&bin.join("rustc"))?.is_usable();
    usable.then_some(Compiler::BuildsCore { bin })
}

fn debian() -> Option<Compiler> {
    let rustc = PathBuf::from("/usr/bin/rustc");
    let libraries = command::output(Command::new(&rustc).args([
        "--print",
        "target-libdir",
        "--target",
        TARGET,
    ]))?;
    let has_core = std::fs::read_dir(libraries.trim())
        .ok()?
        .flatten()
        .any(|file| is_core(&file.file_name().to_string_lossy()));
    let usable = has_core && Version::of(&rustc)?.is_usable();
    usable.then_some(Compiler::BringsCore { rustc })
}

fn is_core(file: &str) -> bool {
    file.starts_with("libcore-")
        && Path::new(file)
            .extension()
            .is_some_and(|extension| extension == "rlib")
}

fn rustup_home() -> Option<PathBuf> {
    let chosen = std::env::var_os("RUSTUP_HOME").map(PathBuf::from);
    chosen.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".rustup")))
}

/// The host as rustup names it in its toolchains.
fn host() -> Option<String> {
    let library = if cfg!(target_env = "musl") {
        "musl"
    } else {
        "gnu"
    };
    cfg!(target_os = "linux").then(|| format!("{}-unknown-linux-{library}", std::env::consts::ARCH))
}

/// What `rustc -vV` says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    minor: u32,
    llvm: u32,
}

impl Version {
    fn of(rustc: &Path) -> Option<Self> {
        Self::parse(&command::output(
            Command::new(rustc)
                .arg("-vV")
                .env_remove("RUSTUP_TOOLCHAIN"),
        )?)
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        let minor = field("release: 1.")?.split('.').next()?.parse().ok()?;
        let llvm = field("LLVM version: ")?.split('.').next()?.parse().ok()?;
        Some(Self { minor, llvm })
    }

    /// New enough for the sources, and not so new that bpf-linker's LLVM can't read what it writes.
    fn is_usable(&self) -> bool {
        self.minor >= OLDEST_MINOR && self.llvm <= linker::LLVM
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn the_version_is_read_as_rustc_prints_it() {
        let text = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\nrelease: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(
            Version::parse(text),
            Some(Version {
                minor: 97,
                llvm: 22
            })
        );
        assert_eq!(Version::parse("rustc 1.63.0"), None);
    }

    #[test]
    fn a_compiler_with_a_newer_llvm_than_the_linker_is_not_usable() {
        assert!(
            Version {
                minor: 96,
                llvm: 22
            }
            .is_usable()
        );
        assert!(
            Version {
                minor: 90,
                llvm: 21
            }
            .is_usable()
        );
        assert!(
            !Version {
                minor: 99,
                llvm: 23
            }
            .is_usable()
        );
        assert!(
            !Version {
                minor: 63,
                llvm: 14
            }
            .is_usable()
        );
    }
}
