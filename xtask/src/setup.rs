//! What has to be installed: one table, what is missing of it, and how it gets there.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::kernel_half::Compiler;
use crate::{command, envoy, fuzz, kubernetes, linker};

/// What somebody is about to do. Each requirement names what it is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Build both halves.
    Build,
    /// Formatting and clippy.
    Lint,
    /// The tests and the demo on the running kernel.
    Kernel,
    /// A real Kubernetes API server, for the tests.
    Kubernetes,
    /// Real Kubernetes nodes, for the tests.
    Cluster,
    /// Real OAPs, agents and Envoy.
    RealOap,
    /// The fuzz targets.
    Fuzz,
    /// What the measurements compare with.
    Bench,
    /// Guests with other kernels.
    Vm,
}

impl Need {
    /// Everything.
    pub const ALL: [Self; 9] = [
        Self::Build,
        Self::Lint,
        Self::Kernel,
        Self::Kubernetes,
        Self::Cluster,
        Self::RealOap,
        Self::Fuzz,
        Self::Bench,
        Self::Vm,
    ];
}

/// One thing that has to be there.
struct Requirement {
    name: &'static str,
    reason: &'static str,
    needs: &'static [Need],
    is_there: fn() -> bool,
    remedy: fn() -> Remedy,
}

/// How a requirement gets there.
enum Remedy {
    /// Debian packages.
    Packages(&'static [&'static str]),
    /// A command, and how somebody would type it.
    Command(Result<Box<Command>>, String),
}

/// Ordered: what comes first may be needed to install what follows.
const REQUIREMENTS: &[Requirement] = &[
    Requirement {
        name: "a compiler for BPF",
        reason: "compiles the kernel half; instead: rustup toolchain install nightly --component rust-src",
        needs: &[Need::Build],
        is_there: || Compiler::find().is_some(),
        remedy: || Remedy::Packages(&["rustc-web", "libstd-rust-web-dev-bpf"]),
    },
    Requirement {
        name: "LLVM 22",
        reason: "bpf-linker is built on it",
        needs: &[Need::Build],
        is_there: || linker::find().is_some() || llvm_is_there(),
        remedy: || Remedy::Packages(&["llvm-22-dev", "libpolly-22-dev"]),
    },
    Requirement {
        name: "bpf-linker 0.13.0 on LLVM 22",
        reason: "links the kernel half",
        needs: &[Need::Build],
        is_there: || linker::find().is_some(),
        remedy: || Remedy::Command(linker::install().map(Box::new), linker::install_by_hand()),
    },
    Requirement {
        name: "rustfmt",
        reason: "checks the formatting",
        needs: &[Need::Lint],
        is_there: || command::find("cargo-fmt").is_some(),
        remedy: || component("rustfmt", &["rustfmt-web"]),
    },
    Requirement {
        name: "clippy",
        reason: "checks the code",
        needs: &[Need::Lint],
        is_there: || command::find("cargo-clippy").is_some(),
        remedy: || component("clippy", &["rust-web-clippy"]),
    },
    Requirement {
        name: "ip and ss",
        reason: "make network namespaces; show the socket table that results are compared with",
        needs: &[Need::Kernel],
        is_there: || are_there(&["ip", "ss"]),
        remedy: || Remedy::Packages(&["iproute2"]),
    },
    Requirement {
        name: "a BPF file system on /sys/fs/bpf",
        reason: "holds pins; what is mounted lasts until the next boot",
        needs: &[Need::Kernel],
        is_there: bpffs_is_mounted,
        remedy: || {
            let mut mount = Command::new("mount");
            mount.args(["-t", "bpf", "bpf", BPFFS]);
            let by_hand = command::line(&mount);
            Remedy::Command(Ok(Box::new(mount)), by_hand)
        },
    },
    Requirement {
        name: "nft",
        reason: "makes the Kubernetes Service that the demo compares with, and limits of connections",
        needs: &[Need::Kernel, Need::Bench],
        is_there: || command::find("nft").is_some(),
        remedy: || Remedy::Packages(&["nftables"]),
    },
    Requirement {
        name: "Go, 1.24 or newer",
        reason: "builds the Kubernetes that the tests run, once",
        needs: &[Need::Kubernetes],
        is_there: || kubernetes::needs_no_go() || kubernetes::go().is_some(),
        remedy: || Remedy::Command(kubernetes::go_install(), kubernetes::go_by_hand()),
    },
    Requirement {
        name: "containerd and runc",
        reason: "run the containers of the tests' Kubernetes nodes",
        needs: &[Need::Cluster],
        is_there: || are_there(&["containerd", "containerd-shim-runc-v2", "ctr", "runc"]),
        remedy: || Remedy::Packages(&["containerd", "runc"]),
    },
    Requirement {
        name: "the CNI plugins bridge, host-local and loopback",
        reason: "give pods of the tests' Kubernetes their addresses",
        needs: &[Need::Cluster],
        is_there: || {
            ["bridge", "host-local", "loopback"]
                .iter()
                .all(|plugin| command::is_executable(&Path::new("/usr/lib/cni").join(plugin)))
        },
        remedy: || Remedy::Packages(&["containernetworking-plugins"]),
    },
    Requirement {
        name: "a busybox that needs no libraries",
        reason: "is what is in the tests' container images",
        needs: &[Need::Cluster],
        is_there: || is_static("busybox"),
        remedy: || Remedy::Packages(&["busybox-static"]),
    },
    Requirement {
        name: "nsenter, unshare and mount",
        reason: "make nodes of namespaces",
        needs: &[Need::Cluster],
        is_there: || are_there(&["nsenter", "unshare", "mount"]),
        remedy: || Remedy::Packages(&["util-linux", "mount"]),
    },
    Requirement {
        name: "a JDK, 17 or newer",
        reason: "runs the OAPs and the Java agents",
        needs: &[Need::RealOap],
        is_there: || {
            command::find("javac").is_some_and(|compiler| {
                java_version(&compiler).is_some_and(|version| version >= 17)
            })
        },
        remedy: || Remedy::Packages(&["default-jdk-headless"]),
    },
    Requirement {
        name: "Maven",
        reason: "fetches the OAP and the Java agent from Maven Central",
        needs: &[Need::RealOap],
        is_there: || command::find("mvn").is_some(),
        remedy: || Remedy::Packages(&["maven"]),
    },
    Requirement {
        name: "python3 with venv",
        reason: "runs the Python agents; its packages bring Envoy",
        needs: &[Need::RealOap, Need::Bench],
        is_there: python_is_there,
        remedy: || Remedy::Packages(&["python3", "python3-venv"]),
    },
    Requirement {
        name: "HAProxy",
        reason: "is measured beside the balancer",
        needs: &[Need::Bench],
        is_there: || command::find("haproxy").is_some(),
        remedy: || Remedy::Packages(&["haproxy"]),
    },
    Requirement {
        name: "Envoy",
        reason: "is measured beside the balancer",
        needs: &[Need::Bench],
        is_there: envoy::is_there,
        remedy: || Remedy::Command(envoy::install().map(Box::new), envoy::install_by_hand()),
    },
    Requirement {
        name: "a C++ compiler",
        reason: "compiles libFuzzer",
        needs: &[Need::Fuzz],
        is_there: || command::find("c++").is_some(),
        remedy: || Remedy::Packages(&["g++"]),
    },
    Requirement {
        name: "cargo-fuzz 0.13.2",
        reason: "builds the fuzz targets",
        needs: &[Need::Fuzz],
        is_there: || fuzz::tool().is_some(),
        remedy: || Remedy::Command(fuzz::install().map(Box::new), fuzz::install_by_hand()),
    },
    Requirement {
        name: "QEMU for x86-64",
        reason: "runs other kernels, emulated",
        needs: &[Need::Vm],
        is_there: || are_there(&["qemu-system-x86_64"]),
        remedy: || Remedy::Packages(&["qemu-system-x86"]),
    },
    Requirement {
        name: "what packs the files of a guest",
        reason: "a guest boots from one file; kernel modules are compressed",
        needs: &[Need::Vm],
        is_there: || {
            let tools = ["cpio", "ldd", "strip", "xz", "zstd"];
            are_there(&tools) && is_static("busybox")
        },
        remedy: || {
            Remedy::Packages(&[
                "binutils",
                "busybox-static",
                "cpio",
                "libc-bin",
                "xz-utils",
                "zstd",
            ])
        },
    },
    Requirement {
        name: "apt with the keys of Debian's archive",
        reason: "fetches Debian's kernels",
        needs: &[Need::Vm],
        is_there: || {
            are_there(&["apt-get", "apt-cache", "dpkg-deb"])
                && Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").is_file()
        },
        remedy: || Remedy::Packages(&["apt", "debian-archive-keyring"]),
    },
];

/// Where tests and the demo pin what they load.
const BPFFS: &str = "/sys/fs/bpf";

fn bpffs_is_mounted() -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|mount| {
        let on_it = mount.split(' ').nth(4) == Some(BPFFS);
        on_it && mount.contains(" - bpf ")
    })
}

/// Installs what these needs lack.
///
/// # Errors
/// When something is missing and can't be installed here: the error holds the commands to type.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    for requirement in &missing {
        eprintln!("missing: {} ({})", requirement.name, requirement.reason);
    }
    install_packages(&missing)?;
    run_commands(&missing)?;
    let missing = self::missing(needs);
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(|requirement| requirement.name).collect();
        bail!(
            "still missing after installing it: {}\nBy hand:\n{}",
            names.join(", "),
            by_hand(&missing)
        );
    }
    Ok(())
}

fn missing(needs: &[Need]) -> Vec<&'static Requirement> {
    REQUIREMENTS
        .iter()
        .filter(|requirement| {
            requirement.needs.iter().any(|need| needs.contains(need)) && !(requirement.is_there)()
        })
        .collect()
}

fn install_packages(missing: &[&Requirement]) -> Result<()> {
    let packages = packages(missing);
    if packages.is_empty() {
        return Ok(());
    }
    let Some(apt) = command::find("apt-get") else {
        bail!(
            "this machine has no apt-get to install them with. On Debian 12 one would type:\n{}",
            by_hand(missing)
        );
    };
    if !is_root() {
        bail!("installing them needs root. Type:\n{}", by_hand(missing));
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new(&apt);
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(std::process::Stdio::null())
            .args(arguments);
        command::run(&mut command)
    };
    apt(&["update"])?;
    // Without --no-remove apt would take out somebody's rustc, which rustc-web replaces.
    let install = ["install", "--yes", "--no-remove", "--no-install-recommends"];
    apt(&[&install[..], &packages[..]].concat())
        .with_context(|| format!("cannot install. By hand:\n{}", by_hand(missing)))
}

fn run_commands(missing: &[&Requirement]) -> Result<()> {
    for requirement in missing {
        if let Remedy::Command(command, by_hand) = (requirement.remedy)() {
            let done = command.and_then(|mut command| command::run(&mut command));
            done.with_context(|| {
                format!(
                    "cannot install {}. By hand:\n    {by_hand}",
                    requirement.name
                )
            })?;
        }
    }
    Ok(())
}

fn packages(missing: &[&Requirement]) -> Vec<&'static str> {
    let remedies = missing.iter().map(|requirement| (requirement.remedy)());
    remedies
        .filter_map(|remedy| {
            if let Remedy::Packages(names) = remedy {
                Some(names)
            } else {
                None
            }
        })
        .flatten()
        .copied()
        .collect()
}

fn by_hand(missing: &[&Requirement]) -> String {
    let packages = packages(missing);
    let apt = (!packages.is_empty()).then(|| {
        format!(
            "apt-get update && apt-get install --no-install-recommends {}",
            packages.join(" ")
        )
    });
    let commands = missing
        .iter()
        .filter_map(|requirement| match (requirement.remedy)() {
            Remedy::Command(_, by_hand) => Some(by_hand),
            Remedy::Packages(_) => None,
        });
    let lines: Vec<_> = apt
        .into_iter()
        .chain(commands)
        .map(|command| format!("    {command}"))
        .collect();
    lines.join("\n")
}

/// A part of the Rust toolchain: from rustup where cargo comes from it, else from Debian.
fn component(name: &str, packages: &'static [&'static str]) -> Remedy {
    let Some(rustup) = command::find("rustup") else {
        return Remedy::Packages(packages);
    };
    let mut add = Command::new(rustup);
    add.args(["component", "add", name]);
    Remedy::Command(Ok(Box::new(add)), format!("rustup component add {name}"))
}

fn are_there(programs: &[&str]) -> bool {
    programs
        .iter()
        .all(|program| command::find(program).is_some())
}

/// A guest begins without libraries.
fn is_static(program: &str) -> bool {
    command::find(program).is_some_and(|path| {
        command::output(Command::new("ldd").arg(path))
            .is_none_or(|libraries| libraries.contains("statically linked"))
    })
}

fn llvm_is_there() -> bool {
    let prefix = linker::llvm_prefix();
    command::is_executable(&prefix.join("bin/llvm-config"))
        && prefix.join("lib/libPolly.a").is_file()
}

/// From the file `release` of every JDK: starting a Java machine to ask takes half a second.
fn java_version(compiler: &Path) -> Option<u32> {
    let compiler = compiler.canonicalize().ok()?;
    let release = std::fs::read_to_string(compiler.parent()?.parent()?.join("release")).ok()?;
    parse_java_version(&release)
}

fn parse_java_version(release: &str) -> Option<u32> {
    let version = release
        .lines()
        .find_map(|line| line.strip_prefix("JAVA_VERSION=\""))?;
    version.split(['.', '"', '-']).next()?.parse().ok()
}

fn python_is_there() -> bool {
    let python = command::find("python3").unwrap_or_else(|| PathBuf::from("python3"));
    command::output(Command::new(python).args(["-c", "import ensurepip, venv"])).is_some()
}

fn is_root() -> bool {
    crate::machine::effective_user() == Some(0)
}

#[cfg(test)]
mod tests {
    use super::{Need, REQUIREMENTS, by_hand, parse_java_version};

    #[test]
    fn the_java_version_is_its_first_number() {
        assert_eq!(
            parse_java_version("IMPLEMENTOR=\"Debian\"\nJAVA_VERSION=\"17.0.15\"\n"),
            Some(17)
        );
        assert_eq!(parse_java_version("JAVA_VERSION=\"1.8.0_402\"\n"), Some(1));
        assert_eq!(parse_java_version("JAVA_VERSION=\"24-ea\"\n"), Some(24));
        assert_eq!(parse_java_version(""), None);
    }

    #[test]
    fn the_names_follow_the_versions_that_are_looked_for() {
        let build: Vec<_> = REQUIREMENTS
            .iter()
            .filter(|requirement| requirement.needs.contains(&Need::Build))
            .collect();
        let commands = by_hand(&build);
        for word in [
            format!("llvm-{}-dev", crate::linker::LLVM),
            crate::linker::install_by_hand(),
        ] {
            assert!(commands.contains(&word), "{word} is not in:\n{commands}");
        }
        for name in [
            format!("cargo-fuzz {}", crate::fuzz::VERSION),
            format!("Go, 1.{} or newer", crate::kubernetes::GO_MINOR),
        ] {
            let mut names = REQUIREMENTS.iter().map(|requirement| requirement.name);
            assert!(names.any(|known| known == name), "{name}");
        }
    }
}
